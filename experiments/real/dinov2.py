r"""The no-op circuit and the outliers of a real DINOv2 ViT-S/14.

Question: how much of its attention does each layer spend on a token that writes nothing, at which token, and
do its heads find that token by one or two modes whose query side is always on? Has it outlier patches, at
which layers and sizes, and do register neurons make them?
Design: one pass over each picture and size measures, by layer and head, the attention to [CLS], to the patch
that draws most in that layer, and to all tokens whose value writes little; the norm-weighted attention; the
value ratio; and the modes of each head's scores with their shares of the token's margin. The norms of all
tokens come from the same pass, and from fewer pictures at larger sizes.
Control: a random patch; random bases of the queries; for the patch that draws most, it is chosen by half of
the queries and measured with the others; random neurons in place of register neurons.

The pictures are given: folders, or tar files. They are resized to a square.

    python experiments/real/dinov2.py --images photographs cifar10_test.tar
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
import tyro
from fetch import expected, fetch
from image_study import KINDS, LIMITS, QUANTITIES, Pictures, measure, norms_of, read_pictures
from numpy.typing import NDArray
from torch import Tensor

import spectral_sinks as ss

NAME = "dinov2-small"
RULES = {"attention": 0.3, "value_ratio": 0.2, "top_two": 0.5, "always_on": 0.8, "rival": 0.5}
"""The conditions of `ss.circuits.Circuits.rule`; those on the value ratio and the rival are upper limits."""

Part = Literal["no_op", "norms", "registers"]


@dataclass(frozen=True)
class Options:
    """Options of a run."""

    images: tuple[Path, ...] = ()
    """Folders of pictures, or tar files of them; the first ones are taken first."""
    model: Path | None = None
    """Folder of an encoder; by default DINOv2 ViT-S/14, fetched if need be."""
    fetched: Path = Path("models")
    out: Path = Path("results/real/dinov2-small")
    work: Path = Path("runs/real/dinov2-small")
    """Folder for what was measured on each picture; a run that was cut off goes on from there."""
    only: tuple[Part, ...] = ("no_op", "norms", "registers")
    sizes: tuple[int, ...] = (224, 518)
    limits: tuple[int, ...] = (200, 200)
    """Number of pictures at each of these sizes."""
    larger: tuple[int, ...] = (770, 1036)
    """Sizes at which norms alone are measured."""
    few: tuple[int, ...] = (8, 4)
    """Number of pictures at each of these."""
    register_size: int = 224
    register_pictures: int = 24
    draws: int = 20
    """Number of random bases."""


def by_layer(found: dict[str, NDArray[Any]], size: int, sets: NDArray[Any]) -> pd.DataFrame:
    """Return the attention to each kind of token by layer, mean over heads, with intervals over pictures."""
    values, rows = found["values"], list[dict[str, Any]]()
    tokens = found["norms"].shape[-1]
    for chosen in ("all", *dict.fromkeys(sets)):
        here = np.full(len(sets), True) if chosen == "all" else sets == chosen
        for layer in range(values.shape[1]):
            for place, kind in enumerate(KINDS):
                row: dict[str, Any] = {"size": size, "set": chosen, "pictures": int(here.sum())}
                row |= {"layer": layer, "kind": kind, "uniform": 1 / tokens}
                for which, name in enumerate(QUANTITIES[:3]):
                    row |= mean_of(name, values[here, layer, place, :, which].mean(1))
                rows.append(row)
            rest = 1 - values[here, layer, :2, :, 0].sum(1).mean(1)
            row = {"size": size, "set": chosen, "pictures": int(here.sum()), "layer": layer, "kind": "rest"}
            rows.append(row | {"uniform": 1 - 2 / tokens} | mean_of("attention", rest))
    return pd.DataFrame(rows)


def nothing(found: dict[str, NDArray[Any]], size: int) -> pd.DataFrame:
    """Return the attention to all tokens whose value ratio is at most a limit, by layer."""
    rows: list[dict[str, Any]] = []
    for place, limit in enumerate(LIMITS):
        for layer in range(found["nothing"].shape[1]):
            row = {"size": size, "limit": limit, "layer": layer}
            row |= mean_of("attention", found["nothing"][:, layer, :, place].mean(1))
            rows.append(row | {"uniform": float(found["nothing tokens"][:, layer, :, place].mean())})
    return pd.DataFrame(rows)


def mean_of(name: str, values: NDArray[Any]) -> dict[str, float]:
    low, high = ss.stats.mean_interval(values)
    return {name: float(np.mean(values)), f"{name}_low": low, f"{name}_high": high}


def by_head(found: dict[str, NDArray[Any]], size: int, cls: int, draws: int) -> pd.DataFrame:
    """Return one row per head and kind of token: the quantities of the no-op rule, and what it lacks.

    Intervals are Student's, over pictures. `top_one` and `top_two` are shares of the mean margin.
    """
    count, layers, heads = found["queries"].shape[:3]
    tokens = found["norms"].shape[-1]
    rows: list[dict[str, Any]] = []
    for layer in range(layers):
        for place, kind in enumerate(KINDS[:2]):
            at = np.full(count, cls) if kind == "cls" else found["chosen"][:, layer]
            query, gap, own = (
                torch.from_numpy(found[f"{kind} {name}"][:, layer]) for name in ("query", "gap", "own query")
            )
            second = torch.from_numpy(found["queries"][:, layer]).double()
            second = (second - own[..., :, None] * own[..., None, :]) / (tokens - 1)
            keys = torch.from_numpy(found[f"{kind} keys"][:, layer].sum(0)) / count
            cross = torch.einsum("bhi,bhj->hij", query, gap) / count
            modes = ss.spectra.Modes.of(second.mean(0), keys)
            parts = modes.parts(cross)
            order = parts.argsort(-1, descending=True)[:, :1]
            lead = modes.take(order)
            margin = cross.diagonal(dim1=-2, dim2=-1).sum(-1)
            carried = parts.sort(-1, descending=True).values.cumsum(-1)
            share = carried / margin[:, None]
            drawn = random_shares(second.mean(0), cross, draws)
            side = torch.einsum("bhi,hi->bh", query, lead.query[..., 0])
            square = torch.einsum("bhij,hi,hj->bh", second, lead.query[..., 0], lead.query[..., 0])
            always = (side.square() / square).numpy()
            rival = rivals(found, layer, at, lead.key[..., 0])
            for head in range(heads):
                values = {
                    name: found["values"][:, layer, place, head, which]
                    for which, name in enumerate(QUANTITIES)
                } | {"always_on": always[:, head], "rival": rival[:, head]}
                row: dict[str, Any] = {"size": size, "layer": layer, "head": head, "kind": kind}
                for name, each in values.items():
                    low, high = ss.stats.t_interval(each)
                    row |= {name: float(each.mean()), f"{name}_low": low, f"{name}_high": high}
                row |= {"margin": float(margin[head])}
                row |= {"top_one": float(share[head, 0]), "top_two": float(share[head, 1])}
                row |= {"random_top_two": float(drawn[:, head].max())}
                half = (carried[head] < 0.5 * margin[head]).sum() + 1
                row["modes_needed"] = int(half) if margin[head] > 0 else 0
                row["lacking"] = ", ".join(name for name in RULES if misses(row, name))
                rows.append(row | {"circuit": not row["lacking"]})
    return pd.DataFrame(rows)


def misses(row: dict[str, Any], name: str) -> bool:
    """Whether a head does not meet one condition of the rule."""
    if name in ("value_ratio", "rival"):
        return row[name] > RULES[name]
    if name == "top_two":
        return row["margin"] <= 0 or row[name] < max(RULES[name], row["random_top_two"])
    return row[name] < RULES[name]


def random_shares(queries: Tensor, cross: Tensor, draws: int) -> NDArray[np.float64]:
    """Return the share of the margin in the leading two members of random bases, `[draws, heads]`.

    The bases are orthonormal for the whitened queries, as the query sides of the modes are.
    """
    values, vectors = torch.linalg.eigh(queries)
    kept = values.clamp_min(1e-12 * float(values.max()))
    root = vectors * kept.sqrt()[:, None] @ vectors.mT
    inverse = vectors * kept.rsqrt()[:, None] @ vectors.mT
    whole = cross.diagonal(dim1=-2, dim2=-1).sum(-1)
    found: list[Tensor] = []
    for seed in range(draws):
        normal = torch.randn(queries.shape[1:], generator=torch.Generator().manual_seed(seed)).double()
        basis = torch.linalg.qr(normal).Q
        parts = (basis * (inverse @ cross @ root @ basis)).sum(-2)
        found.append(parts.sort(-1, descending=True).values[:, :2].sum(-1) / whole)
    return torch.stack(found).numpy()


def rivals(found: dict[str, NDArray[Any]], layer: int, at: NDArray[Any], side: Tensor) -> NDArray[np.float64]:
    """Return the largest key side on another key over that on the token, for the pictures with kept keys."""
    keys = torch.from_numpy(found["all keys"][:, layer]).double()
    count, _, tokens = keys.shape[:3]
    every, here = torch.arange(count), torch.from_numpy(np.asarray(at[:count]))
    sink = keys[every, :, here]
    mean = (keys.sum(2) - sink) / (tokens - 1)
    read = ((keys - mean[:, :, None]) * side[None, :, None]).sum(-1)
    own = read[every, :, here]
    signed = read * own.sign()[..., None]
    signed[every, :, here] = -torch.inf
    return (signed.amax(-1) / own.abs()).numpy()


def norm_rows(norms: NDArray[np.float64], size: int, model: ss.VisionModel) -> list[dict[str, Any]]:
    """Return the norms of patches by exit (-1: the embedding), and the outliers by the robust rule.

    The rule is that of `ss.outliers`: over ten robust deviations above the median, and twice the median.
    """
    patches = norms[..., len(model.prefix) :]
    rows: list[dict[str, Any]] = []
    for site in range(norms.shape[1]):
        here = patches[:, site]
        median = float(np.median(here))
        spread = 1.4826 * float(np.median(np.abs(here - median)))
        cut = max(median + 10 * spread, 2 * median)
        share = (here > cut).mean(1)
        row = {"size": size, "layer": site - 1, "pictures": len(norms), "median": median, "cutoff": cut}
        row |= {
            "largest_over_median": float(here.max() / median),
            "largest_z": float((here.max() - median) / spread),
        }
        row |= mean_of("outlier_share", share)
        row |= {"with_outliers": int((share > 0).sum()), "unseen": 1 - 0.05 ** (1 / len(norms))}
        row |= {"cls_over_median": float(norms[:, site, model.cls].mean() / median)}
        rows.append(row)
    return rows


def larger_norms(
    model: ss.VisionModel, pictures: Pictures, size: int, count: int, work: Path
) -> NDArray[Any]:
    """Measure norms alone, of the first pictures."""
    file = work / f"norms-{size}-{count}.npy"
    if not file.exists():
        work.mkdir(parents=True, exist_ok=True)
        pixels = ss.pixels(pictures.first(count), model, size=size)
        began = time.monotonic()
        held: list[NDArray[Any]] = []
        for place in range(len(pixels)):
            held.append(norms_of(model, pixels[place][None]))
            each = (time.monotonic() - began) / (place + 1)
            left = each * (len(pixels) - place - 1) / 60
            print(
                f"{size} pixels: {place + 1} of {len(pixels)}, about {left:.0f} minutes left", file=sys.stderr
            )
        np.save(file, np.concatenate(held))
    return np.load(file)


def strongest(found: ss.vision.Outliers) -> tuple[int, float | None]:
    """Return the layer whose outliers name the register neurons, and the norm above which a patch counts.

    It is the exit with most outliers by the robust rule, which has no such norm (None). Without any, it is
    the layer whose largest norm is farthest above its median, and the norm is 0.8 of the largest.
    """
    share = found.member[:, 1:].mean((0, 2))
    if share.any():
        return int(share.argmax()), None
    layer = int((found.patches[:, 1:].max((0, 2)) / found.median[1:]).argmax())
    return layer, 0.8 * float(found.patches[:, layer + 1].max())


def registers(model: ss.VisionModel, pictures: Pictures, options: Options) -> pd.DataFrame:
    """Return what test-time registers change, with silenced and random neurons as controls."""
    pixels = ss.pixels(pictures.first(options.register_pictures), model, size=options.register_size)
    found = ss.outliers(model, pixels)
    layer, cutoff = strongest(found)
    neurons = ss.vision.register_neurons(model, pixels, layer=layer, cutoff=cutoff, count=10, measured=found)
    table = ss.vision.register_repair(
        model, pixels, list(zip(neurons["layer"], neurons["neuron"], strict=True)), layer=layer, draws=3,
        measured=found,
    )  # fmt: skip
    kept = table[(table["layer"].isna()) | (table["layer"] == layer)]
    return kept.assign(
        size=options.register_size, outlier_layer=layer, outliers=neurons.attrs["outliers"],
        rule="robust" if cutoff is None else f"norm above {cutoff:.3g}",
    )  # fmt: skip


def record(model: ss.VisionModel, pictures: Pictures, options: Options) -> dict[str, Any]:
    """Return everything on which the results depend."""
    names = list(dict.fromkeys(pictures.sets))
    return {
        "model": "DINOv2 ViT-S/14, out of a saliency model" if options.model is None else model.name,
        "source": expected(NAME) if options.model is None else None,
        "fingerprint": model.fingerprint[:16],
        "dtype": str(model.dtype),
        "pictures": {name: pictures.sets.count(name) for name in names},
        "data_hash": pictures.images.record["data_hash"],
        "resized": "to a square, whatever the shape of the picture",
        "sizes": dict(zip(map(str, options.sizes), options.limits, strict=True)),
        "larger": dict(zip(map(str, options.larger), options.few, strict=True)),
        "registers": {"size": options.register_size, "pictures": options.register_pictures},
        "random_bases": options.draws,
        "versions": ss.sweeps.versions(),
    }


def save(table: pd.DataFrame, out: Path, name: str) -> pd.DataFrame:
    table.to_csv(out / f"{name}.csv", index=False, float_format="%.5g")
    return table


def verdict(layers: pd.DataFrame, heads: pd.DataFrame) -> str:
    """Say how much of each layer's attention the tokens draw, and which heads have a no-op circuit."""
    said: list[str] = []
    for size, part in heads.groupby("size"):
        found = part[part["circuit"]]
        names = ", ".join(f"{row.layer}.{row.head} ({row.kind})" for row in found.itertuples()) or "none"
        mass = layers[(layers["size"] == size) & (layers["set"] == "all")]
        top = mass[mass["kind"].isin(["cls", "patch"])].sort_values("attention").iloc[-1]
        said.append(
            f"at {size} pixels the most attended token is {top['kind']} in layer {top['layer']} "
            f"({top['attention']:.3f}); heads with a no-op circuit by the rule: {names}"
        )
    some = bool(heads["circuit"].any())
    return f"{'holds partly' if some else 'does not hold here'}: {'; '.join(said)}"


