"""Figure of Bigram-Backcopy models: the norm of BOS against that of the other tokens."""

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.ticker import LogLocator, NullFormatter

from spectral_sinks.figures.style import FIRST, OTHER, STYLES, saved_figure


def backcopy(table: pd.DataFrame, peak: float, path: Path) -> None:
    """Draw the norms of BOS and of other tokens by site, for each kind of training, and the largest ratio
    over training.

    The norms are those after training. Each seed is a thin line, and their mean a thick one. `table`: kind,
    seed, step, site, bos, others, ratio. A ratio above `peak` counts as a peak and is marked by a dotted
    line.
    """
    kinds, sites = table["kind"].unique(), table["site"].unique()
    places = np.arange(len(sites))
    last = table[table["step"] == table["step"].max()]
    with saved_figure(path, 1, len(kinds) + 1, (3.1 * len(kinds) + 3.4, 2.9)) as axes:
        for axis, kind in zip(axes[0], kinds, strict=False):
            here = last[last["kind"] == kind]
            for column, label, style in (("bos", "BOS", FIRST), ("others", "median of the others", OTHER)):
                by_seed = here.pivot(index="seed", columns="site", values=column)[sites]
                for norms in by_seed.to_numpy():
                    axis.plot(places, norms, **style | {"linewidth": 0.5, "marker": ""})
                axis.plot(places, by_seed.mean(), label=label, **style)
            axis.set(title=kind, xlabel="after training", ylabel="norm of the residual")
            axis.set_xticks(places, sites)
        axes[0, 0].legend()
        # last panel: ratio over training, the largest of the exits between first and last site
        axis, middle = axes[0, -1], table[table["site"].isin(sites[1:-1])]
        largest = middle.groupby(["kind", "seed", "step"])["ratio"].max()
        for kind, style in zip(kinds, STYLES.values(), strict=False):
            by_step = largest[kind].unstack("seed")
            axis.plot(by_step.index, by_step, **style | {"linewidth": 0.5, "marker": ""})
            axis.plot(by_step.index, by_step.mean(axis=1), label=kind, **style)
        axis.axhline(peak, color="#444444", linewidth=0.7, linestyle=":", label="a peak is above")
        axis.set(xlabel="step of training", ylabel="norm of BOS / median of the others,\nlargest middle exit")
        for axis in axes.flat:
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter(NullFormatter())
        axes[0, -1].set_ylim(top=8 * axes[0, -1].get_ylim()[1])
        axes[0, -1].legend(loc="upper left")
        bottom = last[["bos", "others"]].min(axis=None) / 1.2
        top = last[["bos", "others"]].max(axis=None) * 1.2
        for axis in axes[0, :-1]:
            axis.set_ylim(bottom, top)
