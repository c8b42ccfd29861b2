"""Images in tar files and in data sets on disk, each read when it is needed."""

import tarfile
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pyarrow import compute

from spectral_sinks.errors import InputError

CLASS = "cls"
"""Ending of the files of WebDataset that hold a sample's class."""

PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
"""Endings of compressed tar files, in which a member cannot be found without reading all before it."""

ROWS = 256
"""Rows of a data set whose names are read at once."""


@dataclass(frozen=True)
class Member:
    """An image in a tar file."""

    name: str
    read: Callable[[], bytes]
    label: str | None = None
    """The content of the sample's `.cls` file; None without one."""


def is_tar(path: Path) -> bool:
    """Whether a file is a tar file by its name. Raises InputError for a compressed one."""
    if path.name.lower().endswith(PACKED):
        raise InputError(f"{path} is compressed, so that its images cannot be read one by one: unpack it")
    return path.suffix.lower() == ".tar"


def in_tar(path: Path, extensions: Collection[str]) -> list[Member]:
    """Return the images of a tar file, in the order of their names. Raises InputError for a broken file."""
    found: list[tuple[str, Callable[[], bytes]]] = []
    labels: dict[str, str] = {}
    try:
        with tarfile.open(path, mode="r:") as archive:
            for info in archive:
                if not info.isfile():
                    continue
                name = info.name.removeprefix("./")
                if Path(name).suffix.lower() in extensions:
                    found.append((name, partial(_part, path, info.offset_data, info.size)))
                elif name.endswith(f".{CLASS}"):
                    content = _part(path, info.offset_data, info.size)
                    labels[sample_key(name)] = content.decode("utf-8", "replace").strip()
    except (tarfile.TarError, EOFError) as error:
        raise InputError(f"{path} cannot be read as a tar file: {error}") from error
    return [Member(name, read, labels.get(sample_key(name))) for name, read in sorted(found, key=_name)]


def _name(member: tuple[str, Any]) -> str:
    return member[0]


def sample_key(name: str) -> str:
    """Return what the files of one sample share in WebDataset: the name up to its first point."""
    folder, _, last = name.rpartition("/")
    return f"{folder}/{last.partition('.')[0]}"


def _part(path: Path, start: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return file.read(size)


def saved(path: Path, split: str, extensions: Collection[str]) -> Any:
    """Return the data set or the tar files that a folder holds; None if it is a folder of images.

    Raises InputError for a data set that cannot be read, and a split that it does not have.
    """
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        import datasets  # not for files of images

        try:
            found = datasets.load_from_disk(str(path))
        except Exception as error:  # errors of several libraries behind datasets
            raise InputError(f"{path} cannot be read as a saved data set: {error}") from error
        if not isinstance(found, datasets.DatasetDict):
            return found
        if split not in found:
            raise InputError(f"{path} has no split {split!r}; it has {', '.join(map(str, found))}")
        return found[split]
    files = sorted(file for file in path.rglob("*") if file.is_file())
    if any(file.suffix.lower() in extensions for file in files):
        return None
    if tars := [file for file in files if is_tar(file)]:
        return tars
    parquet = [file for file in files if file.suffix == ".parquet"]
    of_split = [file for file in parquet if file.name.startswith(split)]
    return of_parquet(of_split or parquet) if parquet else None


def of_parquet(paths: list[Path]) -> Any:
    """Return a data set of .parquet files. Raises InputError for files that cannot be read."""
    try:
        import datasets

        return datasets.Dataset.from_parquet([str(path) for path in paths])
    except Exception as error:  # errors of several libraries behind datasets
        raise InputError(f"{paths[0]} cannot be read as a data set: {error}") from error


def in_data_set(stored: Any, column: str) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Yield the name of each image of a data set whose images are not decoded, and what reads its bytes."""
    only = stored.select_columns([column])
    place = 0
    for rows in only.with_format("arrow").iter(batch_size=ROWS):
        for path in compute.struct_field(rows[column], "path").to_pylist():
            yield Path(path).name if path else f"image {place}", partial(_row, only, column, place)
            place += 1


def _row(stored: Any, column: str, place: int) -> bytes:
    found = stored[place][column]
    return found["bytes"] if found["bytes"] is not None else Path(found["path"]).read_bytes()
