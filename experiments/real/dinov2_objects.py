"""Object discovery with a real DINOv2 ViT-S/14, with and without a test-time register.

Question: does LOST find the object of a picture by what the last layer holds, and does a test-time register,
which takes over what the outlier patches hold, help it?
Design: two sets of pictures with boxes. The photographs have boxes drawn by hand (`object_boxes.csv`). The
composites are pictures of CIFAR-10, enlarged and put at a random place of a texture, so that their box is
known. LOST reads keys, queries, values and the exit of the last layer. The register neurons are those of
`dinov2.py`, from the same first pictures.
Control: the method on patches in random positions, a centred box of the average size, the whole picture; as a
register, as many random neurons of the same layers.

    python experiments/real/dinov2_objects.py --photographs photographs --objects cifar10_test.tar
"""

import json
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import torch
import tyro
from dinov2 import NAME, mean_of, record, save, strongest
from dinov2 import Options as Study
from fetch import fetch
from image_study import in_tar, read_pictures
from numpy.typing import NDArray
from PIL import Image

import spectral_sinks as ss

Features = Literal["keys", "queries", "values", "exit"]
BOXES = Path(__file__).with_name("object_boxes.csv")


@dataclass(frozen=True)
class Options:
    """Options of a run."""

    photographs: Path | None = None
    """Folder with the photographs for which there are boxes."""
    objects: Path | None = None
    """Tar file of small pictures of objects, CIFAR-10."""
    model: Path | None = None
    """Folder of an encoder; by default DINOv2 ViT-S/14, fetched if need be."""
    fetched: Path = Path("models")
    out: Path = Path("results/real/dinov2-small")
    textures: tuple[str, ...] = ("grass.png", "gravel.png", "brick.png")
    """Photographs on which the objects are put."""
    boxes: Path = BOXES
    count: int = 100
    """Number of composites."""
    size: int = 224
    """Side of the picture in pixels."""
    shares: tuple[float, float] = (0.2, 0.5)
    """Smallest and largest side of an object over that of the picture."""
    register_pictures: int = 8
    """The register neurons are found on this many pictures."""
    draws: int = 3
    """Number of random sets of neurons."""
    seed: int = 0


def composites(options: Options, textures: list[Image.Image]) -> tuple[ss.Images, dict[str, NDArray[Any]]]:
    """Put each object on a texture, in a random size and place; return the pictures and their boxes."""
    if options.objects is None:
        raise ss.InputError("no objects are given: name a tar file of small pictures, --objects cifar10.tar")
    random = np.random.default_rng(options.seed)
    made: list[Image.Image] = []
    boxes: list[NDArray[Any]] = []
    for place, small in enumerate(in_tar(options.objects, options.count)):
        picture = textures[place % len(textures)].resize((options.size, options.size))
        side = round(options.size * random.uniform(*options.shares))
        x, y = (int(at) for at in random.integers(0, options.size - side + 1, 2))
        picture.paste(small.resize((side, side), Image.Resampling.BICUBIC), (x, y))
        made.append(picture)
        boxes.append(np.array([[x, y, x + side, y + side]], dtype=float))
    read = ss.images(made)
    return read, dict(zip(read.names, boxes, strict=True))


def photographs(options: Options) -> tuple[ss.Images, dict[str, NDArray[Any]], list[Image.Image]]:
    """Return the photographs with boxes, their boxes, and the textures."""
    if options.photographs is None:
        raise ss.InputError("no photographs are given: name their folder, --photographs FOLDER")
    boxes = ss.vision.read_boxes(options.boxes)
    files = [options.photographs / name for name in (*boxes, *options.textures)]
    if missing := [file.name for file in files if not file.is_file()]:
        raise ss.InputError(
            f"{options.photographs} lacks {', '.join(missing)}, which --boxes or --textures name"
        )
    # names as in the table of boxes
    read = ss.images(files[: len(boxes)])
    return read, boxes, [Image.open(file).convert("RGB") for file in files[len(boxes) :]]


