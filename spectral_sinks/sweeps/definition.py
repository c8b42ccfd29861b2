"""A sweep: a model, windows and cells, divided into units of work that any process can do."""

import platform
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from typing import Any

import pandas as pd
from jaxtyping import Int
from torch import Tensor

from spectral_sinks.data.texts import Windows
from spectral_sinks.errors import InputError
from spectral_sinks.interventions.tracing import Interventions
from spectral_sinks.measure.memory import Memory, swap_groups
from spectral_sinks.measure.nll.effects import check_edit
from spectral_sinks.measure.nll.remote_batch import RemoteBatch, cells_per_job, open_batch
from spectral_sinks.measure.nll.replay import VERSION, Batch, BatchResult, first_exit
from spectral_sinks.measure.nll.scoring import Sample, predicted
from spectral_sinks.models.language import LanguageModel
from spectral_sinks.spectra.edits import as_edit
from spectral_sinks.sweeps.cells import Cell, named
from spectral_sinks.sweeps.content_address import address, context, digest, swapping

LIBRARIES = ("spectral-sinks", "nnsight", "torch", "transformers", "numpy", "scipy")

UNIT_OPERATIONS = {"cpu": 5e11, "cuda": 5e15}
"""Floating-point operations in a unit: some seconds of work, which are lost if the process is killed."""

CELLS_PER_UNIT = 20
"""Maximum number of cells in a unit."""


@dataclass(frozen=True)
class Unit:
    """Some cells that begin at one exit, on one batch; a unit is stored completely or not at all."""

    batch: int
    cells: tuple[int, ...]
    """Their indices in the sweep."""
    name: str
    """Hash of the addresses of the cells and of the windows of the batch."""


