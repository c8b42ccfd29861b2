"""Figure of the logit lens by band."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd

from spectral_sinks.figures.style import FIRST, OTHER, mean_line, saved_figure


def lens(table: pd.DataFrame, spread: pd.DataFrame, path: Path) -> None:
    """Draw the NLL of the logit lens by exit as bands are added, and at the last exit its agreement with the
    model.

    At the last exit, one panel has the top-1 agreement as bands are added, and one the KL of every band
    alone. `table`: reading ("bands 1 to k", "band k alone"), layer, band, score (nll, kl, top1), mean, low,
    high. `spread`: the same keys with mean, min and max over random bases, for some bands.
    """
    together, alone = "bands 1 to k", "band k alone"
    layers = sorted(table["layer"].unique().tolist())
    chosen = sorted({layers[round(i)] for i in np.linspace(0, len(layers) - 1, min(7, len(layers)))})
    with saved_figure(path, 1, 3, (11, 3.1)) as axes:
        tones = matplotlib.colormaps["Greys"](np.linspace(0.35, 1.0, len(chosen)))
        for index, (layer, tone) in enumerate(zip(chosen, tones, strict=True)):
            part = _at(table, together, layer, "nll")
            name = "embedding" if layer < 0 else f"exit {layer}"
            style = {
                "color": tone,
                "linestyle": ("-", "--", "-.", ":")[index % 4],
                "marker": "osx^"[index % 4],
            }
            mean_line(axes[0, 0], part["band"], part, name, style)
        axes[0, 0].set(xlabel="bands read (1 to k)", ylabel="NLL of the logit lens (nats per token)")
        _room_above(axes[0, 0])
        ticks = sorted({1, *range(5, table["band"].max(), 5), table["band"].max()})
        for axis in axes[0]:
            axis.set_xticks(ticks)
        axes[0, 0].legend(ncols=3, fontsize=7, loc="upper center")

        # the last exit: agreement with the model's own output
        last = layers[-1]
        for axis, reading, score, label in (
            (axes[0, 1], together, "top1", "top-1 agreement with the model"),
            (axes[0, 2], alone, "kl", "KL from the model, band k alone (nats)"),
        ):
            null = _at(spread, reading, last, score)
            if reading == alone:
                axis.axhspan(
                    null["min"].min(), null["max"].max(), color="#cfcfcf", label="random bases, range"
                )
            else:
                center, band = null["mean"], null["band"]
                errors = np.clip([center - null["min"], null["max"] - center], 0, None)
                axis.errorbar(
                    band,
                    center,
                    yerr=errors,
                    label="random bases, range",
                    capsize=3,
                    **{**OTHER, "linestyle": ""},
                )
            part = _at(table, reading, last, score)
            mean_line(axis, part["band"], part, f"bands of the unembedding, exit {last}", FIRST)
            axis.set(xlabel="bands read (1 to k)" if reading == together else "band k", ylabel=label)
            if reading == alone:
                _room_above(axis)
            axis.legend()


def _room_above(axis: Any) -> None:
    """Make room for a legend above what is drawn, on a logarithmic scale if it spans a factor of ten."""
    least, most = axis.dataLim.intervaly
    if 0 < least < most / 10:
        axis.set_yscale("log")
        low, high = axis.get_ylim()
        axis.set_ylim(low, high * (high / low) ** 0.3)
    else:
        low, high = axis.get_ylim()
        axis.set_ylim(low, high + 0.3 * (high - low))


def _at(table: pd.DataFrame, reading: str, layer: int, score: str) -> pd.DataFrame:
    keep = (table["reading"] == reading) & (table["layer"] == layer) & (table["score"] == score)
    return table[keep].sort_values("band")
