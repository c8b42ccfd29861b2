"""Figures of object discovery: boxes on pictures, and the share of correct ones."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

from spectral_sinks.errors import InputError
from spectral_sinks.figures.style import FIRST, OTHER, saved_figure

ACROSS = 5
"""Number of pictures in a row."""


def vision_boxes(
    pictures: Any,
    table: pd.DataFrame,
    path: Path,
    boxes: Mapping[str, Any] | None = None,
    method: str | None = None,
) -> None:
    """Draw the box found on each picture (solid, with its seed as a dot) and the boxes given (dashed).

    Args:
        pictures: the result of `images`.
        table: the result of `discover` for these pictures.
        path: the PNG to write.
        boxes: the result of `read_boxes`.
        method: the method in the table whose boxes are drawn; by default the first.

    Raises:
        InputError: for a method that is not in the table.

    """
    method = table["method"].iloc[0] if method is None else method
    shown = table[(table["method"] == method) & (table["draw"] == 0)]
    if shown.empty:
        raise InputError(f"the table has no method {method!r}: {', '.join(table['method'].unique())}")
    last = Counter(Path(name).name for name in shown["name"])
    columns = min(ACROSS, len(shown))
    rows = -(-len(shown) // columns)
    with saved_figure(path, rows, columns, (1.9 * columns, 2.1 * rows)) as axes:
        for axis in axes.flat:
            axis.axis("off")
        for axis, row in zip(axes.flat, shown.to_dict("records"), strict=False):
            axis.imshow(np.asarray(pictures[row["document"]]))
            short = Path(row["name"]).name
            alone = (boxes or {}).get(short, ()) if last[short] == 1 else ()
            for given in (boxes or {}).get(row["name"], alone):
                _box(axis, given, "#ffffff", "--")
            if np.isfinite(row["x0"]):
                _box(axis, [row[key] for key in ("x0", "y0", "x1", "y1")], "#f2b134", "-")
            axis.plot(
                row["seed_x"], row["seed_y"], "o", color="#f2b134", markeredgecolor="#000000", markersize=4
            )
            said = "" if pd.isna(row["iou"]) else f"  IoU {row['iou']:.2f}"
            axis.set_title(
                _short(row["name"]) + said + ("" if row["found"] else "  nothing apart"), fontsize=7
            )


def vision_corloc(levels: pd.DataFrame, path: Path) -> None:
    """Draw the CorLoc of each method in the result of `corloc`, with its interval."""
    with saved_figure(path, 1, 1, (4, 0.5 + 0.35 * len(levels))) as axes:
        axis = axes[0, 0]
        for place, row in enumerate(levels.to_dict("records")):
            errors = np.clip([[row["mean"] - row["low"]], [row["high"] - row["mean"]]], 0, None)
            style = {**(OTHER if place else FIRST), "linestyle": ""}
            axis.errorbar(row["mean"], place, xerr=errors, capsize=2, elinewidth=0.8, **style)
        axis.set_yticks(range(len(levels)), levels["method"])
        axis.set_ylim(len(levels) - 0.5, -0.5)
        axis.set_xlim(-0.02, 1.02)
        axis.set(xlabel=f"CorLoc: share of {levels['n'].max()} images with IoU > 0.5")


def _box(axis: Any, box: Any, colour: str, line: str) -> None:
    x0, y0, x1, y1 = (float(value) for value in box)
    around = [withStroke(linewidth=3, foreground="#000000")]
    axis.add_patch(
        Rectangle(
            (x0 - 0.5, y0 - 0.5),
            x1 - x0,
            y1 - y0,
            fill=False,
            edgecolor=colour,
            linestyle=line,
            linewidth=1.5,
            path_effects=around,
            clip_on=False,
        )
    )


def _short(name: str) -> str:
    name = Path(name).name
    return (name if len(name) <= 18 else name[:17] + "…").replace("$", r"\$")