@dataclass(frozen=True, eq=False)
class Sweep:
    """Cells to be measured on windows. Make one with `Sweep.of`."""

    model: LanguageModel
    windows: Windows
    cells: tuple[Cell, ...]
    batch_size: int = 16
    spectrum: str = ""
    """Convention of the spectrum that the cells were made from, for the manifest."""
    predict: Sample | None = None
    """The predictions of each window that are scored; None for all."""
    _held: dict[int, Batch | RemoteBatch] = field(default_factory=dict, repr=False)

    @classmethod
    def of(
        cls,
        model: LanguageModel,
        windows: Windows,
        cells: Mapping[str, Interventions] | Iterable[Cell],
        *,
        batch_size: int = 16,
        spectrum: str = "",
        predict: int | Sample | None = None,
    ) -> "Sweep":
        """Make a sweep.

        Args:
            model: a language model.
            windows: the text.
            cells: interventions by name, or cells.
            batch_size: windows in a batch. With a swap among the cells, a batch holds the windows that are
                paired, up to 16.
            spectrum: convention of the spectrum that the cells were made from, for the manifest.
            predict: number of predictions of each window that are scored, as in `evaluate_all`. It is part of
                the content address, so that a sample is never taken for all predictions.

        Raises:
            InputError: without cells, for names that are not unique, for edits that are not defined on this
                model and these windows, and for a sample of fewer than two predictions.

        """
        all_cells = tuple(named(cells))
        for cell in all_cells:
            for site, edit in cell.edits.items():
                check_edit(site, as_edit(edit), model, windows)
        made = cls(model, windows, all_cells, batch_size, spectrum, Sample.of(predict))
        swaps = [cell.name for cell in all_cells if swapping(cell.edits)]
        if swaps and (alone := [indices[0] for indices, _ in made.batches if len(indices) == 1]):
            raise InputError(
                f"{swaps[0]!r} swaps between windows of one length, and window {alone[0]} is the only one of "
                "its length: give windows of one length"
            )
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        parts = (self.model, self.windows, self.cells, self.batch_size, self.spectrum, self.predict)
        return Sweep, parts, {"addresses": self.addresses}  # a worker need not hash the weights again

    def manifest(self) -> dict[str, Any]:
        """Return what is needed to repeat the sweep."""
        return {
            "model": self.model.name,
            "family": self.model.family,
            "weights": self.shared["weights"],
            "attention": self.model.config._attn_implementation,
            "dtype": str(self.model.dtype),
            "spectrum": self.spectrum,
            "windows": self.windows.record,
            "batch_size": self.batch_size,
            "version": VERSION,
            "libraries": versions(),
            "cells": list(self.addresses),
            **({} if self.predict is None else {"predict": asdict(self.predict)}),
            **({} if self.model.remote is None else {"remote": self.model.remote.record()}),
        }

    @cached_property
    def shared(self) -> dict[str, Any]:
        """What the addresses of all cells contain. Raises InputError as `context` does."""
        return context(self.model, self.windows, self.batch_size, self.predict)

    @cached_property
    def addresses(self) -> tuple[str, ...]:
        """Content address of each cell. Raises InputError for functions that have none."""
        return tuple(address(self.shared, cell.edits) for cell in self.cells)

    def renew(self) -> None:
        """Forget the addresses, and the batch that is kept, if the model has changed since they were made."""
        if "shared" in vars(self) and self.shared != context(
            self.model, self.windows, self.batch_size, self.predict
        ):
            self.release()
            for name in ("shared", "addresses", "distinct", "key", "units"):
                vars(self).pop(name, None)

    @cached_property
    def distinct(self) -> tuple[int, ...]:
        """Indices of the first cell of each address: equal cells under several names are measured once."""
        first: dict[str, int] = {}
        for cell, cell_address in enumerate(self.addresses):
            first.setdefault(cell_address, cell)
        return tuple(first.values())

    @cached_property
    def key(self) -> str:
        """Hash of the whole sweep."""
        return digest([self.addresses, self.batch_size])

    @cached_property
    def batches(self) -> list[tuple[list[int], Int[Tensor, "batch tokens"]]]:
        if any(swapping(cell.edits) for cell in self.cells):
            return list(swap_groups(self.windows))
        return list(self.windows.batches(self.batch_size))

    @cached_property
    def starts(self) -> tuple[int | None, ...]:
        """The exit at which each cell begins."""
        return tuple(first_exit(cell.edits) for cell in self.cells)

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """All units, batch by batch, from the lowest exit up; the same on every machine of one kind."""
        order = sorted(self.distinct, key=self._first)
        units: list[Unit] = []
        for index, (_, ids) in enumerate(self.batches):
            for _, group in groupby(order, key=self._first):
                members = list(group)
                size = self._cells_per_unit(ids)
                for first in range(0, len(members), size):
                    chosen = tuple(members[first : first + size])
                    units.append(self.unit(index, chosen))
        return tuple(units)

    def unit(self, batch: int, cells: Iterable[int]) -> Unit:
        """The unit of some cells on a batch."""
        chosen = tuple(cells)
        return Unit(batch, chosen, digest([[self.addresses[i] for i in chosen], self.batches[batch][0]]))

    def has(self, unit: Unit) -> bool:
        """Whether a unit made by another process is the same unit in this sweep."""
        known = unit.batch < len(self.batches) and max(unit.cells) < len(self.cells)
        return known and self.unit(unit.batch, unit.cells) == unit

    def missing(self, units: Iterable[Unit], finished: Collection[tuple[str, int]]) -> Iterator[Unit]:
        """Yield the unfinished parts of units; `finished` has the addresses of cells, with windows."""
        for unit in units:
            windows = self.batches[unit.batch][0]
            cells = [
                cell
                for cell in unit.cells
                if any((self.addresses[cell], window) not in finished for window in windows)
            ]
            if cells:
                yield unit if len(cells) == len(unit.cells) else self.unit(unit.batch, cells)

    def size(self, unit: Unit) -> int:
        """Cells x windows of a unit."""
        return len(unit.cells) * len(self.batches[unit.batch][0])

    def _first(self, cell: int) -> int:
        """The exit at which a cell begins; -2 for a cell that changes nothing."""
        exit = self.starts[cell]
        return -2 if exit is None else exit

    def _cells_per_unit(self, ids: Tensor) -> int:
        if self.model.remote is not None:
            return cells_per_job(self.model, ids)
        weights = self.model.layers * 12 * self.model.d**2 + self.model.vocabulary * self.model.d
        budget = UNIT_OPERATIONS.get(self.model.device.type, UNIT_OPERATIONS["cpu"])
        return max(1, min(CELLS_PER_UNIT, int(budget / (2 * weights * ids.numel()))))

    def shard(self, i: int, n: int) -> tuple[Unit, ...]:
        """Return every n-th unit from the i-th, where i is 1 to n. Raises InputError for another i."""
        if not 1 <= i <= n:
            raise InputError(f"shard {i}/{n}: expected 1/{max(n, 1)} to {max(n, 1)}/{max(n, 1)}")
        return self.units[i - 1 :: n]

    def batch(self, index: int, starts: Collection[int | None] = ()) -> Batch | RemoteBatch:
        """Return a batch after its untouched pass, which is made once.

        The last batch is kept. `starts` are exits at which residuals are kept besides those of the cells.
        """
        if index not in self._held:
            self.release()
            windows, ids = self.batches[index]
            memory = Memory(self.model, ids.shape[1])
            exits = {*self.starts, *starts}
            self._held[index] = open_batch(
                self.model, self.windows, windows, ids, exits, memory, self.predict
            )
        return self._held[index]

    def release(self) -> None:
        """Release the batch that is kept, whose residuals are large."""
        self._held.clear()

    def measure(self, unit: Unit) -> pd.DataFrame:
        """Measure a unit; return one row per cell and window for the store."""
        batch = self.batch(unit.batch)
        result = batch.measure([self.cells[i].edits for i in unit.cells])
        cells = [described(self, index) for index in unit.cells]
        documents = [self.windows.document[index] for index in batch.indices]
        tokens = predicted(self.model, self.batches[unit.batch][1].shape[1])  # however many are scored
        return table_of(cells, documents, batch.indices, tokens, batch.baseline, result)


