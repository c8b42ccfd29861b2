"""Figure of E-dark and U-dark: overlap and effect."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from spectral_sinks.figures.style import FIRST, OTHER, STYLES, mean_line, saved_figure


def eu_dark(
    table: pd.DataFrame, overlap: pd.DataFrame, alignment: pd.DataFrame, layer: int, path: Path
) -> None:
    """Draw principal cosines and alignment by band of both tails, and the cost of removing each tail or part
    of it.

    Args:
        table: name, layer, random, rank, energy, delta_nll, low, high, sink_cut, sink_cut_low, sink_cut_high.
        overlap: pair, cosine, random_low, random_high.
        alignment: tail, band, share, random_low, random_high.
        layer: the exit of the lower panels.
        path: the PNG to write.

    """
    with saved_figure(path, 2, 3, (11, 6)) as axes:
        axis = axes[0, 0]
        axis.fill_between(
            overlap["pair"],
            overlap["random_low"],
            overlap["random_high"],
            color="#cfcfcf",
            label="random, range",
        )
        axis.plot(overlap["pair"], overlap["cosine"], label="E-dark and U-dark", **FIRST)
        axis.set(xlabel="principal pair", ylabel="cosine of the principal angle", ylim=(0, 1))
        axis.legend()

        axis = axes[0, 1]
        tails = list(alignment["tail"].unique())
        null = alignment.groupby("band")[["random_low", "random_high"]].agg(
            {"random_low": "min", "random_high": "max"}
        )
        axis.fill_between(
            null.index, null["random_low"], null["random_high"], color="#cfcfcf", label="random, range"
        )
        for tail, style in zip(tails, (FIRST, STYLES["Psi"]), strict=True):
            part = alignment[alignment["tail"] == tail]
            other = "U" if tail.startswith("E") else "E"
            axis.plot(part["band"], part["share"], label=f"{tail} in bands of {other}", **style)
        axis.set(xlabel="band (last is darkest)", ylabel="share of the tail's energy", ylim=(0, None))
        axis.legend()

        axis = axes[0, 2]
        draws = table[table["random"] & (table["rank"] == table[table["name"] == "U-dark"]["rank"].iloc[0])]
        spread = draws.groupby("layer")["delta_nll"].agg(["min", "max"])
        axis.fill_between(
            spread.index, spread["min"], spread["max"], color="#cfcfcf", label="random, U-dark's rank"
        )
        for name, style in (("U-dark", FIRST), ("E-dark", STYLES["Psi"]), ("union", STYLES["Omega"])):
            part = table[table["name"] == name].sort_values("layer").rename(columns={"delta_nll": "mean"})
            mean_line(axis, part["layer"], part, name, style)
        axis.set(xlabel="exit of layer", ylabel="NLL above untouched (nats)")
        low, high = axis.get_ylim()
        axis.set_ylim(low, high + 0.35 * (high - low))
        axis.legend(loc="upper left", ncols=2)

        here = table[table["layer"] == layer]
        named = here[~here["random"]]
        for axis, column, low, high, label in (
            (axes[1, 0], "delta_nll", "low", "high", "NLL above untouched (nats)"),
            (axes[1, 1], "sink_cut", "sink_cut_low", "sink_cut_high", "sink mass cut, next layer (share)"),
        ):
            errors = np.clip([named[column] - named[low], named[high] - named[column]], 0, None)
            places = np.arange(len(named))
            axis.bar(places, named[column], color="#8a8a8a", yerr=errors, capsize=2)
            for place, rank in zip(places, named["rank"], strict=True):
                null = here[here["random"] & (here["rank"] == rank)][column]
                axis.scatter([place] * len(null), null, color="black", marker="_", s=70, linewidth=0.6)
            names = [f"{name} ({rank})" for name, rank in zip(named["name"], named["rank"], strict=True)]
            axis.set_xticks(places, names, rotation=40, ha="right", rotation_mode="anchor", fontsize=7)
            axis.axhline(0, color="black", linewidth=0.5)
            axis.set(ylabel=label, title=f"exit {layer} (rank removed; marks: random of that rank)")
            axis.title.set_fontsize(8)

        axis = axes[1, 2]
        null = here[here["random"]]
        axis.scatter(null["energy"], null["delta_nll"], s=12, label="random subspaces", **_dots(OTHER))
        axis.scatter(named["energy"], named["delta_nll"], s=16, label="tails and parts", **_dots(FIRST))
        for _, row in named[named["name"].isin(["U-dark", "E-dark", "union"])].iterrows():
            spot = (row["energy"], row["delta_nll"])
            axis.annotate(row["name"], spot, xytext=(4, -8), textcoords="offset points", fontsize=7)
        axis.set(xlabel="share of energy removed (mean over tokens)", ylabel="NLL above untouched (nats)")
        axis.set_title(f"exit {layer}", fontsize=8)
        axis.legend()


def _dots(style: dict[str, Any]) -> dict[str, Any]:
    return {"color": style["color"], "marker": style["marker"]}
