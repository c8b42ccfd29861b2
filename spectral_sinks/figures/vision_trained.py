"""Figure of image encoders in training: norms and attention of patches, CLS and registers."""

from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.ticker import ScalarFormatter

from spectral_sinks.figures.style import saved_figure

COLOURS = ("#000000", "#b5452c", "#2b6ca3", "#8a8a8a")
KINDS: dict[str, dict[str, Any]] = {
    "patches": {"linestyle": "-", "marker": "o"},
    "cls": {"linestyle": "--", "marker": "s"},
    "registers": {"linestyle": ":", "marker": "^"},
}
LIMIT: dict[str, Any] = {"color": "#444444", "linewidth": 0.7, "linestyle": ":"}


def vision_trained(table: pd.DataFrame, path: Path) -> None:
    """Draw accuracy, norms, and attention by kind of token, over training (top) and by layer after it
    (bottom).

    `table`: run, step, layer, kind, accuracy, largest, z, top, rate, uniform.
    """
    over = table.groupby(["run", "step", "kind"], as_index=False, sort=False).agg(
        accuracy=("accuracy", "first"), largest=("largest", "max"), top=("top", "mean")
    )
    last = table[table["step"] == table.groupby("run")["step"].transform("max")]
    runs = dict(zip(table["run"].unique(), COLOURS, strict=False))
    with saved_figure(path, 2, 3, (10.5, 5.6)) as axes:
        for run, colour in runs.items():
            trained = over[over["run"] == run]
            part = trained[trained["kind"] == "patches"]
            axes[0, 0].plot(part["step"], part["accuracy"], color=colour, marker="o", label=run)
            for kind, style in KINDS.items():
                part = trained[trained["kind"] == kind]
                here = last[(last["run"] == run) & (last["kind"] == kind)]
                if part.empty:
                    continue
                shown = {"color": colour, "label": f"{run}, {kind}", **style}
                axes[1, 0].plot(here["layer"], here["z"], **shown)
                axes[0, 1].plot(part["step"], part["largest"], **shown)
                axes[0, 2].plot(part["step"], part["top"], **shown)
                axes[1, 1].plot(here["layer"], here["largest"], **shown)
                axes[1, 2].plot(here["layer"], here["top"], **shown)
        for axis in axes[0]:
            axis.set_xscale("symlog", linthresh=50, linscale=0.5)
            axis.set(xlabel="step of training", xlim=(-5, None), xticks=(0, 50, 200, 800, 3200))
            axis.xaxis.set_major_formatter(ScalarFormatter())
        for axis in axes[1]:
            axis.set(xlabel="layer after training (-1: embedding)")
        axes[0, 0].set(ylabel="accuracy on held-out images")
        axes[1, 0].axhline(10, label="outliers are above", **LIMIT)
        axes[1, 0].set(ylabel="largest norm, robust z among patches")
        axes[0, 1].set(ylabel="largest norm / median of patches,\nmost over layers")
        axes[1, 1].set(ylabel="largest norm / median of patches")
        axes[0, 2].set(ylabel="attention to the most attended token,\nmean over layers, heads and images")
        axes[1, 2].set(ylabel="attention to the most attended token,\nmean over heads and images")
        for axis in axes[:, 1]:
            axis.axhline(2, label="outliers are above", **LIMIT)
            axis.set_ylim(bottom=0)
        for axis in axes[:, 2]:
            axis.axhline(table["uniform"].max(), label="uniform", **LIMIT)
            axis.set_ylim(bottom=0)
        axes[0, 0].legend()
        for axis in (axes[1, 0], axes[0, 2]):
            axis.set_ylim(top=1.45 * axis.get_ylim()[1])
            axis.legend(fontsize=7, loc="upper left", ncols=2)
