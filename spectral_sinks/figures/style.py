"""The style that all figures share: legible in greyscale, with units on the axes."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from spectral_sinks.errors import InputError
from spectral_sinks.files import atomic_write, figure_format

STYLES: dict[str, dict[str, Any]] = {
    "Phi": {"color": "#000000", "linestyle": "-", "marker": "o"},
    "Psi": {"color": "#b5452c", "linestyle": "--", "marker": "s"},
    "Omega": {"color": "#2b6ca3", "linestyle": "-.", "marker": "^"},
    "Rnd": {"color": "#9a9a9a", "linestyle": ":", "marker": "x"},
}
FIRST: dict[str, Any] = {"color": "#000000", "linestyle": "-", "marker": "o"}
OTHER: dict[str, Any] = {"color": "#8a8a8a", "linestyle": "--", "marker": "s"}


@contextmanager
def saved_figure(
    path: Path, rows: int, columns: int, size: tuple[float, float], **axes: Any
) -> Iterator[Any]:
    """Yield the axes of a new figure, which is written to `path` at the end of the block.

    `axes` are options of `Figure.subplots`. Raises InputError for a name that does not end in a format.
    """
    written = figure_format(path)
    style: Any = {
        "font.size": 8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "lines.markersize": 3,
        "lines.linewidth": 1.1,
        "legend.frameon": False,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        yield figure.subplots(rows, columns, squeeze=False, **axes)
        with atomic_write(path) as temporary:
            figure.savefig(temporary, dpi=160, format=written)


def mean_line(axis: Any, x: Any, table: pd.DataFrame, label: str, style: dict[str, Any]) -> None:
    """Draw a mean, with its interval as error bars."""
    errors = np.clip([table["mean"] - table["low"], table["high"] - table["mean"]], 0, None)
    axis.errorbar(x, table["mean"], yerr=errors, label=label, capsize=1.5, elinewidth=0.7, **style)


def interval_points(
    axis: Any, table: pd.DataFrame, column: str, at: Any, label: str, marker: str = "o", filled: bool = True
) -> None:
    """Draw the means of a column at heights `at`, with their intervals as horizontal error bars.

    Args:
        axis: the axes.
        table: the rows, with the columns `column`, and `column_low` and `column_high` where there are
            intervals.
        column: the column.
        at: the height of each row.
        label: the entry in the legend.
        marker: the marker of matplotlib.
        filled: whether the markers are filled.

    """
    ends = [table.get(f"{column}_{end}", table[column]) for end in ("low", "high")]
    axis.errorbar(
        table[column],
        at,
        xerr=np.nan_to_num(np.clip([table[column] - ends[0], ends[1] - table[column]], 0, None)),
        fmt=marker,
        color="black",
        markerfacecolor="black" if filled else "white",
        markersize=4.5,
        capsize=2,
        elinewidth=0.8,
        label=label,
    )


def suffixes_of(table: pd.DataFrame, column: str) -> dict[str, str]:
    """Return what the names of a table's columns end in, by convention, the one that decides first.

    Raises InputError for a table whose rows are decided by several conventions.
    """
    deciding = list(dict.fromkeys(table["convention"]))
    if len(deciding) > 1:
        raise InputError(
            f"rows decided by {' and '.join(deciding)}: give a figure the rows that one convention decides"
        )
    others = [name for name in ("raw", "folded", "centred") if f"{column}_{name}" in table]
    return {deciding[0]: ""} | {name: f"_{name}" for name in others}
