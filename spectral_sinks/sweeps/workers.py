"""The executors of units of work: this process, a pool that shares the weights, or any other executor."""

import os
import pickle
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from multiprocessing import parent_process
from typing import Any, Protocol, runtime_checkable
from uuid import uuid4

import cloudpickle
import pandas as pd
import torch

from spectral_sinks.errors import InputError
from spectral_sinks.spectra.edits import as_edit
from spectral_sinks.sweeps.cost import share_of_threads
from spectral_sinks.sweeps.definition import Sweep, Unit


@runtime_checkable
class SweepSource(Protocol):
    """What a worker makes a sweep from: the sweep itself, or the file that describes it."""

    @property
    def key(self) -> str: ...

    def prepare(self) -> Sweep: ...


class Held:
    """A sweep as its own source: it is packed once, travels with each unit, and is unpacked once by a worker.

    For a large model, use a sweep file, which names the model.
    """

    def __init__(self, sweep: Sweep) -> None:
        self.key = f"{sweep.key} {uuid4()}"  # the same cells may later run on another device
        self._sweep = sweep

    @cached_property
    def _packed(self) -> bytes:
        return cloudpickle.dumps(self._sweep)

    def __reduce__(self) -> tuple[Any, ...]:
        return Packed, (self.key, self._packed)

    def prepare(self) -> Sweep:
        return self._sweep


@dataclass(frozen=True)
class Packed:
    """A sweep as a worker receives it."""

    key: str
    bytes: bytes

    def prepare(self) -> Sweep:
        return pickle.loads(self.bytes)


class Adopted:
    """A sweep that the workers of a pool received when they started."""

    def __init__(self, key: str) -> None:
        self.key = key

    def prepare(self) -> Sweep:
        raise RuntimeError("this worker was started without its sweep")


_SWEEPS: dict[str, Sweep] = {}
_ONE_AT_A_TIME = threading.Lock()  # a model runs one trace at a time, also where the executor has threads


def work(source: SweepSource, unit: Unit) -> tuple[pd.DataFrame, float]:
    """Measure a unit; return its rows and the seconds they took. A worker prepares a sweep once."""
    with _ONE_AT_A_TIME:
        sweep = _prepared(source, unit)
        began = time.perf_counter()
        try:
            rows = sweep.measure(unit)
        except Exception as error:
            vars(error).pop("__intervention_tb__", None)  # nnsight's traceback cannot be pickled
            raise
        return rows, time.perf_counter() - began


def _prepared(source: SweepSource, unit: Unit) -> Sweep:
    if source.key in _SWEEPS and not _SWEEPS[source.key].has(unit):
        del _SWEEPS[source.key]  # its files have changed since
    if source.key not in _SWEEPS:
        _SWEEPS.clear()
        _SWEEPS[source.key] = source.prepare()
    if not _SWEEPS[source.key].has(unit):
        raise InputError(
            "a worker finds other weights, other texts or another version of the code than this process: "
            "let both see the same files and start the workers again"
        )
    return _SWEEPS[source.key]


class Serial(Executor):
    """An executor that runs everything at once in this process."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


def check_workers(sweep: Sweep, devices: Sequence[str]) -> None:
    """Raise InputError for functions that cannot be sent to processes, and for devices that do not exist."""
    for cell in sweep.cells:
        try:
            pickle.dumps([as_edit(edit).user_function for edit in cell.edits.values()])
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise InputError(
                f"cell {cell.name!r} cannot be sent to worker processes ({error}): define its functions in a "
                "module, or give an executor of threads"
            ) from error
    for device in devices:
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise InputError(f"device {device!r} cannot be used: {error}") from error


def pool(sweep: Sweep, workers: int, devices: Sequence[str] = ()) -> ProcessPoolExecutor:
    """Return a pool of processes that share the weights in memory, or hold them on one device each.

    The workers take the `devices` in turn, such as cuda:0 and cuda:1; load the model on the CPU for that. The
    processes share the cores: each has its part of torch's threads.
    """
    context = torch.multiprocessing.get_context("spawn")
    turns = context.Queue()
    for index in range(64 * workers):  # a pool replaces workers that die
        turns.put(devices[index % len(devices)] if devices else None)
    threads = share_of_threads(workers)
    return ProcessPoolExecutor(workers, context, _adopt, (sweep.key, sweep, turns, threads))


def begin_worker(threads: int) -> None:
    """Begin a process of a pool: give torch some threads, and end when the process that made the pool ends.

    A pool whose process was killed tells its workers nothing, and they would wait for work for ever.
    """
    torch.set_num_threads(threads)
    if (parent := parent_process()) is not None:

        def follow() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=follow, daemon=True).start()


def _adopt(key: str, sweep: Sweep, turns: Any, threads: int) -> None:
    begin_worker(threads)
    device = turns.get()
    if device is not None:
        sweep.model.module.to(device)
    _SWEEPS[key] = sweep
