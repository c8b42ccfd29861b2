"""Many interventions on a sample of predictions, and exactly those that the sample leaves open."""

from collections.abc import Callable, Mapping
from math import isfinite
from statistics import NormalDist

import numpy as np

from spectral_sinks.data.texts import Windows
from spectral_sinks.errors import InputError
from spectral_sinks.interventions.tracing import Interventions
from spectral_sinks.measure.nll.effects import NORMAL_95, Effect, evaluate_all
from spectral_sinks.measure.nll.scoring import Sample
from spectral_sinks.models.language import LanguageModel

MISSED = 0.05
"""Probability that the interval of any cell misses, all cells together."""


def screen(
    model: LanguageModel,
    windows: Windows,
    cells: Mapping[str, Interventions],
    *,
    predict: int | Sample = 16,
    threshold: float | None = None,
    largest: int = 0,
    batch_size: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Effect]:
    """Return the effects of several interventions: exact where the answer turns on them, else marked.

    All cells are first scored on a sample of predictions. A cell is then measured on all predictions if the
    sample leaves open on which side of the `threshold` its NLL difference lies, or whether it is among the
    `largest` ones. The intervals that decide this miss for any cell with a probability of 5 %, all cells
    together (Bonferroni, normal approximation): that is how far a cell that stays screened can be relied on.
    They are about these texts, and not about others.

    An exact effect has `predict` None and the numbers of `evaluate_all`. The `predict` of another says how
    many predictions of each window were scored, and so do its record, its table and `sweeps.effect_table`. It
    saves time where the unembedding takes most of it and few cells are confirmed.

    Args:
        model: a language model.
        windows: the text.
        cells: interventions by name.
        predict: number of predictions of each window in the sample, as in `evaluate_all`.
        threshold: a difference of NLL in nats, such as that of the filter of which the cells are controls.
        largest: number of cells with the largest NLL differences that are to be known.
        batch_size: windows in a pass; None finds it by memory.
        progress: is called with the number of cells just done, starting again for each batch and for the
            exact pass.

    Returns:
        One effect for each cell, in the order of `cells`.

    Raises:
        InputError: as `evaluate_all` does, if neither a threshold nor a number of largest cells is given, and
            for a threshold that is not finite.

    """
    if largest < 0 or (threshold is None and not largest):
        raise InputError("a screen needs to know what turns on the answer: give a threshold, or largest=5")
    if threshold is not None and not isfinite(threshold):
        raise InputError(f"threshold {threshold}: every difference lies on no side of it; give a number")
    found = evaluate_all(model, windows, cells, batch_size=batch_size, predict=predict, progress=progress)
    chosen = {name: cells[name] for name in undecided(found, threshold, largest)}
    exact = evaluate_all(model, windows, chosen, batch_size=batch_size, progress=progress) if chosen else {}
    return {name: exact.get(name, effect) for name, effect in found.items()}


def undecided(effects: Mapping[str, Effect], threshold: float | None, largest: int) -> list[str]:
    """Return the names of sampled effects that may be on either side of a threshold or among the largest."""
    wider = NormalDist().inv_cdf(1 - MISSED / 2 / max(1, len(effects))) / NORMAL_95
    means = np.array([effect.delta_nll for effect in effects.values()])
    ends = np.array([effect.sampling_interval("delta_nll") for effect in effects.values()]).reshape(-1, 2)
    half = wider * (ends[:, 1] - ends[:, 0]) / 2
    open_ones = np.zeros(len(means), dtype=bool)
    if threshold is not None:
        open_ones |= np.abs(means - threshold) <= half
    if largest:
        # at least that many cells lie above this, so that a cell that ends below it is not among them
        surely = np.sort(means - half)[-min(largest, len(means)) :].min(initial=np.inf)
        open_ones |= means + half >= surely
    return [name for name, open_one in zip(effects, open_ones, strict=True) if open_one]
