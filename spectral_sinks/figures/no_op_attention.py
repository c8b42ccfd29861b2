"""The attention of an encoder to candidates for a sink, by layer and by head."""

from pathlib import Path

import pandas as pd

from spectral_sinks.figures.style import FIRST, OTHER, saved_figure

NAMES = {
    "cls": "[CLS]",
    "patch": "the patch that draws most",
    "sep": "[SEP]",
    "random": "a random patch or word",
}
STYLES = {
    "cls": FIRST,
    "patch": OTHER,
    "sep": OTHER,
    "random": {"color": "#2b6ca3", "linestyle": ":", "marker": "x"},
}
TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
ROOM = 1.6
"""Height of a panel over its largest value, so that the legend covers no point."""
LIMIT = {"color": "#b5452c", "linewidth": 0.8, "linestyle": "--"}


def no_op_attention(layers: pd.DataFrame, heads: pd.DataFrame, path: Path) -> None:
    """Draw the attention by layer and kind of token, and each head by its value ratio; one row per size.

    `layers` and `heads` are the tables that `experiments/real/dinov2.py` and `minilm.py` write.
    """
    sizes = list(dict.fromkeys(layers["size"]))
    with saved_figure(path, len(sizes), 2, (6.6, 2.6 * len(sizes))) as axes:
        for (left, right), size in zip(axes, sizes, strict=True):
            shown = layers["kind"].isin(list(NAMES)) & (layers["set"] == "all")
            here = layers[shown & (layers["size"] == size)]
            for kind, name in NAMES.items():
                one = here[here["kind"] == kind]
                if one.empty:
                    continue
                spread = [one["attention"] - one["attention_low"], one["attention_high"] - one["attention"]]
                left.errorbar(
                    one["layer"], one["attention"], yerr=spread, label=name, capsize=1.5, **STYLES[kind]
                )
            top = ROOM * here["attention_high"].max()
            left.set(xlabel="layer", ylabel="attention received", ylim=(0, top))
            unit, things = ("pixels", "pictures") if "pictures" in here else ("tokens", "documents")
            left.set_title(f"{size} {unit}, {here[things].iloc[0]} {things}")
            left.legend(loc="upper right")
            for kind in dict.fromkeys(heads["kind"]):
                one = heads[(heads["size"] == size) & (heads["kind"] == kind)]
                style = {**STYLES[kind], "linestyle": ""}
                right.plot(one["value_ratio"], one["attention"], label=NAMES[kind], **style)
            right.axvline(0.2, **LIMIT)
            right.axhline(0.3, **LIMIT)
            right.set(xscale="log", xlabel="value ratio of the token", ylabel="attention to it, by head")
            ratios = heads.loc[heads["size"] == size, "value_ratio"]
            low, high = ratios.min() / 1.5, ratios.max() * 1.5
            ticks = [tick for tick in TICKS if low < tick < high]
            right.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
            right.set_xlim(low, high)
            right.minorticks_off()
            right.set_title("a no-op lies in the upper left corner")
            right.set_ylim(None, ROOM * heads.loc[heads["size"] == size, "attention"].max())
            right.legend(loc="upper right")
