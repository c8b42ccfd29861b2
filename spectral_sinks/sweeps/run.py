"""Run a sweep into a store: what is finished is found, what is missing is shared out and written at once."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, CancelledError, Executor, Future, wait
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from spectral_sinks.errors import InputError
from spectral_sinks.files import listing
from spectral_sinks.remote import handshake
from spectral_sinks.stats import mean_interval
from spectral_sinks.sweeps.config import SweepFile
from spectral_sinks.sweeps.cost import Cost, duration, estimate, floor
from spectral_sinks.sweeps.definition import Sweep, Unit, describe
from spectral_sinks.sweeps.remote_jobs import RemoteCost, estimate_afar, run_afar
from spectral_sinks.sweeps.store import Store
from spectral_sinks.sweeps.workers import Adopted, Held, Serial, Source, check, pool, work

LOSSES = 3
"""Times that a pool may break, with no unit finished in between, before the sweep gives up."""

PATIENCE = 0.2
"""Seconds between looks at what another process is doing."""

DESCRIBED = ("name", "site", "layer", "head", "filter", "rank", "fill", "at", "draw")
"""Columns of a table that say what a cell is."""

MakesExecutor = Callable[[], Executor]


@dataclass(frozen=True)
class Report:
    """How a run went."""

    computed: int
    """Cells x windows done by this run."""
    found: int
    """Cells x windows that the store had, or that another process did meanwhile."""
    seconds: float
    worker_seconds: float
    """Spent on units, over all workers."""
    of_floor: float | None
    """Worker seconds over the floor of what was computed; None where no cost was estimated."""

    def __str__(self) -> str:
        text = f"{self.computed} cells x windows in {duration(self.seconds)}, {self.found} were there"
        return text if self.of_floor is None else f"{text}; {self.of_floor:.2f} times the floor"


@dataclass(frozen=True, eq=False)
class Done:
    """A sweep that has run: its store, and how it went."""

    sweep: Sweep
    store: Store
    report: Report

    def table(self) -> pd.DataFrame:
        """One row per cell and document, for the cells of this sweep alone, by the names they have in it."""
        found = self.store.table()
        addresses, cells = self.sweep.addresses, self.sweep.cells
        described = pd.DataFrame(
            {"cell": address} | describe(cell) for address, cell in zip(addresses, cells, strict=True)
        ).astype(found.dtypes[["cell", *DESCRIBED]])
        return described.merge(found.drop(columns=[*DESCRIBED]), on="cell")[found.columns]

    def summary(self) -> pd.DataFrame:
        """One row per cell: mean over documents of the NLL difference (nats), its 95 % interval, and more."""
        rows: list[dict[str, object]] = []
        for _, part in self.table().groupby("name", sort=False):
            low, high = mean_interval(part["delta_nll"])
            means = part[["kl", "top1_agreement", "removed_energy_share"]].mean().to_dict()
            first = part.iloc[0]
            rows.append(
                {name: first[name] for name in DESCRIBED}
                | {"delta_nll": part["delta_nll"].mean(), "low": low, "high": high, "n": len(part), **means}
            )
        return pd.DataFrame(rows)


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

    It goes on where an earlier run stopped: cells whose content address the folder has are not computed
    again; `fresh` empties it first. Several processes may run one sweep into one folder at once, or each a
    `shard` (i, n) of it into a folder of its own, to be joined by `Store.merge`. Units of work run in this
    process; in `workers` processes, which share the weights or hold them on `devices`; or on any
    `concurrent.futures.Executor`, such as a Dask client's, whose workers make the sweep from the file, or are
    sent it; `in_flight` is how many units it has in hand, two for each of its workers or more. Of a model at
    a server they are jobs there, whose ids the folder keeps; without `wait` they are sent and not waited for
    (`collect` asks after them). `say` is told what it will cost.

    Raises InputError, before the folder is touched, for a file that is not understood, cells that have no
    content address and a shard that does not exist; and for a folder that is no store or cannot be written.
    """
    if isinstance(what, str | Path):
        what = SweepFile.read(what)
    if workers and executor is not None:
        raise InputError("give workers or an executor, not both")
    if workers < 0 or (devices and not workers):
        raise InputError(f"{workers} workers for devices {', '.join(devices) or 'none'}: give at least 1")
    made = what if isinstance(what, Sweep) else what.prepare()
    if shard is not None:
        made.shard(*shard)
    if made.model.remote is not None and (workers or executor is not None):
        raise InputError("a model that is elsewhere needs no workers or executor here")
    if not wait and not _afar(made):
        raise InputError("only jobs at a server can be left alone: load the model with remote=True")
    if workers:
        check(made, devices)
    if _afar(made):
        handshake.require(made.model)  # addresses name the dtype that the server runs in
    _ = made.units
    store = Store(out)
    if fresh:
        store.clear()
    if _afar(made):
        return _run_afar(made, store, shard, in_flight, wait, say)
    source = Adopted(made.key) if workers else Held(made) if isinstance(what, Sweep) else what
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
    )


