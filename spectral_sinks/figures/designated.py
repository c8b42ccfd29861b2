"""Figures of sinks at a chosen position: by attention edits after training, and by training."""

from pathlib import Path

import numpy as np
import pandas as pd

from spectral_sinks.figures.style import STYLES, saved_figure

PANELS = {
    "heldout_nll": "held-out NLL (nats)",
    "mass": "attention to the chosen position,\nstrongest layer (+: uniform)",
    "norm_ratio": "its norm / median\nof the others",
    "share": "its share in the dark band\n(triangles: others; grey: random)",
    "to_sink_logit": "attention to the further\nlogit of the softmax",
}


def designated(tried: pd.DataFrame, where: pd.DataFrame, position: int, old: int, path: Path) -> None:
    """Draw the cost and the attention of every edit tried, and the attention by position before and after.

    Args:
        tried: name, works, delta_nll, delta_nll_low, delta_nll_high, mass, old_mass; the first row is on top.
        where: position, layer, before, after.
        position: the position of the chosen sink.
        old: the position of the old sink.
        path: the PNG to write.

    """
    places = np.arange(len(tried))[::-1]
    with saved_figure(path, 1, 3, (11, 1.4 + 0.26 * len(tried))) as axes:
        cost, mass, over = axes[0]
        errors = [(tried["delta_nll"] - tried["delta_nll_low"]).clip(0)]
        errors.append((tried["delta_nll_high"] - tried["delta_nll"]).clip(0))
        works = tried["works"].astype(bool)
        for chosen, marker, label in ((works, "o", "works"), (~works, "x", "does not")):
            here = [error[chosen] for error in errors]
            style = {"color": "#000000", "marker": marker, "linestyle": "none", "capsize": 2}
            cost.errorbar(tried["delta_nll"][chosen], places[chosen], xerr=here, label=label, **style)
        cost.set_yticks(places, tried["name"])
        cost.axvline(0, color="#444444", linewidth=0.6)
        cost.set_xlabel("NLL above untouched (nats)")
        cost.legend()
        mass.plot(
            tried["mass"], places, label=f"position {position}", **STYLES["Phi"] | {"linestyle": "none"}
        )
        mass.plot(
            tried["old_mass"], places, label=f"old sink ({old})", **STYLES["Psi"] | {"linestyle": "none"}
        )
        mass.set_yticks(places, [""] * len(places))
        mass.set_xlabel("attention received,\nmean over layers and heads")
        mass.legend()
        mean = where.groupby("position")[["before", "after"]].mean()
        over.plot(mean.index, mean["before"], color="#777777", label="before")
        over.plot(mean.index, mean["after"], color="#000000", linestyle="--", label="after")
        over.set(xlabel="position", ylabel="attention received")
        over.set_yscale("log")
        over.legend()


def variants(table: pd.DataFrame, path: Path) -> None:
    """Draw NLL, attention, norm and darkness at the intended sink of each kind of run, with one dot per run.

    `table`: kind, heldout_nll, mass, uniform, norm_ratio, share, others, share_most, to_sink_logit.
    """
    kinds = list(dict.fromkeys(table["kind"]))
    places = table["kind"].map(kinds.index)
    with saved_figure(path, 1, len(PANELS), (12.5, 1.2 + 0.36 * len(kinds)), sharey=True) as axes:
        for axis, (column, label) in zip(axes[0], PANELS.items(), strict=True):
            if column == "share":
                axis.barh(
                    range(len(kinds)),
                    table.groupby("kind")["share_most"].max().reindex(kinds),
                    height=0.6,
                    color="#d4d4d4",
                )
                axis.plot(table["others"], places, "v", color="#777777", markersize=4)
            if column == "mass":
                axis.plot(table["uniform"], places, "+", color="#777777")
            axis.plot(table[column], places, "o", color="#000000", markersize=4, markerfacecolor="none")
            axis.set_xlabel(label)
            if column != "heldout_nll":
                axis.set_xlim(left=-0.02 * axis.get_xlim()[1])
        axes[0, 0].set_yticks(range(len(kinds)), kinds)
        axes[0, 0].invert_yaxis()


def tuned(table: pd.DataFrame, path: Path) -> None:
    """Draw NLL and attention to position 0 and to the strongest other position, with one dot per run.

    Each run has one dot with the first key visible and one with it masked. `table`: kind, first_key, nll,
    first, strongest_other.
    """
    kinds = list(dict.fromkeys(table["kind"]))
    panels = {
        "nll": "NLL (nats per token)",
        "first": "attention to position 0",
        "strongest_other": "attention to the strongest other",
    }
    marks = {"visible": ("o", -0.12, "first key visible"), "masked": ("s", 0.12, "first key masked")}
    with saved_figure(path, 1, 3, (10, 1.3 + 0.4 * len(kinds)), sharey=True) as axes:
        for axis, (column, label) in zip(axes[0], panels.items(), strict=True):
            for key, (marker, shift, name) in marks.items():
                part = table[table["first_key"] == key]
                places = part["kind"].map(kinds.index) + shift
                style = {"color": "#000000", "markersize": 4, "linestyle": "none"}
                fill = {"markerfacecolor": "none" if key == "masked" else "#000000"}
                axis.plot(part[column], places, marker, label=name, **style, **fill)
            axis.set_xlabel(label)
            if column != "nll":
                axis.set_xlim(left=-0.02 * axis.get_xlim()[1])
        axes[0, 0].set_yticks(range(len(kinds)), kinds)
        axes[0, 0].invert_yaxis()
        axes[0, 2].legend(fontsize=7)
