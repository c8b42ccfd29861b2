"""Generation: does a model without its tail fall into loops?

Question: do continuations repeat themselves if the tail is removed, more than if as many random directions
are removed, and already at 5 %? (Cancedda 2024, section 6.1, shows samples but no numbers.)
Design: the first 32 tokens of each text are continued by 64 tokens, greedily and by sampling (temperature
0.7, the same noise for every filter). Phi removes the last 5, 10 or 20 %, Psi acts on the same bands, and
Omega removes as many bands just above the dark one. The filters act at the exit below the strongest sink, on
all tokens of the prompt and the continuation. The measures by prompt are repeated n-grams, loops and their
onset. The NLL of the same texts under the untouched model is measured too, since a loop is easy to predict.
Control: the untouched model, and Rnd, which removes random subspaces of the rank that Phi removes.
"""

from typing import Any

import pandas as pd
import torch

import spectral_sinks as ss

PROMPT, NEW, TEMPERATURE = 32, 64, 0.7
DOSES = (0.05, 0.1, 0.2)
DRAWS = 2
"""Number of samples per prompt under each named filter. Each random subspace has one."""
MEASURES = ("rep_1", "rep_2", "rep_3", "seq_rep_4", "loops", "onset", "copied_4", "nll_untouched")
SHOWN = {
    "greedy": {
        "loops": "share of texts that loop",
        "onset": "tokens before the loop",
        "seq_rep_4": "seq-rep-4",
    },
    "sampled": {"loops": "share of texts that loop", "seq_rep_4": "seq-rep-4", "rep_1": "rep-1"},
}
JUDGED = (("greedy", "loops"), ("sampled", "seq_rep_4"))
"""The measures on which the verdict is based.

These two, the rule of the verdict, and rep-1 among the answers were chosen after a first run on the embedded
model. The temperature was lowered from 1, at which 4 texts hardly repeated anything under any filter. For
that model, the verdict is therefore exploratory. The table has every measure."""


def run(study: ss.experiments.Study) -> ss.experiments.Finding:
    # the site, and the prompts
    model = study.model
    mass = ss.attention_by_head(model, study.windows).groupby("layer")["attention"].mean()
    site = ss.Site("exit", max(int(mass.iloc[1:].idxmax()) - 1, 0))
    length = min(PROMPT, *(len(row) for row in study.windows.rows))
    prompts = torch.stack([row[:length] for row in study.windows.rows])
    new = NEW if model.context is None else min(NEW, model.context - length)

    # continuations under each filter; a random subspace is sampled once, a named filter several times
    tables, samples = [], []
    chosen = filters(study)
    named, random = ({key: f for key, f in chosen.items() if (key[0] == "Rnd") is of} for of in (False, True))
    for decoding, part, heat, draws in (
        ("greedy", chosen, 0.0, 1),
        ("sampled", named, TEMPERATURE, DRAWS),
        ("sampled", random, TEMPERATURE, 1),
    ):
        cells = {str(key): {} if f is None else {site: f} for key, f in part.items()}
        texts = ss.nll.generate_all(model, prompts, cells, new=new, temperature=heat, draws=draws)
        for (name, removed, seed), f in part.items():
            text = texts[str((name, removed, seed))]
            keys = {"filter": name, "removed": removed, "decoding": decoding, "seed": seed}
            keys |= {"rank": 0 if f is None else f.rank}
            rows = ss.nll.repetition(text, prompts)
            rows = rows.assign(nll_untouched=ss.nll.continuation_nll(model, prompts, text).flatten().numpy())
            distinct = ss.nll.distinct(text.flatten(0, 1).tolist(), 2)
            tables.append(rows.groupby("document", as_index=False).mean().assign(**keys, distinct_2=distinct))
            if seed == 0 and model.tokenizer is not None:
                words = [model.tokenizer.decode(ids) for ids in (prompts[0], text[0, 0])]
                samples.append(keys | dict(zip(("prompt", "text"), words, strict=True)))
    found = pd.concat(tables, ignore_index=True)
    table = summary(found)
    study.save(table.assign(site=str(site), new=new), "generation")
    study.save(pd.DataFrame(samples), "generation_samples")
    ss.figures.generation(table, study.figure("generation"), new)
    return ss.experiments.Finding(answers(table, found), verdict=judged(table))


