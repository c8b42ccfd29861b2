"""Figure of the NLL of long texts by position, under caches that keep different entries."""

from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.ticker import NullFormatter, ScalarFormatter

from spectral_sinks.figures.style import interval_points, saved_figure

STYLES: dict[str, dict[str, Any]] = {
    "all entries": {"color": "#9a9a9a", "linestyle": ":", "marker": "x"},
    "window": {"color": "#b5452c", "linestyle": "--", "marker": "s"},
    "first 1 + window": {"color": "#2b6ca3", "linestyle": "-.", "marker": "v"},
    "first 4 + window": {"color": "#000000", "linestyle": "-", "marker": "o"},
    "random 4 + window": {"color": "#d99a88", "linestyle": "-.", "marker": "P"},
    "first 4 + window, positions of the text": {"color": "#555555", "linestyle": "--", "marker": "D"},
    "attention": {"color": "#2b6ca3", "linestyle": "-", "marker": "^"},
    "first 4 + attention": {"color": "#6f9fc8", "linestyle": "--", "marker": ">"},
    "random": {"color": "#b5452c", "linestyle": ":", "marker": "+"},
    "first 4 + random": {"color": "#d99a88", "linestyle": ":", "marker": "<"},
}
"""How the usual caches are drawn."""


OTHER_STYLES: list[dict[str, Any]] = [
    {"color": color, "linestyle": line, "marker": marker}
    for color, line, marker in (
        ("#8a6d3b", "-", "o"),
        ("#4f7f3f", "--", "P"),
        ("#7a4f9a", "-", "p"),
        ("#8a6d3b", ":", "d"),
        ("#4f7f3f", "-.", "h"),
        ("#7a4f9a", ":", "*"),
        ("#8a6d3b", "-.", "X"),
    )
]
"""What caches of other names are drawn with, in turn: in colours that the usual ones lack."""


def cache_costs(positions: pd.DataFrame, caches: pd.DataFrame, base: str, path: Path) -> None:
    """Draw the NLL by position, and what each cache costs above `base`, with its memory and its speed.

    `positions` and `caches` are the tables of a `CacheCosts`. Its axes hold what is in `caches`: without the
    row of a cache that is far above the others, they can be told apart, and its line leaves the picture.
    """
    others = [name for name in positions["cache"].unique() if name not in STYLES]
    styles = STYLES | {name: OTHER_STYLES[i % len(OTHER_STYLES)] for i, name in enumerate(others)}
    with saved_figure(path, 1, 3, (11.5, 4.2), width_ratios=(1.5, 1.2, 1)) as axes:
        _by_position(axes[0, 0], positions, {name: styles[name] for name in positions["cache"].unique()})
        held = positions.loc[positions["cache"].isin(caches["cache"]), "nll"]
        axes[0, 0].set_ylim(held.min() - 0.1, held.max() + 0.1)
        _bars(axes[0, 1], axes[0, 2], caches.reset_index(drop=True))
        axes[0, 1].set_xlabel(f"NLL of the second half above {base}\n(nats per token)")
        axes[0, 2].set_xlabel("tokens read per second of processor time")


def _by_position(axis: Any, positions: pd.DataFrame, styles: dict[str, dict[str, Any]]) -> None:
    for name, style in styles.items():
        part = positions[positions["cache"] == name]
        if len(part):
            axis.plot((part["start"] * part["stop"]) ** 0.5, part["nll"], label=name, **style)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(ScalarFormatter())
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_xlabel("position in the text")
    axis.set_ylabel("NLL (nats per token)")
    axis.figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=5, fontsize=7)


def _bars(middle: Any, right: Any, caches: pd.DataFrame) -> None:
    heights = list(range(len(caches))[::-1])
    interval_points(middle, caches, "more", heights, "")
    middle.axvline(0, color="#9a9a9a", linewidth=0.6, linestyle=":")
    sizes = caches["nbytes"] / 2**20
    names = [f"{name} ({size:.2f} MB)" for name, size in zip(caches["cache"], sizes, strict=True)]
    middle.set_yticks(heights, names, fontsize=6.5)
    right.barh(heights, caches["tokens_per_processor_second"], color="#b8b8b8")
    right.set_yticks(heights, [])
    right.set_ylim(middle.get_ylim())
