"""Object discovery with an image encoder, compared with boxes that do not depend on the image."""

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from spectral_sinks.data.images import Images
from spectral_sinks.data.pixels import Shape, pixels
from spectral_sinks.errors import InputError, SpectralWarning
from spectral_sinks.interventions.sites import Site
from spectral_sinks.interventions.tracing import Interventions
from spectral_sinks.measure.vision.boxes import COLUMNS, OVERLAP, Boxes, overlap, read_boxes
from spectral_sinks.measure.vision.localization import Discovery, correlations, dino_seg, expand
from spectral_sinks.measure.vision.patch_features import Features, patch_values
from spectral_sinks.models.vision import VisionModel

DRAWS = 20
"""Number of shuffles of each image's patches."""


def discover(
    model: VisionModel,
    images: Images | Sequence[Any] | Float[Tensor, "images channels height width"],
    *,
    features: Features = "keys",
    layer: int | None = None,
    boxes: str | Path | Boxes | None = None,
    interventions: Interventions | None = None,
    size: int | None = None,
    shape: Shape = "square",
    bias: float = 0.0,
    draws: int = DRAWS,
    seed: int = 0,
    batch_size: int | None = None,
) -> pd.DataFrame:
    """Find the box of one object in each image, and control boxes where boxes are given to compare with.

    The method is LOST on `features` of the patches, or DINO-seg with `features="attention"`. Each picture is
    resized as a whole, so that no border is lost.

    The controls are "shuffled", the method on patches in random positions, `draws` times; "centred", a
    centred box of the average size of the given ones, as shares of the picture; and "whole", the whole image.
    `corloc` summarises the table.

    Args:
        model: an image encoder.
        images: the images.
        features: what LOST compares: "keys", "queries" or "values" for the outputs of that projection, before
            any rotation, or "exit" for the residual after the layer. "attention" is DINO-seg on the attention
            of [CLS] to the patches, mean over heads.
        layer: the layer; the last by default.
        boxes: boxes of `read_boxes`, or a file or folder of them.
        interventions: the edit at each site.
        size: side of the square in pixels; that of the model by default.
        shape: "square", or "own" for pictures that keep their shape, as in `pixels`.
        bias: added to every correlation, as in `lost`.
        draws: number of shuffles of each image's patches.
        seed: of the shuffles.
        batch_size: images in a pass.

    Returns:
        One row per image and method: `document`, `name`, `method`, `draw`; the box `x0`, `y0`, `x1`, `y1` and
        the centre of the seed patch `seed_x`, `seed_y`, in pixels of the picture; `share`, the share of
        patches that belong to the object; `found`, whether the object is some of the patches and not all;
        and, where boxes are given, `iou` with the best of them and `located` (iou above 0.5).

    Raises:
        InputError: for features that the model does not have, a layer that does not exist, boxes that match
            no image or lie outside of their image, and as `pixels` and `lost` do.

    """
    if features not in get_args(Features):
        raise InputError(f"features {features!r}: choose from {', '.join(get_args(Features))}")
    if features == "attention" and model.cls is None:
        raise InputError(f"{model.name} has no [CLS] token, whose attention DINO-seg reads: use 'keys'")
    if draws < 0:
        raise InputError(f"{draws} draws: give 0 or more")
    layer = model.layers - 1 if layer is None else layer
    Site("exit", layer).check(model)
    model.require_weights("object discovery")
    if not isinstance(images, Tensor) and (size := size or model.image_size) is None:
        raise InputError(f"{model.name} does not say what size of image it was made for: give size")
    read = pixels(cast(Any, images), model, size=size, shape=shape)
    names = list(getattr(images, "names", map(str, range(len(read)))))
    boxes = read_boxes(boxes) if isinstance(boxes, str | Path) else boxes
    # Boxes of each image, or None
    given = None if boxes is None else _matched(boxes, names)
    method = "DINO-seg" if features == "attention" else f"LOST {features}"
    rows: list[dict[str, Any]] = []
    shown: list[tuple[int, int]] = []
    seen = patch_values(model, read, features, layer, interventions or {}, batch_size)
    # The method itself on each image, and on shuffled patches where there are boxes to compare with
    for place, values in tqdm(seen, method, len(read), unit="image", leave=False, disable=None):
        shown.append(_size(read.images[place]))
        if given is not None:
            _check(given[place], names[place], shown[place])
        find = _finder(values, bias)
        patches = values.shape[0] * values.shape[1]
        turns = [(method, 0, np.arange(patches))]
        if given is not None and given[place] is not None:
            random = np.random.default_rng([seed, place])
            turns += [("shuffled", draw, random.permutation(patches)) for draw in range(draws)]
        for name, draw, order in turns:
            what = _row(find(order), model.patch_size, _size(read[place]), shown[place])
            rows.append({"document": place, "name": names[place], "method": name, "draw": draw} | what)
    if given is not None:
        rows += _blind(given, names, shown)
    table = pd.DataFrame(rows)
    table["iou"] = np.nan if given is None else _best(table, given)
    table["found"] = table["found"].astype("boolean")
    table["located"] = (table["iou"] > OVERLAP).astype("boolean").mask(table["iou"].isna())
    return table


