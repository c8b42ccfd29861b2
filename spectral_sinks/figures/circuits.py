"""Figures of what heads do with their sink: a map of all heads, and a page for one."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.patches import Rectangle

from spectral_sinks.figures.style import FIRST, OTHER, STYLES, saved_figure

LABELS = 150
"""Largest number of heads for which a map shows its numbers."""


def circuits(heads: pd.DataFrame, path: Path) -> None:
    """Draw the attention on the sink, its share of norm-weighted attention, and its value ratio, by layer and
    head.

    `heads`: layer, head, attention, weighted, value_ratio, circuit (outlined).
    """
    layers = sorted(set(heads["layer"]))  # of a stack in which some have no attention, the others
    shape = len(layers), heads["head"].nunique()
    panels = {
        "attention": "attention on the sink",
        "weighted": "share of norm-weighted attention",
        "value_ratio": "value ratio (at most 0.2: no-op)",
    }
    numbers = shape[0] * shape[1] <= LABELS
    size = (3 * max(2.9, (0.34 if numbers else 0.2) * shape[1] + 1), max(2.9, 0.16 * shape[0] + 1))
    with saved_figure(path, 1, 3, size) as axes:
        for axis, (name, label) in zip(axes[0], panels.items(), strict=True):
            grid = heads.pivot(index="layer", columns="head", values=name)
            image = axis.imshow(grid, cmap="Greys", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
            if numbers:
                for (row, column), value in np.ndenumerate(grid.to_numpy()):
                    colour = "white" if value > 0.5 else "black"
                    axis.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=7)
            for layer, head in heads.loc[heads["circuit"], ["layer", "head"]].itertuples(index=False):
                corner = (head - 0.46, layers.index(layer) - 0.46)
                axis.add_patch(Rectangle(corner, 0.92, 0.92, fill=False, color="#b5452c", linewidth=1.6))
            rows, columns = (range(0, n, max(1, n // 12)) for n in shape)
            axis.set(xlabel="head", yticks=rows, yticklabels=[layers[row] for row in rows], xticks=columns)
            axis.set_title(label, fontsize=8)
            axis.figure.colorbar(image, ax=axis, extend="max" if grid.max().max() > 1 else "neither")
        axes[0, 0].set_ylabel("layer")
        axes[0, 0].figure.suptitle("outlined: no-op circuit", fontsize=8, color="#b5452c")


def circuit_page(
    title: str, row: pd.Series, sides: pd.DataFrame, profile: pd.DataFrame, sink: int, path: Path
) -> None:
    """Draw one head: query and key sides of its leading modes over positions, the margin of the sink, and
    bands.

    Args:
        title: the title of the page.
        row: a row of the table of heads.
        sides: position, query_1, key_1, query_2, key_2.
        profile: what, band, share, low, high, random, random_low, random_high.
        sink: the position of the sink.
        path: the PNG to write.

    """
    with saved_figure(path, 2, 3, (10.5, 5.4)) as axes:
        page = axes[0, 0].figure
        page.suptitle(
            f"{title}: attention {row['attention']:.2f}, value ratio {row['value_ratio']:.2f}, "
            f"margin {row['margin']:.1f} nats",
            fontsize=9,
        )
        modes = (("1", FIRST), ("2", STYLES["Psi"]))
        for axis, side in ((axes[0, 0], "query"), (axes[0, 1], "key")):
            for mode, style in modes:
                shown = {**style, "linestyle": "", "marker": "o" if mode == "1" else "x", "markersize": 2}
                axis.plot(sides["position"], sides[f"{side}_{mode}"], label=f"mode {mode}", **shown)
            axis.axhline(0, color="#444444", linewidth=0.7, linestyle=":")
            axis.set(xlabel="position", ylabel=f"{side} side ($\\sqrt{{nats}}$)")
            low, high = axis.get_ylim()
            axis.set_ylim(low, high + 0.2 * (high - low))
            axis.legend(loc="upper right", ncols=2)
        at = sides[sides["position"] == sink]
        for mode, style in modes:
            axes[0, 1].scatter(
                at["position"], at[f"key_{mode}"], s=60, facecolors="none", edgecolors=style["color"]
            )
        axes[0, 1].annotate(
            "sink",
            (sink, float(at["key_1"].iloc[0])),
            xytext=(8, -3),
            textcoords="offset points",
            fontsize=7,
        )
        _margin(axes[0, 2], row)
        labels = {
            "key direction": "energy of the key direction",
            "value": "energy of the sink's value",
            "reading": "what mode 1 reads at the sink",
        }
        for axis, (what, label) in zip(axes[1], labels.items(), strict=True):
            _bands(axis, profile[profile["what"] == what], label)


def _margin(axis: Any, row: pd.Series) -> None:
    """Draw the shares of the margin and the two measures of the leading mode."""
    names = ["top_one", "top_two", "always_on", "rival"]
    values = [float(row[name]) for name in names]
    spread = [[row[n] - row[f"{n}_low"] for n in names], [row[f"{n}_high"] - row[n] for n in names]]
    errors = np.clip(np.nan_to_num(np.array(spread, dtype=float)), 0, None)
    axis.bar(range(4), values, color=["#666666", "#666666", "#b0b0b0", "#b0b0b0"], yerr=errors, capsize=2)
    axis.plot([0.6, 1.4], [row["random_top_two"]] * 2, color="black", linewidth=1.5)
    shown: Any = {"ha": "center", "fontsize": 7, "textcoords": "offset points", "xytext": (0, 3)}
    shown["color"] = "white" if row["random_top_two"] < row["top_two"] else "black"
    axis.annotate("random", (1, row["random_top_two"]), **shown)
    axis.axhline(0, color="#444444", linewidth=0.7)
    labels = ["margin in\none mode", "margin in\ntwo modes", "query side\nconstant", "rival\nkey"]
    axis.set_xticks(range(4), labels)
    axis.set_ylabel("share")


def _bands(axis: Any, part: pd.DataFrame, label: str) -> None:
    errors = np.clip(np.nan_to_num([part["share"] - part["low"], part["high"] - part["share"]]), 0, None)
    axis.bar(part["band"], part["share"], color=OTHER["color"], yerr=errors, capsize=1.5, label="this head")
    if part["random_low"].notna().any():
        axis.vlines(
            part["band"],
            part["random_low"],
            part["random_high"],
            color="black",
            linewidth=1.2,
            label="random direction, 95 %",
        )
    else:
        axis.plot(
            part["band"],
            part["random"],
            color="black",
            marker="_",
            linestyle="",
            markersize=8,
            label="random directions, mean",
        )
    if part["share"].isna().all():
        axis.text(0.5, 0.5, "writes nothing", ha="center", transform=axis.transAxes)
    axis.axhline(0, color="#444444", linewidth=0.7)
    axis.set(xlabel="band (last is darkest)", ylabel=f"share of {label}" if "energy" in label else label)
    low, high = axis.get_ylim()
    axis.set_ylim(low, high + 0.3 * (high - low))
    axis.legend(loc="upper center", fontsize=7)
