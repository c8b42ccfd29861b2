"""Run a sweep into a store: finished units are read, missing ones are measured and written one by one."""

import json
import math
import time
import warnings
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, CancelledError, Executor, Future, wait
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm import tqdm

from spectral_sinks.errors import InputError, SpectralWarning
from spectral_sinks.files import PATIENCE, expanded, listing
from spectral_sinks.measure.results import Result
from spectral_sinks.remote import handshake
from spectral_sinks.stats import Estimate
from spectral_sinks.sweeps.config import SweepFile
from spectral_sinks.sweeps.cost import Cost, Speed, duration, estimate, floor
from spectral_sinks.sweeps.definition import Sweep, Unit, describe_cell
from spectral_sinks.sweeps.remote_jobs import RemoteCost, remote_cost, run_jobs
from spectral_sinks.sweeps.store import Store
from spectral_sinks.sweeps.workers import Adopted, Held, Serial, SweepSource, check_workers, pool, work

LOSSES = 3
"""Number of times that a pool may break, with no unit finished in between, before the sweep gives up."""

CLAIM_POLL = 0.2
"""Seconds between attempts to claim a unit that another process holds."""

DESCRIBED = ("name", "site", "layer", "head", "filter", "rank", "fill", "at", "draw")
"""Columns of a table that describe a cell."""

MakesExecutor = Callable[[], Executor]


@dataclass(frozen=True)
class Report:
    """What a run computed, and how long it took."""

    computed: int
    """Cells x windows computed by this run."""
    found: int
    """Cells x windows that were in the store, or that another process computed meanwhile."""
    seconds: float
    worker_seconds: float
    """Seconds spent on units, summed over the workers."""
    of_floor: float | None
    """Worker seconds divided by the floor of the computed units; None where no cost was estimated."""

    def __str__(self) -> str:
        text = f"{self.computed} cells x windows in {duration(self.seconds)}, {self.found} were there"
        return text if self.of_floor is None else f"{text}; {self.of_floor:.2f} times the floor"


@dataclass(frozen=True, eq=False, repr=False)
class Done(Result):
    """The result of a sweep: its store, and the report of the run."""

    sweep: Sweep
    store: Store
    report: Report

    @property
    def headline(self) -> str:
        """How many cells there are, and where they are stored."""
        return f"{len(self.sweep.cells)} cells in {self.store.folder}"

    @property
    def table(self) -> pd.DataFrame:
        """One row per cell and document, for the cells of this sweep only, under their names in it.

        `attrs["predict"]` says how many predictions of each window were scored, if not all.
        """
        stored = self.store.table()
        addresses, cells = self.sweep.addresses, self.sweep.cells
        described = pd.DataFrame(
            {"cell": address} | describe_cell(cell) for address, cell in zip(addresses, cells, strict=True)
        ).astype(stored.dtypes[["cell", *DESCRIBED]])
        found = described.merge(stored.drop(columns=[*DESCRIBED]), on="cell")[stored.columns]
        return self._marked(found)

    def summary(self) -> pd.DataFrame:
        """Return one row per cell: its description, the number of `documents`, and means over them.

        `delta_nll` is the difference in nats, with its 95 % BCa interval `delta_nll_low` to `delta_nll_high`.
        The interval is over documents, and so it holds the error of a sample of predictions as well. Such a
        sample is marked as in `table`.
        """
        rows: list[dict[str, object]] = []
        for _, part in self.table.groupby("name", sort=False):
            first, means = part.iloc[0], part[["kl", "top1_agreement", "removed_energy_share"]].mean()
            described = {column: first[column] for column in DESCRIBED} | {"documents": len(part)}
            rows.append(described | Estimate.of(part["delta_nll"]).columns("delta_nll") | means.to_dict())
        return self._marked(pd.DataFrame(rows))

    def record(self) -> dict[str, Any]:
        """The report, and the rows of `summary` as `cells`, as a dictionary that JSON can hold.

        `predict` is the number of predictions of each window that were scored, if not all.
        """
        summary = self.summary()
        cells = json.loads(summary.to_json(orient="records"))
        return {"out": str(self.store.folder), **asdict(self.report), **summary.attrs, "cells": cells}

    def _marked(self, table: pd.DataFrame) -> pd.DataFrame:
        if self.sweep.predict is not None:
            table.attrs["predict"] = self.sweep.predict.count
        return table


