"""Lookup of numbers in tables, by file, rows and columns."""

import json
import re
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict, field_validator

from spectral_sinks.errors import SpectralError

DEFAULTS = {1: ["value"], 2: ["low", "high"], 3: ["value", "low", "high"]}
"""Default columns of NAME_summary.csv, by how many numbers a claim states."""

BELOW = re.compile(r"[\w*][\w.*+-]*(/[\w*][\w.*+-]*)*", re.ASCII)
"""The path of a file below a folder: no part of it leads upwards, and none is hidden."""

Selector = str | dict[str, Any]
Take = Literal["max", "min", "mean", "sum", "count"]


class LookupFailure(SpectralError):
    """A file, row or column that does not exist."""


class MissingTable(LookupFailure):
    """A file that does not exist."""

    def __init__(self, message: str, file: str) -> None:
        super().__init__(message)
        self.file = file


class TableCell(BaseModel):
    """The location of numbers in a table."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: str | None = None
    """CSV (several files with `*`) or JSON in the results folder; a path with a folder is relative to the
    repository.
    """
    row: list[Selector] | None = None
    """The values that select rows, by column, where `*` matches any text; a plain string selects by
    `quantity`.

    A list selects the rows of all its entries. None selects all rows.
    """
    column: list[str] | None = None
    """Names of columns: `name`, or `name:2` for the second number within a text and `name:-1` for the last.

    In JSON, a column is a path of keys, such as `key.key.0`.
    """
    take: list[Take] | None = None
    """Reduces all selected rows to one number; a list gives several."""
    scale: float = 1.0
    """Factor on the numbers, such as 100 for per cent."""
    over: "TableCell | None" = None
    """A number by which the numbers are divided."""
    minus: "TableCell | None" = None
    """A number that is subtracted."""
    by: list[str] = []
    """Columns that pair the rows of a comparison."""

    @field_validator("row", "column", "by", "take", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str | dict) else value

    @field_validator("file")
    @classmethod
    def _file_below(cls, value: str | None) -> str | None:
        return value if value is None else below(value)

    def columns(self, numbers: int) -> list[str]:
        """Return the names of the columns; by default those of a summary for that many numbers."""
        if self.take:
            return self.column or ["value"]
        return self.column or DEFAULTS.get(numbers, ["value"])

    def inherited(self, other: "TableCell") -> "TableCell":
        """Return another cell, with the file, row, column, `by` and scale of this one where it sets none of
        its own.
        """
        mine = {key: getattr(self, key) for key in ("file", "row", "column", "by", "scale")}
        own = {key: getattr(other, key) for key in other.model_fields_set}
        return TableCell(**mine | own)


def below(path: str) -> str:
    """Return a path that stays below the folder that it is read from. Raises ValueError for any other."""
    if not BELOW.fullmatch(path):
        raise ValueError(f"{path!r} is not the path of a file below the folder")
    return path


def table(file: str, results: Path, repository: Path | None, cache: dict[str, Any]) -> Any:
    """Return the data frame of CSV files, or the content of JSON.

    Tables are kept in `cache`. Raises LookupFailure if a file is missing or unreadable.
    """
    if file in cache:
        return cache[file]
    folder = repository if "/" in file else results
    if folder is None:
        raise LookupFailure(f"{file} is in the repository, not among the results")
    paths = sorted(folder.glob(file)) if "*" in file else [folder / file]
    if not paths or not all(path.is_file() for path in paths):
        raise MissingTable(f"file {file} is missing in {folder}", file)
    try:
        if file.endswith(".json"):
            cache[file] = json.loads(paths[0].read_text(encoding="utf-8"))
        else:
            cache[file] = pd.concat([pd.read_csv(path) for path in paths], ignore_index=True)
    except (OSError, ValueError, RecursionError) as error:
        raise LookupFailure(f"file {file} cannot be read: {error}") from error
    return cache[file]


def values(cell: TableCell, columns: list[str], found: Any) -> pd.DataFrame:
    """Return the numbers of a cell as rows x columns, indexed by its `by`. Raises LookupFailure."""
    if not isinstance(found, pd.DataFrame):
        return _of_json(cell, columns, found)
    rows = found
    if cell.row is not None:
        kept = np.zeros(len(found), dtype=bool)
        for selector in cell.row:
            hit = _selected(cell, selector, found)
            if not hit.any():
                raise LookupFailure(f"{cell.file} has no row {selector!r}")
            kept |= hit
        rows = found[kept]
    if cell.take == ["count"]:
        return pd.DataFrame({"count": [float(len(rows))]})
    block = pd.DataFrame({name: _numbers(cell, rows, name) for name in columns})
    if missing := [name for name in columns if block[name].isna().any()]:
        raise LookupFailure(f"column {missing[0]!r} of {cell.file} has no number there")
    if cell.take is not None:
        return block.agg(cell.take)
    if absent := [name for name in cell.by if name not in rows]:
        raise LookupFailure(f"{cell.file} has no column {absent[0]!r}: {', '.join(rows.columns)}")
    if cell.by:
        block.index = pd.MultiIndex.from_frame(rows[cell.by])
        if block.index.has_duplicates:
            raise LookupFailure(f"several rows of {cell.file} have the same {', '.join(cell.by)}")
    return block


def globbed(pattern: str) -> re.Pattern[str]:
    """Return a pattern in which only `*` is special."""
    return re.compile(".*".join(map(re.escape, pattern.split("*"))), re.DOTALL)


def _selected(cell: TableCell, selector: Selector, found: pd.DataFrame) -> np.ndarray:
    wanted = {"quantity": selector} if isinstance(selector, str) else selector
    hit = np.ones(len(found), dtype=bool)
    for name, value in wanted.items():
        if name not in found:
            raise LookupFailure(f"{cell.file} has no column {name!r}: {', '.join(found.columns)}")
        if isinstance(value, str):
            hit &= found[name].astype(str).str.fullmatch(globbed(value)).to_numpy(dtype=bool)
        else:
            hit &= found[name].isin(value if isinstance(value, list) else [value]).to_numpy()
    return hit


def _numbers(cell: TableCell, rows: pd.DataFrame, column: str) -> pd.Series:
    name, _, place = column.partition(":")
    if name not in rows:
        raise LookupFailure(f"{cell.file} has no column {name!r}: {', '.join(rows.columns)}")
    if not place:
        return pd.to_numeric(rows[name], errors="coerce")
    if not re.fullmatch(r"-?[1-9]\d{0,3}", place):
        raise LookupFailure(f"column {column!r}: expected a place such as {name}:2 or {name}:-1")
    index = int(place) - (int(place) > 0)
    texts = rows[name].fillna("").astype(str)
    parts = [re.findall(r"(?<![\w.])[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?", text) for text in texts]
    if any(not -len(part) <= index < len(part) for part in parts):
        raise LookupFailure(f"{name!r} of {cell.file} has no number {place} in {texts.iloc[0]!r}")
    return pd.Series([float(part[index]) for part in parts], index=rows.index)


def _of_json(cell: TableCell, columns: list[str], found: Any) -> pd.DataFrame:
    flat: list[float] = []
    for column in columns:
        value = found
        for key in column.split("."):
            try:
                value = value[int(key)] if isinstance(value, list) else value[key]
            except (KeyError, IndexError, ValueError, TypeError):
                raise LookupFailure(f"{cell.file} has no {column!r}") from None
        try:
            flat += [float(part) for part in (value if isinstance(value, list) else [value])]
        except (TypeError, ValueError, OverflowError):
            raise LookupFailure(f"{column!r} of {cell.file} is not a number") from None
    block = pd.DataFrame({"value": flat})
    return block.agg(cell.take) if cell.take else block
