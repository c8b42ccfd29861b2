"""Figures of test-time registers: norm and attention on some images before and after, and an ablation."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from spectral_sinks.errors import InputError
from spectral_sinks.figures.overlays import Maps, lay_over, overlay_figure, scale_below
from spectral_sinks.figures.style import FIRST, saved_figure

TITLES = {
    "norm before": "norm before",
    "norm after": "norm with registers",
    "attention before": "attention before",
    "attention after": "attention with registers",
}


def registers(pictures: Sequence[Any], maps: Mapping[str, Maps], path: Path) -> None:
    """Draw one row per picture: the picture, and over it its maps of norm and attention before and after.

    `pictures` are PIL images or arrays `[height, width, channels]`, each scaled to its own range. `maps` is
    the result of `register_maps`, with these images first. Norms before and after share one scale for all
    pictures, and so does attention. Raises InputError for fewer maps than pictures.
    """
    names = [name for name in TITLES if name in maps]
    if not pictures or not names or any(len(maps[name]) < len(pictures) for name in names):
        raise InputError(
            f"{len(pictures)} pictures: expected some, and for each a map of norm, see register_maps"
        )
    with overlay_figure(path, pictures, 1 + len(names)) as axes:
        for kind, label in (("norm", "norm of a patch"), ("attention", "attention of [CLS]")):
            pair = [name for name in names if name.startswith(kind)]
            if not pair:
                continue
            top = max(float(np.max(maps[name][row])) for name in pair for row in range(len(pictures)))
            drawn: Any = None
            for name in pair:
                place = 1 + names.index(name)
                for row, picture in enumerate(pictures):
                    values = np.asarray(maps[name][row])
                    drawn = lay_over(axes[row, place], picture, values, top)
                    axes[row, place].set_xlabel(f"largest {values.max():.3g}", fontsize=6, labelpad=1)
                axes[0, place].set_title(TITLES[name], fontsize=8)
            columns = [1 + names.index(name) for name in pair]
            scale_below(list(axes[:, columns].flat), drawn, f"{label}, before and after")


def register_ablation(table: pd.DataFrame, path: Path) -> None:
    """Every edit of `ss.vision.register_ablation` with its interval, a panel for each measure."""
    measures = [name for name in MEASURES if name in set(table["measure"])]
    edits = list(dict.fromkeys(table["edit"]))
    with saved_figure(path, 1, len(measures), (2.1 * len(measures) + 0.6, 2.3), sharey=True) as axes:
        for axis, measure in zip(axes[0], measures, strict=True):
            part = table[table["measure"] == measure].set_index("edit").reindex(edits)
            errors = np.clip([part["mean"] - part["low"], part["high"] - part["mean"]], 0, None)
            axis.errorbar(
                part["mean"], range(len(edits)), xerr=errors, capsize=2, **{**FIRST, "linestyle": ""}
            )
            axis.axvline(float(part["mean"].iloc[0]), color="#9a9a9a", linewidth=0.6)
            axis.set(xlabel=measure, yticks=range(len(edits)), yticklabels=edits)
        axes[0, 0].invert_yaxis()


MEASURES = ("cls error", "patch error", "agreement", "accuracy")
"""Measures that the figure of an ablation shows."""
