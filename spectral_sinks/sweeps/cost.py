"""The cost of a sweep: a floor in seconds, estimated before the start."""

import math
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from spectral_sinks.errors import plural
from spectral_sinks.interventions.sites import Site
from spectral_sinks.measure.memory import Memory, row_bytes
from spectral_sinks.measure.nll.replay import Batch
from spectral_sinks.measure.nll.scoring import block, chunk
from spectral_sinks.sweeps.content_address import digest
from spectral_sinks.sweeps.definition import Sweep, Unit

REPEATS = 2


@dataclass(frozen=True)
class Speed:
    """How long a model takes on one machine. The results folder keeps it, so that no restart measures it."""

    where: str
    """Hash of the machine, the device, the threads, the model, the shape of a batch and the sample of
    predictions."""
    layer_seconds: float
    """One layer on one window."""
    head_seconds: float
    """Final norm, unembedding and metrics on one window."""

    @classmethod
    def kept(cls, runs: Mapping[str, Any], where: str) -> "Speed | None":
        """Return the speed that some run of a results folder has measured there, or None."""
        for run in runs.values():
            match run.get("speed"):
                case {"where": str(at), "layer_seconds": float(layer), "head_seconds": float(head)} if (
                    at == where and math.isfinite(layer + head) and layer >= 0 < head
                ):
                    return cls(at, layer, head)
                case _:
                    continue
        return None

    @property
    def record(self) -> dict[str, Any]:
        """The entry of a run in the manifest."""
        return {"speed": asdict(self)}


def place(sweep: Sweep, workers: int) -> str:
    """Return a hash of what the speed of a sweep depends on."""
    model, (_, ids) = sweep.model, sweep.batches[0]
    machine = [platform.node(), str(model.device), share_of_threads(workers)]
    scored = [] if sweep.predict is None else [sweep.predict.count]
    return digest([*machine, sweep.shared["weights"], *ids.shape, *scored])


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
            f"{plural(self.cells, 'cell')} x {plural(self.windows, 'window')} in "
            f"{plural(self.units, 'unit')}: {self.forwards:.1f} forward passes over the text, about "
            f"{duration(self.floor)} on one process of this machine, about "
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


def estimate(
    sweep: Sweep, units: tuple[Unit, ...], workers: int = 0, runs: Mapping[str, Any] | None = None
) -> tuple[Cost, Speed]:
    """Add up the cost of some units, from the speed that one of `runs` has kept, or that is measured now.

    The first batch is timed, whose windows are the longest. A pass from the last exit costs the head; a whole
    pass costs the head and all layers. The fastest of some repeats counts, so other work on the machine does
    not raise the floor. With `workers`, the passes run with as many threads as each worker will have. The
    sweep keeps the batch for its first unit.
    """
    where = place(sweep, workers)
    speed = Speed.kept(runs or {}, where)
    if speed is None:
        threads = torch.get_num_threads()
        torch.set_num_threads(share_of_threads(workers))
        try:
            speed = _measured(sweep, where)
        finally:
            torch.set_num_threads(threads)
    return _cost(sweep, units, speed), speed


def share_of_threads(workers: int) -> int:
    """Return the number of threads of each of some processes that share the cores."""
    return max(1, torch.get_num_threads() // max(1, workers))


def _measured(sweep: Sweep, where: str) -> Speed:
    model = sweep.model
    indices, _ = sweep.batches[0]
    batch = sweep.batch(0, [model.layers - 1])  # kept for the first unit
    assert isinstance(batch, Batch), "the cost of jobs at a server is not measured"

    def seconds(site: Site) -> float:
        taken: list[float] = []
        for _ in range(1 + REPEATS):
            began = time.perf_counter()
            batch.measure([{site: lambda x: x}])
            taken.append(time.perf_counter() - began)
        return min(taken) / len(indices)

    head = seconds(Site("exit", model.layers - 1))
    return Speed(where, max(0.0, seconds(Site("embedding")) - head) / model.layers, head)


def _cost(sweep: Sweep, units: tuple[Unit, ...], speed: Speed) -> Cost:
    model = sweep.model
    _, ids = sweep.batches[0]
    layer, head = speed.layer_seconds, speed.head_seconds
    lowest = floor(sweep, units, layer, head)
    windows = len(sweep.windows)
    residuals = len(set(sweep.starts)) * ids.numel() * model.d * model.dtype.itemsize
    passes = Memory(model, ids.shape[1]).rows * row_bytes(model, ids.shape[1])
    logits = 2 * 4 * chunk(model, model.device) * block(model, model.device)
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
