"""Figures of outlier tokens: norm maps of some images, and the share of outliers by layer."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from spectral_sinks.figures.overlays import Maps, lay_over, overlay_figure, patch_frame, scale_below
from spectral_sinks.figures.style import FIRST, OTHER, STYLES, mean_line, saved_figure


def norm_maps(
    pictures: Sequence[Any],
    maps: Mapping[int, Maps],
    cutoffs: Mapping[int, float],
    path: Path,
) -> None:
    """Draw one row per picture: the picture, and over it the norms of its patches at some layers.

    `pictures` are PIL images. `maps` has a map `[rows, columns]` of each picture by layer (-1: the
    embedding). `cutoffs` has the norm above which a patch of that layer is an outlier; these patches are
    framed. Each layer has one scale for all pictures.
    """
    layers = list(maps)
    with overlay_figure(path, pictures, len(layers) + 1) as axes:
        for place, layer in enumerate(layers, start=1):
            top = max(float(np.max(values)) for values in maps[layer])
            drawn: Any = None
            for row, picture in enumerate(pictures):
                axis, values = axes[row, place], np.asarray(maps[layer][row])
                drawn = lay_over(axis, picture, values, top)
                for y, x in np.argwhere(values > cutoffs[layer]):
                    left, upper, width, height = patch_frame(axis, values.shape, int(y), int(x))
                    frame = Rectangle((left, upper), width, height, fill=False, edgecolor="#59c3e8")
                    axis.add_patch(frame)
            axes[0, place].set_title("embedding" if layer < 0 else f"layer {layer}", fontsize=8)
            scale_below(axes[:, place], drawn, "norm of a patch")
        axes[0, 0].figure.suptitle("norms of patches; a frame marks an outlier", fontsize=8)


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
