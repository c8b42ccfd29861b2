"""One page for each namespace of the package, with the whole docstring of every public name.

docs/conf.py writes them when the site is built. On GitHub, docs/api.md has one line for each name.
"""

import inspect
import types
from pathlib import Path
from typing import Any

from generate_api import NAMESPACES, names

import spectral_sinks as ss


def directive(path: str, value: Any, shown: bool) -> list[str]:
    """The directive of autodoc that shows one name; `shown` where another page has its members."""
    if isinstance(value, types.ModuleType):
        return []  # a namespace has a page of its own
    if inspect.isclass(value):
        return [f".. autoclass:: {path}", "   :no-index:" if shown else "   :members:", ""]
    if callable(value):
        return [f".. autofunction:: {path}", *(["   :no-index:"] if shown else []), ""]
    return [f".. py:data:: {path}", ""]


def page(path: str, module: Any, title: str, introduction: str, elsewhere: set[int]) -> str:
    """The text of one page, in reStructuredText; `elsewhere` has what other pages show."""
    lines = [title, "=" * len(title), "", introduction, ""]
    for name in names(module):
        value = getattr(module, name)
        lines += directive(f"{path}.{name}", value, id(value) in elsewhere)
    return "\n".join(lines)


def write(folder: Path) -> None:
    """Write the pages that differ from those in the folder, and delete those of names that are gone."""
    spaces = {space: getattr(ss, space) for space in NAMESPACES}
    inside = {id(getattr(module, name)) for module in spaces.values() for name in names(module)}
    first = "The names at the top. `import spectral_sinks as ss` comes first."
    pages = {"spectral_sinks": page("spectral_sinks", ss, "ss", first, inside)}
    for space, module in spaces.items():
        text = inspect.getdoc(module) or ""
        pages[f"ss.{space}"] = page(f"spectral_sinks.{space}", module, f"ss.{space}", text, set())
    folder.mkdir(exist_ok=True)
    for file in folder.glob("*.rst"):
        if file.stem not in pages:
            file.unlink()
    for name, text in pages.items():
        file = folder / f"{name}.rst"
        if not file.exists() or file.read_text() != text:
            file.write_text(text)
