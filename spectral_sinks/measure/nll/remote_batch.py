"""A batch that is measured in another process or at a server, as many cells to a job as fit."""

from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Int
from torch import Tensor

from spectral_sinks.data.texts import Windows
from spectral_sinks.interventions.tracing import Interventions
from spectral_sinks.measure.memory import Memory
from spectral_sinks.measure.nll.replay import VARIED, Batch, BatchResult, first_exit, for_batch, reads_sink
from spectral_sinks.measure.nll.scoring import Sample, predicted
from spectral_sinks.models.language import LanguageModel
from spectral_sinks.remote.client import remotely, send
from spectral_sinks.remote.transport import TooLarge

T = TypeVar("T")
R = TypeVar("R")

JOB_OPERATIONS = 2e16
"""Floating-point operations in a job: about a minute on hardware that serves large models."""

CELLS_PER_JOB = 256
"""Cells in a job, at most."""

RESULT_COLUMNS = ("nll", "kl", "top1_agreement", "removed_energy_share")

Pair = tuple[BatchResult, BatchResult]
"""The untouched pass and the cells."""


class RemoteBatch:
    """A batch whose model is in another process or at a server: only numbers by window come back."""

    def __init__(
        self,
        model: LanguageModel,
        windows: Windows,
        indices: Sequence[int],
        ids: Int[Tensor, "batch tokens"],
        sample: Sample | None = None,
    ) -> None:
        self.model, self.windows, self.indices, self.ids = model, windows, list(indices), ids
        self.attention = reads_sink(model, windows)
        self.predicted = predicted(model, ids.shape[1])
        self._sample = sample
        self._baseline: BatchResult | None = None

    @property
    def baseline(self) -> BatchResult:
        """The untouched pass, which the first `measure` includes; without one, a separate job is sent."""
        if self._baseline is not None:
            return self._baseline
        baseline: BatchResult
        baseline, _ = send(self.model, *self.job([]))
        self._baseline = baseline
        return baseline

    def measure(
        self, cells: Sequence[Interventions], progress: Callable[[int], None] | None = None
    ) -> BatchResult:
        """Measure cells in one job or several; `progress` is called with the number of cells of each."""
        results: list[BatchResult] = []
        for part in in_jobs(self.model, self.ids, cells):
            for baseline, measured in in_halves(part, lambda cells: [send(self.model, *self.job(cells))]):
                self._baseline = baseline
                results.append(measured)
            if progress is not None:
                progress(len(part))
        return joined(results)

    def job(self, cells: Sequence[Interventions]) -> tuple[Any, ...]:
        """Return the function and the arguments of the job that measures some cells."""
        own = [for_batch(cell, self.indices, len(self.windows)) for cell in cells]
        if self._sample is None:
            return measure_batch, self.ids, own, self.attention
        return measure_batch, self.ids, own, self.attention, self._sample, self.indices


def open_batch(
    model: LanguageModel,
    windows: Windows,
    indices: Sequence[int],
    ids: Int[Tensor, "batch tokens"],
    starts: Collection[int | None] = (),
    memory: Memory | None = None,
    sample: Sample | None = None,
) -> Batch | RemoteBatch:
    """Return a batch of windows for a model in this process, or for one that is elsewhere."""
    if model.remote is not None:
        return RemoteBatch(model, windows, indices, ids, sample)
    return Batch(model, windows, indices, ids, starts, memory, sample=sample)


@remotely
def measure_batch(
    model: LanguageModel,
    ids: Tensor,
    cells: Sequence[Interventions],
    attention: bool,
    sample: Sample | None = None,
    indices: Sequence[int] = (),
) -> Pair:
    """Measure cells with a `Batch` on windows of one length; sink mass only with `attention`.

    A `sample` of predictions depends on the `indices` of the windows in all windows of the measurement.
    """
    windows = Windows(tuple(ids), tuple(range(len(ids))))
    starts = {first_exit(cell) for cell in cells}
    places = range(len(ids))
    batch = Batch(model, windows, places, ids, starts, attention=attention, sample=sample, drawn_as=indices)
    return batch.baseline, batch.measure(cells)


def by_job(
    model: LanguageModel,
    ids: Int[Tensor, "batch tokens"],
    cells: Sequence[T],
    run: Callable[[Sequence[T]], list[R]],
) -> list[R]:
    """Apply `run` to cells, as many to a job as fit, and return one result per cell.

    Raises TooLarge for a single cell that does not fit into a job.
    """
    return [result for part in in_jobs(model, ids, cells) for result in in_halves(part, run)]


def in_halves(cells: Sequence[T], run: Callable[[Sequence[T]], list[R]]) -> list[R]:
    """Apply `run` to cells, or to each half of them where they are too large for a job."""
    try:
        return run(cells)
    except TooLarge:
        if len(cells) == 1:
            raise
        half = len(cells) // 2
        return in_halves(cells[:half], run) + in_halves(cells[half:], run)


def in_jobs(model: LanguageModel, ids: Int[Tensor, "batch tokens"], cells: Sequence[T]) -> list[Sequence[T]]:
    """Divide cells into jobs: one for a model in this process, else as many as the time budget demands."""
    size = len(cells) if model.remote is None else cells_per_job(model, ids)
    return [cells[first : first + size] for first in range(0, len(cells), max(size, 1))]


def cells_per_job(model: LanguageModel, ids: Tensor) -> int:
    """Return the number of cells that the time budget of a job allows."""
    weights = model.layers * 12 * model.d**2 + model.vocabulary * model.d
    return max(1, min(CELLS_PER_JOB, int(JOB_OPERATIONS / (2 * weights * ids.numel()))))


def joined(parts: Sequence[BatchResult]) -> BatchResult:
    """Join the results of several jobs, one after the other."""
    masses = [part.sink_mass for part in parts if part.sink_mass is not None]
    nll, kl, agrees, removed = (
        np.concatenate([getattr(part, name) for part in parts]) for name in RESULT_COLUMNS
    )
    varied = [part.variances for part in parts if part.variances is not None]
    variances = {name: np.concatenate([part[name] for part in varied]) for name in VARIED} if varied else None
    return BatchResult(nll, kl, agrees, removed, np.concatenate(masses) if masses else None, variances)
