"""Bigram-Backcopy in three layers: does Adam cause the peak of the residual norm at BOS (Guo et al. 2024)?

Question: the paper finds that three layers trained by Adam give BOS a large norm at the middle exits, that
SGD keeps the sink without the peak, and that ReLU attention has neither. Do the tools find this?
Design: `train_backcopy.py` trains the architecture of the paper on its kind of task. The models are narrower
and the batches smaller, with the same product of learning rate and steps (3). The models are trained by
AdamW, by SGD, and by AdamW with ReLU attention, with three seeds each. Every checkpoint is measured on
held-out text. The rule for a peak was set beforehand: the largest ratio of the norm of BOS to the median norm
of the other tokens, over all exits except the last, is above 2 and above the ratio at the last exit.
Intervals are over seeds (Student's t).
Control: the untrained weights (step 0), and a comparison of the three kinds of training.

    python experiments/training/backcopy.py --out results   # trains what `--runs` lacks, 6 minutes a model
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import train_backcopy
import tyro
from torch import Tensor

import spectral_sinks as ss

KINDS: dict[str, dict[str, Any]] = {
    "AdamW": {},
    "SGD": {"optimiser": "sgd"},
    "ReLU attention": {"attention": "relu"},
}
PEAK = 2.0
SINK = 0.3
"""Attention from other tokens above which a layer has a sink (Gu et al. 2025)."""

EXIT = "exit {}"


@dataclass(frozen=True)
class Options:
    """Options: the models, and the folders for models and tables."""

    runs: Path = Path("runs/backcopy")
    out: Path = Path("runs/backcopy")
    seeds: tuple[int, ...] = (1, 2, 3)
    kinds: tuple[str, ...] = tuple(KINDS)
    steps: int = 3000
    checkpoints: tuple[int, ...] = (0, 250, 500, 1000, 2000)
    width: int = 128
    windows: int = 64
    """Number of held-out windows."""


def recipe(options: Options, kind: str, seed: int) -> train_backcopy.Recipe:
    """Return the recipe that repeats the training of the paper at this size."""
    return train_backcopy.Recipe(
        out=options.runs / f"{kind.split()[0].lower()}-{seed}",
        architecture="gpt2",
        layers=3,
        schedule="constant",
        width=options.width,
        triggers=0.3,
        batch=32,
        steps=options.steps,
        seed=seed,
        checkpoints=options.checkpoints,
        **KINDS[kind],
    )


def checkpoints(made: train_backcopy.Recipe) -> Iterator[tuple[int, Path]]:
    """Yield the steps and folders of the checkpoints, with the trained model last."""
    for step in made.checkpoints:
        yield step, made.out / f"step-{step:06d}"
    yield made.steps, made.out


def measure(folder: Path, made: train_backcopy.Recipe, windows: int) -> list[dict[str, Any]]:
    """Return one row per site: the norms at the site, and how the layer that ends there treats BOS."""
    model, moves = ss.load(folder), train_backcopy.chain(made)
    draw = torch.Generator().manual_seed(made.seed + 2**20)
    ids = train_backcopy.text(moves, windows, made.window, draw)
    held = ss.Windows.of_ids(list(ids), model)
    with warnings.catch_warnings():  # about the null space, and about rows of ReLU that do not sum to 1
        warnings.simplefilter("ignore", ss.SpectralWarning)
        spectrum = ss.read_spectrum(model)
        found = ss.find_sinks(model, held, spectrum, draws=3)
    use = None if model.own_attention else ss.head_use(model, held).groupby("layer")
    bos = next((sink for sink in found.sinks if sink.position == 0), None)
    norm, losses = found.residuals.norm, train_backcopy.evaluate(model.module, made)
    sites = [ss.Site("embedding"), *(ss.Site("exit", layer) for layer in range(model.layers))]
    to_bos, shares = ss.trace(
        model, ids, {}, sites, attention=True,
        readout=lambda _, read, maps: (attended(maps, ids), [spectrum.null().share(read[s]) for s in sites]),
    )  # fmt: skip
    rows: list[dict[str, Any]] = []
    for site, unread in enumerate(shares):
        mine, others = float(norm[:, site, 0].mean()), float(np.median(norm[:, site, 1:]))
        row = {"site": EXIT.format(site - 1) if site else "embedding", "bos": mine, "others": others}
        row |= {"ratio": mine / others, "sink": bos is not None, "onset": bos and bos.onset_layer}
        row |= {"norm_onset": bos and bos.norm_onset, "norm_erasure": bos and bos.norm_erasure} | losses
        row |= {"unread": float(unread[:, 0].mean()), "unread_of_others": float(unread[:, 1:].mean())}
        if site:
            row |= to_bos[site - 1]
            row |= {"sink_rate": float((found.attention.alpha[:, site - 1, :, 0] > found.epsilon).mean())}
        if site and use is not None:
            here = use.get_group(site - 1)
            row |= {"value_ratio": here["value_ratio"].mean(), "dormant": here["dormant"].mean()}
        rows.append(row)
    return rows


def attended(maps: list[Tensor], ids: Tensor) -> list[dict[str, float]]:
    """Return the mean attention to BOS by layer.

    It is given for queries from position 2 on that are not triggers, for triggers, and for BOS itself.
    """
    triggers = train_backcopy.is_trigger(ids)[:, 2:]
    to_bos = [layer[:, 0, :, 0] for layer in maps]
    return [
        {
            "attention": float(layer[:, 2:][~triggers].mean()),
            "attention_of_triggers": float(layer[:, 2:][triggers].mean()),
            "attention_of_bos": float(
                layer[:, 0].mean()
            ),  # 1, except under ReLU, where weights are unbounded
        }
        for layer in to_bos
    ]


def peaks(ratios: Sequence[float]) -> bool:
    """Test whether the norm ratios of BOS at the exits, first to last, have a peak by the rule above."""
    middle = max(ratios[:-1])
    return middle > PEAK and middle > ratios[-1]


def by_run(table: pd.DataFrame) -> pd.DataFrame:
    """Return one row per trained model: its largest ratio at a middle exit, and its strongest sink."""
    rows: list[dict[str, Any]] = []
    for (kind, seed), run in table.groupby(["kind", "seed"], sort=False):
        exits = run[(run["step"] == run["step"].max()) & (run["site"] != "embedding")].reset_index()
        ratios, first = exits["ratio"].tolist(), exits.iloc[0]
        strongest = exits.loc[exits["attention"].idxmax()]
        rows.append(
            {
                "kind": kind,
                "seed": seed,
                "peak": float(peaks(ratios)),
                "sink": float(strongest["attention"] > SINK),
                "called a sink by find_sinks": float(first["sink"]),
                "ratio at a middle exit, largest": max(ratios[:-1]),
                "ratio at the last exit": ratios[-1],
                "norm of BOS, exit 0": first["bos"],
                "norm of others, exit 0": first["others"],
                "share of BOS that the vocabulary does not read, exit 0": first["unread"],
                "the same of others": first["unread_of_others"],
                "attention to BOS, layer with most": strongest["attention"],
                "attention to BOS by triggers, same layer": strongest["attention_of_triggers"],
                "value of BOS over the mean, least in a layer with the sink": exits.loc[
                    exits["sink_rate"] > 0.5, "value_ratio"
                ].min(),
                "attention of BOS to itself, layer with most": exits["attention_of_bos"].max(),
                "NLL after triggers": first["nll_after_triggers"],
                "excess NLL elsewhere": first["excess_nll_elsewhere"],
            }
        )
    return pd.DataFrame(rows)


def over_seeds(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the mean and interval of every quantity by kind of training."""
    rows: list[dict[str, Any]] = []
    for kind, part in runs.groupby("kind", sort=False):
        for quantity in part.columns.drop(["kind", "seed"]):
            values = part[quantity]
            low, high = ss.stats.t_interval(values)
            row = {"kind": kind, "quantity": quantity, "mean": values.mean(), "low": low, "high": high}
            rows.append(row | {"least": values.min(), "most": values.max(), "seeds": len(values)})
    return pd.DataFrame(rows)


