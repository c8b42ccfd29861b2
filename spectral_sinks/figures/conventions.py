"""Figure of the conventions: the dark share of the sink by layer, and what removing the dark band does."""

from pathlib import Path
from typing import Any

import pandas as pd

from spectral_sinks.figures.style import mean_line, saved_figure
from spectral_sinks.stats import summarise

LINES: dict[tuple[str, str], dict[str, Any]] = {
    ("folded", "share"): {"color": "#000000", "linestyle": "-", "marker": "o"},
    ("folded", "others"): {"color": "#8a8a8a", "linestyle": "-", "marker": "o", "markerfacecolor": "white"},
    ("raw", "share"): {"color": "#b5452c", "linestyle": "--", "marker": "s"},
    ("raw", "others"): {"color": "#d9a79b", "linestyle": "--", "marker": "s", "markerfacecolor": "white"},
}
NAMES = {"share": "position 0", "others": "other tokens"}

EDITS = {
    "raw dark": "raw dark band",
    "folded dark": "folded dark band",
    "raw dark, mean": "raw dark band set to its mean",
    "folded dark, mean": "folded dark band set to its mean",
    "largest channel": "largest channel",
    "folded dark without the channel": "folded dark band without it",
    "same rank": "random, same rank",
    "same energy": "random, same energy",
}


def conventions(shares: pd.DataFrame, effects: pd.DataFrame, path: Path, *, model: str, layer: int) -> None:
    """Draw the dark share by exit under raw and folded, and removals at the first token of one exit.

    Args:
        shares: layer (-1: the embedding), document, convention, share, others, random_least, random_most.
        effects: layer, tokens, edit, draw, delta_nll, low, high, mass_above, baseline_mass_above.
        path: the PNG file.
        model: the name of the model, for the title.
        layer: the exit whose removals are drawn.

    """
    here = effects[(effects["layer"] == layer) & (effects["tokens"] == "first")]
    names = [name for name in EDITS if name in set(here["edit"])]
    with saved_figure(path, 1, 3, (11, 3.2), width_ratios=(1.3, 1, 1)) as axes:
        axis = axes[0, 0]
        for (convention, column), style in LINES.items():
            part = shares[shares["convention"] == convention]
            by_layer = summarise(part, ["layer"], column)
            mean_line(axis, by_layer["layer"], by_layer, f"{NAMES[column]}, {convention}", style)
        band = shares.groupby("layer")[["random_least", "random_most"]].mean()
        axis.fill_between(
            band.index, band["random_least"], band["random_most"], color="#cccccc", label="random subspaces"
        )
        axis.set(xlabel="exit of layer (-1: embedding)", ylabel="share of the energy in the dark band")
        axis.set_ylim(-0.02, 1.02)
        axis.set_title(f"{model}: last 5 % of the spectrum", fontsize=8)
        axis.legend(fontsize=6.5)
        for axis, column, label in (
            (axes[0, 1], "delta_nll", "NLL above untouched (nats per token)"),
            (axes[0, 2], "mass_above", "attention to position 0 in the layers above"),
        ):
            for place, name in enumerate(names):
                part = here[here["edit"] == name]
                if (part["draw"] != "").all():
                    axis.scatter(
                        part[column], [place] * len(part), color="#444444", marker="|", linewidth=0.8
                    )
                elif column == "delta_nll":
                    errors = [(part[column] - part["low"]).clip(0), (part["high"] - part[column]).clip(0)]
                    axis.errorbar(part[column], [place], xerr=errors, color="#000000", marker="o", capsize=2)
                else:
                    axis.plot(part[column], [place], color="#000000", marker="o")
            untouched = 0 if column == "delta_nll" else here["baseline_mass_above"].iloc[0]
            axis.axvline(untouched, color="#444444", linewidth=0.6, linestyle=":")
            axis.set_yticks(
                range(len(names)), [EDITS[name] for name in names] if column == "delta_nll" else []
            )
            axis.invert_yaxis()
            axis.set_xlabel(label)
            axis.set_title(f"removed at the first token, exit {layer}", fontsize=8)
