"""The output of the commands: tables, JSON, and warnings of one line."""

import json
import math
import os
import sys
import warnings
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.table import Table

SILENT = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "DATASETS_VERBOSITY": "critical",
}
"""Environment variables of a command, which silence the libraries."""


def plain(value: Any) -> str:
    """Format a value for a table."""
    if isinstance(value, list | tuple):
        return " ".join(plain(part) for part in value)
    if isinstance(value, float):
        return "-" if math.isnan(value) else f"{value:.4f}"
    return "-" if value is None else str(value)


def table(title: str, columns: tuple[str, ...], rows: Any) -> Table:
    # without borders, whose width 80 columns need for numbers
    made = Table(
        *columns,
        title=title or None,
        show_header=any(columns),
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for row in rows:
        made.add_row(*row)
    return made


def show(as_json: bool, found: dict[str, Any], shown: RenderableType) -> None:
    if as_json:
        print(json.dumps(without_nan(found)))
    else:
        Console().print(shown)


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
        print(f"spectral-sinks: warning: {message}", file=sys.stderr)

    warnings.showwarning = line