def main(options: Options) -> None:
    if not options.images:
        raise ss.InputError(
            "no pictures are given, and none ship with this project: name folders or tar files of at least "
            "200, --images FOLDER"
        )
    if len(options.limits) != len(options.sizes) or len(options.few) != len(options.larger):
        raise ss.InputError("give one of --limits for each of --sizes, and one of --few for each of --larger")
    torch.set_num_threads(1)
    pictures = read_pictures(options.images, max(*options.limits, *options.few, options.register_pictures))
    folder = options.model or fetch([NAME], options.fetched)[NAME]
    model = ss.load_vision(folder)
    options.out.mkdir(parents=True, exist_ok=True)
    done = record(model, pictures, options)
    norms: list[dict[str, Any]] = []
    parts: dict[str, list[pd.DataFrame]] = {"layers": [], "nothing": [], "heads": []}
    if {"no_op", "norms"} & set(options.only):
        for size, count in zip(options.sizes, options.limits, strict=True):
            found = measure(model, pictures, size, options.work, count=count)
            sets = np.array(pictures.sets[:count])
            norms += norm_rows(found["norms"], size, model)
            if "no_op" in options.only:
                parts["layers"].append(by_layer(found, size, sets))
                parts["nothing"].append(nothing(found, size))
                parts["heads"].append(by_head(found, size, int(model.cls or 0), options.draws))
    if "no_op" in options.only:
        tables = {name: save(pd.concat(part), options.out, name) for name, part in parts.items()}
        ss.figures.no_op_attention(tables["layers"], tables["heads"], options.out / "no_op.png")
        done["verdict"] = verdict(tables["layers"], tables["heads"])
    if "norms" in options.only:
        for size, count in zip(options.larger, options.few, strict=True):
            norms += norm_rows(larger_norms(model, pictures, size, count, options.work), size, model)
        save(pd.DataFrame(norms), options.out, "norms")
    if "registers" in options.only:
        save(registers(model, pictures, options), options.out, "registers")
    (options.out / "dinov2.json").write_text(json.dumps(done, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except ss.InputError as error:
        print(error, file=sys.stderr)
        sys.exit(1)