def conditions(
    model: ss.VisionModel, neurons: list[tuple[int, int]], draws: int
) -> dict[str, list[tuple[int, int]]]:
    """Return the neurons whose work a register takes over, by condition; without any there is no register."""
    width = int(model.config.hidden_size * model.config.mlp_ratio)
    found: dict[str, list[tuple[int, int]]] = {"original": [], "register": neurons}
    for draw in range(draws):
        random = np.random.default_rng([1, draw])
        found[f"random {draw + 1}"] = []
        for layer in sorted({layer for layer, _ in neurons}):
            taken = [neuron for at, neuron in neurons if at == layer]
            rest = np.setdiff1d(np.arange(width), taken)
            drawn = random.choice(rest, len(taken), replace=False)
            found[f"random {draw + 1}"] += [(layer, int(neuron)) for neuron in drawn]
    return found


def study(
    model: ss.VisionModel,
    sets: dict[str, tuple[ss.Images, dict[str, NDArray[Any]]]],
    neurons: list[tuple[int, int]],
    options: Options,
) -> pd.DataFrame:
    """Return one row per set, features, condition and method: CorLoc, and its change from the original."""
    rows: list[pd.DataFrame] = []
    turns = list(product(get_args(Features), conditions(model, neurons, options.draws).items()))
    before: dict[tuple[str, str], NDArray[Any]] = {}
    began = time.monotonic()
    for place, (features, (condition, chosen)) in enumerate(turns):
        for name, (pictures, boxes) in sets.items():
            with ExitStack() as stack:
                if chosen:
                    stack.enter_context(ss.vision.install_registers(model, chosen))
                table = ss.vision.discover(
                    model,
                    pictures,
                    features=features,
                    boxes=boxes,
                    size=options.size,
                    seed=options.seed,
                    draws=20 if condition == "original" else 0,
                )
            found = ss.vision.corloc(table)
            own = table[table["method"] == f"LOST {features}"].sort_values("document")
            located = own["located"].to_numpy(dtype=float)
            if condition != "original":
                # controls without an encoder are the same under all conditions
                found = found[:1].assign(**mean_of("change", located - before[name, features]))
            before.setdefault((name, features), located)
            rows.append(found.assign(set=name, features=features, condition=condition))
        left = (time.monotonic() - began) / (place + 1) * (len(turns) - place - 1) / 60
        print(f"{place + 1} of {len(turns)}, about {left:.0f} minutes left", file=sys.stderr)
    table = pd.concat(rows)
    first = ["set", "features", "condition"]
    return table[first + [column for column in table if column not in first]]


def verdict(table: pd.DataFrame) -> str:
    """Say whether the register helps to find the objects more than random neurons do."""
    own = table[table["method"].str.startswith("LOST")]
    changed = own[own["condition"] == "register"]
    better = changed[changed["change_low"] > 0]
    said = ", ".join(f"{row.set} by {row.features}" for row in better.itertuples()) or "none"
    return f"{'holds partly' if len(better) else 'does not hold here'}: a register helps in: {said}"


def main(options: Options) -> None:
    torch.set_num_threads(1)
    read, boxes, textures = photographs(options)
    sets = {"photographs": (read, boxes), "composites": composites(options, textures)}
    model = ss.load_vision(options.model or fetch([NAME], options.fetched)[NAME])
    few = read_pictures([options.photographs or Path()], options.register_pictures)
    pixels = ss.pixels(few.images, model, size=options.size)
    measured = ss.outliers(model, pixels)
    layer, cutoff = strongest(measured)
    found = ss.vision.register_neurons(model, pixels, layer=layer, cutoff=cutoff, count=10, measured=measured)
    neurons = [(int(at), int(neuron)) for at, neuron in zip(found["layer"], found["neuron"], strict=True)]
    options.out.mkdir(parents=True, exist_ok=True)
    table = save(study(model, sets, neurons, options), options.out, "objects")
    done = record(model, few, Study(model=options.model))
    kept = ("model", "source", "fingerprint", "dtype", "versions")
    (options.out / "objects.json").write_text(
        json.dumps(
            {key: done[key] for key in kept}
            | {
                "pictures": {name: len(pictures) for name, (pictures, _) in sets.items()},
                "data_hash": {name: pictures.record["data_hash"] for name, (pictures, _) in sets.items()},
                "size": options.size,
                "shares": options.shares,
                "register_layer": layer,
                "neurons": neurons,
                "verdict": verdict(table),
            },
            indent=1,
        )
        + "\n"
    )


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except ss.InputError as error:
        print(error, file=sys.stderr)
        sys.exit(1)
