"""Figures of bands kept and removed in an image encoder, and of the energy of its tokens by band."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.colors import LogNorm
from matplotlib.ticker import MaxNLocator

from spectral_sinks.figures.style import STYLES, mean_line, saved_figure

LABELS = {
    "accuracy": "accuracy",
    "kl": "KL from untouched\n(nats)",
    "top1_agreement": "same class as untouched",
    "cls_cosine": "[CLS], cosine\nto untouched",
    "patches_cosine": "patches, cosine\nto untouched",
    "registers_cosine": "registers, cosine\nto untouched",
    "cls_nearest": "[CLS], same\nnearest image",
    "patches_nearest": "mean patch, same\nnearest image",
    "probe_accuracy": "accuracy of a\nlinear probe",
}

TAILS: dict[str, tuple[str, str]] = {
    "dark": ("last band", "o"),
    "read": ("all that is read", "s"),
    "unread": ("all that is not read", "^"),
}


def vision_bands(
    table: pd.DataFrame, path: Path, quantities: tuple[str, ...], rank: int | None = None
) -> None:
    """Draw quantities against bands kept and removed by exit, and the removal of the tail beside random
    draws.

    `table` is the result of `image_ladder` for several exits. `rank` is the number of bands in which the
    matrix reads. Bands beyond it are cut from its null space, which is shaded.
    """
    layers = sorted(table["layer"].unique().tolist())
    shown = layers if len(layers) <= 4 else [layers[round(i)] for i in np.linspace(0, len(layers) - 1, 4)]
    size = (2.0 * (len(shown) + 1.6), 1.75 * len(quantities) + 0.5)
    widths = [1.0] * len(shown) + [1.5]
    with saved_figure(path, len(quantities), len(shown) + 1, size, width_ratios=widths) as axes:
        for row, quantity in enumerate(quantities):
            part = table[table["quantity"] == quantity]
            for column, layer in enumerate(shown):
                axis = axes[row, column]
                here = part[part["layer"] == layer]
                for name, style in (("keep", STYLES["Phi"]), ("remove", STYLES["Psi"])):
                    line = here[here["filter"] == name].sort_values("band")
                    label = "bands 1 to k kept" if name == "keep" else "band k removed"
                    mean_line(axis, line["band"], line, label, style)
                if rank is not None:
                    axis.axvspan(
                        rank + 0.5,
                        here["band"].max() + 0.5,
                        color="#eeeeee",
                        linewidth=0,
                        zorder=0,
                        label="bands cut from the null space",
                    )
                if row == 0:
                    axis.set_title(f"exit of layer {layer}", fontsize=8)
                if row == len(quantities) - 1:
                    axis.set_xlabel("band k")
                axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
                _limits(axis, part)
            axes[row, 0].set_ylabel(LABELS.get(quantity, quantity))
            _beside_random(axes[row, -1], part, layers)
            if row == len(quantities) - 1:
                axes[row, -1].set_xlabel("exit of layer")
        axes[0, -1].set_title("removed, and random draws", fontsize=8)
        lines = [axes[0, 0].get_legend_handles_labels(), axes[0, -1].get_legend_handles_labels()]
        handles, labels = ([*a, *b] for a, b in zip(*lines, strict=True))
        axes[0, 0].figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=7)


def _beside_random(axis: Any, part: pd.DataFrame, layers: list[int]) -> None:
    """Draw the effect of removing the last band, the null space and the rest, and the range over random
    subspaces.
    """
    present = [name for name in TAILS if (part["filter"] == name).any()]
    for place, name in enumerate(present):
        label, marker = TAILS[name]
        line = part[part["filter"] == name].sort_values("layer")
        x = line["layer"] + (place - (len(present) - 1) / 2) * 0.28
        style = {"color": "#000000", "linestyle": "", "marker": marker, "zorder": 3}
        mean_line(axis, x, line, label, style)
        for control, colour, shift in (("rank", "#9a9a9a", -0.07), ("energy", "#5b9bd0", 0.07)):
            middle = line[f"{control}_mean"]
            ranges = (middle - line[f"{control}_least"], line[f"{control}_most"] - middle)
            label = None if place else f"random, same {control}: mean, range"
            axis.errorbar(
                x + shift, middle, ranges, color=colour, linestyle="", marker="_", markersize=7, label=label
            )
    axis.set_xticks(layers)
    _limits(axis, part)


def _limits(axis: Any, part: pd.DataFrame) -> None:
    """Shares and accuracies from 0 to 1, other quantities (KL) on a logarithmic scale about zero."""
    if part["quantity"].iloc[0] in ("kl", "delta_cross_entropy"):
        axis.set_yscale("symlog", linthresh=0.01)
        axis.set_ylim(bottom=-0.002)
    else:
        axis.set_ylim(min(-0.03, 1.05 * float(part["mean"].min())), 1.05)


def token_spectra(table: pd.DataFrame, path: Path, rank: int | None = None) -> None:
    """Draw the share of energy by band and layer, relative to an even spread, with a panel per class of
    tokens.

    `table` has one row per `position_class`, `layer` (-1: the embedding) and `band`, with the share in
    `mean`. The first `rank` bands are read, and the others lie in the null space.
    """
    kinds = list(dict.fromkeys(table["position_class"]))
    count = int(table["band"].max())
    with saved_figure(path, 1, len(kinds), (2.3 * len(kinds) + 0.9, 2.4), sharey=True) as axes:
        for axis, kind in zip(axes[0], kinds, strict=True):
            part = table[table["position_class"] == kind]
            grid = part.pivot(index="layer", columns="band", values="mean") * count
            axis.imshow(
                grid,
                cmap="Greys",
                norm=LogNorm(1 / count, count),
                aspect="auto",
                extent=(0.5, count + 0.5, grid.index.max() + 0.5, grid.index.min() - 0.5),
            )
            if rank is not None:
                axis.axvline(rank + 0.5, color="black", linewidth=0.8, linestyle=":")
            axis.set_title(kind, fontsize=8)
            axis.set_xlabel("band")
            axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            axis.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes[0, 0].set_ylabel("exit of layer (-1: embedding)")
        axes[0, 0].figure.colorbar(axes[0, 0].images[0], ax=list(axes[0]), label="energy / even spread")
