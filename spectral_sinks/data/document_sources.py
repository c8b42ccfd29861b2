"""Documents from files, folders, tables, data sets of the hub, and strings."""

import codecs
import gzip
import json
import sys
import tempfile
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from huggingface_hub import HfApi

from spectral_sinks.data.chats import is_chat
from spectral_sinks.data.token_ids import refuse_surrogates
from spectral_sinks.errors import InputError, SpectralWarning, brief
from spectral_sinks.files import expanded
from spectral_sinks.models import embedded
from spectral_sinks.models.checkpoint import TIMEOUT

CORPUS = embedded.FOLDER / "corpus.jsonl"
"""The shipped corpus: held-out Wikipedia articles (CC BY-SA; attribution by the url of each row)."""

BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
"""Files of rows, by the end of the name without .gz, and the builder of `datasets` that reads them."""

ARCHIVES = {".zip", ".tar", ".tgz", ".7z", ".rar", ".bz2", ".xz", ".zst"}
"""Ends of the names of packed files, which are not read, unlike .gz."""

MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
"""Byte order marks of other encodings than UTF-8; that of UTF-32 begins with that of UTF-16."""


def documents(
    source: str | Path | Iterable[Any] | None = None,
    *,
    split: str = "train",
    column: str | None = None,
    name: str | None = None,
    limit: int | None = None,
    separator: str | None = None,
    chat: bool = False,
) -> list[Any]:
    """Load texts as a list with one string per document, or with one list of messages per chat.

    A source can be:

    - None for the shipped corpus;
    - a file: .txt is one document, or several between `separator`; .jsonl, .csv, .tsv and .parquet have one
      document per row, in `column`; with .gz behind the name, each is unpacked;
    - a folder, whose .txt files are read in the order of their names; a warning says what else it holds;
    - a string with white space, which is the text itself;
    - any other string, a data set id of the hub, which is streamed;
    - a table: a pandas DataFrame or Series, a dictionary of columns, or the splits of a `datasets` object;
    - any iterable of strings, of lists of messages, or of rows that hold one of these, such as a `datasets`
      object.

    Text files are UTF-8. A byte order mark is left out, and the line ends of a .txt file become line feeds.
    Documents without text are left out, and a warning says how many rows hold none.

    Args:
        source: where the texts come from, as listed above.
        split: the split of a data set.
        column: the column that holds the text or the messages, where the source has rows; by default "text",
            or "messages" in rows without it.
        name: the configuration of a data set of the hub.
        limit: the number of documents to keep, from the first.
        separator: the string between documents in a .txt file.
        chat: whether chats are wanted, which are then read from "messages" in rows that have it by default.

    Raises:
        InputError: for a source that does not exist or cannot be reached or unpacked, a missing column or
            split, empty texts, text that is not UTF-8, a document with half of a surrogate pair, a limit
            below 1, and what is none of these sources.

    """
    if limit is not None and limit < 1:
        raise InputError(f"limit {limit}: give at least 1 document, or None for all")
    columns = [column] if column else ["messages", "text"] if chat else ["text", "messages"]
    taken: list[Any] = []
    empty = 0
    for place, row in enumerate(_found(source, columns, name, split, separator)):
        if limit is not None and len(taken) == limit:
            break
        if isinstance(row, Mapping):
            row = row[_column(row, columns)]
        if isinstance(row, np.ndarray):  # a list in a cell of a table
            row = row.tolist()
        if not (row is None or isinstance(row, str) or is_chat(row)):
            raise InputError(
                f"row {place} of the texts is {type(row).__name__}, expected a string or a list of messages"
            )
        if isinstance(row, str):
            refuse_surrogates(row, f"document {place}")
        if row and not (isinstance(row, str) and row.isspace()):
            taken.append(row)
        else:
            empty += 1
    if not taken:
        raise InputError("the text is empty: give at least one document of two tokens")
    if empty:
        rows = "row holds" if empty == 1 else "rows hold"
        warnings.warn(
            f"{empty} {rows} no text, and {'is' if empty == 1 else 'are'} left out",
            SpectralWarning,
            stacklevel=2,
        )
    return taken


def split_text(text: str, separator: str | None) -> list[str]:
    """Return the documents of a text; what lies between two separators may be empty, and is then none."""
    if not separator:
        return [text]
    return [part for part in text.split(separator) if part.strip()] or [""]


