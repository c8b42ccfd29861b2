"""Figure of a table of models and checkpoints."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from spectral_sinks.figures.style import interval_points, saved_figure, suffixes_of

MARKERS = {"dark": "o", "not dark": "s", "no sink": "x"}

PANELS = {
    "rate": "share of (text, head)\nwith $\\alpha_1$ > 0.3",
    "share": "share of energy of the sink's\ncarrier in the dark band",
    "cut": "share of the sink lost\nwithout the dark band",
    "delta": "NLL without the dark band\nabove untouched (nats)",
}


def across(table: pd.DataFrame, path: Path) -> None:
    """Draw the strength of the sink, the darkness of its carrier, and what its tail carries, one row per
    model.

    `table` has the rows of `SinkVerdict.summary()`, from top to bottom. Error bars are 95 % intervals. The
    grey range covers the random subspaces, and small triangles are the other tokens. The marker of a row is
    its verdict under the convention that decides; open circles are what another convention gives.
    """
    (deciding, _), *others = suffixes_of(table, "share").items()
    places = np.arange(len(table))[::-1]
    with saved_figure(path, 1, 4, (11, 1.3 + 0.24 * len(table)), sharey=True) as axes:
        for axis, (name, label) in zip(axes[0], PANELS.items(), strict=True):
            axis.use_sticky_edges = False
            if f"{name}_least" in table:
                least, most = table[f"{name}_least"], table[f"{name}_most"]
                axis.barh(
                    places, most - least, left=least, height=0.62, color="#d4d4d4", label="random draws"
                )
            if name == "share":
                axis.plot(table["others"], places, "v", color="#777777", markersize=4, label="other tokens")
            for verdict, marker in MARKERS.items():
                chosen = (table["verdict"] == verdict).to_numpy()
                if chosen.any():
                    said = verdict if verdict == "no sink" else f"{verdict} ({deciding})"
                    interval_points(axis, table[chosen], name, places[chosen], said, marker)
            for (other, end), marker in zip(others, "oD", strict=False):
                if f"{name}{end}" in table:
                    interval_points(axis, table, f"{name}{end}", places - 0.24, other, marker, filled=False)
            axis.axvline(0, color="#444444", linewidth=0.6, linestyle=":")
            axis.set_xlabel(label)
            axis.grid(axis="y", color="#eeeeee", linewidth=0.6)
            axis.set_axisbelow(True)
        axes[0, 0].set_yticks(places, table["model"])
        axes[0, 0].set_ylim(-0.7, len(table) - 0.3)
        handles: dict[str, Any] = {}
        for axis in axes[0]:
            handles |= dict(zip(*axis.get_legend_handles_labels()[::-1], strict=True))
        axes[0, 0].figure.legend(
            handles.values(), handles.keys(), loc="outside upper center", ncols=len(handles), fontsize=7
        )
