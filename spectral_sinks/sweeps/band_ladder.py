"""The ladder: NLL and sink against the number of bands kept, at one site, compared with random subspaces."""

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from spectral_sinks.data.texts import Windows
from spectral_sinks.interventions.sites import Site
from spectral_sinks.measure.nll.effects import Effect, evaluate_all
from spectral_sinks.measure.nll.scoring import Sample
from spectral_sinks.models.language import LanguageModel
from spectral_sinks.spectra.filters import Filter, omega, phi, psi, rnd
from spectral_sinks.spectra.spectrum import Spectrum

RANDOM_AT = (8, 16, 19)
"""Numbers of bands kept at which random subspaces are drawn."""


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
    batch_size: int | None = None,
    predict: int | Sample | None = None,
    progress: Callable[[int], None] | None = None,
) -> pd.DataFrame:
    """Evaluate Phi, Psi (reading u-e) and Omega with 1 to all bands kept, and Rnd of Phi's rank, at one site.

    Args:
        model: a language model.
        windows: the text.
        site: where all filters act.
        unembedding: the spectrum whose bands are kept.
        embedding: the second spectrum of Psi.
        kept: the numbers of bands kept; 1 to all by default.
        random_at: the numbers of bands kept at which random subspaces are drawn.
        draws: random subspaces at each of them.
        batch_size: windows in a pass; None finds it by memory.
        predict: number of predictions of each window that are scored, as in `evaluate_all`.
        progress: is called with the number of cells just done.

    Returns:
        One row per `filter` and number of bands `kept`: the `rank` removed, `removed_energy_share`; `mean`,
        `low` and `high` of the NLL difference in nats (95 % over documents); `sink` and `baseline_sink`, the
        mean attention received by position 0 in the layers above the site. A row of Rnd has the mean over
        the draws, and `least`, `most`, `sink_least` and `sink_most` over them. With `predict`, a row of
        another filter has `sampling_low` and `sampling_high`, the interval for the mean that all predictions
        would give, and `attrs["predict"]` of the table says how many were scored.

    Source: Cancedda (2024), section 4.

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
    effects = evaluate_all(model, windows, cells, batch_size=batch_size, predict=predict, progress=progress)

    rows: list[dict[str, object]] = []
    for name, effect in effects.items():
        kind, number, *_ = name.split()
        if kind != "Rnd":
            low, high = effect.delta_nll_interval
            rows.append(
                _row(kind, int(number), [effect], site.layer)
                | {"mean": effect.delta_nll, "low": low, "high": high}
                | {"sink": effect.mean_sink_mass(site.layer + 1)["sink"]}
                | _sampling(effect)
            )
    for k in steps:
        drawn = [effects[f"Rnd {k} {seed}"] for seed in range(draws)]
        deltas = [effect.delta_nll for effect in drawn]
        sinks = [effect.mean_sink_mass(site.layer + 1)["sink"] for effect in drawn]
        rows.append(
            _row("Rnd", k, drawn, site.layer)
            | {"mean": np.mean(deltas), "least": min(deltas), "most": max(deltas)}
            | {"sink": np.mean(sinks), "sink_least": min(sinks), "sink_most": max(sinks)}
        )
    table = pd.DataFrame(rows)
    table.insert(0, "layer", site.layer)
    table.insert(0, "site", site.kind)
    if (sample := Sample.of(predict)) is not None:
        table.attrs["predict"] = sample.count
    return table


def _sampling(effect: Effect) -> dict[str, object]:
    if effect.predict is None:
        return {}
    low, high = effect.sampling_interval("delta_nll")
    return {"sampling_low": low, "sampling_high": high}


def _row(kind: str, kept: int, effects: list[Effect], layer: int) -> dict[str, object]:
    energy = np.mean([effect.table["removed_energy_share"].mean() for effect in effects])
    return {
        "filter": kind,
        "kept": kept,
        "rank": effects[0].rank,
        "n": len(effects[0].table),
        "removed_energy_share": energy,
        "baseline_sink": effects[0].mean_sink_mass(layer + 1)["baseline_sink"],
    }