def plan(
    what: Sweep | SweepFile | str | Path,
    out: str | Path | None = None,
    *,
    shard: tuple[int, int] | None = None,
) -> Cost | RemoteCost:
    """What is still to be done of a sweep, as measured on its first batch; nothing is written.

    Raises InputError as `sweep` does.
    """
    if isinstance(what, str | Path):
        what = SweepFile.read(what)
    made = what if isinstance(what, Sweep) else what.prepare()
    if _afar(made):
        handshake.require(made.model)
    units = made.units if shard is None else made.shard(*shard)
    finished: set[tuple[str, int]] = set()
    if out is not None and listing(Path(out).expanduser()):
        finished = Store(out, create=False).finished()
    left = tuple(_missing(made, units, finished))
    return estimate(made, left) if made.model.remote is None else estimate_afar(made, left)


def run(
    sweep: Sweep,
    store: Store,
    executor: Executor | MakesExecutor | None = None,
    source: Source | None = None,
    *,
    shard: tuple[int, int] | None = None,
    say: Callable[[str], None] | None = None,
    in_flight: int = 8,
    processes: int = 0,
) -> Done:
    """Do what is missing of a sweep, `in_flight` units at a time where there is an executor.

    An executor given as a function that makes one is made again when it breaks, as a pool does when one of
    its processes is killed. `source` is what workers make the sweep from. With `say`, the cost is estimated
    for one of so many `processes` and told before the start.
    """
    units = sweep.units if shard is None else sweep.shard(*shard)
    total = sum(map(sweep.size, units))
    store.record(sweep.key, sweep.manifest())
    left = deque(_missing(sweep, units, store.finished()))
    here = sweep.model.remote is None
    cost = estimate(sweep, tuple(left), processes) if say is not None and left and here else None
    if say is not None:
        there = f"all {total} cells x windows are in {store.folder}"
        say(str(cost or (estimate_afar(sweep, tuple(left)) if left else there)))
    began = time.perf_counter()
    computed, worker_seconds, lowest = 0, 0.0, 0.0
    workers = _Workers(executor)
    there = total - sum(map(sweep.size, left))
    bar = tqdm(total=total, initial=there, unit="cell", leave=False, disable=None)
    with workers, bar:
        while left or workers.waiting:
            open_units = [*left, *workers.units]
            bar.update(total - sum(map(sweep.size, open_units)) - bar.n)
            if len(workers.waiting) < (in_flight if executor else 1) and (mine := _claim(sweep, left, store)):
                workers.submit(source or Held(sweep), *mine)
                continue
            if not workers.waiting:
                time.sleep(PATIENCE)  # what is left is in the hands of another process
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
    seconds = time.perf_counter() - began
    ratio = worker_seconds / lowest if lowest else None
    return Done(sweep, store, Report(computed, total - computed, seconds, worker_seconds, ratio))


