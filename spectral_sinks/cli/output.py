"""The output of the commands: tables, JSON, and warnings of one line.

Names of folders, tokens and the messages of servers come from outside. Here, and nowhere else, they become
characters that a terminal shows and does not obey.
"""

import json
import math
import os
import sys
import unicodedata
import warnings
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from spectral_sinks.errors import without_secrets

SILENT = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "DATASETS_VERBOSITY": "critical",
}
"""Environment variables of a command, which silence the libraries."""

OBEYED = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Categories of characters that move the cursor, change the direction of text, or cannot be written."""


def plain(value: Any) -> str:
    """Format a value for a table."""
    if isinstance(value, list | tuple):
        return " ".join(plain(part) for part in value)
    if isinstance(value, float):
        return "-" if math.isnan(value) else f"{value:.4f}"
    return "-" if value is None else str(value)


def printable(text: str) -> str:
    """Return a text without keys, whose control and formatting characters are written as escapes."""
    shown = without_secrets(text)
    if shown.isprintable():
        return shown
    return "".join(
        character.encode("unicode_escape").decode()
        if character not in "\n\t" and unicodedata.category(character) in OBEYED
        else character
        for character in shown
    )


def say(text: object, file: Any = None) -> None:
    """Print a line, on standard output unless a file is given."""
    print(printable(str(text)), file=file, flush=True)


def table(title: str, columns: tuple[str, ...], rows: Any) -> Table:
    # without borders, whose width 80 columns need for numbers; a title is never squeezed into narrow columns
    made = Table(
        min_width=min(len(title), 60) or None,
        title=_clean(title) if title else None,
        show_header=any(columns),
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for column in columns:
        made.add_column(_clean(column))
    for row in rows:
        made.add_row(*map(_clean, row))
    return made


def show(as_json: bool, found: dict[str, Any], shown: RenderableType) -> None:
    if as_json:
        print(without_secrets(json.dumps(without_nan(found))))
    else:
        Console(markup=False, emoji=False, highlight=False).print(_clean(shown))


def _clean(shown: Any) -> Any:
    """Return what is shown with its texts as they are, neither markup nor control characters."""
    if isinstance(shown, Group):
        return Group(*map(_clean, shown.renderables))
    return Text(printable(str(shown))) if isinstance(shown, str | Text) else shown


def without_nan(value: Any) -> Any:
    """Replace numbers that are not finite by None, since JSON has none of them."""
    if isinstance(value, dict):
        return {k: without_nan(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def quiet() -> None:
    """Print each warning as one line on standard error, and silence the libraries.

    The environment variables silence libraries that are imported later, since most commands do not need them
    all. A variable that is already set keeps its value.
    """
    for name, value in SILENT.items():
        os.environ.setdefault(name, value)
    if transformers := sys.modules.get("transformers"):
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
    if datasets := sys.modules.get("datasets"):
        datasets.disable_progress_bars()
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)

    def line(message: Any, category: Any, *rest: Any, **more: Any) -> None:
        say(f"spectral-sinks: warning: {message}", sys.stderr)

    warnings.showwarning = line