def sweep(
    what: Sweep | SweepFile | str | Path,
    out: str | Path,
    *,
    shard: tuple[int, int] | None = None,
    fresh: bool = False,
    executor: Executor | None = None,
    workers: int = 0,
    devices: Sequence[str] = (),
    in_flight: int = 8,
    wait: bool = True,
    say: Callable[[str], None] | None = None,
) -> Done:
    """Measure the cells of a sweep, or of a sweep file, into the results folder `out`.

    A run continues where an earlier one stopped: cells whose content address is in the folder are not
    computed again. Several processes may run one sweep into the same folder at once. The units of a model at
    a server are jobs there, whose ids the folder keeps.

    Args:
        what: a sweep, or the path of a sweep file.
        out: the results folder.
        shard: `(i, n)` for every n-th unit from the i-th. Shards in folders of their own are joined by
            `Store.merge`.
        fresh: whether to empty the folder first.
        executor: any `concurrent.futures.Executor`, such as that of a Dask client. Its workers make the sweep
            from the file, or receive it.
        workers: the number of processes on this machine that run the units; 0 for this process.
        devices: the devices of these processes; without any, they share the weights.
        in_flight: the number of units that an executor or a server has in hand. Give an executor two or more
            for each of its workers.
        wait: whether to wait for jobs at a server; if not, `collect` fetches their results later.
        say: is called once with the cost as text.

    Raises:
        InputError: before the folder is touched, for a file that cannot be read, cells without a content
            address and a shard that does not exist; and for a folder that is not a store or cannot be
            written.

    """
    if isinstance(what, str | Path):
        what = SweepFile.read(what)
    if workers and executor is not None:
        raise InputError("give workers or an executor, not both")
    if workers < 0 or (devices and not workers):
        raise InputError(f"{workers} workers for devices {', '.join(devices) or 'none'}: give at least 1")
    made = what if isinstance(what, Sweep) else what.prepare()
    if made.model.remote is not None and (workers or executor is not None):
        raise InputError("a model that is elsewhere needs no workers or executor here")
    if not wait and not _at_server(made):
        raise InputError("only jobs at a server can be left alone: load the model with remote=True")
    if workers:
        check_workers(made, devices)
    if _at_server(made):
        handshake.require(made.model)  # addresses name the dtype that the server runs in
    made.renew()
    _ = made.units if shard is None else made.shard(*shard)
    store = Store(out)
    if fresh:
        store.clear()
    source = what if executor is not None and isinstance(what, SweepFile) else Held(made)
    if workers:
        source = Adopted(made.key)
    runner = partial(pool, made, workers, devices) if workers else executor
    return run(
        made,
        store,
        runner,
        source,
        shard=shard,
        in_flight=max(in_flight, 2 * workers),
        processes=workers,
        say=say,
        wait=wait,
    )


def plan(
    what: Sweep | SweepFile | str | Path,
    out: str | Path | None = None,
    *,
    shard: tuple[int, int] | None = None,
) -> Cost | RemoteCost:
    """Return the cost of the missing part of a sweep, as measured on its first batch.

    It is measured now, unless an earlier run into `out` has done so. Nothing is written. Raises InputError as
    `sweep` does.
    """
    if isinstance(what, str | Path):
        what = SweepFile.read(what)
    made = what if isinstance(what, Sweep) else what.prepare()
    if _at_server(made):
        handshake.require(made.model)
    made.renew()
    units = made.units if shard is None else made.shard(*shard)
    store = Store(out, create=False) if out is not None and listing(expanded(out)) else None
    finished = store.finished() if store else set[tuple[str, int]]()
    return _cost(made, tuple(made.missing(units, finished)), store)[0]


