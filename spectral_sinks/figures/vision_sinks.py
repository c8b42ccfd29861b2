"""Figures of the attention sinks of images: how much each head attends to each kind of token, and where."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

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
    images: NDArray[np.generic],
    maps: Sequence[NDArray[np.floating]],
    titles: Sequence[str],
    uniform: float,
    path: Path,
) -> None:
    """Draw images, and below each the attention that its patches receive (alpha_k), with a row per layer or
    head.

    Args:
        images: `[images, 3, height, width]` on any scale; each is shown from its smallest to its largest
            value.
        maps: `[images, rows, columns]` for each title. Each row of maps has one scale, from 0 to its largest
            value, or to four times uniform if that is larger. A ring marks the largest patch of each image.
        titles: the title of each row of maps.
        uniform: the attention that each patch receives if attention is uniform.
        path: the PNG to write.

    """
    count = min(SHOWN, len(images))
    size = (1.25 * count + 1.1, 1.3 * (len(maps) + 1))
    with saved_figure(path, len(maps) + 1, count, size) as axes:
        for column in range(count):
            picture = np.moveaxis(np.asarray(images[column], dtype=float), 0, -1)
            low, high = picture.min(), picture.max()
            axes[0, column].imshow((picture - low) / max(high - low, 1e-12))
            for row, values in enumerate(maps, start=1):
                largest = max(float(values[:count].max()), 4 * uniform)
                here = values[column]
                axes[row, column].imshow(here, cmap="magma", vmin=0, vmax=largest)
                y, x = np.unravel_index(int(here.argmax()), here.shape)
                axes[row, column].plot(x, y, "o", markersize=9, markerfacecolor="none", color="#59c3e8")
        for axis in axes.flat:
            axis.set(xticks=[], yticks=[])
            for side in axis.spines.values():
                side.set_visible(False)
        axes[0, 0].set_ylabel("image", fontsize=8)
        aside = axes[0, 0].figure.colorbar(axes[0, 0].images[0], ax=list(axes[0]))
        aside.ax.set_visible(False)  # it keeps the row as wide as the rows below
        for row, title in enumerate(titles, start=1):
            axes[row, 0].set_ylabel(title, fontsize=8)
            bar = axes[row, 0].figure.colorbar(axes[row, count - 1].images[0], ax=list(axes[row]))
            bar.ax.axhline(uniform, color="white", linewidth=1)
        axes[0, 0].figure.suptitle(
            f"attention that each patch receives; line on the scale: uniform, {uniform:.4f}", fontsize=8
        )
