r"""Vision across: outlier tokens, sinks and registers in any list of image encoders, with one verdict each.

Question: which encoders have outlier tokens and attention sinks, which kinds of token are they, and do
registers take over their role (Darcet et al. 2024; Jiang et al. 2025)?
Design: outliers are found by `ss.outliers`, by the robust rule at every exit and by the published cut-off.
The largest norms of registers and of [CLS] are measured. Sinks are found by `ss.vision_sinks` by kind of
token, together with the share of attention that goes to sinks which write nothing. The verdict is "outliers"
if at some layer at least 1 patch in 1 000 is an outlier and the whole interval lies above 0, and "sink" if
some kind of token is a sink.
Control: the first checkpoint of a training run, or an untrained model, in the same list.

    python experiments/vision/across.py --images FOLDER --out results \
        --models runs/vit/{step-000000,model}
    python experiments/vision/across.py --images FOLDER --size 518 --out runs/across --models \
        facebook/dinov2-{small,base,large} facebook/dinov2-with-registers-{small,base,large}
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import tyro

import spectral_sinks as ss

FEWEST = 1e-3
"""Smallest share of outlier patches with which a model counts as having outliers [ours]."""


@dataclass(frozen=True)
class Options:
    """Options: the models, and the images."""

    models: tuple[str, ...]
    """Folders or hub ids."""
    images: Path
    """Folder of images, or a .txt list of files."""
    out: Path
    """Folder for the table."""
    size: int | None = None
    """Side of the square that images are resized to. By default the processor of each model resizes them."""
    limit: int = 200
    """Maximum number of images, taken from each class in turn."""
    batch: int = 16


def row_of(model: ss.VisionModel, pixels: ss.Pixels, batch: int) -> dict[str, Any]:
    """Measure one model, and return its row with outliers, sinks and verdict."""
    found = ss.outliers(model, pixels, batch_size=batch)
    published = ss.outliers(model, pixels, rule="published", batch_size=batch)
    shares = found.summary()
    peak = shares.loc[shares["share"].idxmax()]
    sinks = ss.vision_sinks(model, pixels, batch_size=batch)
    kinds = sinks.by_kind().set_index("kind")
    layers = sinks.by_layer()
    most = layers.loc[layers["no_op_mass"].idxmax()]
    outliers = peak["share"] >= FEWEST and peak["low"] > 0
    said = [name for name, holds in (("outliers", outliers), ("sink", bool(sinks.sinks))) if holds]
    return {
        "model": "/".join(Path(model.name).parts[-2:]),
        "patches": found.patches.shape[-1],
        "prefix": " ".join(model.prefix),
        "images": len(pixels),
        "outlier_share": peak["share"],
        "low": peak["low"],
        "high": peak["high"],
        "strongest_layer": found.strongest,
        "onset_layer": found.onset_layer,
        "published_share": published.member[:, -1].mean(),
        "largest_norm": (shares["largest"] / shares["median"]).max(),
        **{f"{name}_norm": shares[name].max() for name in ("cls", "reg1") if name in shares},
        "patch_sinks_per_image": sinks.patches()["per_image"].iloc[0],
        "patch_sink_rate": kinds.loc["patch", "any_rate"],
        **{
            f"{name}_sink_rate": kinds.loc[name, "sink_rate"]
            for name in ("cls", "reg1")
            if name in kinds.index
        },
        "sinks": " ".join(str(sink.token) for sink in sinks.sinks),
        "no_op_mass": most["no_op_mass"],
        "no_op_low": most["no_op_mass_low"],
        "no_op_high": most["no_op_mass_high"],
        "no_op_layer": most["layer"],
        "verdict": " and ".join(said) or "neither",
    }


def main(options: Options) -> pd.DataFrame:
    images = ss.images(options.images, limit=options.limit)
    rows: list[dict[str, Any]] = []
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.models:
        model = ss.load_vision(name)
        rows.append(row_of(model, ss.pixels(images, model, size=options.size), options.batch))
        table = pd.DataFrame(rows)
        table.to_csv(options.out / "vision_across.csv", index=False, float_format="%.5g")
        print(table.iloc[-1].to_string())
    return pd.DataFrame(rows)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
