"""Maps of patches laid over the pictures that they belong to, at the pictures' own proportions."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spectral_sinks.figures.style import saved_figure

Maps = NDArray[Any] | Sequence[NDArray[Any]]
"""A map `[rows, columns]` for each picture."""

WIDTH = 1.9
"""Width of a picture in inches."""

OPAQUE = 0.7
"""How much of the picture's grey a map hides."""

NARROW, TALL = 0.35, 2.0
"""Smallest and largest height of a row, in widths of a picture."""


@contextmanager
def overlay_figure(path: Path, pictures: Sequence[Any], columns: int) -> Iterator[Any]:
    """Yield one row of axes for each picture, the first with the picture, and write the figure.

    The rows are as high as the pictures are, at one width.
    """
    shown = [as_picture(picture) for picture in pictures]
    heights = [min(max(picture.shape[0] / picture.shape[1], NARROW), TALL) for picture in shown]
    size = (WIDTH * columns, WIDTH * sum(heights) + 0.7)
    with saved_figure(path, len(shown), columns, size, gridspec_kw={"height_ratios": heights}) as axes:
        for axis in axes.flat:
            axis.set(xticks=[], yticks=[])
            for side in axis.spines.values():
                side.set_visible(False)
        for row, picture in enumerate(shown):
            axes[row, 0].imshow(picture)
        axes[0, 0].set_title("image", fontsize=8)
        yield axes


def lay_over(axis: Any, picture: Any, values: NDArray[Any], top: float) -> Any:
    """Draw a map `[rows, columns]` over a picture in grey, from 0 to `top`; return what a scale shows."""
    # without its whites and blacks, so that a bright picture does not look like a large value
    grey = 0.3 + 0.4 * as_picture(picture).mean(-1)
    height, width = grey.shape
    axis.imshow(grey, cmap="gray", vmin=0, vmax=1)
    return axis.imshow(
        values,
        cmap="magma",
        vmin=0,
        vmax=top,
        alpha=OPAQUE,
        extent=(-0.5, width - 0.5, height - 0.5, -0.5),
        interpolation="nearest",
    )


def patch_frame(
    axis: Any, shape: tuple[int, int], row: int, column: int
) -> tuple[float, float, float, float]:
    """Return left, top, width and height of a patch on axes that show a picture, for a grid of patches."""
    left, right = sorted(axis.get_xlim())
    upper, lower = sorted(axis.get_ylim())
    width, height = (right - left) / shape[1], (lower - upper) / shape[0]
    return left + column * width, upper + row * height, width, height


def scale_below(axes: Any, drawn: Any, label: str) -> Any:
    """Draw one scale below some axes, and return it."""
    bar = axes[0].figure.colorbar(drawn, ax=list(axes), location="bottom", shrink=0.9, aspect=25, pad=0.01)
    bar.set_alpha(1)
    bar.set_label(label, fontsize=7)
    bar.ax.tick_params(labelsize=6)
    bar.ax.locator_params(nbins=4)
    return bar


def as_picture(picture: Any) -> NDArray[np.float64]:
    """Return a picture as `[height, width, 3]` from 0 to 1.

    It is a PIL image, or an array with its channels first or last, which is shown from its smallest to its
    largest value.
    """
    values = np.asarray(picture, dtype=np.float64)
    if not isinstance(picture, np.ndarray):
        return values / 255
    if values.shape[0] in (1, 3) and values.shape[-1] not in (1, 3):
        values = np.moveaxis(values, 0, -1)
    low, high = values.min(), values.max()
    return np.broadcast_to((values - low) / (high - low or 1.0), (*values.shape[:2], 3))
