"""Where units of work run: this process, a pool that shares the weights, or any other executor."""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from typing import Any, Protocol

import pandas as pd
import torch

from spectral_sinks.sweeps.sweep import Sweep, Unit


class Source(Protocol):
    """What a worker makes the sweep from: the sweep itself, or the file that describes it."""

    @property
    def key(self) -> str: ...

    def prepare(self) -> Sweep: ...


class Held:
    """A sweep as its own source: it travels with each unit; a large model is better named in a file."""

    def __init__(self, sweep: Sweep) -> None:
        self.key = sweep.key
        self._sweep = sweep

    def prepare(self) -> Sweep:
        return self._sweep


class Adopted:
    """A sweep that the workers of a pool were given when they started."""

    def __init__(self, key: str) -> None:
        self.key = key

    def prepare(self) -> Sweep:
        raise RuntimeError("this worker was started without its sweep")


_SWEEPS: dict[str, Sweep] = {}
_ONE_AT_A_TIME = threading.Lock()  # a model runs one trace at a time, also where the executor has threads


def work(source: Source, unit: Unit) -> tuple[pd.DataFrame, float]:
    """The rows of a unit and the seconds they took; a worker prepares a sweep once."""
    with _ONE_AT_A_TIME:
        if source.key not in _SWEEPS:
            _SWEEPS.clear()
            _SWEEPS[source.key] = source.prepare()
        began = time.perf_counter()
        rows = _SWEEPS[source.key].measure(unit)
        return rows, time.perf_counter() - began


class Serial(Executor):
    """Work in this process, at once."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


def pool(sweep: Sweep, workers: int, devices: Sequence[str] = ()) -> ProcessPoolExecutor:
    """Processes that share the weights of a model in memory, or hold them on a device each.

    `devices` are dealt to the workers in turn, such as cuda:0 and cuda:1 (then load the model on the CPU).
    The processes share the cores: each has its part of torch's threads.
    """
    context = torch.multiprocessing.get_context("spawn")
    turns = context.Queue()
    for index in range(64 * workers):  # a pool replaces workers that die
        turns.put(devices[index % len(devices)] if devices else None)
    threads = max(1, torch.get_num_threads() // workers)
    return ProcessPoolExecutor(workers, context, _adopt, (sweep.key, sweep, turns, threads))


def _adopt(key: str, sweep: Sweep, turns: Any, threads: int) -> None:
    torch.set_num_threads(threads)
    device = turns.get()
    if device is not None:
        sweep.model.module.to(device)
    _SWEEPS[key] = sweep
