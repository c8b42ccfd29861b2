"""Vision bands: the output of an image encoder when bands of its residual stream are kept or removed.

Question: does the dark tail matter for an image encoder as it does for a language model, and in which part of
the spectrum do [CLS], registers, patches and outlier patches have their energy?
Design: the spectrum is that of the classifier head, or of any named matrix. At the exit of one layer at a
time, and for all tokens, bands 1 to k are kept, and each band is removed. If the head has fewer rows than the
width of the residual stream, it has a null space, in which the boundaries of the last bands are arbitrary. In
that case, the subspace that the head reads and the null space are removed as a whole, too. The norm of each
class of tokens and its share of energy by band are measured by layer. Outlier patches, if there are any, are
found by the robust rule at the layer with most of them.
Control: random subspaces of the same rank, and random subspaces that remove the same energy.

    python experiments/vision/bands.py --model runs/vit/model --images FOLDER --out results
    python experiments/vision/bands.py --model facebook/dinov2-small-imagenet1k-1-layer --images FOLDER \
        --out results
"""

import json
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
import tyro
from tqdm import tqdm

import spectral_sinks as ss

DIGITS, PROBED = "%.5g", 6
"""Number format of the tables; and the number of images per class from which on a linear probe is fitted.

The probe is fitted on half of the images."""


@dataclass(frozen=True)
class Options:
    """Options: the model, the images, and the spectrum."""

    model: str
    """Folder or id of an image encoder."""
    images: Path
    """Folder of images, one folder per class."""
    out: Path
    """Folder for tables and figures."""
    matrix: str = "classifier"
    """Matrix of the spectrum: "classifier" (the head), "embedding", or the name of a parameter."""
    convention: Literal["raw", "folded", "centred"] = "raw"
    bands: int = 20
    names: Path | None = None
    """File that lists the names of the images inside the folder, such as the held-out images."""
    limit: int = 200
    """Maximum number of images, taken from each class in turn."""
    layers: tuple[int, ...] = ()
    """Layers whose exits are filtered; by default all of them."""
    draws: int = 20
    """Number of random subspaces of each kind."""
    batch: int = 50
    label: str = "vision_bands"
    """Start of the file names."""


def read(options: Options) -> ss.Images:
    """Read the images, taken from each class in turn."""
    if options.names is None:
        return ss.images(options.images, limit=options.limit)
    listed: dict[str, list[str]] = {}
    for name in options.names.read_text().splitlines():
        listed.setdefault(str(Path(name).parent), []).append(name)
    turns = zip_longest(*listed.values())
    chosen = [name for turn in turns for name in turn if name is not None][: options.limit]
    labels = [str(Path(name).parent) for name in chosen]
    return ss.images([options.images / name for name in chosen], labels=labels)


def token_spectra(
    model: ss.VisionModel, pixels: ss.Pixels, spectrum: ss.Spectrum, batch: int
) -> pd.DataFrame:
    """Return energy shares by class of token, layer and band, and median norms, as means over images."""
    found = ss.outliers(model, pixels, batch_size=batch)
    marked = None
    if found.strongest is not None:
        marked = torch.zeros(len(pixels), pixels.length, dtype=torch.bool)
        marked[:, len(model.prefix) :] = torch.from_numpy(found.member[:, found.strongest + 1].copy())
    table = ss.energy(model, pixels, spectrum, marked=marked, batch_size=batch)
    table["position_class"] = table["position_class"].replace("marked", "outlier patches")
    keys = ["position_class", "layer", "band"]
    shares = table.groupby(keys, sort=False, as_index=False)["share"].mean().rename(columns={"share": "mean"})
    norms = table.groupby(keys, sort=False, as_index=False)["norm"].mean()
    return shares.merge(norms)


def main(options: Options) -> dict[str, Any]:
    """Measure the bands, write tables and figures, and return the record."""
    # the effect of filters at each exit, and the energy of the tokens by band
    options.out.mkdir(parents=True, exist_ok=True)
    model = ss.load_vision(options.model)
    pixels = ss.pixels(read(options), model)
    spectrum = ss.read_spectrum(model, options.matrix, convention=options.convention, bands=options.bands)
    probe = None
    if pixels.labels is not None and int(pixels.labels.unique(return_counts=True)[1].min()) >= PROBED:
        probe = "patches" if model.cls is None else "cls"
    parts = [
        ss.sweeps.image_ladder(
            model,
            pixels,
            ss.Site("exit", layer),
            spectrum,
            probe=probe,
            draws=options.draws,
            batch_size=options.batch,
        )
        for layer in tqdm(options.layers or range(model.layers), "layers")
    ]
    table = pd.concat(parts, ignore_index=True)
    tokens = token_spectra(model, pixels, spectrum, options.batch)
    read_bands = None
    if spectrum.rank < spectrum.d:
        read_bands = next(band for band, edge in enumerate(spectrum.edges) if edge >= spectrum.rank)

    def path(name: str) -> Path:
        return options.out / f"{options.label}{name}"

    # tables, record and figures
    tails = table["filter"].isin(["dark", "read", "unread"])
    ladder = table[~tails].dropna(axis="columns", how="all")
    untouched = ladder[(ladder["filter"] == "keep") & (ladder["band"] == spectrum.count)]
    wanted = ("kl", "accuracy", "cls_cosine", "patches_cosine")
    shown = [name for name in wanted if name in set(table["quantity"])]
    ladder[ladder["quantity"].isin(shown)].to_csv(path(".csv"), index=False, float_format=DIGITS)
    table[tails].drop(columns="band").to_csv(path("_summary.csv"), index=False, float_format=DIGITS)
    tokens.to_csv(path("_tokens.csv"), index=False, float_format=DIGITS)
    record = {
        "model": model.name,
        "spectrum": repr(spectrum),
        "rank": spectrum.rank,
        "d": spectrum.d,
        "images": len(pixels),
        "outliers": ss.outliers(model, pixels, batch_size=options.batch).record(),
        "untouched": dict(untouched.drop_duplicates("quantity").set_index("quantity")["mean"]),
        "pixels": {key: value for key, value in pixels.record.items() if key != "source"},
    }
    path(".json").write_text(json.dumps(record, indent=1, default=str) + "\n")
    ss.figures.vision_bands(table, path(".png"), tuple(shown), read_bands)
    ss.figures.token_spectra(tokens, path("_tokens.png"), read_bands)
    return record


if __name__ == "__main__":
    print(json.dumps(main(tyro.cli(Options, description=__doc__)), indent=1, default=str))
