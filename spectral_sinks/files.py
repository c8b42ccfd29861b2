"""Files that are written whole or not at all, and what the operating system says against it."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import Timeout

from spectral_sinks.errors import InputError

PATIENCE = 60.0
"""Seconds to wait for a process that writes, which takes milliseconds unless it is suspended."""

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to it at the end, removed on any error (a full disk).

    What was renamed is on the disk, and so is its name: a crash of the machine cannot leave half a file.
    """
    temporary = path.with_name(f".{path.name}.part")
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
    """Operating system errors as an InputError that says what to do."""
    try:
        yield
    except Timeout as error:
        raise InputError(
            f"another process has kept {folder} locked for {PATIENCE:.0f} s: resume or stop it, and run again"
        ) from error
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in FULL:
            reason = f"the disk is full ({reason}): free some space and run again"
        elif error.errno in READ_ONLY:
            reason = f"it is read-only ({reason}): give a folder that can be written"
        raise InputError(
            f"{folder} cannot be written: {reason}; what was finished is intact and is not computed again"
        ) from error


def listing(folder: Path) -> list[str]:
    """Names that are not hidden; none for a folder that is not there."""
    try:
        return [name for name in os.listdir(folder) if not name.startswith(".")]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise InputError(f"{folder} cannot be read as a folder of sweep results: {error.strerror}") from error


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # has no such thing
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
