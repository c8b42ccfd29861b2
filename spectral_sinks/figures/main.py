"""Figures of the main findings: spectrum, BOS, band ladders, the sink, and its emergence in training."""

from pathlib import Path

import numpy as np
import pandas as pd

from spectral_sinks.figures.style import FIRST, OTHER, STYLES, mean_line, saved_figure, suffixes_of


def spectrum(values: pd.DataFrame, alignment: pd.DataFrame, path: Path) -> None:
    """Draw the singular values of both matrices, and E-dark by band of the unembedding against random
    subspaces.

    `values`: matrix ("unembedding", "embedding"), index, value. `alignment`: band, share, random_low,
    random_high.
    """
    with saved_figure(path, 1, 2, (8, 2.9)) as axes:
        for matrix, style in (("unembedding", STYLES["Phi"]), ("embedding", STYLES["Psi"])):
            part = values[values["matrix"] == matrix]
            axes[0, 0].semilogy(part["index"], part["value"], label=matrix, **{**style, "marker": ""})
        axes[0, 0].set(xlabel="direction, strongest first", ylabel="singular value")
        axes[0, 0].legend()
        axis = axes[0, 1]
        axis.bar(alignment["band"], alignment["share"], color="#8a8a8a", label="E-dark")
        axis.vlines(
            alignment["band"],
            alignment["random_low"],
            alignment["random_high"],
            color="black",
            linewidth=1.5,
            label="random subspaces, least to most",
        )
        axis.set(xlabel="band of the unembedding (last is darkest)", ylabel="share of E-dark's energy")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_ylim(top=1.35 * max(alignment["share"].max(), alignment["random_high"].max()))
        axis.legend(loc="upper left")


def bos(table: pd.DataFrame, chance: float, path: Path) -> None:
    """Draw the norm and dark share of the first token and the others by layer, and what was written to the
    first.

    `table` has one row per (site, layer, position_class, quantity) with mean, low, high, and the convention.
    `chance` is the dark share of a random vector, r/d.
    """
    convention = next(iter(suffixes_of(table, "dark share")))
    first = next(c for c in table["position_class"].unique() if c != "other")
    stream = table[table["site"].isin(["embedding", "exit"])]
    with saved_figure(path, 1, 3, (10.5, 3)) as axes:
        for axis, quantity, label in (
            (axes[0, 0], "norm", "residual norm"),
            (axes[0, 1], "dark share", f"share of energy in the dark band ({convention})"),
        ):
            for name, style in ((first, FIRST), ("other", OTHER)):
                part = stream[(stream["position_class"] == name) & (stream["quantity"] == quantity)]
                shown = "BOS" if name == "bos" else ("first token" if name == "first" else "other tokens")
                mean_line(axis, part["layer"], part, shown, style)
            axis.set(xlabel="exit of layer (-1: embedding)", ylabel=label)
        axes[0, 0].set_yscale("log")
        axes[0, 1].axhline(chance, color="#444444", linewidth=0.7, linestyle=":", label="chance, r/d")
        axes[0, 1].set_ylim(0, 1)
        axes[0, 0].legend()
        axes[0, 1].legend()
        written = table[(table["position_class"] == first) & table["site"].isin(["attention", "mlp"])]
        # lines and not bars, which in a model of thirty layers would be hairs
        for site, marker in (("attention", "^"), ("mlp", "o")):
            for part_name, colour, line in (("dark", "#000000", "-"), ("light", "#8a8a8a", "--")):
                part = written[(written["site"] == site) & (written["quantity"] == f"{part_name} norm")]
                name = f"{'MLP' if site == 'mlp' else site}, {part_name}"
                axes[0, 2].plot(
                    part["layer"], part["mean"], color=colour, linestyle=line, marker=marker, label=name
                )
        for axis in axes.flat:
            axis.xaxis.get_major_locator().set_params(integer=True)
        axes[0, 2].set(xlabel="layer", ylabel="norm of what was written to the first token", yscale="log")
        low, high = axes[0, 2].get_ylim()
        axes[0, 2].set_ylim(low, high * 8)
        axes[0, 2].legend(ncols=2)


