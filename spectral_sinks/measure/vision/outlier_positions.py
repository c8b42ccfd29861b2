"""Where outlier patches lie on images, and how similar they are to their neighbours."""

from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from numpy.typing import NDArray

from spectral_sinks.errors import InputError
from spectral_sinks.measure.vision.outlier_tokens import Outliers, border_distance, neighbour_cosines
from spectral_sinks.stats import mean_interval

COLUMNS = ["quantity", "control", "outliers", "others", "difference", "low", "high", "images"]


def outlier_places(found: Outliers, layer: int | None = None) -> pd.DataFrame:
    """Compare outliers with other patches in their similarity to neighbours and their distance to the border.

    Similarity is the cosine after the patch embedding. There is one row per `quantity` and `control`. The
    controls are "same image" (the other patches of the image), "same border distance" (those of them that are
    as far from the border), and "same place" (the same position in images where it is not an outlier).
    `outliers`, `others` and their `difference` are means over the `images` that have such a pair, and `low`
    to `high` is the interval of the difference. The table is empty without outliers at `layer`, by default
    the layer with most outliers. Raises InputError for a layer that the model does not have, and for images
    of several shapes.
    """
    border = border_distance(found.pixels.grid).ravel()
    layer = found.strongest if layer is None else layer
    if layer is None:
        return pd.DataFrame(columns=COLUMNS)
    if not -1 <= layer < found.norm.shape[1] - 1:
        raise InputError(f"layer {layer}: {found.model} has layers 0 to {found.norm.shape[1] - 2}, or -1")
    outlier = found.member[:, layer + 1]
    if not outlier.any():
        return pd.DataFrame(columns=COLUMNS)
    alike = np.stack([neighbour_cosines(found.pixels, image).ravel() for image in range(len(found.pixels))])
    far = np.broadcast_to(border, alike.shape).astype(np.float64)
    return pd.DataFrame(
        [
            _row("neighbour cosine", "same image", alike, same_image(alike, outlier), outlier),
            _row(
                "neighbour cosine", "same border distance", alike, same_ring(alike, outlier, border), outlier
            ),
            _row("neighbour cosine", "same place", alike, same_place(alike, outlier), outlier),
            _row("border distance", "same image", far, same_image(far, outlier), outlier),
        ],
        columns=COLUMNS,
    )


Values = Float[NDArray[np.float64], "images patches"]
Member = Bool[NDArray[np.bool_], "images patches"]


def same_image(value: Values, outlier: Member) -> Values:
    """Return the mean over the patches of each image that are not outliers, for each patch; NaN if none."""
    return np.broadcast_to(_mean(value, ~outlier, axis=1), value.shape)


def same_ring(value: Values, outlier: Member, border: NDArray[np.int64]) -> Values:
    """Return the mean over the image's patches that are not outliers and as far from the border."""
    found = np.empty(value.shape)
    for distance in np.unique(border):
        ring = border == distance
        found[:, ring] = _mean(value[:, ring], ~outlier[:, ring], axis=1)
    return found


def same_place(value: Values, outlier: Member) -> Values:
    """Return, for each position, the mean over the images in which it is not an outlier."""
    return np.broadcast_to(_mean(value, ~outlier, axis=0), value.shape)


def _mean(value: Values, member: Member, axis: int) -> NDArray[np.float64]:
    count = member.sum(axis, keepdims=True)
    total = np.where(member, value, 0.0).sum(axis, keepdims=True)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _row(quantity: str, control: str, value: Values, other: Values, outlier: Member) -> dict[str, Any]:
    """Return one row: means over outliers that have a partner, within each image and then over images."""
    paired = outlier & np.isfinite(other)
    image = paired.any(1)
    own, its = (_mean(np.nan_to_num(x), paired, axis=1)[image, 0] for x in (value, other))
    low, high = mean_interval(own - its)
    means = (float(x.mean()) if image.any() else float("nan") for x in (own, its, own - its))
    return dict(zip(COLUMNS, (quantity, control, *means, low, high, int(image.sum())), strict=True))
