"""Swap: does the last band matter because of its information about the text, or because of the sink?

Question: if the removed component is replaced by that of the same position in another document, does the step
at the last 5 % disappear? Does it remain if only the first token is filtered (Cancedda 2024, Fig. 10, 11)?
Design: at every exit, the last step of the ladder (bands 1 to 19 kept against all 20) is measured with the
component zeroed or swapped, at all tokens, at the first alone and at all but the first. It is compared with
the step before it, and measured with only 70 % of the spectrum kept. The whole ladder is measured at the exit
below the strongest sink. There are two settings, with and without BOS. Without BOS, documents open with
different tokens, so the swap leaves out position 0. With BOS, swapping position 0 alone must change nothing.
Control: random subspaces of the rank of the last band, zeroed and swapped at the same tokens, at one exit per
setting.
"""

from dataclasses import replace
from typing import Any

import pandas as pd

import spectral_sinks as ss

WAYS: dict[str, dict[str, Any]] = {
    "zero": {"tokens": "all"},
    "swap": {"fill": ss.Swap(), "tokens": "all"},
    "zero, first token": {"tokens": "first"},
    "zero, all but first": {"tokens": "all-but-first"},
    "swap, all but first": {"fill": ss.Swap(), "tokens": "all-but-first"},
}
KEPT = (1, 4, 8, 12, 14, 16, 17, 18, 19)


def settings(study: ss.experiments.Study) -> dict[str, ss.experiments.Study]:
    """Return the study with BOS before each text (if the model has a BOS), and without."""
    model, bos = study.model, study.model.bos
    bare = [row[1:] if bos is not None and int(row[0]) == bos else row for row in study.windows.rows]
    rows = {"without BOS": bare}
    if bos is not None:
        opened = [[bos, *row.tolist()][: model.context] for row in bare]
        rows = {"with BOS": opened, "without BOS": bare}
    document = study.windows.document
    return {
        name: replace(study, windows=ss.Windows.of_ids(ids, model, document)) for name, ids in rows.items()
    }


