"""Figure of attention bars."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.ticker import MaxNLocator

from spectral_sinks.figures.style import FIRST, OTHER, STYLES, mean_line, saved_figure


def bars(levels: pd.DataFrame, correlation: pd.DataFrame, tokens: pd.DataFrame, path: Path) -> None:
    """Draw the dark ratio of attention bars and other tokens, its rank correlation with attention, and the
    tokens of bars.

    The first two panels are by layer. `levels`: layer, tokens ("bars", "matched", "rest"), mean, low, high,
    random_low, random_high. `correlation`: layer, kind ("plain", "given both"), mean, low, high, random_low,
    random_high. `tokens`: text, bars, pairs, rate, sorted by the number of bars, largest first.
    """
    with saved_figure(path, 1, 3, (11, 3.3)) as axes:
        axis = axes[0, 0]
        null = levels.groupby("layer")[["random_low", "random_high"]].first()
        _band(axis, null, "all tokens, random subspaces")
        for name, shown, style in (
            ("bars", "bars", FIRST),
            ("matched", "matched tokens", STYLES["Psi"]),
            ("rest", "all other tokens", OTHER),
        ):
            part = levels[levels["tokens"] == name]
            mean_line(axis, part["layer"], part, shown, style)
        axis.set(xlabel="layer", ylabel="dark ratio $|P_{dark}x|/|x|$", xticks=_ticks(levels))
        low, high = axis.get_ylim()
        axis.set_ylim(low, high + 0.45 * (high - low))
        axis.legend(loc="upper left", fontsize=7)

        axis = axes[0, 1]
        for kind, shown, style in (
            ("plain", "plain", OTHER),
            ("given both", "given position and frequency", FIRST),
        ):
            part = correlation[correlation["kind"] == kind].sort_values("layer")
            if kind == "given both":
                _band(axis, part.set_index("layer"), "random subspaces, given both")
            mean_line(axis, part["layer"], part, shown, style)
        axis.axhline(0, color="#444444", linewidth=0.7, linestyle=":")
        axis.set(
            xlabel="layer", ylabel="rank correlation, attention and dark ratio", xticks=_ticks(correlation)
        )
        low, high = axis.get_ylim()
        axis.set_ylim(low, high + 0.35 * (high - low))
        axis.legend(loc="upper left", fontsize=7)

        axis = axes[0, 2]
        places = np.arange(len(tokens))
        axis.barh(places, tokens["bars"], color="#8a8a8a")
        for place, (count, rate) in enumerate(zip(tokens["bars"], tokens["rate"], strict=True)):
            axis.text(count, place, f" {rate:.0%}", va="center", fontsize=6)
        names = [repr(text).replace("$", r"\$") for text in tokens["text"]]
        axis.set_yticks(places, names, fontsize=7)
        axis.invert_yaxis()
        axis.margins(x=0.15)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set(xlabel="bars (label: share of the token's pairs that are bars)")


def _band(axis: Any, null: pd.DataFrame, label: str) -> None:
    axis.fill_between(null.index, null["random_low"], null["random_high"], color="#cfcfcf", label=label)


def _ticks(table: pd.DataFrame) -> list[int]:
    layers = sorted(table["layer"].unique().tolist())
    return layers[:: max(1, len(layers) // 8)]
