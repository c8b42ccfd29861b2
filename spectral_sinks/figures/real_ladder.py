"""Figure of the ladder under two conventions: what the NLL loses as the spectrum is cut from the dark end."""

from pathlib import Path

import pandas as pd

from spectral_sinks.figures.style import STYLES, mean_line, saved_figure


def real_ladder(table: pd.DataFrame, path: Path, *, model: str, layer: int) -> None:
    """Draw the NLL by the bands that are kept, and beside it the sink, under both conventions.

    `table`: convention, edit ("Phi 1:j", ...), draw, delta_nll, low, high, mass_above, baseline_mass_above.
    """
    phi = table[table["edit"].str.startswith("Phi 1:")].copy()
    phi["kept"] = phi["edit"].str.removeprefix("Phi 1:").astype(int)
    drawn = table.loc[table["edit"] == "as many as the last band"]
    with saved_figure(path, 1, 2, (7.6, 3)) as axes:
        for name, style in (("folded", STYLES["Phi"]), ("raw", STYLES["Psi"])):
            part = phi[phi["convention"] == name].sort_values("kept")
            lines = part.rename(columns={"delta_nll": "mean"})
            mean_line(axes[0, 0], lines["kept"], lines, f"bands 1 to j, {name}", style)
            axes[0, 1].plot(part["kept"], part["mass_above"], label=f"bands 1 to j, {name}", **style)
        for axis, column in ((axes[0, 0], "delta_nll"), (axes[0, 1], "mass_above")):
            axis.scatter(
                [19] * len(drawn), drawn[column], color="#8a8a8a", marker="_", zorder=3,
                label="random, as many directions as the last band",
            )  # fmt: skip
            axis.set_xlabel(f"j: bands kept of 20, at the exit of layer {layer}")
        axes[0, 0].set_ylabel("NLL above untouched (nats per token)")
        axes[0, 0].set_title(model, fontsize=8)
        low, high = axes[0, 0].get_ylim()
        axes[0, 0].set_ylim(low, high + 0.35 * (high - low))  # room for the legend
        axes[0, 0].legend(loc="upper right")
        axes[0, 1].axhline(
            table["baseline_mass_above"].iloc[0], color="#444444", linewidth=0.6, linestyle=":"
        )
        axes[0, 1].set_ylabel("attention to position 0 in the layers above")
        axes[0, 1].set_ylim(0, None)
