"""Documents from files, folders, tables, data sets of the hub, and strings."""

import codecs
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
from huggingface_hub import HfApi

from spectral_sinks.data.chats import is_chat
from spectral_sinks.data.token_ids import refuse_surrogates
from spectral_sinks.errors import InputError
from spectral_sinks.models import embedded
from spectral_sinks.models.checkpoint import TIMEOUT

CORPUS = embedded.FOLDER / "corpus.jsonl"
"""The shipped corpus: held-out Wikipedia articles (CC BY-SA; attribution by the url of each row)."""

BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".gz": "json"}

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
    - a file: .txt is one document, or several between `separator`; .jsonl, .csv and .parquet have one
      document per row, in `column`;
    - a folder, whose .txt files are read in the order of their names;
    - a string with white space, which is the text itself;
    - any other string, a data set id of the hub, which is streamed;
    - a table: a pandas DataFrame or Series, a dictionary of columns, or the splits of a `datasets` object;
    - any iterable of strings, of lists of messages, or of rows that hold one of these, such as a `datasets`
      object.

    Text files are UTF-8. A byte order mark is left out, and the line ends of a .txt file become line feeds.

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
        InputError: for a source that does not exist or cannot be reached, a missing column or split, empty
            texts, text that is not UTF-8, and a document with half of a surrogate pair.

    """
    columns = [column] if column else ["messages", "text"] if chat else ["text", "messages"]
    taken: list[Any] = []
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
    if not taken:
        raise InputError("the text is empty: give at least one document of two tokens")
    return taken


def decoded(data: bytes, name: str) -> str:
    """Decode UTF-8 without a byte order mark, with a line feed at the end of each line.

    Raises InputError for another encoding, as far as a byte order mark or the first wrong byte shows it.
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
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def _found(
    source: Any, columns: list[str], name: str | None, split: str, separator: str | None
) -> Iterable[Any]:
    """Return the documents of a source, or rows that hold one each."""
    if source is None:
        source = CORPUS
    if isinstance(source, str) and (any(c.isspace() for c in source) or not source):
        return [source]
    if isinstance(source, Path) or (isinstance(source, str) and _is_path(source)):
        return _from_file(Path(source).expanduser(), separator)
    if isinstance(source, str):
        return _from_hub(source, name, split)
    if isinstance(source, datasets.DatasetDict | datasets.IterableDatasetDict):
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
        return [values] if isinstance(values, str) or is_chat(values) else values
    return source


def _column(row: Mapping[str, Any], columns: list[str]) -> str:
    """Return the first of some columns that a row has."""
    for column in columns:
        if column in row:
            return column
    raise InputError(f"rows have no column {columns[0]!r}; columns: {', '.join(map(str, row))}")


def _is_path(source: str) -> bool:
    """Whether a name without white space means a file rather than a data set of the hub."""
    return source[0] in "./~" or Path(source).suffix.lower() in {".txt", *BUILDERS} or Path(source).exists()


def _from_file(path: Path, separator: str | None) -> Iterable[Any]:
    if path.is_dir():
        files = [file for file in path.iterdir() if file.suffix.lower() == ".txt" and file.name[0] != "."]
        if not files:
            raise InputError(f"{path} is a folder without .txt files: give a file, or a folder of .txt files")
        return [text for file in sorted(files) for text in _from_file(file, separator)]
    if not path.exists():
        raise InputError(f"{path} does not exist")
    if builder := BUILDERS.get(path.suffix.lower()):
        return _rows(path, builder)
    text = decoded(path.read_bytes(), str(path))
    return text.split(decoded(separator.encode(), "the separator")) if separator else [text]


def _rows(path: Path, builder: str) -> Iterator[Any]:
    """Stream the rows of a table, without the cache of `datasets`, which may be read-only."""
    files = {"train": str(path)}
    try:
        with tempfile.TemporaryDirectory() as cache:
            yield from datasets.load_dataset(
                builder, data_files=files, split="train", streaming=True, cache_dir=cache
            )
    except (ValueError, OSError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        if path.suffix.lower() in (".jsonl", ".json", ".csv"):
            decoded(path.read_bytes(), str(path))  # says what is wrong where it is the encoding
        raise InputError(f"{path} cannot be read as {builder}: {error}") from error


def _from_hub(source: str, name: str | None, split: str) -> Iterable[Any]:
    try:
        HfApi().dataset_info(source, timeout=TIMEOUT)
        return datasets.load_dataset(source, name, split=split, streaming=True)
    except Exception as error:  # errors of several libraries behind the hub client
        raise InputError(
            f"{source!r} is not a file, and as a data set of the hub it cannot be read ({error}); "
            "a text itself needs white space"
        ) from error