def _finder(values: Tensor, bias: float) -> Callable[[NDArray[np.int64]], Discovery]:
    """Return a function that finds the object when patch `order[i]` stands at position i."""
    grid = (values.shape[0], values.shape[1])
    if values.ndim == 2:
        flat = values.flatten().numpy()
        return lambda order: dino_seg(flat[order].reshape(grid))
    products = correlations(values, bias)
    return lambda order: expand(products[np.ix_(order, order)], grid)


def _row(found: Discovery, patch_size: int, read: tuple[int, int], shown: tuple[int, int]) -> dict[str, Any]:
    y, x = ((found.seed[axis] + 0.5) * patch_size * shown[axis] / read[axis] for axis in (0, 1))
    box = found.in_pixels(patch_size, read, shown)
    row: dict[str, Any] = dict(zip(COLUMNS, box, strict=True))
    return row | {"seed_x": x, "seed_y": y, "share": float(found.mask.mean()), "found": found.found}


def _blind(
    given: Sequence[NDArray[Any] | None], names: Sequence[str], shown: Sequence[tuple[int, int]]
) -> list[dict[str, Any]]:
    """Return the rows of the controls that do not depend on the image."""
    sides = [
        (boxes[:, 2:] - boxes[:, :2]) / [width, height]
        for boxes, (height, width) in zip(given, shown, strict=True)
        if boxes is not None
    ]
    rows: list[dict[str, Any]] = []
    for method, side in (("centred", np.concatenate(sides).mean(0)), ("whole", np.ones(2))):
        for place, (height, width) in enumerate(shown):
            if given[place] is not None:
                box = np.concatenate([0.5 - side / 2, 0.5 + side / 2]) * [width, height, width, height]
                row = {"document": place, "name": names[place], "method": method, "draw": 0}
                rows.append(row | dict(zip(COLUMNS, box, strict=True)))
    return rows


def _best(table: pd.DataFrame, given: Sequence[NDArray[Any] | None]) -> list[float]:
    """Return the overlap of each row's box with the best of the given boxes."""
    found: list[float] = []
    for place, box in zip(table["document"], table[list(COLUMNS)].to_numpy(dtype=float), strict=True):
        boxes = given[place]
        found.append(np.nan if boxes is None else float(overlap(box, boxes).max()))
    return found


def _check(boxes: NDArray[Any] | None, name: str, shown: tuple[int, int]) -> None:
    height, width = shown
    if boxes is None:
        return
    inside = (boxes[:, :2] >= 0) & (boxes[:, :2] < boxes[:, 2:]) & (boxes[:, 2:] <= [width, height])
    if not inside.all():
        raise InputError(
            f"the box {boxes[~inside.all(1)][0].tolist()} given for {name} is empty or lies outside of its "
            f"{width} x {height} pixels: boxes are x0, y0, x1, y1 in pixels of the upright picture"
        )


def _matched(boxes: Boxes, names: Sequence[str]) -> list[NDArray[Any] | None]:
    """Return the boxes of each image, matched by its name or else by the last part of it."""
    last = Counter(Path(name).name for name in names)
    found: list[NDArray[Any] | None] = []
    for name in names:
        short = Path(name).name
        known = boxes.get(name, boxes.get(short, ()) if last[short] == 1 else ())
        array = np.asarray(known, dtype=np.float64).reshape(-1, 4)
        found.append(array if len(array) else None)
    if without := [name for name, known in zip(names, found, strict=True) if known is None]:
        if len(without) == len(names):
            raise InputError(
                f"no boxes for any image: images are called {names[0]!r}, boxes {next(iter(boxes), None)!r}"
            )
        warnings.warn(
            f"{len(without)} of {len(names)} images have no boxes and do not count, such as {without[0]!r}",
            SpectralWarning,
            stacklevel=3,
        )
    return found


def _size(image: Any) -> tuple[int, int]:
    """Return height and width."""
    return (image.shape[-2], image.shape[-1]) if isinstance(image, Tensor) else (image.height, image.width)
