"""Figure of what quantisation breaks, and what sparing sinks saves."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from spectral_sinks.figures.style import interval_points, saved_figure

SPARED = {
    "nothing": ("o", True),
    "sink tokens": ("s", True),
    "massive channels": ("D", True),
    "both": ("^", True),
    "random tokens": ("s", False),
    "random channels": ("D", False),
}
"""Marker of what is spared, and whether it is filled: random choices are open."""

LINES = {("tensor", 8): "-", ("tensor", 4): "--", ("token", 8): "-.", ("token", 4): ":"}
"""Lines of the usual kinds of quantisation; any other is drawn through."""


def quantisation(summary: pd.DataFrame, sites: pd.DataFrame, angles: pd.DataFrame, path: Path) -> None:
    """Draw error and NLL difference by kind of quantisation and what is spared, the error by site, and the
    angles by which bands of the unembedding turn.

    `summary`, `sites` and `angles`: the tables `summary()`, `by_site()` and `angles` of a quantisation
    report.
    """
    with saved_figure(path, 2, 2, (9.5, 7.0)) as axes:
        _spared(axes[0, 0], summary, "error", "squared error over squared length")
        axes[0, 0].set_xscale("log")
        _spared(axes[0, 1], summary, "delta_nll", "NLL above the untouched model (nats per token)")
        axes[0, 1].set_xscale("symlog", linthresh=0.01)
        axes[0, 1].axvline(0, color="#444444", linewidth=0.7, linestyle=":")
        handles = axes[0, 0].get_legend_handles_labels()
        axes[0, 0].figure.legend(*handles, title="spared", loc="outside upper center", ncols=6, fontsize=7)
        _by_site(axes[1, 0], sites)
        _angles(axes[1, 1], angles)


def _spared(axis: Any, summary: pd.DataFrame, column: str, label: str) -> None:
    kinds = list(summary.groupby(["what", "bits", "per"], sort=False).groups)
    for place, kind in enumerate(kinds):
        here = summary.set_index(["what", "bits", "per"]).loc[[kind]].set_index("spared")
        for row, (name, (marker, filled)) in enumerate(SPARED.items()):
            if name not in here.index:
                continue
            at, part = place + 0.13 * (row - 2.5), here.loc[[name]]
            if not filled:
                ends = part[[f"{column}_least", f"{column}_most"]].to_numpy()[0]
                axis.plot(ends, [at, at], color="#b0b0b0", linewidth=4, solid_capstyle="butt")
            interval_points(axis, part, column, [at], name if place == 0 else "", marker, filled)
    axis.set_yticks(range(len(kinds)), [f"{what}\nint{bits} per {per}" for what, bits, per in kinds])
    for edge in np.arange(1, len(kinds)) - 0.5:
        axis.axhline(edge, color="#dddddd", linewidth=0.6)
    axis.invert_yaxis()
    axis.margins(x=0.05)
    axis.set_xlabel(label)


def _by_site(axis: Any, sites: pd.DataFrame) -> None:
    names = list(dict.fromkeys(sites["site"]))
    for (bits, per), part in sites.groupby(["bits", "per"], sort=False):
        line = LINES.get((str(per), int(bits)), "-")
        for column, color, tokens in (
            ("error_others", "#000000", "other tokens"),
            ("error_sinks", "#b5452c", "sinks"),
        ):
            axis.plot(
                [names.index(name) for name in part["site"]],
                part[column],
                color=color,
                linestyle=line,
                label=f"int{bits} per {per}" if tokens == "other tokens" else None,
            )
    axis.plot([], [], color="#b5452c", label="the same, sinks")
    step = max(1, len(names) // 8)
    axis.set_xticks(range(0, len(names), step), names[::step], rotation=30, ha="right")
    axis.set_yscale("log")
    axis.set(xlabel="site, nothing spared", ylabel="squared error over squared length")
    axis.figure.legend(*axis.get_legend_handles_labels(), loc="outside lower left", ncols=3, fontsize=7)


def _angles(axis: Any, angles: pd.DataFrame) -> None:
    plain = angles[angles["spared"] == "nothing"]
    kinds = list(plain.groupby(["bits", "per"], sort=False).groups)
    series = list(plain.groupby(["convention", "band"], sort=False).groups)
    markers = dict(zip(dict.fromkeys(name for name, _ in series), "osD", strict=False))
    for row, (convention, band) in enumerate(series):
        part = plain[(plain["convention"] == convention) & (plain["band"] == band)]
        at = [kinds.index(kind) for kind in zip(part["bits"], part["per"], strict=True)]
        interval_points(
            axis,
            part,
            "largest_angle",
            np.array(at) + 0.15 * (row - len(series) / 2 + 0.5),
            f"{band} band, {convention}",
            markers[convention],
            band == "dark",
        )
    axis.set_yticks(range(len(kinds)), [f"unembedding\nint{bits} per {per}" for bits, per in kinds])
    axis.invert_yaxis()
    axis.set_xlim(0, 92)
    axis.set_xlabel("largest principal angle, before and after (degrees)")
    axis.figure.legend(*axis.get_legend_handles_labels(), loc="outside lower right", ncols=2, fontsize=7)
