"""Figure of the question whether there is one sink or several."""

from pathlib import Path

import pandas as pd
from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter

from spectral_sinks.figures.fills import DRAWN, WAYS
from spectral_sinks.figures.style import mean_line, saved_figure

MOVES = {
    "untouched": {"color": "#000000", "linestyle": "-", "marker": ""},
    "key masked": {"color": "#b5452c", "linestyle": "--", "marker": "s"},
    "weight dropped": {"color": "#8a8a8a", "linestyle": ":", "marker": "x"},
    "dark removed, BOS alone": {"color": "#2b6ca3", "linestyle": "-.", "marker": "^"},
    "dark removed, all tokens": {"color": "#7ba7cc", "linestyle": (0, (1, 1)), "marker": "D"},
}

SETS = {
    "first": ("the first tokens", "zero", 0.0),
    "next": ("those after BOS", "swap", 0.1),
    "others": ("other positions", "noise", 0.2),
    "0 and others": ("BOS and other positions", "mean", -0.14),
}


def several(
    interventions: pd.DataFrame,
    positions: pd.DataFrame,
    dark: pd.DataFrame,
    curve: pd.DataFrame,
    stream: pd.DataFrame,
    path: Path,
) -> None:
    """Draw attention by position and heads with another sink under each edit, the dark tokens, and streaming.

    Args:
        interventions: intervention, draw, quantity, mean, low, high.
        positions: intervention, position, attention, uniform.
        dark: quantity, mean.
        curve: share, dark, random_low, random_high, bos.
        stream: kept, which, recent, mean, low, high.
        path: the PNG to write.

    """
    with saved_figure(path, 2, 2, (9.5, 6.2)) as axes:
        # attention received by position, under each edit
        axis = axes[0, 0]
        for name, style in MOVES.items():
            part = positions[positions["intervention"] == name]
            axis.plot(part["position"], part["attention"], label=name, **{**style, "markersize": 2.2})
        even = positions[positions["intervention"] == "untouched"]
        axis.plot(even["position"], even["uniform"], color="#000000", linewidth=0.6, label="uniform")
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(ScalarFormatter())
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.set(xlabel="position k", ylabel="attention received $\\alpha_k$, mean over heads")
        axis.legend(fontsize=7)

        # heads with more than 0.3 on one token, beside the controls of each edit
        axis = axes[0, 1]
        for place, name in enumerate(MOVES):
            here = interventions[interventions["intervention"] == name]
            for shift, end, style in ((-0.15, "at position 0", "zero"), (0.15, "elsewhere", "swap")):
                part = here[here["quantity"] == f"heads above 0.3 {end}"]
                label = end if place == 0 else ""
                own = WAYS[style] | {"linestyle": "none", "markersize": 4.5}
                mean_line(axis, [place + shift], part[part["draw"] == "observed"], label, own)
                draws = part[part["draw"] != "observed"]["mean"]
                label = "the same edit, controls" if place == 1 and shift < 0 else ""
                axis.scatter([place + shift + 0.09] * len(draws), draws, s=28, label=label, **DRAWN)
        axis.set_xticks(
            range(len(MOVES)), [name.replace(", ", ",\n").replace(" ", "\n", 1) for name in MOVES]
        )
        axis.set_ylabel("heads that give more than 0.3 (of a text)")
        axis.legend(fontsize=7, loc="center left")

        # share of tokens whose energy lies in the dark band
        axis = axes[1, 0]
        axis.fill_between(
            curve["share"],
            curve["random_low"],
            curve["random_high"],
            color="#cfcfcf",
            linewidth=0,
            label="random subspaces",
        )
        axis.plot(curve["share"], curve["dark"], color="#000000", label="dark band")
        bos = curve["bos"].iloc[0]
        axis.axvline(bos, color="#b5452c", linestyle="--", label="BOS")
        axis.axvline(bos / 2, color="#b5452c", linestyle=":", label="half of BOS")
        share = dark.set_index("quantity")["mean"]["like_bos"]
        axis.plot([bos / 2], [share], color="#b5452c", marker="o", linestyle="none", clip_on=False)
        axis.set_xlim(0, 1.1 * bos)
        axis.set_yscale("symlog", linthresh=1e-3)
        axis.set(xlabel="x: share of a token's energy", ylabel="share of tokens above x", ylim=(0, 1.05))
        axis.legend(fontsize=7, loc="center", bbox_to_anchor=(0.69, 0.7))

        # streaming: NLL by the number of tokens kept
        axis = axes[1, 1]
        counts = sorted(stream["kept"].unique())
        for which, (label, way, shift) in SETS.items():
            part = stream[stream["which"] == which].sort_values("kept")
            x = part["kept"].map(counts.index) + shift
            if which in ("first", "next"):
                mean_line(axis, x, part, label, WAYS[way])
            else:
                axis.scatter(x, part["mean"], s=40, label=label, **{**DRAWN, "color": WAYS[way]["color"]})
        axis.set_xticks(range(len(counts)), counts)
        axis.axhline(0, color="#444444", linewidth=0.6)
        recent = stream["recent"].iloc[0]
        axis.set(xlabel=f"tokens kept beside the {recent} most recent")
        axis.set_ylabel("NLL above full attention (nats)")
        axis.legend(fontsize=7, ncols=2, loc="upper right")
        axis.set_ylim(top=1.25 * axis.get_ylim()[1])
