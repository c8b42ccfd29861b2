"""Sweep results in a folder: Parquet parts and a manifest, each written completely or not at all.

    manifest.json                  the format, and what was run
    parts/UNIT-CHECKSUM.parquet    finished work; pandas.read_parquet("parts") reads it without this package
    jobs/UNIT.json                 what was sent to a server
    .locks/                        claims of processes; the operating system frees those of a dead process

A store needs a local file system, since locks may not hold between machines on a network file system. Give
each machine its own folder, and merge the folders.
"""

import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
from filelock import FileLock, Timeout

from spectral_sinks.errors import InputError, SpectralWarning, without_secrets
from spectral_sinks.files import PATIENCE, atomic_write, clearly, expanded, listing, read_regular
from spectral_sinks.sweeps.schema import (
    FORMAT,
    PART,
    UNIT,
    Conflict,
    Damaged,
    by_document,
    canonical,
    check_format,
    checksum,
    conflicts,
    decode,
    encode,
)

FOLDERS = ("parts", "jobs", ".locks")
"""The folders inside a results folder."""

KIND = "spectral_sinks sweep"
"""The mark that distinguishes the manifest of a store from any other manifest.json."""


class Store:
    """The rows of a sweep on disk, one per cell and window; a unit is stored completely or not at all.

    Any number of processes may read and write at once, and be killed at any time. `create=False` opens only
    an existing store. Raises InputError for a folder with other contents or another format, and for one that
    cannot be written.
    """

    def __init__(self, folder: str | Path, create: bool = True) -> None:
        self.folder = expanded(folder)
        self.parts = self.folder / "parts"
        self._manifest = self.folder / "manifest.json"
        self._locks = self.folder / ".locks"
        self._finished: dict[str, set[tuple[str, int]]] = {}  # by part
        self._pairs: set[tuple[str, int]] = set()  # of all parts
        self._tidy = False
        for name in FOLDERS:
            if not (self.folder / name).resolve().is_relative_to(self.folder.resolve()):
                raise InputError(
                    f"{self.folder / name} is a link to {(self.folder / name).resolve()}, outside of the "
                    "results folder: replace it by what it links to"
                )
        if not os.path.exists(self._manifest):  # false as well where it cannot be seen
            self._begin(create)
        _ = self.manifest  # refuses another format

    def _begin(self, create: bool) -> None:
        present = listing(self.folder)
        if not create and "parts" not in present:
            raise InputError(f"{self.folder} holds no sweep results")
        if strangers := sorted(set(present) - {"parts", "jobs", "manifest.json"}):
            raise InputError(
                f"{self.folder} holds other things than sweep results ({strangers[0]}): give an empty folder"
            )
        earlier = self.finished()  # refuses parts of another format
        with self._alone():
            if self._manifest.exists():  # another process just began it
                return
            self.parts.mkdir(exist_ok=True)
            self._write_manifest({})
        if earlier:
            warnings.warn(
                f"{self._manifest} was gone: the rows are there, what earlier runs recorded is not",
                SpectralWarning,
                stacklevel=3,
            )

    @property
    def manifest(self) -> dict[str, Any]:
        """`format`, and `runs` by key. Raises InputError if damaged, foreign or of another format."""
        try:
            manifest = json.loads(read_regular(self._manifest))
        except OSError as error:
            raise InputError(f"{self._manifest} cannot be read: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise self._damaged_manifest(str(error)) from error
        if not isinstance(manifest, dict) or manifest.get("store") != KIND:
            raise InputError(f"{self._manifest} does not belong to a sweep: give another folder")
        check_format(manifest.get("format"), str(self.folder))
        runs = manifest.get("runs")
        if not isinstance(runs, dict) or not all(isinstance(run, dict) for run in runs.values()):
            raise self._damaged_manifest("no runs")
        for run in runs.values():
            cells = run.get("cells", [])
            if not isinstance(cells, list) or not all(isinstance(cell, str) for cell in cells):
                raise self._damaged_manifest("the cells of a run are not a list of addresses")
        return manifest

    def _damaged_manifest(self, reason: str) -> InputError:
        return InputError(
            f"{self._manifest} is damaged ({reason}): restore it, or delete it and run again; "
            "the rows are kept, what earlier runs recorded is lost"
        )

    def record(self, run_key: str, run: dict[str, Any]) -> None:
        """Merge the description of a run into the manifest.

        `run["cells"]` lists the addresses in the order of the rows; all shards of a sweep record the same.
        """

        def with_run(runs: dict[str, Any]) -> dict[str, Any]:
            old = runs.get(run_key, {})
            cells = dict.fromkeys([*old.get("cells", ()), *run.get("cells", ())])
            return runs | {run_key: {**old, **run, "cells": list(cells)}}

        known = self.manifest["runs"]
        if with_run(known) == known:  # a finished sweep can be shown from a folder that cannot be written
            return
        with self._alone():
            self._write_manifest(with_run(self.manifest["runs"]))

    def add(self, unit: str, rows: pd.DataFrame) -> Path:
        """Write the rows of one unit of work: when this returns they are finished and on the disk.

        Raises InputError for rows that do not fit the schema, a full disk and a read-only folder; the store
        is then as it was.
        """
        data = encode(rows)
        return self._put(f"{_unit(unit)}-{checksum(data)}.parquet", data)

    def finished(self) -> set[tuple[str, int]]:
        """Return cell and window of all sound rows. Damaged parts are reported and set aside."""
        names = self._names()
        self._keep(names)
        for name, _, table in self._sound(name for name in names if name not in self._finished):
            self._finished[name] = _keys(table)
            self._pairs |= self._finished[name]
        return self._pairs

    def rows(self) -> pd.DataFrame:
        """Return each cell and window once, in the recorded order of the cells.

        Raises InputError where two parts have different numbers for one cell and window.
        """
        tables = {name: table for name, _, table in self._sound(self._names())}
        self._keep(tables)
        refuse(conflicts({str(self.parts / name): table for name, table in tables.items()}))
        runs = self.manifest["runs"]
        cells = dict.fromkeys(cell for key in sorted(runs) for cell in runs[key].get("cells", ()))
        return canonical(list(tables.values()), list(cells))

    def table(self) -> pd.DataFrame:
        """Return one row per cell and document: token-weighted means over the stored windows."""
        return by_document(self.rows())

    @contextmanager
    def claim(self, unit: str) -> Iterator[bool]:
        """Claim a unit until the block ends, without waiting; the value is whether the claim succeeded.

        Read `finished` again inside the block: another process may have finished the unit just before.
        """
        lock = self._lock(f"unit-{_unit(unit)}.lock")
        with clearly(self.folder), suppress(Timeout):
            self._locks.mkdir(parents=True, exist_ok=True)
            lock.acquire(blocking=False)
        try:
            yield lock.is_locked
        finally:
            lock.release()

    def clear(self) -> None:
        """Remove all rows and records, but no file that the store did not write.

        Raises InputError while another process has claimed a unit.
        """
        with self._alone():
            for path in self._locks.glob("unit-*.lock"):
                unit = path.name.removeprefix("unit-").removesuffix(".lock")
                if not UNIT.fullmatch(unit):  # not a lock of a store
                    continue
                with self.claim(unit) as free:
                    if not free:
                        raise InputError(f"another process is at work on {self.folder}: stop it first")
            for path in self.parts.iterdir() if self.parts.exists() else ():
                if PART.fullmatch(path.name.removeprefix(".damaged-")):
                    path.unlink()
            self._write_manifest({})
        self._finished, self._pairs = {}, set()

    @staticmethod
    def merge(folders: Sequence[str | Path], out: str | Path, prefer: str | Path | None = None) -> "Store":
        """Copy all sound rows and records of several stores into `out`, which may already have rows.

        Where parts have different numbers for one cell and window, `prefer` names the part, or the folder of
        the parts, whose numbers are kept.

        Raises InputError, before anything is written, for a folder that is not a store of this format, and
        for different numbers of which none, or several, are preferred.
        """
        stores = [Store(folder, create=False) for folder in folders]
        present = [Store(out, create=False)] if listing(expanded(out)) else []
        found = {
            store.parts / name: (data, table)
            for store in (*stores, *present)
            for name, data, table in store._sound(store._names())
        }
        dropped = _decided({path: table for path, (_, table) in found.items()}, prefer)
        merged = Store(out)
        own = merged.parts.resolve()
        for path, (data, table) in found.items():
            if path not in dropped:
                if path.parent.resolve() != own:
                    merged._put(path.name, data)
                continue
            keys = zip(table["cell"].to_pylist(), table["window"].to_pylist(), strict=True)
            kept = table.filter([key not in dropped[path] for key in keys])
            if kept.num_rows:
                parsed = PART.fullmatch(path.name)
                assert parsed is not None
                merged.add(parsed["unit"], kept.to_pandas())
            if path.parent.resolve() == own:
                path.unlink(missing_ok=True)
        for store in stores:
            for key, run in store.manifest["runs"].items():
                merged.record(key, run)
        return merged

    def _keep(self, names: Iterable[str]) -> None:
        """Forget the parts that are not among the names: they are damaged, or were set aside."""
        if gone := self._finished.keys() - set(names):
            self._finished = {name: self._finished[name] for name in self._finished.keys() - gone}
            self._pairs = set().union(*self._finished.values())

    def _put(self, name: str, data: bytes) -> Path:
        with self._alone():
            self.parts.mkdir(exist_ok=True)  # somebody may have deleted it
            with atomic_write(self.parts / name) as path:
                path.write_bytes(data)
        return self.parts / name

    def _write_manifest(self, runs: dict[str, Any]) -> None:
        manifest = {"store": KIND, "format": FORMAT, "runs": dict(sorted(runs.items()))}
        text = without_secrets(json.dumps(manifest, indent=1, ensure_ascii=False)) + "\n"
        with atomic_write(self._manifest) as path:
            path.write_text(text, encoding="utf-8")

    def _names(self) -> list[str]:
        return sorted(name for name in listing(self.parts) if name.endswith(".parquet"))

    def _sound(self, names: Iterable[str]) -> Iterator[tuple[str, bytes, pa.Table]]:
        """Yield name, bytes and rows of the sound parts; report the others."""
        for name in names:
            try:
                data = read_regular(self.parts / name)
                table = decode(data, name)
            except FileNotFoundError:  # another process set it aside
                continue
            except OSError as error:
                self._report(name, f"cannot be read ({error.strerror})", "left there")
            except Damaged as error:
                if (fate := self._set_aside(name)) is not None:
                    self._report(name, f"is damaged ({error})", fate)
                else:
                    yield from self._sound([name])
            else:
                yield name, data, table

    def _set_aside(self, name: str) -> str | None:
        """Set a damaged part aside, and return what was done as text.

        The result is None if another process has just set the part aside, or written it again.
        """
        path = self.parts / name
        with suppress(InputError), self._alone():
            try:
                decode(read_regular(path), name)
            except FileNotFoundError:
                return None
            except Damaged:
                path.replace(path.with_name(f".damaged-{name}"))
                return f"set aside as .damaged-{name}"
            else:
                return None
        return "left there, for the folder cannot be written"

    def _report(self, name: str, trouble: str, fate: str) -> None:
        warnings.warn(
            f"part {self.parts / name} {trouble}: {fate}, its rows count as not computed",
            SpectralWarning,
            stacklevel=5,
        )

    def _lock(self, name: str) -> FileLock:
        # a soft lock would outlive its process
        return FileLock(self._locks / name, timeout=PATIENCE, poll_interval=0.005, fallback_to_soft=False)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the lock under which files change; remove temporary files, which dead processes have left."""
        with clearly(self.folder):
            self._locks.mkdir(parents=True, exist_ok=True)
            with self._lock("store.lock"):
                if not self._tidy:
                    for path in (self.folder / ".manifest.json.part", *self.parts.glob(".*.parquet.part")):
                        path.unlink(missing_ok=True)
                    self._tidy = True
                yield


def refuse(found: Sequence[Conflict]) -> None:
    """Raise InputError if parts have different numbers for one cell and window; it names two of them."""
    if found:
        first = found[0]
        more = f", and {len(found) - 1} more rows differ" if len(found) > 1 else ""
        one, other = first.parts
        raise InputError(
            f"{one} and {other} have different numbers for window {first.window} of {first.name!r} "
            f"({first.difference}){more}: decide which is right, and name that part or its folder with "
            "`spectral-sinks merge OUT FOLDERS --prefer PATH`"
        )


def _decided(tables: Mapping[Path, pa.Table], prefer: str | Path | None) -> dict[Path, set[tuple[str, int]]]:
    """Return the rows, by part, that give way to different numbers of a preferred part."""
    found = conflicts({str(path): table for path, table in tables.items()})
    if prefer is None:
        refuse(found)
    where = expanded(prefer or "").resolve()
    right = {path: table for path, table in tables.items() if path.resolve().is_relative_to(where)}
    if prefer is not None and not right:
        raise InputError(f"{prefer} is none of the parts and folders that are joined: prefer one of them")
    refuse(conflicts({str(path): table for path, table in right.items()}))
    keys = {path: _keys(table) for path, table in tables.items()}
    decided = set[tuple[str, int]]().union(*(keys[path] for path in right))
    refuse([each for each in found if (each.cell, each.window) not in decided])
    settled = {(each.cell, each.window) for each in found}
    dropped = {path: keys[path] & settled for path in tables if path not in right}
    return {path: rows for path, rows in dropped.items() if rows}


def _keys(table: pa.Table) -> set[tuple[str, int]]:
    return set(zip(table["cell"].to_pylist(), table["window"].to_pylist(), strict=True))


def _unit(name: str) -> str:
    """Return the name of a unit. Raises InputError for one that cannot be the name of a file."""
    if not UNIT.fullmatch(name):
        raise InputError(
            f"unit {name!r}: give 1 to 150 letters, digits and . _ = -, beginning with a letter or digit"
        )
    return name