def ladder(table: pd.DataFrame, path: Path, columns: str, title: str) -> None:
    """Draw the NLL change and the sink mass of the layers above against bands kept, with a column of panels
    per site.

    `table`: `columns` (the panel), `filter`, `kept`, `mean`, `low`, `high` of the NLL difference, `sink`
    (mean sink mass of the layers above), `baseline_sink`. Rnd rows also have `least`, `most`, `sink_least`,
    `sink_most` over draws. `columns` names the column of the panels, and `title` opens the title of each.
    """
    panels = list(table[columns].unique())
    size = (1.9 * len(panels) + 0.9, 4.2)
    with saved_figure(path, 2, len(panels), size, sharex=True, sharey="row") as axes:
        for column, panel in enumerate(panels):
            upper, lower = axes[0, column], axes[1, column]
            here = table[table[columns] == panel]
            for name, style in STYLES.items():
                part = here[here["filter"] == name].sort_values("kept")
                if part.empty:
                    continue
                if name == "Rnd":
                    for axis, low, high in ((upper, "least", "most"), (lower, "sink_least", "sink_most")):
                        axis.fill_between(part["kept"], part[low], part[high], color="#cfcfcf")
                    upper.plot(part["kept"], part["mean"], label="Rnd (mean, range)", **style)
                else:
                    mean_line(upper, part["kept"], part, name, style)
                if part["sink"].notna().any():
                    lower.plot(part["kept"], part["sink"], label=name, **style)
            if here["baseline_sink"].notna().any():
                lower.axhline(here["baseline_sink"].iloc[0], color="#444444", linewidth=0.7, linestyle=":")
            else:
                lower.text(0.5, 0.3, "no layer above", ha="center", transform=lower.transAxes)
            upper.set_title(f"{title} {panel}", fontsize=8)
            lower.set_xlabel("bands kept (of 20)")
        axes[0, 0].set_ylabel("NLL above untouched (nats)")
        axes[0, 0].set_yscale("symlog", linthresh=0.1)
        axes[1, 0].set_ylabel("mean $\\alpha_1$ of the layers above\n(dotted: untouched)")
        handles = axes[0, 0].get_legend_handles_labels()
        axes[1, -1].legend(*handles, fontsize=7, loc="best")


def sink(heads: pd.DataFrame, removal: pd.DataFrame, path: Path) -> None:
    """Draw the attention received by position 0 by head, and the effect of removing the dark band beside
    random draws.

    `heads`: layer, head, mean. `removal`: name ("dark", "dark, first token", ..., "random N"), `delta_nll`,
    `low`, `high`, `sink_next` (sink mass of the next layer); the untouched model is the row "untouched".
    """
    with saved_figure(path, 1, 3, (10.5, 2.9)) as axes:
        grid = heads.pivot(index="layer", columns="head", values="mean")
        image = axes[0, 0].imshow(grid, cmap="Greys", vmin=0, vmax=1, aspect="auto")
        for (row, column), value in np.ndenumerate(grid.to_numpy()):
            colour = "white" if value > 0.5 else "black"
            axes[0, 0].text(column, row, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=7)
        axes[0, 0].set(xlabel="head", ylabel="layer", yticks=range(len(grid)), xticks=range(grid.shape[1]))
        axes[0, 0].figure.colorbar(image, ax=axes[0, 0], label="$\\alpha_1$ at T = 64")
        draws = removal[removal["name"].str.startswith("random")]
        named = removal[~removal["name"].str.startswith("random")]
        for axis, column, label in (
            (axes[0, 1], "sink_next", "$\\alpha_1$ of the next layer"),
            (axes[0, 2], "delta_nll", "NLL above untouched (nats)"),
        ):
            shown = named if column == "sink_next" else named[named["name"] != "untouched"]
            places = range(len(shown))
            errors = None
            if column == "delta_nll":
                errors = np.clip([shown[column] - shown["low"], shown["high"] - shown[column]], 0, None)
            axis.bar(places, shown[column], color="#666666", yerr=errors, capsize=2)
            axis.scatter(
                [len(shown)] * len(draws), draws[column], color="black", marker="_", s=60, linewidth=0.8
            )
            axis.set_xticks(
                [*places, len(shown)],
                [*shown["name"], f"{len(draws)} random"],
                rotation=30,
                ha="right",
                rotation_mode="anchor",
            )
            axis.set_ylabel(label)


def birth(log: pd.DataFrame, path: Path) -> None:
    """Draw the emergence of a sink in training: NLL, sink rate, norm ratio and dark share against tokens
    seen.

    `log`: `tokens`, `heldout_nll`, `sink_rate`, `norm_ratio`, `dark_share`, `other_dark_share`, `run`.
    """
    panels = {
        "heldout_nll": "held-out NLL (nats per token)",
        "sink_rate": "share of (text, head) with $\\alpha_1$ > 0.3",
        "norm_ratio": "norm of BOS / median of others",
        "dark_share": "dark share of BOS (thin: others)",
    }
    lines = [("#000000", "-"), ("#b5452c", "--"), ("#2b6ca3", "-."), ("#8a8a8a", ":")]
    with saved_figure(path, 1, 4, (12, 2.8)) as axes:
        for (run, part), (colour, line) in zip(log.groupby("run", sort=False), lines, strict=False):
            for axis, (column, label) in zip(axes[0], panels.items(), strict=True):
                axis.plot(part["tokens"] / 1e6, part[column], color=colour, linestyle=line, label=run)
                axis.set(xlabel="tokens seen (millions)", ylabel=label)
            axes[0, 3].plot(
                part["tokens"] / 1e6, part["other_dark_share"], color=colour, linestyle=line, linewidth=0.5
            )
        axes[0, 1].set_ylim(bottom=0)
        axes[0, 3].set_ylim(0, 1)
        axes[0, 0].legend()
