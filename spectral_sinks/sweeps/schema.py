"""A row of a sweep: its columns, its bytes in a Parquet part, and the means over a document."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from spectral_sinks.errors import InputError, SpectralError
from spectral_sinks.stats import document_means

FORMAT = 1
"""Raised when the layout of a store's folder or the meaning of a column changes."""

MEANS = ("nll", "baseline_nll", "delta_nll", "kl", "top1_agreement", "removed_energy_share")
"""Nats per token, or shares; NaN where not measured."""

BY_LAYER = ("sink_mass", "baseline_sink_mass")
"""One value per layer; null where attention cannot be read."""

CELL = pa.schema(
    [
        pa.field("cell", pa.string(), nullable=False),  # the content address
        pa.field("name", pa.string(), nullable=False),
        pa.field("model", pa.string(), nullable=False),
        pa.field("site", pa.string(), nullable=False),  # kinds, joined by " + "
        pa.field("layer", pa.int32()),  # the lowest; null without a site
        pa.field("head", pa.int32()),
        pa.field("filter", pa.string(), nullable=False),
        pa.field("rank", pa.int32()),  # directions removed; null for a custom function
        pa.field("fill", pa.string(), nullable=False),
        pa.field("at", pa.string(), nullable=False),  # which tokens were filtered
        pa.field("draw", pa.int32()),
    ]
)
"""The columns that describe a cell."""

SCHEMA = pa.schema(
    [
        *CELL,
        pa.field("document", pa.int32(), nullable=False),
        pa.field("window", pa.int32(), nullable=False),
        pa.field("tokens", pa.int32(), nullable=False),  # predicted ones
        *(pa.field(name, pa.float64()) for name in MEANS),
        *(pa.field(name, pa.list_(pa.float64())) for name in BY_LAYER),
    ]
)
"""One row per cell and window."""

KEY = ["cell", "window"]
"""The columns that identify a row."""

ROUNDING = 1e-5
"""Difference of two numbers, absolute or relative, that is due to the rounding of other machines."""

UNIT = re.compile(r"[A-Za-z0-9][\w.=-]{0,149}", re.ASCII)
"""The name of a unit of work."""

PART = re.compile(rf"(?P<unit>{UNIT.pattern})-(?P<checksum>[0-9a-f]{{32}})\.parquet", re.ASCII)
"""The name of a part: the unit of work, and the first 128 bits of the SHA-256 of the bytes."""

MARK = b"spectral_sinks.format"


class Damaged(SpectralError):
    """The bytes of a part are not those that were written; the message gives the reason."""


