"""Figure of the attention sinks of one model."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.colors import LogNorm
from matplotlib.ticker import MaxNLocator, ScalarFormatter

from spectral_sinks.figures.style import FIRST, interval_points, saved_figure, suffixes_of

NUMBERS = 12
"""Largest side of a map that shows its numbers."""

LABELS = {"mass": "attention to all sinks", "first": "attention to position 0 (no sinks found)"}


def sinks(
    heads: pd.DataFrame,
    rates: pd.DataFrame,
    norms: pd.DataFrame,
    path: Path,
    epsilon: float,
    found: pd.DataFrame | None = None,
) -> None:
    """Draw the mass on the sinks by head, the sink rate by position, the residual norm by position and layer,
    and the dark share of each sink.

    Args:
        heads: layer, head, mass, first; `first` is shown where no head has any mass, since no sinks were
            found.
        rates: position, mean, low, high.
        norms: layer (-1: the embedding), position, norm_ratio.
        path: the PNG to write.
        epsilon: the threshold of the sink rate.
        found: the rows of `Sinks.summary()`, whose dark shares are drawn under each convention. Without them,
            and where there is no sink, this panel is left out.

    """
    panels = 3 if found is None or found.empty else 4
    with saved_figure(path, 1, panels, (11.5 * panels / 3, 3.1)) as axes:
        if found is not None and not found.empty:
            _dark_shares(axes[0, 3], found)
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


def _dark_shares(axis: Any, found: pd.DataFrame) -> None:
    """Draw the dark share of each sink under each convention, beside random subspaces and other tokens."""
    places, ends = np.arange(len(found))[::-1], suffixes_of(found, "dark_share")
    step = 0.8 / len(ends)
    for index, (name, end) in enumerate(ends.items()):
        at = places + 0.4 - step * (index + 0.5)
        random, others = ("random subspaces", "other tokens") if index == 0 else (None, None)
        least, most = found[f"dark_share{end}_least"], found[f"dark_share{end}_most"]
        axis.barh(at, most - least, left=least, height=0.7 * step, color="#d4d4d4", label=random)
        axis.plot(found[f"other_dark_share{end}"], at, "v", color="#777777", markersize=4, label=others)
        label = f"{name} (decides)" if index == 0 and len(ends) > 1 else name
        interval_points(axis, found, f"dark_share{end}", at, label, filled=index == 0)
    axis.set_yticks(places, [_name(row) for row in found.to_dict("records")])
    axis.set(xlabel="share of the sink's energy in the dark band", xlim=(-0.03, 1.03))
    axis.set_ylim(-0.6, len(found) - 0.4)
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, 1.2), ncols=2)


def _name(sink: dict[Any, Any]) -> str:
    """Return the position of a sink and its token, as far as it has them."""
    position = "" if pd.isna(sink["position"]) else f"{sink['position']:.0f} "
    return position + ("" if sink["token"] is None else repr(sink["token"]).replace("$", r"\$"))


def _map(axis: Any, grid: pd.DataFrame, columns: str, **style: Any) -> Any:
    first = int(grid.index[0])
    extent = (-0.5, grid.shape[1] - 0.5, first + len(grid) - 0.5, first - 0.5)
    image = axis.imshow(grid, aspect="auto", interpolation="nearest", extent=extent, **style)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axis.set_xlabel(columns)
    return image
