"""Figures of test-time registers: norm and attention on some images before and after, and an ablation."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from spectral_sinks.errors import InputError
from spectral_sinks.figures.style import FIRST, saved_figure

TITLES = {
    "norm before": "norm",
    "norm after": "with registers",
    "attention before": "attention of [CLS]",
    "attention after": "with registers",
}


def registers(pictures: Sequence[Any], maps: Mapping[str, NDArray[Any]], path: Path) -> None:
    """Draw one row per picture: the picture, and its maps of norm and attention before and after.

    `pictures` are PIL images or arrays `[height, width, channels]`, each scaled to its own range. `maps` is
    the result of `register_maps`, with these images first. Before and after share a scale in each row. Raises
    InputError for fewer maps than pictures.
    """
    names = [name for name in TITLES if name in maps]
    if not pictures or not names or any(len(maps[name]) < len(pictures) for name in names):
        raise InputError(
            f"{len(pictures)} pictures: expected some, and for each a map of norm, see register_maps"
        )
    size = (1.6 + 1.95 * len(names), 1.55 * len(pictures) + 0.35)
    with saved_figure(path, len(pictures), 1 + len(names), size) as axes:
        for row, picture in enumerate(pictures):
            _bare(axes[row, 0]).imshow(_stretched(picture))
            for kind in ("norm", "attention"):
                pair = [name for name in names if name.startswith(kind)]
                top = max((float(maps[name][row].max()) for name in pair), default=0.0)
                for name in pair:
                    axis = _bare(axes[row, 1 + names.index(name)])
                    drawn = axis.imshow(
                        maps[name][row], cmap="Greys", vmin=0, vmax=top, interpolation="nearest"
                    )
                    axis.set_xlabel(f"largest {maps[name][row].max():.3g}", fontsize=6, labelpad=1)
                    if row == 0:
                        axis.set_title(TITLES[name], fontsize=8)
                    if name == pair[-1]:
                        axis.figure.colorbar(drawn, ax=list(axes[row, [1 + names.index(n) for n in pair]]))


def _bare(axis: Any) -> Any:
    axis.set(xticks=[], yticks=[])
    for spine in axis.spines.values():
        spine.set(visible=True, linewidth=0.5, color="#8a8a8a")
    return axis


def _stretched(picture: Any) -> NDArray[np.float64]:
    values = np.asarray(picture, dtype=np.float64)
    low, high = values.min(), values.max()
    return (values - low) / (high - low or 1.0)


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
