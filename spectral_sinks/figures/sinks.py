"""Figure of the attention sinks of one model."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.colors import LogNorm
from matplotlib.ticker import MaxNLocator, ScalarFormatter

from spectral_sinks.figures.style import FIRST, saved_figure

NUMBERS = 12
"""Largest side of a map that shows its numbers."""

LABELS = {"mass": "attention to all sinks", "first": "attention to position 0 (no sinks found)"}


def sinks(heads: pd.DataFrame, rates: pd.DataFrame, norms: pd.DataFrame, path: Path, epsilon: float) -> None:
    """Draw the mass on the sinks by head, the sink rate by position, and the residual norm by position and
    layer.

    Args:
        heads: layer, head, mass, first; `first` is shown where no head has any mass, since no sinks were
            found.
        rates: position, mean, low, high.
        norms: layer (-1: the embedding), position, norm_ratio.
        path: the PNG to write.
        epsilon: the threshold of the sink rate.

    """
    with saved_figure(path, 1, 3, (11.5, 3.1)) as axes:
        shown = "mass" if heads["mass"].any() else "first"
        grid = heads.pivot_table(index="layer", columns="head", values=shown)
        image = _map(axes[0, 0], grid, "head", cmap="Greys", vmin=0, vmax=1)
        if max(grid.shape) <= NUMBERS:
            for (row, column), value in np.ndenumerate(grid.to_numpy()):
                colour = "white" if value > 0.5 else "black"
                axes[0, 0].text(
                    column, row, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=7
                )
        axes[0, 0].set_ylabel("layer")
        axes[0, 0].figure.colorbar(image, ax=axes[0, 0], label=LABELS[shown])

        axis = axes[0, 1]
        axis.fill_between(rates["position"], rates["low"], rates["high"], color="#cfcfcf", linewidth=0)
        axis.plot(
            rates["position"], rates["mean"], label="mean, 95 % interval", **{**FIRST, "linewidth": 0.8}
        )
        half = len(rates) / 2
        axis.axvline(half, color="#444444", linewidth=0.7, linestyle=":", label="beyond: few queries")
        axis.set(xlabel="position k", ylabel=f"share of (text, head) with $\\alpha_k$ > {epsilon:g}")
        axis.set_ylim(-0.02, max(1.05 * rates[["mean", "high"]].max().max(), 0.1))
        axis.legend(loc="upper center")

        grid = norms.pivot(index="layer", columns="position", values="norm_ratio")
        low, high = min(1.0, float(grid.min().min())), max(1.5, float(grid.max().max()))
        image = _map(axes[0, 2], grid, "position", cmap="Greys", norm=LogNorm(low, high))
        axes[0, 2].set_ylabel("exit of layer (-1: embedding)")
        bar = axes[0, 2].figure.colorbar(image, ax=axes[0, 2], label="norm, in medians of the layer")
        ticks = [t for t in (0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000) if low <= t <= high]
        bar.set_ticks(ticks, minor=False)
        bar.ax.yaxis.set_minor_locator(MaxNLocator(1))
        bar.ax.yaxis.set_major_formatter(ScalarFormatter())
        bar.ax.minorticks_off()


def _map(axis: Any, grid: pd.DataFrame, columns: str, **style: Any) -> Any:
    first = int(grid.index[0])
    extent = (-0.5, grid.shape[1] - 0.5, first + len(grid) - 0.5, first - 0.5)
    image = axis.imshow(grid, aspect="auto", interpolation="nearest", extent=extent, **style)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axis.set_xlabel(columns)
    return image