def decoded(data: bytes, name: str) -> str:
    """Decode UTF-8 without a byte order mark, with a line feed at the end of each line.

    Raises InputError for another encoding, as far as a byte order mark, the first wrong byte or a NUL shows
    it.
    """
    for mark, encoding in MARKS.items():
        if data.startswith(mark):
            raise InputError(
                f"{name} is not UTF-8 text (it begins with the byte order mark of {encoding}): save it as "
                "UTF-8"
            )
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        wrong = data[error.start : error.start + 1]
        meant = wrong.decode("cp1252", errors="ignore")
        hint = f", which is {meant!r} in cp1252" if meant else ""
        raise InputError(
            f"{name} is not UTF-8 text ({error.reason} 0x{wrong.hex()} at byte {error.start}{hint}): "
            "save it as UTF-8"
        ) from error
    if "\0" in text:
        raise InputError(
            f"{name} is not UTF-8 text (it holds NUL characters, as UTF-16 without a byte order mark and "
            "binary files do): save it as UTF-8"
        )
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def _found(
    source: Any, columns: list[str], name: str | None, split: str, separator: str | None
) -> Iterable[Any]:
    """Return the documents of a source, or rows that hold one each."""
    if source is None:
        return map(json.loads, CORPUS.read_bytes().splitlines())
    if isinstance(source, str) and (any(c.isspace() for c in source) or not source):
        return [source]
    if isinstance(source, Path) or (isinstance(source, str) and _is_path(source)):
        return _from_file(expanded(source), separator)
    if isinstance(source, bytes | bytearray):
        return [decoded(bytes(source), "the text")]
    if isinstance(source, str):
        return _from_hub(source, name, split)
    library = sys.modules.get("datasets")  # without which there is no such object
    if library is not None and isinstance(source, library.DatasetDict | library.IterableDatasetDict):
        if split not in source:
            raise InputError(
                f"the data set has no split {split!r}: give split= one of {', '.join(map(repr, source))}"
            )
        return source[split]
    if isinstance(source, pd.DataFrame | pd.Series):
        present = source.astype(object).where(source.notna(), None)
        return present.to_dict("records") if isinstance(present, pd.DataFrame) else present.tolist()
    if is_chat(source) and source and "role" in source[0] and not set(columns) & set(source[0]):
        return [source]
    if isinstance(source, Mapping):
        values = source[_column(source, columns)]
        source = [values] if isinstance(values, str) or is_chat(values) else values
    if not isinstance(source, Iterable):
        raise InputError(
            f"texts of the type {type(source).__name__}: give a file, a string, or a list of strings"
        )
    return source


def _column(row: Mapping[str, Any], columns: list[str]) -> str:
    """Return the first of some columns that a row has."""
    for column in columns:
        if column in row:
            return column
    raise InputError(f"rows have no column {columns[0]!r}; columns: {', '.join(map(str, row))}")


def _is_path(source: str) -> bool:
    """Whether a name without white space means a file rather than a data set of the hub."""
    known = {".txt", *BUILDERS, *ARCHIVES}
    return source[0] in "./~" or _kind(Path(source)) in known or _packed(source) or Path(source).exists()


def _packed(path: str | Path) -> bool:
    return Path(path).suffix.lower() == ".gz"


def _kind(path: Path) -> str:
    """Return the end of a file's name, without .gz."""
    return (path.with_suffix("") if _packed(path) else path).suffix.lower()


def _from_file(path: Path, separator: str | None) -> Iterable[Any]:
    if path.is_dir():
        held = sorted(file for file in path.iterdir() if file.name[0] != ".")
        files = [file for file in held if _kind(file) == ".txt"]
        if not files:
            raise InputError(f"{path} is a folder without .txt files: give a file, or a folder of .txt files")
        if others := [file.name for file in held if file not in files]:
            warnings.warn(
                f"{path} also holds what is no .txt file and is left out: {others[0]}"
                f"{f' and {len(others) - 1} more' if others[1:] else ''}",
                SpectralWarning,
                stacklevel=2,
            )
        return [text for file in files for text in _from_file(file, separator)]
    if not path.exists():
        itself = "" if path.suffix else ": give a text itself in a list, or to a command as text:..."
        raise InputError(f"{path} does not exist{itself}")
    kind = _kind(path)
    if kind in ARCHIVES or (_packed(path) and kind not in {".txt", *BUILDERS}):
        ends = ", ".join(f"{end}.gz" for end in (".txt", *BUILDERS))
        raise InputError(f"{path} is packed: unpack it, or give a file that ends in one of {ends}")
    if builder := BUILDERS.get(kind):
        return _rows(path, builder, {"sep": "\t"} if kind == ".tsv" else {})
    text = decoded(_content(path), str(path))
    return split_text(text, separator and decoded(separator.encode(), "the separator"))


def _content(path: Path) -> bytes:
    """Return the bytes of a file, unpacked. Raises InputError for a broken .gz file."""
    if not _packed(path):
        return path.read_bytes()
    try:
        return gzip.decompress(path.read_bytes())
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path} cannot be unpacked ({brief(error)}): fetch or pack it again") from error


def _rows(path: Path, builder: str, options: Mapping[str, Any]) -> Iterator[Any]:
    """Stream the rows of a table, without the cache of `datasets`, which may be read-only."""
    import datasets  # not for other sources

    broken = (
        *(ValueError, OSError, RuntimeError, EOFError, zlib.error, datasets.exceptions.DatasetsError),
        StopIteration,  # of an empty file
    )
    files = {"train": str(path)}
    try:
        with tempfile.TemporaryDirectory() as cache:
            yield from datasets.load_dataset(
                builder, data_files=files, split="train", streaming=True, cache_dir=cache, **options
            )
    except broken as error:
        content = _content(path)  # says what is wrong where it is the packing
        if builder != "parquet" and not decoded(content, str(path)).strip():  # or the encoding
            return
        raise InputError(f"{path} cannot be read as {builder}: {brief(error)}") from error


def _from_hub(source: str, name: str | None, split: str) -> Iterable[Any]:
    try:
        import datasets

        HfApi().dataset_info(source, timeout=TIMEOUT)
        return datasets.load_dataset(source, name, split=split, streaming=True)
    except Exception as error:  # errors of several libraries behind the hub client
        raise InputError(
            f"{source!r} is not a file, and as a data set of the hub it cannot be read ({brief(error)}); "
            "give a text itself in a list, or to a command as text:..."
        ) from error