def filters(study: ss.experiments.Study) -> dict[tuple[str, float, int], ss.Filter | None]:
    """Return the filters by name, share removed and seed; None stands for the untouched model."""
    u = study.unembedding
    chosen: dict[tuple[str, float, int], ss.Filter | None] = {("untouched", 0.0, 0): None}
    for dose in DOSES:
        kept = u.count - max(1, round(dose * u.count))
        phi = ss.phi(u, 1, kept)
        chosen["Phi", dose, 0] = phi
        chosen["Psi", dose, 0] = ss.psi(u, study.embedding, kept)
        chosen["Omega", dose, 0] = ss.omega(u, kept - 1)
        chosen |= {("Rnd", dose, seed): ss.rnd(u.d, phi.rank, seed) for seed in range(study.draws)}
    return chosen


def summary(found: pd.DataFrame) -> pd.DataFrame:
    """Summarise by filter, share removed, decoding and measure.

    Each row has the mean, the difference from the untouched model, and for Rnd the range of the draws.
    """
    rows: list[dict[str, Any]] = []
    for (decoding, name, removed), part in found.groupby(["decoding", "filter", "removed"], sort=False):
        base = found[(found["decoding"] == decoding) & (found["filter"] == "untouched")].set_index("document")
        keys = {"filter": name, "removed": removed, "decoding": decoding, "rank": int(part["rank"].iloc[0])}
        for measure in (*MEASURES, "distinct_2"):
            values = part.groupby("document")[measure].mean()
            row = keys | {"measure": measure, "mean": values.mean()}
            if measure in MEASURES:  # `distinct_2` is one number for all texts, so it has no interval
                row |= dict(zip(("low", "high"), ss.stats.mean_interval(values), strict=True))
                difference = values - base[measure]
                ends = zip(
                    ("difference_low", "difference_high"), ss.stats.mean_interval(difference), strict=True
                )
                row |= {"difference": difference.mean()} | dict(ends)
            if name == "Rnd":
                drawn = part.groupby("seed")[measure].mean()
                row |= {"least": drawn.min(), "most": drawn.max()}
            rows.append(row | {"n": len(values)})
    return pd.DataFrame(rows)


def answers(table: pd.DataFrame, found: pd.DataFrame) -> list[dict[str, Any]]:
    by = table.set_index(["measure", "decoding", "filter", "removed"])
    rows = []
    for decoding, measures in SHOWN.items():
        for measure, label in measures.items():
            base = by.loc[(measure, decoding, "untouched", 0.0), "mean"]
            for dose in DOSES:
                phi, random = (by.loc[(measure, decoding, name, dose)] for name in ("Phi", "Rnd"))
                ends = f"[{phi['difference_low']:+.3f}, {phi['difference_high']:+.3f}]"
                rows.append(
                    ss.experiments.answer(
                        f"{decoding}: {label}, last {100 * dose:.0f} % removed",
                        float(phi["mean"]),
                        f"untouched {base:.3f}, difference {phi['difference']:+.3f} {ends}, "
                        f"random: {random['least']:.3f} to {random['most']:.3f}",
                        (float(phi["low"]), float(phi["high"])),
                    )
                )
    greedy = found[found["decoding"] == "greedy"]
    looped, free = (greedy[greedy["loops"] == which]["nll_untouched"].mean() for which in (1, 0))
    rows.append(
        ss.experiments.answer(
            "untouched NLL of greedy texts that loop", float(looped), f"the others {free:.3f}"
        )
    )
    return rows


def judged(table: pd.DataFrame) -> str:
    """State the verdict at the lowest dose.

    It holds if both intervals lie above every random draw, and holds partly if a mean does. A mean counts
    only if the interval of its difference from the untouched model lies above zero.
    """
    by = table.set_index(["measure", "decoding", "filter", "removed"])
    sure, likely, words = [], [], []
    for decoding, measure in JUDGED:
        phi, random = (by.loc[(measure, decoding, name, DOSES[0])] for name in ("Phi", "Rnd"))
        likely.append(phi["mean"] > random["most"] and phi["difference_low"] > 0)
        sure.append(likely[-1] and phi["low"] > random["most"])
        words.append(
            f"{decoding} {measure} {phi['mean']:.3f} [{phi['low']:.3f}, {phi['high']:.3f}], "
            f"random up to {random['most']:.3f}"
        )
    verdict = "holds" if all(sure) else "holds partly" if any(likely) else "does not hold here"
    return f"{verdict}: at {100 * DOSES[0]:.0f} %, {'; '.join(words)}"