def encode(rows: pd.DataFrame) -> bytes:
    """Encode rows as a part; the same rows give the same bytes.

    Raises InputError for rows that do not fit the schema.
    """
    missing = [name for name in SCHEMA.names if name not in rows.columns]
    unknown = [name for name in rows.columns if name not in SCHEMA.names]
    if missing or unknown or len(rows.columns) != len(SCHEMA.names):
        raise InputError(
            f"rows of a sweep: missing columns {missing}, unknown columns {unknown}, "
            f"expected each once: {', '.join(SCHEMA.names)}"
        )
    try:
        table = pa.Table.from_pandas(rows, SCHEMA, preserve_index=False)
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise InputError(f"rows of a sweep do not fit their columns: {error}") from error
    sink = pa.BufferOutputStream()
    # without the metadata of pandas, which depends on how the frame was made
    pq.write_table(table.replace_schema_metadata({MARK: str(FORMAT)}), sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def checksum(data: bytes) -> str:
    """Return the first 128 bits of the SHA-256 in hexadecimal."""
    return hashlib.sha256(data).hexdigest()[:32]


def decode(data: bytes, name: str) -> pa.Table:
    """The rows of the part of that name, checked.

    Raises Damaged for other bytes than were written or other columns, InputError for another format.
    """
    parsed = PART.fullmatch(name)
    if parsed is None:
        raise Damaged("its name holds no checksum")
    if checksum(data) != parsed["checksum"]:
        raise Damaged("its checksum does not match" if data.endswith(b"PAR1") else "it is truncated")
    try:
        table = pq.ParquetFile(pa.BufferReader(data)).read()
    except (pa.ArrowException, OSError) as error:
        raise Damaged(f"it is not a Parquet file: {error}") from error
    check_format((table.schema.metadata or {}).get(MARK, b"unknown").decode(), f"part {name}")
    if not table.schema.equals(SCHEMA):
        raise Damaged("its columns are not those of a sweep")
    return table


def check_format(version: object, what: str) -> None:
    """Raise InputError for any format but this version's."""
    if str(version) != str(FORMAT):
        raise InputError(
            f"{what} has format {version} of sweep results, this version reads format {FORMAT}: "
            "use the version of spectral_sinks that wrote it, or give another folder"
        )


@dataclass(frozen=True)
class Conflict:
    """Two rows of one cell and window whose numbers differ by more than rounding."""

    cell: str
    window: int
    name: str
    parts: tuple[str, str]
    """The parts that hold the rows."""
    difference: str
    """The first column that differs, with both values."""


def frame_of(tables: Sequence[pa.Table]) -> pd.DataFrame:
    """Return the rows of all tables, one table after the other."""
    frame = pa.concat_tables([SCHEMA.empty_table(), *tables]).to_pandas()
    integers = [field.name for field in SCHEMA if field.nullable and field.type == pa.int32()]
    return frame.astype(dict.fromkeys(integers, "Int32"))


def conflicts(tables: Mapping[str, pa.Table]) -> list[Conflict]:
    """Return, for each cell and window that several parts hold with different numbers, two of these parts."""
    frame = frame_of(list(tables.values()))
    frame["part"] = np.repeat(np.arange(len(tables)), [table.num_rows for table in tables.values()])
    again = frame[frame.duplicated(KEY, keep=False)].sort_values([*KEY, "part"], ignore_index=True)
    group = again.groupby(KEY, sort=False).ngroup().to_numpy()
    firsts = np.flatnonzero(np.diff(group, prepend=-1))[group]  # the first row of each row's group
    names, found = list(tables), dict[int, Conflict]()
    for column in ("document", "tokens", *MEANS, *BY_LAYER):
        values = list(again[column])
        for row, first in enumerate(firsts):
            if first not in found and _apart(values[first], values[row]):
                one, other = again.iloc[first], again.iloc[row]
                values_differ = "" if column in BY_LAYER else f" {one[column]:.6g} and {other[column]:.6g}"
                parts = names[one["part"]], names[other["part"]]
                difference = f"{column}{values_differ}"
                found[first] = Conflict(one["cell"], int(one["window"]), one["name"], parts, difference)
    return [found[first] for first in sorted(found)]


def _apart(one: Any, other: Any) -> bool:
    """Whether two numbers, or two lists of numbers by layer, differ by more than rounding."""
    if one is None or other is None:
        return one is not other
    if isinstance(one, float | int):
        return not (abs(one - other) <= ROUNDING * max(1.0, abs(one)) or (one != one and other != other))
    return len(one) != len(other) or not np.allclose(one, other, ROUNDING, ROUNDING, equal_nan=True)


def canonical(tables: Sequence[pa.Table], cells: Sequence[str] = ()) -> pd.DataFrame:
    """Return each cell and window once, in the order of `cells` (others follow by address), then by window.

    Of several rows for one cell and window, which `conflicts` does not report, the first in the order of
    their columns is taken, so that the result depends on the rows alone and not on the parts that held them.
    """
    frame = frame_of(tables)
    again = frame.duplicated(KEY, keep=False)
    if again.any():
        in_order = frame[again].sort_values([name for name in SCHEMA.names if name not in BY_LAYER])
        frame = frame.drop(index=in_order.index[in_order.duplicated(KEY)])
    places = {cell: place for place, cell in enumerate(cells)}
    frame["place"] = [places.get(cell, len(places)) for cell in frame["cell"]]
    return frame.sort_values(["place", *KEY], ignore_index=True).drop(columns="place")


def by_document(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the token-weighted means over the windows of each cell and document, in the order of the cells.

    `windows` is the number of rows, and `tokens` the sum of their tokens. A mean over rows of which one has
    no value is missing.
    """
    place = rows.groupby("cell", sort=False).ngroup()
    rows = rows.iloc[np.lexsort((rows["window"], rows["document"], place))]
    groups = rows.groupby(["cell", "document"], sort=False)
    group, tokens = groups.ngroup().to_numpy(), rows["tokens"].to_numpy(np.float64)

    starts = np.flatnonzero(np.diff(group, prepend=-1))
    table = rows.iloc[starts][[*CELL.names, "document"]].reset_index(drop=True)
    table["windows"] = np.bincount(group)
    table["tokens"] = np.bincount(group, tokens).astype(np.int64)
    _, means = document_means(rows[list(MEANS)].to_numpy(np.float64), group, tokens)
    table[list(MEANS)] = means
    for name in BY_LAYER:
        table[name] = pd.Series(_by_layer(list(rows[name]), group, tokens), dtype=object)
    return table


def _by_layer(
    values: list[np.ndarray | None], group: np.ndarray, weights: np.ndarray
) -> list[np.ndarray | None]:
    """Weighted means by layer over the rows of each group; None where a row of the group has no values."""
    layers = np.array([0 if value is None else len(value) for value in values], dtype=int)
    padded = np.full((len(values), layers.max(initial=0)), np.nan)
    present = [value for value in values if value is not None]
    padded[np.arange(padded.shape[1]) < layers[:, None]] = np.concatenate([*present, []])
    _, means = document_means(padded, group, weights)
    counts = np.full(len(means), padded.shape[1])
    np.minimum.at(counts, group, layers)
    return [mean[:count] if count else None for mean, count in zip(means, counts, strict=True)]
