"""Figures of the attention sinks of images: how much each head attends to each kind of token, and where."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from spectral_sinks.figures.overlays import Maps, lay_over, overlay_figure, patch_frame, scale_below
from spectral_sinks.figures.style import saved_figure

SHOWN = 8
"""Largest number of images in a figure of maps."""


def vision_sinks(heads: pd.DataFrame, path: Path) -> None:
    """Draw the attention to each kind of token by layer and head, as a mean over images, with a panel per
    kind.

    `heads`: layer, head, kind, mass, uniform. A kind of token that no image has is left out.
    """
    means = heads.groupby(["kind", "layer", "head"], sort=False)[["mass", "uniform"]].mean().reset_index()
    kinds = [kind for kind in means["kind"].unique() if means.loc[means["kind"] == kind, "uniform"].any()]
    shape = means["layer"].nunique(), means["head"].nunique()
    columns = min(4, len(kinds))
    rows = -(-len(kinds) // columns)
    size = (columns * max(2.2, 0.16 * shape[1] + 0.8) + 0.8, rows * max(2.2, 0.16 * shape[0] + 0.9))
    with saved_figure(path, rows, columns, size) as axes:
        for axis, kind in zip(axes.flat, kinds, strict=False):
            part = means[means["kind"] == kind]
            grid = part.pivot(index="layer", columns="head", values="mass")
            axis.imshow(grid, cmap="Greys", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
            axis.set_title(f"{kind} (uniform {part['uniform'].mean():.3f})", fontsize=8)
            ticks = (range(0, n, max(1, n // 6)) for n in shape)
            axis.set(xlabel="head", ylabel="layer", yticks=next(ticks), xticks=next(ticks))
        for axis in axes.flat[len(kinds) :]:
            axis.set_axis_off()
        axes[0, 0].figure.colorbar(
            axes[0, 0].images[0], ax=list(axes.flat), label="attention, mean over queries"
        )


def attention_maps(
    images: Sequence[Any] | NDArray[np.generic],
    maps: Sequence[Maps],
    titles: Sequence[str],
    uniform: float,
    path: Path,
) -> None:
    """Draw one row per image: the image, and over it the attention that its patches receive (alpha_k).

    Args:
        images: PIL images, or an array `[images, 3, height, width]` on any scale; each is shown from its
            smallest to its largest value.
        maps: for each title, such as a layer or head, a map `[rows, columns]` of each image. Maps of one
            title have one scale, from 0 to their largest value, or to four times uniform if that is larger. A
            ring marks the largest patch of each image.
        titles: the title of each column of maps.
        uniform: the attention that each patch receives if attention is uniform.
        path: the PNG to write.

    """
    shown = list(images)[:SHOWN]
    with overlay_figure(path, shown, len(maps) + 1) as axes:
        for place, (title, column) in enumerate(zip(titles, maps, strict=True), start=1):
            top = max(4 * uniform, *(float(np.max(values)) for values, _ in zip(column, shown, strict=False)))
            drawn: Any = None
            for row, picture in enumerate(shown):
                axis, values = axes[row, place], np.asarray(column[row])
                drawn = lay_over(axis, picture, values, top)
                y, x = np.unravel_index(int(values.argmax()), values.shape)
                left, upper, width, height = patch_frame(axis, values.shape, int(y), int(x))
                centre = left + width / 2, upper + height / 2
                axis.plot(*centre, "o", markersize=9, markerfacecolor="none", color="#59c3e8")
            axes[0, place].set_title(title, fontsize=8)
            scale_below(axes[:, place], drawn, "attention").ax.axvline(uniform, color="white", linewidth=1)
        axes[0, 0].figure.suptitle(
            "attention that each patch receives; a ring marks the largest patch\n"
            f"white line on the scale: uniform attention, {uniform:.4f}",
            fontsize=8,
        )
