"""The cost of a sweep: a floor in seconds, estimated before the start."""

import time
from dataclasses import dataclass

import torch

from spectral_sinks.interventions.sites import Site
from spectral_sinks.measure.memory import row_bytes
from spectral_sinks.measure.nll.replay import Batch
from spectral_sinks.measure.nll.scoring import chunk
from spectral_sinks.sweeps.definition import Sweep, Unit

REPEATS = 2


@dataclass(frozen=True)
class Cost:
    """The floor of a sweep: for each cell, the layers above its exit and the head, once for each window."""

    cells: int
    windows: int
    units: int
    layer_seconds: float
    """One layer on one window."""
    head_seconds: float
    """Final norm, unembedding and metrics on one window."""
    layers: int
    """Layers of the model."""
    forwards: float
    """The floor in whole passes of the model over all windows."""
    floor: float
    """Seconds."""
    bytes: int
    """Memory of a pass beyond the weights."""

    def __str__(self) -> str:
        return (
            f"{self.cells} cells x {self.windows} windows in {self.units} units: {self.forwards:.1f} forward "
            f"passes over the text, about {duration(self.floor)} on one process of this machine, about "
            f"{self.bytes / 2**30:.1f} GiB beside the weights"
        )


def floor(sweep: Sweep, units: tuple[Unit, ...], layer: float, head: float) -> float:
    """Return the seconds that the layers above the exits, and the head, take in some units."""
    layers = sweep.model.layers
    total = 0.0
    for unit in units:
        windows = len(sweep.batches[unit.batch][0])
        for cell in unit.cells:
            first = sweep.starts[cell]
            if first is not None:
                total += windows * ((layers - 1 - first) * layer + head)
    return total


def estimate(sweep: Sweep, units: tuple[Unit, ...], workers: int = 0) -> Cost:
    """Time a layer and the head on the first batch, whose windows are the longest, and add up.

    A pass from the last exit costs the head; a whole pass costs the head and all layers. The fastest of some
    repeats counts, so other work on the machine does not raise the floor. With `workers`, the passes run with
    as many threads as each worker will have. The sweep keeps the batch for its first unit.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(share_of_threads(workers))
    try:
        return _estimate(sweep, units)
    finally:
        torch.set_num_threads(threads)


def share_of_threads(workers: int) -> int:
    """Return the number of threads of each of some processes that share the cores."""
    return max(1, torch.get_num_threads() // max(1, workers))


def _estimate(sweep: Sweep, units: tuple[Unit, ...]) -> Cost:
    model = sweep.model
    indices, ids = sweep.batches[0]
    batch = sweep.batch(0, [model.layers - 1])  # kept for the first unit
    assert isinstance(batch, Batch), "the cost of jobs at a server is not measured"
    last, first = Site("exit", model.layers - 1), Site("embedding")

    def seconds(site: Site) -> float:
        taken: list[float] = []
        for _ in range(1 + REPEATS):
            began = time.perf_counter()
            batch.measure([{site: lambda x: x}])
            taken.append(time.perf_counter() - began)
        return min(taken) / len(indices)

    head = seconds(last)
    layer = max(0.0, seconds(first) - head) / model.layers
    lowest = floor(sweep, units, layer, head)
    windows = len(sweep.windows)
    residuals = len(set(sweep.starts)) * ids.numel() * model.d * model.dtype.itemsize
    passes = batch.memory.rows * row_bytes(model, ids.shape[1])
    logits = 2 * 4 * chunk(model, model.device) * model.vocabulary
    return Cost(
        cells=len({cell for unit in units for cell in unit.cells}),
        windows=windows,
        units=len(units),
        layer_seconds=layer,
        head_seconds=head,
        layers=model.layers,
        forwards=lowest / (windows * (model.layers * layer + head)),
        floor=lowest,
        bytes=residuals + passes + logits,
    )


def duration(seconds: float) -> str:
    """Format a length of time in the largest unit of which there are at least two."""
    for size, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {name}"
    return f"{seconds:.1f} seconds"
