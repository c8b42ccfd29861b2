"""Figure of the bands that the matrices of each layer read and write."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from spectral_sinks.figures.style import saved_figure

CONTRAST = 2.0
"""Factor above and below chance at which the grey scale ends."""


def weights(bands: pd.DataFrame, dark: pd.DataFrame, count: int, chance: float, path: Path) -> None:
    """Draw the share of each band in each reader and writer against chance, and the dark shares by layer.

    Args:
        bands: part, layer, unit, band, rank, share, of one convention.
        dark: part, layer, unit, convention ("raw", "folded"), share, random_low, random_high.
        count: the number of bands.
        chance: the dark share of a random direction, r/d.
        path: the PNG to write.

    """
    parts = [part for part in bands["part"].cat.categories if (bands["part"] == part).any()]
    with saved_figure(path, 2, len(parts), (1.75 * len(parts) + 1.2, 5.6)) as axes:
        image, limit = None, np.log2(CONTRAST)
        for column, part in enumerate(parts):
            here = bands[bands["part"] == part]
            grid = here.pivot(index=["layer", "unit"], columns="band", values="share")
            even = here.groupby("band")["rank"].first() / here.groupby("band")["rank"].first().sum()
            ratio = np.log2(np.maximum(grid / even, 2.0**-9))
            upper, lower = axes[0, column], axes[1, column]
            image = upper.imshow(
                ratio, cmap="Greys", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest"
            )
            image.axes.set_xticks([0, count // 2 - 1, count - 1], [1, count // 2, count])
            layers = grid.index.get_level_values("layer").to_numpy()
            units = len(grid) // len(np.unique(layers))
            step = max(1, len(np.unique(layers)) // 8)
            starts = [(i, layer) for i, layer in enumerate(layers) if i % units == 0 and layer % step == 0]
            upper.set_yticks([i + (units - 1) / 2 for i, _ in starts], [layer for _, layer in starts])
            for i, _ in starts[1:]:
                upper.axhline(i - 0.5, color="black", linewidth=0.3)
            role = "writes" if part in ("o", "down") else "reads"
            each = ", by head" if units > 1 else ""
            upper.set_title(f"$W_{{{part}}}$ {role}{each}", fontsize=8)
            upper.set_xlabel("band")
            _dark(lower, dark[dark["part"] == part], units, chance)
        top = 1.08 * max(dark["share"].max(), dark["random_high"].max())
        for axis in axes[1]:
            axis.set_ylim(0, top)
            axis.set_xlabel("layer")
        for axis in axes[1, 1:]:
            axis.set_yticklabels([])
        axes[0, 0].set_ylabel("layer")
        axes[1, 0].set_ylabel("share in the dark band")
        bar = axes[0, 0].figure.colorbar(image, ax=list(axes[0]), extend="both", pad=0.005, aspect=30)
        bar.set_label("share / chance")
        bar.set_ticks([-limit, 0, limit], labels=[f"1/{CONTRAST:g}", "1", f"{CONTRAST:g}"])
        handles = axes[1, 0].get_legend_handles_labels()
        axes[0, 0].figure.legend(*handles, loc="outside lower center", ncols=4)


def _dark(axis: Any, table: pd.DataFrame, units: int, chance: float) -> None:
    """Draw the dark share by layer and head, raw and folded, with the range of random subspaces."""
    raw = table[table["convention"] == "raw"].sort_values(["layer", "unit"])
    folded = table[table["convention"] == "folded"].sort_values(["layer", "unit"])
    offset = (raw["unit"].clip(lower=0).to_numpy() + 0.5) / units - 0.5
    x = raw["layer"].to_numpy() + 0.8 * offset
    axis.vlines(
        x,
        raw["random_low"],
        raw["random_high"],
        color="#bdbdbd",
        linewidth=2,
        label="random subspaces, range",
    )
    draw = axis.plot
    draw(x, folded["share"], "o", color="black", markerfacecolor="white", label="norm's gain folded in")
    draw(x, raw["share"], ".", color="black", markersize=4, label="raw weights")
    axis.axhline(chance, color="#444444", linewidth=0.7, linestyle=":", label="chance, r/d")
