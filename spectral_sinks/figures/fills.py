"""Figures of swaps and other fills, and of how much of the spectrum can be deleted."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from spectral_sinks.figures.style import mean_line, saved_figure

DRAWN: dict[str, Any] = {"color": "#555555", "marker": "_", "linewidth": 0.5, "zorder": 1}
"""Style of random draws: ticks beside a measured value."""

WAYS: dict[str, dict[str, Any]] = {
    "zero": {"color": "#000000", "linestyle": "-", "marker": "o"},
    "mean": {"color": "#2b6ca3", "linestyle": "-.", "marker": "^"},
    "swap": {"color": "#b5452c", "linestyle": "--", "marker": "s"},
    "noise": {"color": "#8a8a8a", "linestyle": ":", "marker": "x"},
    "zero, first token": {"color": "#2b6ca3", "linestyle": "-.", "marker": "^"},
    "zero, all but first": {"color": "#8a8a8a", "linestyle": ":", "marker": "x"},
    "swap, all but first": {"color": "#d08a6e", "linestyle": (0, (1, 1)), "marker": "D"},
}


def swap(ladder: pd.DataFrame, steps: pd.DataFrame, path: Path, bands: int) -> None:
    """Draw the ladder at one exit and the step of the last band at every exit, by fill and selected tokens.

    Each setting has a row of panels. `ladder`: setting, layer, way, filter, kept, mean, low, high. `steps`:
    setting, layer, way, step, mean, low, high.
    """
    settings = list(steps["setting"].unique())
    with saved_figure(path, len(settings), 2, (9, 2.7 * len(settings) + 0.2)) as axes:
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
                mean_line(left, part["kept"], part, way, WAYS[way])
                offset = (place - (len(ways) - 1) / 2) * 0.14
                rows = test[test["way"] == way].sort_values("layer")
                style = WAYS[way] | {"linestyle": "none"}
                mean_line(right, rows["layer"] + offset, rows, way, style)
                draws = random[random["way"] == way]["mean"]
                label = f"{len(draws)} random subspaces" if place == 0 else ""
                right.scatter([layer + offset + 0.05] * len(draws), draws, s=28, label=label, **DRAWN)
            # axes: the ladder on the left, the last step on the right
            left.set_yscale("symlog", linthresh=0.1)
            left.set(xlabel=f"bands kept (of {bands})", ylabel="NLL above untouched (nats)")
            left.set_title(f"{setting}: ladder at the exit of layer {layer}", fontsize=8)
            right.axhline(0, color="#444444", linewidth=0.6)
            right.set(xlabel="exit of layer", ylabel="NLL step of the last band (nats)")
            right.set_xticks(sorted(test["layer"].unique()))
            left.xaxis.get_major_locator().set_params(integer=True)
            low, high = right.get_ylim()
            right.set_ylim(low, high + 0.35 * (high - low))
            left.legend(fontsize=7)
            right.set_title(f"{setting}: the last step", fontsize=8)
        axes[0, 1].legend(fontsize=7, ncols=2, loc="upper center")


def fills(table: pd.DataFrame, path: Path, bands: int) -> None:
    """Draw, by exit, the ladder under each fill, the sink above the exit, and the last band beside random
    subspaces.

    `table`: layer, fill, filter ("Phi", "random N", "seed N"), kept, mean, low, high, sink, baseline_sink.
    """
    layers = list(table["layer"].unique())
    names = [name for name in WAYS if name in set(table["fill"])]
    with saved_figure(path, len(layers), 3, (10.5, 2.8 * len(layers))) as axes:
        for (left, middle, right), layer in zip(axes, layers, strict=True):
            here = table[table["layer"] == layer]
            for place, name in enumerate(names):
                part = here[(here["fill"] == name) & (here["filter"] == "Phi")].sort_values("kept")
                mean_line(left, part["kept"], part, name, WAYS[name])
                if part["sink"].notna().any():
                    middle.plot(part["kept"], part["sink"], label=name, **WAYS[name])
                last = part[part["kept"] == bands - 1]
                mean_line(right, [place], last, "", WAYS[name] | {"linestyle": "none", "color": "#000000"})
                for which, shift, mark in (("random", 0.2, "_"), ("seed", -0.2, "+")):
                    draws = here[(here["fill"] == name) & here["filter"].str.startswith(which)]["mean"]
                    label = {"random": "random subspaces", "seed": "other seeds"}[which]
                    if len(draws):
                        style = DRAWN | {"marker": mark}
                        right.scatter([place + shift] * len(draws), draws, s=28, label=label, **style)
            if here["baseline_sink"].notna().any():
                middle.axhline(here["baseline_sink"].iloc[0], color="#444444", linewidth=0.7, linestyle=":")
            else:
                middle.text(0.5, 0.5, "no layer above", ha="center", transform=middle.transAxes)
            left.set_ylabel("NLL above untouched (nats)")
            left.set_yscale("symlog", linthresh=0.05)
            left.set_title(f"exit of layer {layer}", fontsize=8)
            middle.set(ylabel="mean $\\alpha_1$ of the layers above\n(dotted: untouched)", ylim=(0, None))
            for axis in (left, middle):
                axis.set_xlabel(f"bands kept (of {bands})")
                axis.xaxis.get_major_locator().set_params(integer=True)
            right.set_ylabel(f"NLL above untouched, {bands - 1} kept (nats)")
            right.set_xticks(range(len(names)), names)
        axes[0, 0].legend()
        handles, labels = axes[0, 2].get_legend_handles_labels()
        shown = dict(zip(labels, handles, strict=True))
        axes[0, 2].legend(shown.values(), shown.keys(), fontsize=7)


def sink_preserving(table: pd.DataFrame, within: pd.DataFrame, plans: pd.DataFrame, path: Path) -> None:
    """Draw NLL against the share deleted, the largest share within each budget by exit, and schedules over
    layers.

    `table`: where, kind, share, mean, low, high. `within`: where, kind, budget, mean, low, high. `plans`:
    kind, budget, share, mean, low, high, chosen_at.
    """
    kinds = list(within["kind"].unique())
    styles = dict(zip(kinds, (WAYS["mean"], WAYS["zero"], WAYS["swap"]), strict=False))
    places, budgets = list(within["where"].unique()), sorted(within["budget"].unique())
    with saved_figure(path, 2, 3, (11, 5.8)) as axes:
        # NLL against the share deleted, at the first and the last choice of exits
        for axis, where in zip(axes[0], dict.fromkeys([places[0], places[-1]]), strict=False):
            here = table[table["where"] == where]
            for kind in kinds:
                part = here[here["kind"] == kind].sort_values("share")
                mean_line(axis, part["share"], part, kind, styles[kind])
            draws = here[here["kind"].str.startswith("random")]
            x = 1.12 * draws["share"]
            axis.scatter(x, draws["mean"], s=28, label="random kept instead of the tail", **DRAWN)
            axis.set(xlabel="share of the directions deleted", ylabel="NLL above untouched (nats)")
            axis.set_xscale("log")
            axis.set_yscale("symlog", linthresh=0.05)
            axis.set_ylim(bottom=0)
            axis.set_title(where, fontsize=8)
        axes[0, 0].legend(fontsize=7)
        # largest share within each budget, the largest budget first
        for axis, budget in zip([axes[0, 2], *axes[1, :2]], budgets[-1:] + budgets[:-1], strict=False):
            for place, kind in enumerate(kinds):
                part = within[(within["kind"] == kind) & (within["budget"] == budget)]
                x = np.arange(len(part)) + (place - 1) * 0.2
                mean_line(axis, x, part, kind, styles[kind] | {"linestyle": "none"})
            names = [name.replace("exit ", "").replace("all exits", "all") for name in places]
            axis.set_xticks(range(len(places)), names)
            axis.set(xlabel="exit of layer", ylabel=f"largest share within +{budget:g} nats")
            axis.set_ylim(bottom=-0.05 * axis.get_ylim()[1])
        # schedules over layers
        axis = axes[1, 2]
        cross = {"color": "#000000", "marker": "+", "markersize": 7, "linestyle": "none"}
        for kind, style in (("greedy", WAYS["mean"]), ("one depth", WAYS["zero"])):
            part = plans[plans["kind"] == kind].sort_values("share")
            mean_line(axis, part["share"], part, f"{kind}, held-out documents", style)
            axis.plot(part["share"], part["chosen_at"], **cross)
        draws = plans[plans["kind"].str.startswith("random")]
        axis.scatter(draws["share"], draws["mean"], s=28, label="random of the greedy ranks", **DRAWN)
        axis.plot([], [], label="where it was chosen", **cross)
        axis.set(xlabel="share of all exits' directions deleted", ylabel="NLL above untouched (nats)")
        axis.legend(fontsize=7)
