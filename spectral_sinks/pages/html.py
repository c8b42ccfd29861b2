"""One HTML file from a template, its data, and Plotly, all inside the file."""

from dataclasses import dataclass, field
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from spectral_sinks.errors import InputError
from spectral_sinks.files import atomic_write, expanded
from spectral_sinks.pages.packing import inside_script

LIMIT = 15_000_000
"""Bytes of a page, at most."""


@dataclass(frozen=True)
class Chart:
    """A figure of a page: what Plotly draws, what it shows in words, and the numbers behind it."""

    name: str
    """The name of the element, and of the CSV file."""
    title: str
    caption: str
    table: pd.DataFrame
    variants: dict[str, dict[str, Any]]
    """What Plotly draws (`data` and `layout`), by the choice of the reader; one that has no choice is ""."""
    choice: str = ""
    """What the reader chooses between."""

    def json(self) -> dict[str, Any]:
        """Return what the page needs to draw the figure and to show its numbers."""
        return {"variants": self.variants, "table": columns_and_rows(self.table)}


@dataclass(frozen=True)
class Page:
    """A page as HTML, which shows itself in a notebook."""

    html: str = field(repr=False)
    height: int = 900
    """Pixels in a notebook."""

    def save(self, path: str | Path) -> Path:
        """Write the page to a file and return its path.

        Raises InputError for a name that does not end in .html and for a folder that does not exist.
        """
        return written(self.html, path)

    def _repr_html_(self) -> str:
        return framed(self.html, self.height)


def page_file(path: str | Path) -> Path:
    """Return the path of a page. Raises InputError for another ending, and without a folder for it."""
    found = expanded(path)
    if found.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"{path} is not a name for a page: let it end in .html")
    if not found.parent.is_dir():
        raise InputError(f"{found.parent} is not a folder: make it, or give another one for the page")
    return found


def written(html: str, path: str | Path) -> Path:
    """Write a page to a file and return its path. Raises InputError as `page_file` does."""
    found = page_file(path)
    with atomic_write(found) as temporary:
        temporary.write_text(html, encoding="utf-8")
    return found


def framed(html: str, height: int) -> str:
    """Return a frame that holds a whole page, for a notebook."""
    return (
        f'<iframe title="spectral_sinks" sandbox="allow-scripts allow-downloads" srcdoc="{escape(html)}" '
        f'style="width:100%;height:{height}px;border:1px solid #bbb"></iframe>'
    )


def columns_and_rows(table: pd.DataFrame) -> dict[str, Any]:
    """Return a table as lists, for JSON."""
    return {"columns": [str(c) for c in table.columns], "rows": table.to_numpy(dtype=object).tolist()}


def require_plotly() -> str:
    """Return the source of Plotly for a browser. Raises InputError where it is not installed."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise InputError(
            "pages are drawn by Plotly, which is not installed: pip install 'spectral-sinks[pages]'"
        ) from error
    return get_plotlyjs()


def render(template: str, scripts: tuple[str, ...], data: dict[str, Any], **context: Any) -> str:
    """Return a page.

    Args:
        template: the file of the template.
        scripts: the files of the scripts, in order.
        data: what the scripts read.
        context: what the template reads.

    Raises:
        InputError: where Plotly is not installed.

    """
    folder = resources.files("spectral_sinks.pages") / "templates"
    environment = Environment(
        loader=PackageLoader("spectral_sinks.pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(
        plotly=Markup(require_plotly()),
        style=Markup((folder / "style.css").read_text("utf-8")),
        scripts=[Markup((folder / name).read_text("utf-8")) for name in scripts],
        data=Markup(inside_script(data)),
        **context,
    )
