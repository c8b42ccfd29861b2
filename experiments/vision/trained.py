"""Attention sinks, outlier tokens and the use of registers in a small image encoder trained from scratch.

Question: do tokens of high norm and attention sinks form in encoders of this size, when do they form in
training, and do registers take over their role?
Design: every checkpoint of runs of `train_vit.py` is measured on the held-out images of the run. The measures
are accuracy, the norms of patches, CLS and registers after each layer, the attention that the most attended
token of each kind receives, and its norm. Intervals are over images, so they hold for these weights and not
for other seeds.
Control: the untrained weights (step 0), uniform attention 1 / T, and the run with the same seed without
registers, paired by image.

    python experiments/vision/trained.py runs/vit/plain-0 runs/vit/random4-0 --images FOLDER --out results
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import tyro
from numpy.typing import NDArray
from tyro.conf import Positional

import spectral_sinks as ss

SINK = 0.3
"""Attention received above which a head counts as having a sink (Gu et al. 2025)."""


@dataclass(frozen=True)
class Options:
    """Options: the folders that `train_vit.py` wrote, and the images that it read."""

    runs: Positional[tuple[Path, ...]]
    images: Path
    out: Path = Path("runs/vision_trained")
    limit: int | None = None
    """Maximum number of held-out images; by default all are read."""
    heads: int = 200
    """Number of images on which single heads are measured, after training."""
    batch_size: int = 128


@dataclass(frozen=True, eq=False)
class Seen:
    """The measurements of one checkpoint on the images."""

    run: str
    registers: int
    seed: int
    step: int
    outliers: ss.vision.Outliers
    """Norms of all tokens, and which patches are outliers."""
    right: NDArray[np.float64]
    """1 for each image that is classified correctly, otherwise 0."""
    alpha: NDArray[np.float64]
    """Attention received, mean over queries, `[images, layers, heads, tokens]`."""

    @cached_property
    def kinds(self) -> dict[str, slice]:
        """The positions of the tokens of each kind."""
        start = len(self.outliers.pixels.model.prefix)
        kinds = {"cls": slice(0, 1), "registers": slice(1, start), "patches": slice(start, None)}
        return {kind: places for kind, places in kinds.items() if kind != "registers" or self.registers}

    def top(self, kind: str) -> NDArray[np.float64]:
        """Return the attention to the most attended token of a kind, `[images, layers, heads]`."""
        return self.alpha[..., self.kinds[kind]].max(-1)

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield one row per layer (-1: the embedding) and kind of token."""
        found, (_, layers, _, tokens) = self.outliers, self.alpha.shape
        same = {"run": self.run, "registers": self.registers, "seed": self.seed, "step": self.step}
        for site in range(layers + 1):
            for kind, places in self.kinds.items():
                norm = found.norm[:, site, places]
                beyond = (norm > found.cutoff[site]).mean(1)
                largest, median = float(norm.max()), float(found.median[site])
                row = same | {"accuracy": self.right.mean(), "layer": site - 1, "kind": kind}
                row |= {"norm": norm.mean() / median, "largest": largest / median}
                row |= {"z": (largest - median) / found.spread[site]}
                row |= interval("outliers", beyond)
                yield row | (self.attended(site - 1, kind) if site else {}) | {"uniform": 1 / tokens}

    def attended(self, layer: int, kind: str) -> dict[str, Any]:
        """Return how much attention a layer gives to a kind of token.

        It is given for the most attended token of each image, for the most attended position over all images,
        and for all tokens of the kind together.
        """
        alpha, top = self.alpha[:, layer, :, self.kinds[kind]], self.top(kind)[:, layer]
        at = alpha.argmax(-1)  # by image and head
        entering = self.outliers.norm[:, layer, self.kinds[kind]] / self.outliers.median[layer]
        by_head = top.mean(0)
        return {
            **interval("top", top.mean(1)),
            "head": int(by_head.argmax()),
            "head_top": float(by_head.max()),
            "rate": float((top > SINK).mean()),
            "one_place": float(alpha.mean(0).max(-1).mean()),
            "mass": float(alpha.sum(-1).mean()),
            "top_norm": float(np.take_along_axis(entering, at, 1).mean()),
        }


