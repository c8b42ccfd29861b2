"""Small sweeps that many tests run, and what other processes do with them."""

import functools
import itertools
import multiprocessing
import os
import signal
import sys
import threading
import time
from multiprocessing import forkserver
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from torch import Tensor

import spectral_sinks as ss
from spectral_sinks.sweeps import definition as sweeps
from spectral_sinks.sweeps import workers
from support import tiny_models

DOCUMENTS = [0, 0, 1, 2, 3]
"""Of the five windows."""

NUMBERS = ["nll", "baseline_nll", "delta_nll", "kl", "top1_agreement", "removed_energy_share"]


class Fixed:
    """A custom function that can be sent to any process and stored: it scales, after a pause."""

    def __init__(self, factor: float, seconds: float = 0) -> None:
        self.factor, self.seconds = factor, seconds
        self.address = f"scaled by {factor}"

    def __call__(self, x: Tensor) -> Tensor:
        time.sleep(self.seconds)
        return x * self.factor


class Failing(Fixed):
    """A custom function that raises what it was given."""

    def __call__(self, x: Tensor) -> Tensor:
        raise ValueError(f"failed at {tuple(x.shape)}")


@functools.cache
def windows() -> ss.Windows:
    return ss.Windows.of_ids(tiny_models.ids(5, 66), tiny_models.model(), DOCUMENTS)


@functools.cache
def spectrum() -> ss.Spectrum:
    return ss.read_spectrum(tiny_models.model(), bands=4, use_cache=False)


def sweep(cells: Any = None, **options: Any) -> ss.Sweep:
    """48 cells, of which 36 differ, on two batches."""
    model = tiny_models.model()
    if cells is None:
        cells = ss.grid(
            model,
            windows(),
            spectrum(),
            sites=["exit", "mlp"],
            layers=[0, 1, [0, 2]],
            keep=["1-3"],
            remove=["4", "2"],  # removing the last band is keeping the others
            fills=["zero", "noise"],
            controls=1,
        )
    return ss.Sweep.of(model, windows(), cells, **{"batch_size": 3} | options)


def scaled(count: int, seconds: float = 0, layer: int = 1) -> dict[str, Any]:
    return {f"x {i}": {ss.Site("exit", layer): Fixed(1 + i / 8, seconds)} for i in range(count)}


def rows_agree(one: pd.DataFrame, other: pd.DataFrame) -> None:
    """Check that two stores have the same rows, with numbers that differ by rounding alone."""
    assert not one.duplicated(["cell", "window"]).any()
    exact = ["cell", "name", "site", "filter", "fill", "at", "document", "window", "tokens"]
    assert one[exact].equals(other[exact])
    assert (one[NUMBERS] - other[NUMBERS]).abs().max().max() < 1e-6
    for name in ("sink_mass", "baseline_sink_mass"):
        assert (one[name].map(max) - other[name].map(max)).abs().max() < 1e-6


def fast() -> BaseContext:
    """Processes that are forked from one that has made everything: they start at once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["support.forkserver_preload"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # threads do not survive a fork
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
        forkserver.ensure_running()
    first = context.Process(target=int)
    first.start()
    first.join()
    return context


def run(out: Path, cells_per_unit: int = 1, seconds: float = 0) -> None:
    """Run the sweep in a process of its own, in small units: there are many moments to be killed at."""
    sweeps.CELLS_PER_UNIT = cells_per_unit
    ss.sweep(sweep() if not seconds else sweep(scaled(20, seconds)), out)


def run_with_workers(out: Path) -> None:
    """Run a sweep of slow cells in a pool of a process of its own."""
    sweeps.CELLS_PER_UNIT = 1
    ss.sweep(sweep(scaled(200, 0.2)), out, workers=2)


def run_until_killed(out: Path, units: int, seconds: float) -> None:
    """Run the sweep in a process of its own, which dies some time after it has stored so many units.

    The process counts for itself, so that a loaded machine cannot move every kill before the first unit.
    """
    add = ss.sweeps.Store.add
    left = itertools.count(units, -1)

    def counted(self: ss.sweeps.Store, name: str, rows: pd.DataFrame) -> None:
        add(self, name, rows)
        if next(left) == 1:
            threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ss.sweeps.Store, "add", counted)
        run(out)


def peek(key: str) -> tuple[bool, float, str, int]:
    """What a worker of a pool has: whether its weights are in shared memory, one, its device, threads."""
    model = workers._SWEEPS[key].model
    weight = model.unembedding_weight
    value = 0.0 if weight.is_meta else float(weight[3, 5])
    return weight.is_shared(), value, str(weight.device), os.getpid()
