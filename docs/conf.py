"""Settings of the site: `make docs` builds it from the Markdown pages, the notebooks and the docstrings.

The source folder is the repository, so that a link on a page means the same on GitHub and on the site.
"""

import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import reference_pages  # noqa: E402  (a neighbour of this file)

import spectral_sinks  # noqa: E402

project = "spectral_sinks"
author = "the spectral_sinks authors"
copyright = author
version = release = spectral_sinks.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_external_toc",
]
external_toc_path = "docs/_toc.yml"
include_patterns = [
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "docs/**",
    "results/**.md",
    "spectral_sinks/models/embedded/**.md",
]
# Folders that are not walked through
exclude_patterns = [
    ".*",
    "build",
    "experiments",
    "models",
    "runs",
    "tests",
    "**.ipynb_checkpoints",
]

# Markdown as GitHub reads it
myst_heading_anchors = 4
myst_enable_extensions: list[str] = []
suppress_warnings: list[str] = []

# Every notebook runs, and an error in a cell is an error of the build.
os.environ["TQDM_DISABLE"] = "1"  # no progress bars among the outputs
os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"  # tqdm misses widgets that nobody needs here
os.environ["PYTHONPATH"] = str(ROOT)  # the notebooks run on this checkout
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 300  # seconds for a cell, on a machine with other work
nb_execution_in_temp = True
nb_merge_streams = True
nb_execution_show_tb = True

# Docstrings mark code by single backticks.
default_role = "code"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Returns"]  # prose, which may have a colon
python_maximum_signature_line_length = 88

html_theme = "furo"
html_title = "spectral_sinks"
html_extra_path = ["root"]
html_static_path = ["static"]
html_css_files = ["tables.css"]
html_show_sphinx = False
html_copy_source = False


prose: dict[str, list[str]] = {}
"""Docstrings of attributes, by name, while napoleon has them."""


def keep_prose(app: Any, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """Keep the docstring of an attribute: napoleon reads what precedes a colon in it as a type."""
    if what in ("attribute", "property", "data"):
        prose[name] = list(lines)


def put_back(app: Any, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """Put the docstring of an attribute back as it was."""
    if name in prose:
        lines[:] = prose.pop(name)


def setup(app: Any) -> None:
    """Write the pages of the reference before Sphinx looks for pages."""
    reference_pages.write(ROOT / "docs" / "reference")
    app.connect("autodoc-process-docstring", keep_prose, priority=400)  # before napoleon
    app.connect("autodoc-process-docstring", put_back, priority=600)
