"""Figures of what takes a component's place: swaps, fills, and how much of the spectrum can go."""

from pathlib import Path
from typing import Any

import pandas as pd

from spectral_sinks.report.figures import _figure, _line

WAYS: dict[str, dict[str, Any]] = {
    "zero": {"color": "#000000", "linestyle": "-", "marker": "o"},
    "swap": {"color": "#b5452c", "linestyle": "--", "marker": "s"},
    "zero, first token": {"color": "#2b6ca3", "linestyle": "-.", "marker": "^"},
    "zero, all but first": {"color": "#8a8a8a", "linestyle": ":", "marker": "x"},
    "swap, all but first": {"color": "#d08a6e", "linestyle": (0, (1, 1)), "marker": "D"},
}


def _range(axis: Any, x: float, values: pd.Series, label: str = "") -> None:
    """Random draws as ticks beside a measured value."""
    axis.scatter(
        [x] * len(values), values, color="#555555", marker="_", s=28, linewidth=0.5, zorder=1, label=label
    )


def swap(ladder: pd.DataFrame, steps: pd.DataFrame, path: Path, bands: int) -> None:
    """The ladder at one exit, and the last step at every exit, by what takes the component's place and where.

    `ladder`: setting, layer, way, filter, kept, mean, low, high; `steps`: setting, layer, way, step, mean,
    low, high. A row of panels for each setting.
    """
    settings = list(steps["setting"].unique())
    with _figure(path, len(settings), 2, (9, 2.7 * len(settings) + 0.2)) as axes:
        for (left, right), setting in zip(axes, settings, strict=True):
            here = ladder[ladder["setting"] == setting].astype({"kept": int})
            random = here[here["filter"].str.startswith("random")]
            layer = random["layer"].iloc[0] if len(random) else here["layer"].iloc[0]
            test = steps[(steps["setting"] == setting) & (steps["step"] == "last step")]
            ways = [way for way in WAYS if way in set(test["way"])]
            for place, way in enumerate(ways):
                part = here[(here["layer"] == layer) & (here["filter"] == "Phi") & (here["way"] == way)]
                whole = pd.DataFrame([{"kept": bands, "mean": 0.0, "low": 0.0, "high": 0.0}])
                part = pd.concat([part[["kept", "mean", "low", "high"]].sort_values("kept"), whole])
                _line(left, part["kept"], part, way, WAYS[way])
                offset = (place - (len(ways) - 1) / 2) * 0.14
                rows = test[test["way"] == way].sort_values("layer")
                style = WAYS[way] | {"linestyle": "none"}
                _line(right, rows["layer"] + offset, rows, way, style)
                draws = random[random["way"] == way]["mean"]
                label = f"{len(draws)} random subspaces" if place == 0 else ""
                _range(right, layer + offset + 0.05, draws, label)
            left.set_yscale("symlog", linthresh=0.1)
            left.set(xlabel=f"bands kept (of {bands})", ylabel="NLL above untouched (nats)")
            left.set_title(f"{setting}: ladder at the exit of layer {layer}", fontsize=8)
            right.axhline(0, color="#444444", linewidth=0.6)
            right.set(xlabel="exit of layer", ylabel="NLL step of the last band (nats)")
            right.set_xticks(sorted(test["layer"].unique()))
            right.set_title(f"{setting}: the last step", fontsize=8)
        axes[0, 0].legend(fontsize=7)
        axes[0, 1].legend(fontsize=7, ncols=2)