def verdict(runs: pd.DataFrame) -> str:
    """State which of the three findings of the paper every seed shows; `runs` has kind, peak and sink."""
    share = runs.groupby("kind")[["peak", "sink"]].mean()
    claims = {
        "AdamW grows the peak and has the sink": share.loc["AdamW", ["peak", "sink"]].eq(1).all(),
        "SGD has the sink without the peak": share.loc["SGD", "sink"] == 1 and share.loc["SGD", "peak"] == 0,
        "ReLU attention has neither": share.loc["ReLU attention", ["peak", "sink"]].eq(0).all(),
    }
    held = [claim for claim, holds in claims.items() if holds]
    word = "holds" if len(held) == len(claims) else "holds partly" if held else "does not hold here"
    return f"{word}: {'; '.join(held) or 'none of the three findings in every seed'}"


def main(options: Options) -> None:
    rows: list[dict[str, Any]] = []
    for kind in options.kinds:
        for seed in options.seeds:
            made = recipe(options, kind, seed)
            if not train_backcopy.finished(made):
                train_backcopy.main(made)
            for step, folder in checkpoints(made):
                about = {"kind": kind, "seed": seed, "step": step}
                rows += [about | row for row in measure(folder, made, options.windows)]
    table = pd.DataFrame(rows)
    runs = by_run(table)
    summary = over_seeds(runs)
    options.out.mkdir(parents=True, exist_ok=True)
    for name, part in (("backcopy", table), ("backcopy_summary", summary)):
        part.to_csv(options.out / f"{name}.csv", index=False, float_format="%.6g")
    ss.figures.backcopy(table, PEAK, options.out / "backcopy.png")
    print(summary.round(3).to_string(index=False))
    if set(options.kinds) == set(KINDS):
        print(verdict(runs))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