def run(
    sweep: Sweep,
    store: Store,
    executor: Executor | MakesExecutor | None = None,
    source: SweepSource | None = None,
    *,
    shard: tuple[int, int] | None = None,
    say: Callable[[str], None] | None = None,
    in_flight: int = 8,
    processes: int = 0,
    wait: bool = True,
) -> Done:
    """Measure the missing part of a sweep, in this process, on an executor, or as jobs at a server.

    Args:
        sweep: what to measure; the location of its model decides whether units become jobs.
        store: the results folder.
        executor: where the units run. A function that makes an executor is called again when the executor
            breaks, as a pool does when one of its processes is killed. None runs them in this process.
        source: what the workers make the sweep from.
        shard: `(i, n)` for every n-th unit from the i-th.
        say: is called once, before the start, with the cost as text.
        in_flight: the number of units that an executor or a server has in hand.
        processes: the number of processes that share the cores, for the estimate of the cost.
        wait: whether to wait for jobs at a server.

    """
    units = sweep.units if shard is None else sweep.shard(*shard)
    total = sum(map(sweep.size, units))

    def missing(sent: Collection[tuple[str, int]] = ()) -> list[Unit]:
        return list(sweep.missing(units, store.finished().union(sent)))

    store.record(sweep.key, sweep.manifest())
    left = missing()
    cost = None
    if say is not None and left:
        cost, speed = _cost(sweep, tuple(left), store, processes)
        if speed is not None:
            store.record(sweep.key, speed.record)
    if say is not None:
        say(f"all {total} cells x windows are in {store.folder}" if cost is None else str(cost))
    if executor is not None:
        sweep.release()  # the batch of the estimate: the workers make their own
    began = time.perf_counter()
    if _at_server(sweep):
        computed = run_jobs(sweep, store, missing, in_flight=in_flight, wait=wait)
        worker_seconds, lowest = time.perf_counter() - began, 0.0
    else:
        local = cost if isinstance(cost, Cost) else None
        workers = _Workers(executor, source or Held(sweep), in_flight if executor else 1)
        computed, worker_seconds, lowest = _run_units(sweep, store, left, total, workers, local)
    unfinished = 0 if wait else sum(map(sweep.size, missing()))
    ratio = worker_seconds / lowest if lowest else None
    seconds = time.perf_counter() - began
    report = Report(computed, total - unfinished - computed, seconds, worker_seconds, ratio)
    return Done(sweep, store, report)


def _run_units(
    sweep: Sweep, store: Store, missing: Iterable[Unit], total: int, workers: "_Workers", cost: Cost | None
) -> tuple[int, float, float]:
    """Measure units and store their rows.

    Returns the cells x windows computed, the seconds that the workers took, and the floor of the cost in
    seconds, 0 without an estimate.
    """
    left = deque(missing)
    computed, worker_seconds, lowest = 0, 0.0, 0.0
    stored = total - sum(map(sweep.size, left))
    bar = tqdm(total=total, initial=stored, unit="cell", leave=False, disable=None)
    idle: float | None = None  # since when other processes have had all units that are left
    with workers, bar:
        while left or workers.waiting:
            open_units = [*left, *workers.units]
            bar.update(total - sum(map(sweep.size, open_units)) - bar.n)
            # Keep every worker busy before waiting for one of them
            if workers.have_room and (mine := _claim(sweep, left, store)):
                workers.submit(*mine)
                idle = None
                continue
            if left and not workers.waiting:
                idle = time.monotonic() if idle is None else idle
                if time.monotonic() - idle > PATIENCE:
                    warnings.warn(
                        f"this run waits for {len(left)} units that other processes have claimed for more "
                        f"than {PATIENCE:.0f} s, such as {left[0].name}: a process that is suspended must be "
                        "resumed or stopped",
                        SpectralWarning,
                        stacklevel=4,
                    )
                    idle = math.inf
                time.sleep(CLAIM_POLL)
            for unit, claim, result in workers.done():
                with claim:
                    if result is None:
                        left.appendleft(unit)
                        continue
                    rows, seconds = result
                    store.add(unit.name, rows)
                computed += sweep.size(unit)
                worker_seconds += seconds
                if cost is not None:
                    lowest += floor(sweep, (unit,), cost.layer_seconds, cost.head_seconds)
    return computed, worker_seconds, lowest


