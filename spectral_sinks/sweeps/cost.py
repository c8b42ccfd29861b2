"""What a sweep costs: before it starts, as a floor, and how near to the floor it came."""

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
    """Counts and seconds of a sweep's floor: the layers above each cell's exit, and the head, once each."""

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
    """Passes over all windows that the floor is worth, in whole passes of the model."""
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
    """Seconds that the layers above the exits, and the head, take in some units."""
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
    """Time a layer and the head on the first batch (its windows are the longest), and add up.

    A pass from the last exit is the head; a whole pass is that and all layers. The quickest of some repeats
    counts, so the floor is not raised by what else the machine does. With `workers`, at the number of threads
    that each of them will have.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(share_of_threads(workers))
    try:
        return _estimate(sweep, units)
    finally:
        torch.set_num_threads(threads)


def share_of_threads(workers: int) -> int:
    """Threads of each of some processes that share the cores; all of them where there are none."""
    return max(1, torch.get_num_threads() // max(1, workers))


def _estimate(sweep: Sweep, units: tuple[Unit, ...]) -> Cost:
    model = sweep.model
    places, ids = sweep.batches[0]
    batch = sweep.batch(0, [model.layers - 1])  # kept for the first unit
    assert isinstance(batch, Batch), "the cost of jobs at a server is not measured"
    last, first = Site("exit", model.layers - 1), Site("embedding")

    def seconds(site: Site) -> float:
        taken: list[float] = []
        for _ in range(1 + REPEATS):
            began = time.perf_counter()
            batch.measure([{site: lambda x: x}])
            taken.append(time.perf_counter() - began)
        return min(taken) / len(places)

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
    """A length of time in the largest unit that leaves two digits."""
    for size, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {name}"
    return f"{seconds:.1f} seconds"
