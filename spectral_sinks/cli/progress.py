"""Signs of life of a long command, on standard error: what it will cost, and a line now and then."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from spectral_sinks.cli.output import say
from spectral_sinks.errors import plural

if TYPE_CHECKING:
    import spectral_sinks as ss

EVERY = 60.0
"""Seconds between two lines."""

LARGE = 100_000
"""Number of tokens from which the cost of a text is said before it is measured."""

_noted: list[str] = [""]


def note(progress: str) -> None:
    """Set what the next lines say of the progress."""
    _noted[0] = progress


@contextmanager
def alive(command: str) -> Iterator[None]:
    """Print a line now and then while the block runs, unless a terminal shows progress by bars."""
    if sys.stderr.isatty():
        yield
        return
    note("")
    ended, begun = threading.Event(), time.monotonic()

    def tell() -> None:
        while not ended.wait(EVERY):
            said = f": {_noted[0]}" if _noted[0] else ""
            _tell(f"{command} has run for {spoken(time.monotonic() - begun)}{said}")

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        ended.set()
        teller.join()


def say_cost(model: ss.LanguageModel, windows: ss.Windows, batch_size: int | None) -> None:
    """Say how many windows a large text has, and how long the model takes to read them once."""
    if sum(windows.lengths) < LARGE:
        return
    documents = windows.record["documents"]
    counted = f"{plural(len(windows), 'window')} of {plural(documents, 'document')}"
    note(counted)
    said = f"{counted}, {sum(windows.lengths)} tokens"
    if not model.weightless:
        import torch  # not for --help

        from spectral_sinks.measure.memory import batches

        _, ids = next(iter(batches(model, windows, batch_size)))
        inputs = model.inputs(ids.to(model.device)) | ({"use_cache": False} if model.causal else {})
        begun = time.perf_counter()
        with torch.no_grad():
            model.module(**inputs)
        took = (time.perf_counter() - begun) * len(windows) / len(ids)
        said += (
            f": the model takes about {spoken(took)} to read them once, and a measurement reads them more "
        )
        said += "than once"
    _tell(f"{said} (fewer with --documents and --per-document)")


def _tell(line: str) -> None:
    """Print a line on standard error; one that nobody reads any more is no failure."""
    with suppress(OSError, ValueError):
        say(f"spectral-sinks: {line}", sys.stderr)


def spoken(seconds: float) -> str:
    """Return a time in the unit that reads best."""
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
