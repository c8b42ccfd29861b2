"""Figures of outlier tokens: norm maps of some images, and the share of outliers by layer."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from spectral_sinks.figures.style import FIRST, OTHER, STYLES, mean_line, saved_figure


def norm_maps(
    pictures: Sequence[Any], maps: Mapping[int, NDArray[Any]], cutoffs: Mapping[int, float], path: Path
) -> None:
    """Draw one row per picture: the picture, and the norms of its patches at some layers, with outliers
    framed.

    `pictures` are PIL images. `maps` has `[images, rows, columns]` by layer (-1: the embedding). `cutoffs`
    has the norm above which a patch of that layer is an outlier. Each layer has one scale for all pictures.
    """
    layers = list(maps)
    size = (1.5 * (len(layers) + 1), 1.5 * len(pictures) + 0.3)
    with saved_figure(path, len(pictures), len(layers) + 1, size) as axes:
        for axis in axes.flat:
            axis.set(xticks=[], yticks=[])
        for row, picture in enumerate(pictures):
            rows, columns = maps[layers[0]][row].shape
            axes[row, 0].imshow(np.asarray(picture), aspect="auto")
            axes[row, 0].set_box_aspect(rows / columns)
            for place, layer in enumerate(layers, start=1):
                values, axis = maps[layer][row], axes[row, place]
                axis.imshow(values, cmap="gray_r", vmin=0, vmax=float(maps[layer].max()))
                for y, x in np.argwhere(values > cutoffs[layer]):
                    axis.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor="#b5452c"))
        for place, layer in enumerate(layers, start=1):
            axes[0, place].set_title("embedding" if layer < 0 else f"layer {layer}")


def outlier_shares(shares: pd.DataFrame, prefix: Sequence[str], path: Path) -> None:
    """Draw the share of outliers among patches by layer, with its interval, and the norms of patches and
    prefix tokens.

    `shares` is the result of `Outliers.summary`, and `prefix` the names of the tokens whose norms it has.
    """
    with saved_figure(path, 1, 2, (7.5, 2.8)) as axes:
        axis = axes[0, 0]
        mean_line(axis, shares["layer"], shares.rename(columns={"share": "mean"}), "outliers", FIRST)
        axis.set(xlabel="layer (-1: the embedding)", ylabel="share of patches that are outliers")
        axis.set_ylim(bottom=0)
        axis = axes[0, 1]
        axis.plot(shares["layer"], shares["largest"] / shares["median"], label="largest patch", **FIRST)
        axis.plot(shares["layer"], shares["cutoff"] / shares["median"], label="cut-off", **STYLES["Rnd"])
        for place, name in enumerate(prefix):
            style = OTHER if place else STYLES["Psi"]
            label = name if place == 0 else "other prefix tokens" if place == 1 else None
            axis.plot(shares["layer"], shares[name], label=label, **style)
        axis.set(xlabel="layer (-1: the embedding)", ylabel="norm in medians of patches")
        axis.set_ylim(bottom=0)
        axis.legend()
        for axis in axes[0]:
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
