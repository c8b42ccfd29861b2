"""(f) Logit spectroscopy: how the next-token distribution builds up as bands are added, at every exit.

Question: which bands carry the prediction of the model, and does the dark band, which the vocabulary hardly
reads, add anything to it (Cancedda 2024, sections 2 and 3)?
Design: at the embedding and at every exit, the final norm and the unembedding read bands 1 to k of the
residual, and band k alone. The measures are the NLL of the next token, the KL divergence from the model's own
distribution, and the agreement of the most likely token. The norm keeps the scale of the whole residual, so
the contributions of the bands to a logit add up.
Control: random (Haar) bases, divided into as many bands, at half of the depth and at the last exit. Their
bands are alike, so any order will do.
"""

import pandas as pd

import spectral_sinks as ss

SCORES = ("nll", "kl", "top1")


def run(study: ss.experiments.Study) -> ss.experiments.Finding:
    # the lens by bands of the unembedding, and by bands of random bases at some numbers of bands
    model, windows, u = study.model, study.windows, study.unembedding
    count, last = u.count, model.layers - 1
    own = ss.residual.band_lens(model, windows, {"U": u}, predict=study.predict)
    compared = list(dict.fromkeys([max(0, last // 2), last]))
    steps = sorted({max(1, round(count * part)) for part in (0.25, 0.5, 0.75)} | {max(1, count - 1), count})
    random = pd.concat(
        ss.residual.band_lens(
            model,
            windows,
            {f"random {seed}": ss.spectra.random_spectrum(u.d, count, seed)},
            [ss.Site("exit", layer) for layer in compared],
            bands=steps,
            predict=study.predict,
        )
        for seed in range(study.draws)
    )
    keys = ["reading", "layer", "band"]
    table = pd.concat(ss.stats.summarise(own, keys, score).assign(score=score) for score in SCORES)
    draws = random.groupby(["basis", *keys], as_index=False)[list(SCORES)].mean()
    draws = draws.melt(["basis", *keys], list(SCORES), var_name="score")
    spread = draws.groupby([*keys, "score"], as_index=False)["value"].agg(["mean", "min", "max"])
    study.save(table, "lens")
    study.save(spread, "lens_random")
    ss.figures.lens(table, spread, study.figure("lens"))

    def at(frame: pd.DataFrame, reading: str, layer: int, band: int, by: str, score: str) -> pd.Series:
        rows = frame[(frame["reading"] == reading) & (frame["layer"] == layer) & (frame["band"] == band)]
        return rows.groupby(by)[score].mean()

    def random_range(values: pd.Series) -> str:
        return f"{study.draws} random bases: {values.min():.3f} to {values.max():.3f}"

    answers: list[dict[str, object]] = []
    for layer in range(-1, last + 1):
        nll = at(own, ss.residual.TOGETHER, layer, count, "document", "nll")
        place = "embedding" if layer < 0 else f"exit {layer}"
        answers.append(ss.experiments.answer(f"{place}: NLL of the logit lens, all bands", nll))
    for layer in compared:
        step = at(own, ss.residual.TOGETHER, layer, count - 1, "document", "nll") - at(
            own, ss.residual.TOGETHER, layer, count, "document", "nll"
        )
        other = at(random, ss.residual.TOGETHER, layer, count - 1, "basis", "nll") - at(
            random, ss.residual.TOGETHER, layer, count, "basis", "nll"
        )
        answers.append(
            ss.experiments.answer(
                f"exit {layer}: NLL that the last band takes off the lens", step, random_range(other)
            )
        )
    for band in (steps[1], count - 1):
        agree = at(own, ss.residual.TOGETHER, last, band, "document", "top1")
        other = at(random, ss.residual.TOGETHER, last, band, "basis", "top1")
        answers.append(
            ss.experiments.answer(
                f"exit {last}: top-1 agreement from bands 1 to {band}", agree, random_range(other)
            )
        )
    for band in (1, count):
        alone = at(own, ss.residual.ALONE, last, band, "document", "kl")
        other = at(random, ss.residual.ALONE, last, count, "basis", "kl")
        answers.append(
            ss.experiments.answer(f"exit {last}: KL from band {band} alone", alone, random_range(other))
        )
    return ss.experiments.Finding(answers)