def _afar(sweep: Sweep) -> bool:
    """Whether units are jobs at a server."""
    return sweep.model.remote is not None and sweep.model.remote.to != "local"


def _run_afar(
    sweep: Sweep,
    store: Store,
    shard: tuple[int, int] | None,
    in_flight: int,
    wait: bool,
    say: Callable[[str], None] | None,
) -> Done:
    """Do what is missing of a sweep at a server."""
    units = sweep.units if shard is None else sweep.shard(*shard)
    total = sum(map(sweep.size, units))
    store.record(sweep.key, sweep.manifest())
    left = tuple(_missing(sweep, units, store.finished()))
    if say is not None:
        say(str(estimate_afar(sweep, left)) if left else f"all {total} cells x windows are in {store.folder}")
    began = time.perf_counter()
    computed = run_afar(
        sweep,
        store,
        lambda sent: _missing(sweep, units, store.finished() | sent),
        in_flight=in_flight,
        wait=wait,
    )
    seconds = time.perf_counter() - began
    found = total - sum(map(sweep.size, _missing(sweep, units, store.finished()))) - computed
    return Done(sweep, store, Report(computed, found, seconds, seconds, None))


Result = tuple[pd.DataFrame, float]


class _Workers:
    """An executor with the units it has in hand; made anew when it breaks, if there is a way to make one."""

    def __init__(self, executor: Executor | MakesExecutor | None) -> None:
        self._make = None if executor is None or isinstance(executor, Executor) else executor
        self._given = executor if isinstance(executor, Executor) else None
        self._current: Executor | None = None
        self._losses = 0
        self.waiting: dict[Future[Result], tuple[Unit, ExitStack, Executor]] = {}

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

    def submit(self, source: Source, unit: Unit, claim: ExitStack) -> None:
        if self._current is None:
            self._current = self._make() if self._make else self._given or Serial()
        with ExitStack() as undo:
            undo.push(claim)
            try:
                future: Future[Result] = self._current.submit(work, source, unit)
            except BrokenExecutor as error:
                future = Future()
                future.set_exception(error)
            undo.pop_all()
        self.waiting[future] = unit, claim, self._current

    def done(self) -> Iterator[tuple[Unit, ExitStack, Result | None]]:
        """Units that are finished, with their result; None for one whose worker died. Errors come last."""

        def failed(future: Future[Result]) -> bool:
            return future.cancelled() or future.exception() is not None

        for future in sorted(wait(self.waiting, return_when=FIRST_COMPLETED).done, key=failed):
            unit, claim, executor = self.waiting.pop(future)
            with ExitStack() as undo:
                undo.push(claim)
                try:
                    result = future.result()
                    self._losses = 0
                except (BrokenExecutor, CancelledError) as error:  # Dask cancels when it loses its scheduler
                    result = None
                    if executor is self._current:  # the first of its units to report the loss
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


def _missing(sweep: Sweep, units: Iterable[Unit], finished: set[tuple[str, int]]) -> Iterator[Unit]:
    """What is left of some units."""
    for unit in units:
        places = sweep.batches[unit.batch][0]
        cells = [
            i for i in unit.cells if any((sweep.addresses[i], place) not in finished for place in places)
        ]
        if cells:
            yield unit if len(cells) == len(unit.cells) else sweep.unit(unit.batch, cells)


def _claim(sweep: Sweep, left: deque[Unit], store: Store) -> tuple[Unit, ExitStack] | None:
    """The next unit that no other process is at work on, what is still missing of it, and the hold on it."""
    for _ in range(len(left)):
        unit = left.popleft()
        claim = ExitStack()
        if not claim.enter_context(store.claim(unit.name)):
            left.append(unit)
            continue
        for missing in _missing(sweep, [unit], store.finished()):
            return missing, claim
        claim.close()
    return None
