"""Effects as one table: per intervention what it removes, its cost in NLL, and the remaining sink mass."""

from collections.abc import Mapping

import pandas as pd

from spectral_sinks.measure.nll.effects import Effect

BEFORE = ("embedding", "queries", "keys")
"""Sites that the attention weights of their own layer depend on."""


def effect_table(effects: Mapping[str, Effect], above: int | None = None) -> pd.DataFrame:
    """Return one row per effect.

    The columns are `name`, `rank` (None for a function), `removed_energy_share`; `mean`, `low` and `high` of
    the NLL difference in nats, a 95 % interval over `n` documents; `sink` and `baseline_sink`, the mean
    attention received by position 0 in the layers that the lowest site can change, or in those above the exit
    `above`. They are NaN where there is no such layer or where attention cannot be read. If any effect was
    scored on a sample of predictions, `exact` says which ones were not.
    """
    sampled = any(effect.predict is not None for effect in effects.values())
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
                **({"exact": effect.predict is None} if sampled else {}),
                **effect.mean_sink_mass(first),
            }
        )
    return pd.DataFrame(rows)