def steps(
    study: ss.experiments.Study, layer: int, ways: list[str], random: bool
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Measure the cells of the ladder at one exit, and the steps that follow from them.

    Returns a table of the cells, and one of the steps with their intervals over documents.
    """
    u, site, n = study.unembedding, ss.Site("exit", layer), study.unembedding.count
    most = round(0.7 * n)
    cells = {}
    for way in ways:
        for k in KEPT if random else (most, n - 2, n - 1):
            cells[f"{way}|Phi|{k}"] = {site: replace(ss.phi(u, 1, k), **WAYS[way])}
        cells[f"{way}|Omega|{most}"] = {site: replace(ss.omega(u, most), **WAYS[way])}
        for seed in range(study.draws if random else 0):
            cells[f"{way}|random {seed}|{n - 1}"] = {
                site: replace(ss.rnd(u.d, u.dark().rank, seed), **WAYS[way])
            }
    effects = study.evaluate(cells, str(site))
    table = ss.sweeps.effect_table(effects).assign(layer=layer)
    table[["way", "filter", "kept"]] = [name.split("|") for name in table["name"]]
    delta = {name: effect.table.set_index("document")["delta_nll"] for name, effect in effects.items()}
    rows: list[dict[str, object]] = []
    for way in ways:
        last = delta[f"{way}|Phi|{n - 1}"]
        found = {
            "last step": last,
            "step before": delta[f"{way}|Phi|{n - 2}"] - last,
            "last minus before": 2 * last - delta[f"{way}|Phi|{n - 2}"],
            f"last band, {most} others kept": delta[f"{way}|Phi|{most}"] - delta[f"{way}|Omega|{most}"],
        }
        for step, values in found.items():
            low, high = ss.stats.mean_interval(values)
            p = ss.stats.sign_flip(values)
            rows.append(
                {"layer": layer, "way": way, "step": step, "mean": values.mean(), "low": low, "high": high}
                | {"zero": verdict(low, high), "p_sign_flip": p, "n": len(values)}
            )
    return table.drop(columns="name"), pd.DataFrame(rows)


def verdict(low: float, high: float) -> str:
    return "excludes 0" if low > 0 or high < 0 else "includes 0"


def run(study: ss.experiments.Study) -> ss.experiments.Finding:
    n = study.unembedding.count
    ladders, tests, answers, said = [], [], [], []
    for name, here in settings(study).items():
        # random subspaces and the whole ladder are measured at one exit, the others have the steps only
        swapped = "swap" if here.windows.opens_with_bos else "swap, all but first"
        ways = [way for way in WAYS if not way.startswith("swap") or way == swapped]
        layer = here.below_sink
        made = [steps(here, index, ways, index == layer) for index in range(study.model.layers)]
        ladder = pd.concat([cells for cells, _ in made]).assign(setting=name)
        test = pd.concat([rows for _, rows in made]).assign(setting=name)
        ladders.append(ladder)
        tests.append(test)
        draws = ladder[ladder["filter"].str.startswith("random")].groupby("way")["mean"]
        spread = draws.agg(["min", "max"])
        at = test[test["layer"] == layer].set_index(["step", "way"])
        said.append(f"{name}, exit {layer}: " + judged(at.loc["last step"], spread, swapped))
        for way in ways:
            row = at.loc[("last step", way)]
            random = f"{study.draws} random: {spread['min'][way]:+.4f} to {spread['max'][way]:+.4f}"
            answers.append(
                ss.experiments.answer(
                    f"{name}, exit {layer}: last step, {way}",
                    float(row["mean"]),
                    f"{row['zero']}; {random}",
                    (row["low"], row["high"]),
                )
            )
        for way in ("zero", swapped, "zero, first token"):
            row = at.loc[("last minus before", way)]
            answers.append(
                ss.experiments.answer(
                    f"{name}, exit {layer}: last step minus the one before, {way}",
                    float(row["mean"]),
                    row["zero"],
                    (row["low"], row["high"]),
                )
            )
            last = test[(test["step"] == "last step") & (test["way"] == way)]
            clear = (last["zero"] == "excludes 0") & (last["mean"] > 0)
            answers.append(
                ss.experiments.answer(
                    f"{name}: exits of {len(last)} where the last step, {way}, exceeds 0", int(clear.sum())
                )
            )
        if swapped == "swap":
            answers.append(idle(here, layer))
    ladder, test = pd.concat(ladders, ignore_index=True), pd.concat(tests, ignore_index=True)
    study.save(ladder, "swap")
    study.save(test, "swap_steps")
    ss.figures.swap(ladder, test, study.figure("swap"), n)
    return ss.experiments.Finding(answers, verdict="; ".join(said))


def judged(step: pd.DataFrame, spread: pd.DataFrame, swapped: str) -> str:
    """State the result of the test of the paper, which has two sides.

    Zeroing (all tokens, or the first alone) must cost more than every random subspace, and swapping must not.
    It holds fully only if the interval of the step under a swap includes 0.
    """
    beyond = step["mean"] > spread["max"].reindex(step.index)
    said = [f"{way} {step.loc[way, 'mean']:+.3f}" for way in ("zero", "zero, first token", swapped)]
    gone = step.loc[swapped, "low"] <= 0
    zero, first, swap = (bool(beyond[way]) for way in ("zero", "zero, first token", swapped))
    word = (
        "holds" if zero and first and gone else "holds partly" if zero and not swap else "does not hold here"
    )
    more = [way for way in step.index if beyond[way]]
    return f"{word} ({', '.join(said)} nats; beyond all random: {', '.join(more) or 'none'})"


def idle(study: ss.experiments.Study, layer: int) -> dict[str, object]:
    """Return the answer of the control of the swap, which swaps position 0 alone.

    Where all documents open with BOS, this must change nothing.
    """
    dark = ss.remove(study.unembedding.dark(), ss.Swap(), "first")
    effect = study.evaluate({"swap": {ss.Site("exit", layer): dark}})["swap"]
    largest = float(effect.table["delta_nll"].abs().max())
    return ss.experiments.answer(
        f"with BOS, exit {layer}: largest change by a swap of position 0 alone", largest
    )
