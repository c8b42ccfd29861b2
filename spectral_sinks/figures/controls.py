"""Figures of controls: an effect beside the distributions to which it is compared."""

from pathlib import Path

import pandas as pd

from spectral_sinks.figures.style import FIRST, STYLES, mean_line, saved_figure

CONTROLS = {
    "dark": "dark band",
    "same rank": "random, same rank",
    "same energy": "random, same energy",
    "other directions": "dark put on other directions",
    "dark, norm restored": "dark, norm restored",
    "same rank, norm restored": "random, norm restored",
    "no-op": "no-op",
}


def controls(table: pd.DataFrame, tests: pd.DataFrame, layer: int, path: Path) -> None:
    """Draw every control at one exit, and the paired excess of the dark band over the draws at every exit.

    The controls at one exit are shown for all tokens and for the first token. `table`: layer, tokens,
    control, draw, mean, low, high. `tests`: layer, tokens, observed, control, excess, low, high. `layer` is
    the one exit.
    """
    places = list(table.loc[table["layer"] == layer, "tokens"].unique())
    with saved_figure(path, 1, len(places) + 1, (3.7 * (len(places) + 1), 3.2)) as axes:
        for axis, tokens in zip(axes[0], places, strict=False):
            here = table[(table["layer"] == layer) & (table["tokens"] == tokens)]
            names = [name for name in CONTROLS if name in set(here["control"])]
            for place, name in enumerate(names):
                part = here[here["control"] == name]
                if (part["draw"] != "").all():
                    axis.scatter(
                        part["mean"], [place] * len(part), color="#444444", marker="|", linewidth=0.8
                    )
                else:
                    errors = [(part["mean"] - part["low"]).clip(0), (part["high"] - part["mean"]).clip(0)]
                    axis.errorbar(part["mean"], [place], xerr=errors, color="#000000", marker="o", capsize=2)
            axis.axvline(0, color="#444444", linewidth=0.6)
            axis.set_yticks(range(len(names)), [CONTROLS[name] for name in names])
            axis.invert_yaxis()
            where = "all tokens" if tokens == "all" else f"{tokens} token alone"
            axis.set_title(f"exit of layer {layer}, {where}", fontsize=8)
            axis.set_xlabel("NLL above untouched (nats)")
        axis, whole = axes[0, -1], tests[(tests["tokens"] == "all") & (tests["observed"] == "dark")]
        for shift, name, style in ((-0.08, "same rank", STYLES["Phi"]), (0.08, "same energy", STYLES["Psi"])):
            part = whole[whole["control"] == name].sort_values("layer")
            part = part.assign(mean=part["excess"])
            mean_line(
                axis, part["layer"] + shift, part, f"minus random, {name}", style | {"linestyle": "none"}
            )
        axis.axhline(0, color="#444444", linewidth=0.6)
        axis.set(xlabel="exit of layer", ylabel="dark minus mean of the draws (nats)")
        axis.set_xticks(sorted(whole["layer"].unique()))
        low, high = axis.get_ylim()
        axis.set_ylim(low, high + 0.25 * (high - low))
        axis.legend(loc="upper center")


MANY = 14
"""Number of places from which on the names of layers are numbers."""


def reads(table: pd.DataFrame, below: int, path: Path) -> None:
    """Draw the cost, and the share of the sink that is left, when one component reads no dark band, beside
    random draws.

    `table`: site, place ("layer N", "above", "all layers", "reference", ...), draw ("dark" or a number),
    mean, low, high, sink_left. `below` is the exit of the reference.
    """
    kinds = [kind for kind in table["site"].unique() if kind not in ("exit", "all four")]
    styles = dict(zip(kinds, (FIRST, STYLES["Psi"], STYLES["Omega"], STYLES["Rnd"]), strict=False))
    places = [place for place in table["place"].unique() if place != "reference"]
    dark, random = table[table["draw"] == "dark"], table[table["draw"] != "dark"]
    reference = dark[dark["place"] == "reference"].iloc[0]
    with saved_figure(path, 2, 1, (max(9, 0.36 * len(places)), 5.4), sharex=True) as axes:
        for axis, value in ((axes[0, 0], "mean"), (axes[1, 0], "sink_left")):
            for index, kind in enumerate([*kinds, "all four"]):
                style = styles.get(kind, {"color": "#000000", "marker": "D"}) | {"linestyle": "none"}
                for place in places:
                    row = dark[(dark["site"] == kind) & (dark["place"] == place)]
                    if row.empty or row[value].isna().any():
                        continue
                    x = places.index(place) + (index - 2) * 0.16
                    label = kind if place == ("above" if kind == "all four" else places[0]) else ""
                    if value == "mean":
                        mean_line(axis, [x], row, label, style)
                    else:
                        axis.plot([x], row[value], label=label, **style)
                    draws = random[(random["site"] == kind) & (random["place"] == place)][value]
                    marks = {"color": "#777777", "marker": "_", "s": 22, "linewidth": 0.5}
                    axis.scatter([x + 0.05] * len(draws), draws, **marks)
            if pd.notna(reference[value]):
                axis.axhline(reference[value], color="#444444", linewidth=0.8, linestyle="--")
        axes[0, 0].axhline(0, color="#444444", linewidth=0.5)
        if reference[["low", "high"]].notna().all():
            axes[0, 0].axhspan(reference["low"], reference["high"], color="#e4e4e4", zorder=0)
        axes[0, 0].set_ylabel("NLL above untouched (nats)")
        axes[0, 0].set_title(
            f"dark band withheld from one reader (dashed: removed at exit {below}; ticks: random)", fontsize=8
        )
        axes[0, 0].legend(fontsize=7, ncols=5, loc="upper left")
        axes[1, 0].set(ylabel="share of the sink left", ylim=(0, None))
        note = "single layer: the first layer affected; several: mean of the layers above the exit"
        axes[1, 0].set_title(note, fontsize=8)
        shown = [place.replace("above", f"above\nexit {below}").replace(", ", ",\n") for place in places]
        axes[1, 0].set_xticks(range(len(places)), shown)
        if len(places) > MANY:
            axes[1, 0].set_xticks(range(len(places)), [place.removeprefix("layer ") for place in places])
            for place, tick in zip(places, axes[1, 0].get_xticklabels(), strict=True):
                tick.set(rotation=0 if place.startswith("layer ") else 90, fontsize=7)
            axes[1, 0].set_xlabel(f"layer that reads, or several layers (above exit {below})")
