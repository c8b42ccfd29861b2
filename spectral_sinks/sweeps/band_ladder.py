"""The ladder: NLL and sink against bands kept, at one site, beside random subspaces."""

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from spectral_sinks.data.texts import Windows
from spectral_sinks.interventions.sites import Site
from spectral_sinks.measure.nll.effects import Effect, evaluate_all
from spectral_sinks.models.language import LanguageModel
from spectral_sinks.spectra.filters import Filter, omega, phi, psi, rnd
from spectral_sinks.spectra.spectrum import Spectrum

RANDOM_AT = (8, 16, 19)
"""Bands kept at which random subspaces are drawn."""


def ladder(
    model: LanguageModel,
    windows: Windows,
    site: Site,
    unembedding: Spectrum,
    embedding: Spectrum,
    *,
    kept: Sequence[int] | None = None,
    random_at: Sequence[int] = RANDOM_AT,
    draws: int = 20,
    batch_size: int = 24,
    progress: Callable[[int], None] | None = None,
) -> pd.DataFrame:
    """Phi, Psi (reading u-e) and Omega with 1 to all bands kept, and Rnd of Phi's rank, at one site.

    `kept` chooses some numbers of bands, `random_at` those at which random subspaces are drawn.
    One row per `filter` and bands `kept`: `rank` removed, `removed_energy_share`, `mean`, `low`, `high` of
    the NLL difference (nats; 95 % over documents), `sink` and `baseline_sink`, the mean attention received by
    position 0 in the layers above the site. A Rnd row has the mean over `draws`, and `least`, `most`,
    `sink_least`, `sink_most` over them. (Cancedda 2024, section 4)
    """
    bands = unembedding.count
    steps = [k for k in random_at if k < bands]
    cells: dict[str, dict[Site, Filter]] = {}
    for k in kept or range(1, bands + 1):
        cells[f"Phi {k}"] = {site: phi(unembedding, 1, k)}
        cells[f"Psi {k}"] = {site: psi(unembedding, embedding, k)}
        if k < bands:
            cells[f"Omega {k}"] = {site: omega(unembedding, k)}
    for k in steps:
        rank = phi(unembedding, 1, k).rank
        cells |= {f"Rnd {k} {seed}": {site: rnd(model.d, rank, seed)} for seed in range(draws)}
    effects = evaluate_all(model, windows, cells, batch_size=batch_size, progress=progress)

    rows: list[dict[str, object]] = []
    for name, effect in effects.items():
        kind, number, *_ = name.split()
        if kind != "Rnd":
            low, high = effect.delta_nll_interval
            rows.append(
                _row(kind, int(number), [effect], site.layer)
                | {"mean": effect.delta_nll, "low": low, "high": high}
                | {"sink": _sink(effect.sink_mass, site.layer)}
            )
    for k in steps:
        drawn = [effects[f"Rnd {k} {seed}"] for seed in range(draws)]
        deltas = [effect.delta_nll for effect in drawn]
        sinks = [_sink(effect.sink_mass, site.layer) for effect in drawn]
        rows.append(
            _row("Rnd", k, drawn, site.layer)
            | {"mean": np.mean(deltas), "least": min(deltas), "most": max(deltas)}
            | {"sink": np.mean(sinks), "sink_least": min(sinks), "sink_most": max(sinks)}
        )
    table = pd.DataFrame(rows)
    table.insert(0, "layer", site.layer)
    table.insert(0, "site", site.kind)
    return table


def _row(kind: str, kept: int, effects: list[Effect], layer: int) -> dict[str, object]:
    energy = np.mean([effect.table["removed_energy_share"].mean() for effect in effects])
    return {
        "filter": kind,
        "kept": kept,
        "rank": effects[0].rank,
        "n": len(effects[0].table),
        "removed_energy_share": energy,
        "baseline_sink": _sink(effects[0].baseline_sink_mass, layer),
    }


def _sink(masses: list[float] | None, layer: int) -> float:
    """Mean sink mass of the layers above; NaN where there is none or it cannot be read."""
    above = [] if masses is None else masses[layer + 1 :]
    return float(np.mean(above)) if above else float("nan")