def described(sweep: Sweep, index: int) -> dict[str, Any]:
    """Return the columns of a cell in the store that do not depend on a window."""
    cell = sweep.cells[index]
    return {"cell": sweep.addresses[index], "model": sweep.model.name, **describe_cell(cell)}


def table_of(
    cells: Sequence[dict[str, Any]],
    documents: Sequence[int],
    windows: Sequence[int],
    tokens: int,
    base: BatchResult,
    result: BatchResult,
) -> pd.DataFrame:
    """Return rows for the store, one per cell and window.

    Args:
        cells: the columns that describe each cell.
        documents: the document of each window.
        windows: the index of each window.
        tokens: the predicted tokens of a window.
        base: the untouched pass.
        result: the cells.

    """
    rows: list[dict[str, Any]] = []
    for row, cell in enumerate(cells):
        for column, (document, window) in enumerate(zip(documents, windows, strict=True)):
            rows.append(
                cell
                | {
                    "document": document,
                    "window": window,
                    "tokens": tokens,
                    "nll": result.nll[row, column],
                    "baseline_nll": base.nll[0, column],
                    "delta_nll": result.nll[row, column] - base.nll[0, column],
                    "kl": result.kl[row, column],
                    "top1_agreement": result.top1_agreement[row, column],
                    "removed_energy_share": result.removed_energy_share[row, column],
                    "sink_mass": _listed(result.sink_mass, row, column),
                    "baseline_sink_mass": _listed(base.sink_mass, 0, column),
                }
            )
    return pd.DataFrame(rows)


def versions() -> dict[str, str | None]:
    """Return the versions of the libraries behind the numbers; None for a package that is not installed."""

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    return {name: installed(name) for name in LIBRARIES} | {"python": platform.python_version()}


def describe_cell(cell: Cell) -> dict[str, Any]:
    """Return the columns that describe a cell: its sites, filters, fills, tokens and draw."""
    sites = sorted(cell.edits, key=lambda site: site.rank)
    edits = [as_edit(cell.edits[site]) for site in sites]
    ranks = [edit.rank for edit in edits if edit.rank is not None]
    labels = [edit.labels for edit in edits if edit.labels is not None]
    return {
        "name": cell.name,
        "site": " + ".join(site.kind for site in sites),
        "layer": sites[0].layer if sites else None,
        "head": sites[0].head if sites else None,
        "filter": " + ".join(dict.fromkeys(edit.name for edit in edits)),
        "rank": sum(ranks) if len(ranks) == len(edits) else None,
        "fill": " + ".join(dict.fromkeys(fill for fill, _ in labels)),
        "at": " + ".join(dict.fromkeys(tokens for _, tokens in labels)),
        "draw": cell.draw,
    }


def _listed(mass: Any, row: int, column: int) -> list[float] | None:
    return None if mass is None else mass[row, column].tolist()
