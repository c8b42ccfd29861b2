"""Figure of a model without BOS: where attention goes, and whether the tokens that receive it are dark."""

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.ticker import MaxNLocator

from spectral_sinks.figures.style import FIRST, OTHER, STYLES, mean_line, saved_figure


def no_bos(
    layer: pd.DataFrame, place: pd.DataFrame, token: pd.DataFrame, cost: pd.DataFrame, path: Path
) -> None:
    """Draw relative attention by position, the most attended tokens, their darkness, and the NLL without it.

    The first model in `layer` is the one without BOS.

    Args:
        layer: model, layer, excess, low, high, random_low, random_high.
        place: model, position, mean.
        token: model, text, top, rate, sorted by `top`, largest first.
        cost: layer, and for each of "most attended", "matched" and "random" the mean, `_low` and `_high`.
        path: the PNG to write.

    """
    names = list(layer["model"].unique())
    styles = dict(zip(names, (FIRST, OTHER), strict=False))
    with saved_figure(path, 2, 2, (8.5, 6)) as axes:
        axis = axes[0, 0]
        for name, style in styles.items():
            part = place[place["model"] == name]
            axis.semilogx(part["position"] + 1, part["mean"], label=name, **{**style, "marker": ""})
            axis.semilogx([1], part["mean"].iloc[:1], **style)
        axis.axhline(1, color="#444444", linewidth=0.7, linestyle=":", label="uniform attention")
        axis.set(xlabel="position, counted from 1", ylabel="attention received over uniform")
        axis.legend(fontsize=7)

        axis = axes[0, 1]
        most = token[token["model"] == names[0]].head(15)
        rows = np.arange(len(most))
        axis.barh(rows, most["top"], color="#8a8a8a")
        for row, (count, rate) in enumerate(zip(most["top"], most["rate"], strict=True)):
            axis.text(count, row, f" {rate:.0%}", va="center", fontsize=6)
        axis.set_yticks(rows, [repr(text).replace("$", r"\$") for text in most["text"]], fontsize=7)
        axis.invert_yaxis()
        axis.margins(x=0.15)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set(xlabel=f"times among the most attended 5 % of {names[0]}\n(label: of all its pairs)")

        axis = axes[1, 0]
        null = layer[layer["model"] == names[0]]
        axis.fill_between(
            null["layer"],
            null["random_low"],
            null["random_high"],
            color="#d4d4d4",
            label=f"{names[0]}, random subspaces",
        )
        for shift, (name, style) in zip((-0.04, 0.04), styles.items(), strict=False):
            part = layer[layer["model"] == name]
            mean_line(axis, part["layer"] + shift, part.assign(mean=part["excess"]), name, style)
        axis.axhline(0, color="#444444", linewidth=0.7, linestyle=":")
        axis.set(xlabel="layer that reads", ylabel="dark share of the most attended\nabove matched tokens")
        low, high = axis.get_ylim()
        axis.set_ylim(low, high + 0.3 * (high - low))
        axis.legend(fontsize=7, loc="upper left")

        axis = axes[1, 1]
        shapes = (
            ("most attended", "most attended", FIRST),
            ("matched", "as many matched tokens", STYLES["Psi"]),
            ("random", "most attended, random subspaces", OTHER),
        )
        for shift, (kind, shown, style) in zip((-0.08, 0, 0.08), shapes, strict=True):
            part = cost[[kind, f"{kind}_low", f"{kind}_high"]].set_axis(["mean", "low", "high"], axis=1)
            mean_line(axis, cost["layer"] + shift, part, shown, style)
        axis.axhline(0, color="#444444", linewidth=0.7, linestyle=":")
        axis.set(xlabel="layer that reads", ylabel="NLL without the dark band there\nabove untouched (nats)")
        low, high = axis.get_ylim()
        axis.set_ylim(low, high + 0.35 * (high - low))
        axis.legend(fontsize=7, loc="upper left")
