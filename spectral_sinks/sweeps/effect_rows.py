"""Effects as a table: a row per intervention, with what it removed, its cost and what is left of the sink."""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from spectral_sinks.measure.nll.effects import Effect

BEFORE = ("embedding", "queries", "keys")
"""Sites that the attention weights of their own layer depend on."""


def effect_table(effects: Mapping[str, Effect], above: int | None = None) -> pd.DataFrame:
    """One row per effect: its `name`, `rank` and `removed_energy_share`, `mean`, `low`, `high` of the NLL
    difference (nats; 95 % over `n` documents), `sink` and `baseline_sink`.

    These are the mean attention received by position 0 in the layers that the lowest site comes before (or
    above the exit `above`); NaN where there is none or it cannot be read. `rank` is None for a function.
    """
    rows: list[dict[str, object]] = []
    for name, effect in effects.items():
        low, high = effect.delta_nll_interval
        first = min((s.layer + (s.kind not in BEFORE) for s in effect.sites), default=0)
        first = first if above is None else above + 1
        rows.append(
            {
                "name": name,
                "rank": effect.rank,
                "removed_energy_share": effect.table["removed_energy_share"].mean(),
                "mean": effect.delta_nll,
                "low": low,
                "high": high,
                "n": len(effect.table),
                "sink": _sink(effect.sink_mass, first),
                "baseline_sink": _sink(effect.baseline_sink_mass, first),
            }
        )
    return pd.DataFrame(rows)


def _sink(masses: list[float] | None, first: int) -> float:
    above = [] if masses is None else masses[first:]
    return float(np.mean(above)) if above else float("nan")
