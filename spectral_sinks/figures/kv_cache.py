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
"""The caches whose NLL is drawn by position, and how."""


OTHER_STYLES: list[dict[str, Any]] = [
    {"color": color, "linestyle": line, "marker": marker}
    for color, line, marker in (
        ("#8a6d3b", "-", "o"),
        ("#d99a88", "-.", "P"),
        ("#2b6ca3", "-", "^"),
        ("#555555", "--", "D"),
        ("#6f9fc8", ":", "v"),
        ("#8a6d3b", "--", ">"),
        ("#8a6d3b", ":", "<"),
    )
]
"""What caches of other names are drawn with, in turn."""


def cache_costs(positions: pd.DataFrame, caches: pd.DataFrame, base: str, path: Path) -> None:
    """Draw the NLL by position, and what each cache costs above `base`, with its memory and its speed.

    `positions` and `caches` are the tables of a `CacheCosts`.
    """
    others = [name for name in caches["cache"] if name not in STYLES]
    styles = {name: OTHER_STYLES[i % len(OTHER_STYLES)] for i, name in enumerate(others)}
    styles |= {name: STYLES[name] for name in caches["cache"] if name in STYLES}
    with saved_figure(path, 1, 3, (11.5, 4.2), width_ratios=(1.5, 1.2, 1)) as axes:
        _by_position(axes[0, 0], positions, {name: styles[name] for name in caches["cache"]})
        ends = positions["nll"]
        axes[0, 0].set_ylim(ends.min() - 0.1, ends.max() + 0.1)
        drawn = caches.reset_index(drop=True)
        _bars(axes[0, 1], axes[0, 2], drawn, drawn["nbytes"], drawn["tokens_per_processor_second"])
        axes[0, 1].set_xlabel(f"NLL of the second half above {base}\n(nats per token)")
        axes[0, 2].set_xlabel("tokens read per second of processor time")


def kv_cache(positions: pd.DataFrame, caches: pd.DataFrame, path: Path) -> None:
    """Draw the NLL by position, and what a cache costs against its memory and its speed.

    `positions` has `cache`, `start`, `stop`, `nll`. `caches` has `cache`, `bytes` of one text,
    `tokens_per_second`, and `more`, the late NLL above that of the first 4 and a window, with `more_low` and
    `more_high`. Both are tables of `experiments/kv_cache.py`.
    """
    with saved_figure(path, 1, 3, (11.5, 4.2), width_ratios=(1.5, 1.2, 1)) as axes:
        _by_position(axes[0, 0], positions, STYLES)
        others = positions.loc[positions["cache"] != "all entries", "nll"]
        # without limit, the others cannot be told apart
        axes[0, 0].set_ylim(others.min() - 0.1, others.max() + 0.4)
        drawn = caches[caches["cache"] != "all entries"].reset_index(drop=True)
        _bars(axes[0, 1], axes[0, 2], drawn, drawn["bytes"], drawn["tokens_per_second"])
        axes[0, 1].set_xlabel("late NLL above first 4 + window\n(nats per token)")
        axes[0, 2].set_xlabel("tokens read per second")


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


def _bars(middle: Any, right: Any, caches: pd.DataFrame, nbytes: Any, speed: Any) -> None:
    heights = list(range(len(caches))[::-1])
    interval_points(middle, caches, "more", heights, "")
    middle.axvline(0, color="#9a9a9a", linewidth=0.6, linestyle=":")
    names = [f"{name} ({size / 2**20:.2f} MB)" for name, size in zip(caches["cache"], nbytes, strict=True)]
    middle.set_yticks(heights, names, fontsize=6.5)
    right.barh(heights, speed, color="#b8b8b8")
    right.set_yticks(heights, [])
    right.set_ylim(middle.get_ylim())
