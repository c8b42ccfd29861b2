"""Atomic writes of files, and clear errors for failures of the operating system."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from spectral_sinks.errors import InputError

PATIENCE = 60.0
"""Seconds to wait for another process that writes, which takes milliseconds unless it is suspended."""

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FIGURE_FORMATS = ("png", "pdf", "svg")
"""Formats of figures, by the end of the file's name."""

GGUF = ".gguf"
"""The end of the name of a file as llama.cpp writes it."""

READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, which replaces `path` at the end of the block.

    Only a regular file is replaced. The temporary file is removed on any error, such as a full disk. Both the
    content and the new name are synced to the disk, so a crash of the machine cannot leave half a file.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    temporary = path.with_name(f".{path.name}.part")
    temporary.unlink(missing_ok=True)  # never write through a link that a foreign folder has in its place
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def clearly(folder: Path) -> Iterator[None]:
    """Turn operating system errors into an InputError that says what to do."""
    try:
        yield
    except OSError as error:
        from filelock import Timeout  # not for --help

        if isinstance(error, Timeout):
            raise InputError(
                f"another process has kept {folder} locked for {PATIENCE:.0f} s: resume or stop it, and run "
                "again"
            ) from error
        reason = error.strerror or str(error)
        if error.errno in FULL:
            reason = f"the disk is full ({reason}): free some space and run again"
        elif error.errno in READ_ONLY:
            reason = f"it is read-only ({reason}): give a folder that can be written"
        raise InputError(
            f"{folder} cannot be written: {reason}; what was finished is intact and is not computed again"
        ) from error


def read_regular(path: Path) -> bytes:
    """Return the content of a file. Raises OSError also for a pipe or a device, which could block."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return path.read_bytes()


def expanded(path: str | Path) -> Path:
    """Return a path with ~ and ~user replaced. Raises InputError for a user who does not exist."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise InputError(f"{path} cannot be found: {error}") from error


def listing(folder: Path) -> list[str]:
    """Return the names in a folder that are not hidden; an empty list for a folder that does not exist.

    Raises InputError for a folder that cannot be read.
    """
    try:
        return [name for name in os.listdir(folder) if not name.startswith(".")]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise InputError(f"{folder} cannot be read as a folder of sweep results: {error.strerror}") from error


def figure_format(path: Path) -> str:
    """Return the format of a figure. Raises InputError for another format, and where it cannot be written."""
    found = path.suffix.lower().removeprefix(".")
    if found not in FIGURE_FORMATS:
        ends = ", ".join(f".{name}" for name in FIGURE_FORMATS)
        raise InputError(f"{path} is not a name for a figure: let it end in one of {ends}")
    if not path.parent.is_dir():
        raise InputError(f"{path.parent} is not a folder: make it, or give another one for the figure")
    if path.exists() and not path.is_file():
        raise InputError(f"{path} is not a regular file: give another name for the figure")
    return found


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows cannot sync a folder
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