def interval(name: str, values: NDArray[np.float64]) -> dict[str, float]:
    low, high = ss.stats.mean_interval(values)
    return {name: float(values.mean()), f"{name}_low": low, f"{name}_high": high}


def look(folder: Path, images: Any, batch_size: int, **about: Any) -> Seen:
    """Measure one checkpoint on the images."""
    model = ss.load_vision(folder)
    pixels = ss.pixels(images, model)
    assert pixels.labels is not None
    batches = [batch for _, batch in pixels.batches(batch_size)]
    classes = [ss.trace(model, x, {}, readout=lambda *_: model.logits().argmax(-1)) for x in batches]
    return Seen(
        outliers=ss.outliers(model, pixels, batch_size=batch_size),
        right=(torch.cat(classes) == pixels.labels).double().numpy(),
        alpha=ss.attention.attention_by_position(model, pixels, batch_size=batch_size).alpha,
        **about,
    )


def heads(seen: Seen, options: Options) -> pd.DataFrame:
    """Apply `ss.head_use` to CLS, each register, and the most attended patch of each image.

    Returns one row per image, head and token.
    """
    pixels = seen.outliers.pixels
    kept = range(0, len(pixels), -(-len(pixels) // options.heads))
    few = ss.pixels(torch.stack([pixels[place] for place in kept]), pixels.model)
    tables = [
        ss.head_use(pixels.model, few, token, batch_size=options.batch_size).assign(token=token)
        for token in (*pixels.model.prefix, "patch")
    ]
    return pd.concat(tables).assign(run=seen.run)


def written(use: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Yield the answers about how much the most attended tokens write."""
    for token, rows in use.groupby("token", sort=False):
        layer, head = rows.groupby(["layer", "head"])["attention"].mean().idxmax()
        here = rows[(rows["layer"] == layer) & (rows["head"] == head)]
        said = f"no-op at most 0.2, broadcast at least 0.5; attention {here['attention'].mean():.4f}"
        yield ss.experiments.answer(
            f"value of {token} over the mean value, head {layer}.{head}", here["value_ratio"], said
        )
        rate, counts = rows.groupby("document")["dormant"].mean(), rows["use"].value_counts()
        said = f"no-op {counts.get('no-op', 0)}, broadcast {counts.get('broadcast', 0)} of {len(rows)}"
        yield ss.experiments.answer(f"share of heads in which 0.9 of queries give 0.5 to {token}", rate, said)


def checkpoints(run: Path, options: Options) -> Iterator[Seen]:
    """Measure every checkpoint of a run, in the order of training."""
    recipe = json.loads((run / "recipe.json").read_text())
    names = (run / "heldout.txt").read_text().split("\n")[:-1]
    if options.limit is not None:
        names = names[:: max(1, len(names) // options.limit)][: options.limit]
    labels = [Path(name).parent.name for name in names]
    images = ss.images([options.images / name for name in names], labels=labels, broken="refuse")
    folders = {int(folder.name.removeprefix("step-")): folder for folder in run.glob("step-*")}
    for step, folder in sorted((folders | {recipe["steps"]: run / "model"}).items()):
        about = {"registers": recipe["registers"], "seed": recipe["seed"], "step": step}
        yield look(folder, images, options.batch_size, run=run.name, **about)


def answers(first: Seen, last: Seen) -> Iterator[dict[str, Any]]:
    """Yield the answers about the trained weights, compared with the untrained weights."""
    found, before = last.outliers, first.outliers
    classes, uniform = len(found.pixels.model.labels), 1 / last.alpha.shape[-1]
    yield ss.experiments.answer(
        "accuracy", last.right, f"chance {1 / classes:.3g}, untrained {first.right.mean():.3f}"
    )
    for layer in range(last.alpha.shape[1]):
        share, untrained = (o.member[:, layer + 1].mean(1) for o in (found, before))
        said = f"untrained {untrained.mean():.3g}"
        yield ss.experiments.answer(f"share of patches that are outliers after layer {layer}", share, said)
    for kind, places in last.kinds.items():
        norm, control = ((o.norm[..., places] / o.median[:, None]).max((0, 2))[1:] for o in (found, before))
        name = f"largest norm of {kind} after any layer ({norm.argmax()}), in medians of patches"
        yield ss.experiments.answer(name, float(norm.max()), f"untrained {control.max():.3g}")
    for kind, places in last.kinds.items():
        name, even = f"attention to the most attended of {kind}", f"uniform {uniform:.4f}, untrained"
        top, control = last.top(kind), first.top(kind)
        yield ss.experiments.answer(f"{name}, all heads", top.mean((1, 2)), f"{even} {control.mean():.4f}")
        at = np.unravel_index(top.mean(0).argmax(), top.shape[1:])
        said = f"{even} {control[:, *at].mean():.4f}"
        yield ss.experiments.answer(f"{name}, head {at[0]}.{at[1]}", top[:, *at], said)
        rate, said = (top > SINK).mean((1, 2)), f"untrained {(control > SINK).mean():.4f}"
        yield ss.experiments.answer(f"share of heads in which one of {kind} receives over {SINK}", rate, said)
        mass, control = (part.alpha[..., places].sum(-1).mean((1, 2)) for part in (last, first))
        said = f"uniform {uniform * last.alpha[..., places].shape[-1]:.4f}, untrained {control.mean():.4f}"
        yield ss.experiments.answer(f"attention to all of {kind}, all heads", mass, said)


def differences(plain: Seen, other: Seen) -> Iterator[dict[str, Any]]:
    """Yield the differences between runs with and without registers, paired by image."""
    said = f"{other.run} minus {plain.run}"
    yield ss.experiments.answer("accuracy, difference", other.right - plain.right, said)
    without, having = (part.outliers.member[:, 1:].mean((1, 2)) for part in (plain, other))
    yield ss.experiments.answer(
        "share of patches that are outliers after any layer, difference", having - without, said
    )
    for kind in plain.kinds:
        change = other.top(kind).mean((1, 2)) - plain.top(kind).mean((1, 2))
        yield ss.experiments.answer(f"attention to the most attended of {kind}, difference", change, said)


def main(options: Options) -> None:
    rows: list[dict[str, Any]] = []
    said: list[pd.DataFrame] = []
    uses: list[pd.DataFrame] = []
    last: dict[tuple[int, int], Seen] = {}
    for run in options.runs:
        seen = list(checkpoints(run, options))
        rows += [row for one in seen for row in one.rows()]
        uses.append(heads(seen[-1], options))
        found = [*answers(seen[0], seen[-1]), *written(uses[-1])]
        said.append(pd.DataFrame(found).assign(run=run.name))
        last[seen[-1].seed, seen[-1].registers] = seen[-1]
    for (seed, registers), seen in last.items():
        if registers and (seed, 0) in last:
            said.append(pd.DataFrame(differences(last[seed, 0], seen)).assign(run=seen.run))
    table = pd.DataFrame(rows)
    summary = pd.concat(said)[["run", "quantity", "value", "low", "high", "control"]]
    options.out.mkdir(parents=True, exist_ok=True)
    by = ["run", "token", "layer", "head"]
    use = pd.concat(uses).drop(columns=["document", "use"]).groupby(by, as_index=False, sort=False).mean()
    tables = {"": table, "_heads": use, "_summary": summary}
    for name, part in tables.items():
        part.to_csv(options.out / f"vision_trained{name}.csv", index=False, float_format="%.6g")
    ss.figures.vision_trained(table, options.out / "vision_trained.png")
    print(summary.round(4).to_string(index=False))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
