"""After fine-tuning: does a second sink appear if the first cannot be attended to?

Question: a model is trained further without its first key (`train_sinklet.py --start MODEL --softmax
no-first`). Does attention find another sink, and does the NLL recover from the loss of the first one?
Design: each model is measured with the first key visible and with it masked. The measures are the NLL on
held-out text, the sinks that `ss.find_sinks` finds, and the strongest position other than 0 among those with
half of the queries. Intervals are over seeds.
Control: plain fine-tuning for as many steps with the same seeds, and the model before fine-tuning.

    python experiments/tuned.py sinklet runs/tuned/*/model --out results
"""

import json
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import tyro
from tyro.conf import Positional

import spectral_sinks as ss


@dataclass(frozen=True)
class Options:
    """Options: the model before fine-tuning, and folders of models after it."""

    models: Positional[tuple[str, ...]]
    out: Path = Path("runs/tuned")
    text: str | None = None
    """Held-out text; by default the shipped corpus."""
    documents: int = 16


def measure(name: str, options: Options) -> list[dict[str, object]]:
    """Measure a model with the first key visible and with it masked, in two rows."""
    model = ss.load(name)
    recipe = Path(name) / "recipe.json"
    trained = json.loads(recipe.read_text()) if recipe.exists() else {"softmax": "before", "seed": 0}
    windows = ss.cut(ss.documents(options.text, limit=options.documents), model, per_document=1)
    spectrum, rows = ss.read_spectrum(model), []
    for masked in (False, True):
        with ss.attending(model, ss.attention.MaskKey(0)) if masked else nullcontext():
            found = ss.find_sinks(model, windows, spectrum)
            nll = ss.evaluate(model, windows, {}).nll
        alpha = found.attention.alpha.mean((0, 1, 2))[1 : found.length // 2 + 1]
        other = [sink for sink in found.sinks if sink.position != 0]
        rows.append(
            {
                "kind": {"no-first": "without the first key", "plain": "plain"}.get(
                    trained["softmax"], "before"
                ),
                "seed": trained["seed"],
                "first_key": "masked" if masked else "visible",
                "nll": nll,
                "sinks": len(found.sinks),
                "other_sinks": len(other),
                "first": float(found.attention.alpha[..., 0].mean()),
                "strongest_other": float(alpha.max()),
                "strongest_other_position": int(alpha.argmax()) + 1,
            }
        )
    return rows


def main(options: Options) -> None:
    table = pd.DataFrame([row for name in options.models for row in measure(name, options)])
    over = []
    for (kind, key), rows in table.groupby(["kind", "first_key"], sort=False):
        for column in ("nll", "other_sinks", "first", "strongest_other"):
            low, high = ss.stats.t_interval(rows[column])
            row = {"kind": kind, "first_key": key, "quantity": column, "mean": rows[column].mean()}
            over.append(row | {"low": low, "high": high, "seeds": len(rows)})
    runs = table.set_index(["kind", "first_key", "seed"])["nll"].sort_index()
    for name, first, second in (
        ("cost of no first key before", ("before", "masked"), ("before", "visible")),
        ("cost of no first key, tuned so", ("without the first key", "masked"), ("plain", "visible")),
        ("cost of no first key, tuned plain", ("plain", "masked"), ("plain", "visible")),
    ):
        if first in runs.index and second in runs.index:
            cost = (runs.loc[first] - runs.loc[second]).dropna()
            low, high = ss.stats.t_interval(cost)
            row = {"kind": name, "first_key": "both", "quantity": "nll difference", "mean": cost.mean()}
            over.append(row | {"low": low, "high": high, "seeds": len(cost)})
    options.out.mkdir(parents=True, exist_ok=True)
    for name, part in (("tuned", table), ("tuned_over_seeds", pd.DataFrame(over))):
        part.to_csv(options.out / f"{name}.csv", index=False, float_format="%.6g")
    ss.figures.tuned(table, options.out / "tuned.png")
    print(pd.DataFrame(over).round(4).to_string(index=False))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
