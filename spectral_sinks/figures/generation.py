"""Figure of the effect of filters on generated text."""

from pathlib import Path

import pandas as pd

from spectral_sinks.figures.style import STYLES, mean_line, saved_figure


def generation(table: pd.DataFrame, path: Path, new: int) -> None:
    """Draw repetition, loops, their onset and the untouched model's NLL against the share of directions
    removed.

    `table`: `filter`, `removed`, `decoding`, `measure`, `mean`, `low`, `high`, and `least`, `most` of Rnd.
    `new` is the number of generated tokens.
    """
    panels = {
        "loops": "share of texts that loop",
        "onset": f"tokens before the loop\n(none: {new})",
        "seq_rep_4": "share of repeated 4-grams\n(seq-rep-4)",
        "rep_1": "share of repeated tokens\n(rep-1)",
        "nll_untouched": "untouched model's NLL\nof the text (nats per token)",
    }
    limits = {"loops": (-0.03, 1), "onset": (0, 1.05 * new)}
    decodings = list(table["decoding"].unique())
    with saved_figure(
        path, len(decodings), len(panels), (12.5, 2.2 * len(decodings) + 0.4), sharex=True
    ) as axes:
        for row, decoding in enumerate(decodings):
            for axis, (measure, label) in zip(axes[row], panels.items(), strict=True):
                here = table[(table["decoding"] == decoding) & (table["measure"] == measure)]
                base = here[here["filter"] == "untouched"].iloc[0]
                axis.axhline(base["mean"], color="#444444", linewidth=0.8, linestyle=":", label="untouched")
                for place, (name, style) in enumerate(STYLES.items()):
                    part = here[here["filter"] == name].sort_values("removed")
                    if part.empty:
                        continue
                    x = 100 * part["removed"] + 0.35 * (place - 1)
                    if name == "Rnd":
                        axis.fill_between(100 * part["removed"], part["least"], part["most"], color="#d4d4d4")
                        axis.plot(100 * part["removed"], part["mean"], label="Rnd (mean, range)", **style)
                    else:
                        mean_line(axis, x, part, name, style)
                axis.set_ylabel(label)
                if measure in limits:
                    axis.set_ylim(*limits[measure])
                if row == len(decodings) - 1:
                    axis.set_xlabel("share of directions removed (%)")
            axes[row, 0].set_title(decoding, loc="left", fontsize=8, fontweight="bold")
        handles = axes[0, 0].get_legend_handles_labels()
        axes[0, 0].figure.legend(*handles, loc="outside upper center", ncols=5, fontsize=7)