def _at_server(sweep: Sweep) -> bool:
    """Whether the units of a sweep are jobs at a server."""
    return sweep.model.remote is not None and sweep.model.remote.to != "local"


def _cost(
    sweep: Sweep, units: tuple[Unit, ...], store: Store | None, processes: int = 0
) -> tuple[Cost | RemoteCost, Speed | None]:
    """Return the cost of some units: estimated where the model is in this process, counted otherwise."""
    if sweep.model.remote is not None:
        return remote_cost(sweep, units), None
    return estimate(sweep, units, processes, store.manifest["runs"] if store else {})


Measured = tuple[pd.DataFrame, float]


class _Workers:
    """An executor and the units that it has in hand; it is made again when it breaks, where possible."""

    def __init__(
        self, executor: Executor | MakesExecutor | None, source: SweepSource, in_flight: int
    ) -> None:
        self._source, self._in_flight = source, in_flight
        self._make = None if executor is None or isinstance(executor, Executor) else executor
        self._given = executor if isinstance(executor, Executor) else None
        self._current: Executor | None = None
        self._losses = 0
        self.waiting: dict[Future[Measured], tuple[Unit, ExitStack, Executor]] = {}

    @property
    def units(self) -> list[Unit]:
        return [unit for unit, *_ in self.waiting.values()]

    def __enter__(self) -> "_Workers":
        return self

    def __exit__(self, *_: object) -> None:
        for future, (_unit, claim, _executor) in self.waiting.items():
            future.cancel()
            claim.close()
        if self._make is not None and self._current is not None:
            self._current.shutdown(cancel_futures=True)

    @property
    def have_room(self) -> bool:
        return len(self.waiting) < self._in_flight

    def submit(self, unit: Unit, claim: ExitStack) -> None:
        if self._current is None:
            self._current = self._make() if self._make else self._given or Serial()
        with ExitStack() as undo:
            undo.push(claim)
            try:
                future: Future[Measured] = self._current.submit(work, self._source, unit)
            except BrokenExecutor as error:
                future = Future()
                future.set_exception(error)
            undo.pop_all()
        self.waiting[future] = unit, claim, self._current

    def done(self) -> Iterator[tuple[Unit, ExitStack, Measured | None]]:
        """Yield finished units with their results, None for a unit whose worker died. Errors come last."""

        def failed(future: Future[Measured]) -> bool:
            return future.cancelled() or future.exception() is not None

        for future in sorted(wait(self.waiting, return_when=FIRST_COMPLETED).done, key=failed):
            unit, claim, executor = self.waiting.pop(future)
            with ExitStack() as undo:
                undo.push(claim)
                try:
                    result = future.result()
                    self._losses = 0
                except Exception as error:
                    # Dask cancels when it loses its scheduler, and gives up a unit that has killed workers
                    gone = isinstance(error, BrokenExecutor | CancelledError)
                    if not gone and type(error).__name__ != "KilledWorker":
                        raise
                    result = None
                    if executor is self._current:  # only the first of its units reports the loss
                        self._broke(error)
                undo.pop_all()
            yield unit, claim, result

    def _broke(self, error: Exception) -> None:
        if self._make is None:
            raise InputError(
                f"the executor broke ({str(error) or 'it gave up what it had in hand'}): start another and "
                "run the sweep again, which goes on from there"
            ) from error
        assert self._current is not None
        self._current.shutdown(wait=False)
        self._current = None
        self._losses += 1
        if self._losses > LOSSES:
            raise InputError(
                f"worker processes died {self._losses} times in a row without finishing anything ({error}): "
                "memory may be short; use fewer workers or a smaller batch_size"
            ) from error


def _claim(sweep: Sweep, left: deque[Unit], store: Store) -> tuple[Unit, ExitStack] | None:
    """Claim the next unit that no other process holds; return what is missing of it, and the claim."""
    for _ in range(len(left)):
        unit = left.popleft()
        claim = ExitStack()
        if not claim.enter_context(store.claim(unit.name)):
            left.append(unit)
            continue
        for missing in sweep.missing([unit], store.finished()):
            return missing, claim
        claim.close()
    return None
