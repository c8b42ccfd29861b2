"""Write docs/api.md: one line for each public name, by namespace.

python docs/generate_api.py
"""

import inspect
from pathlib import Path
from typing import Any

import spectral_sinks as ss

NAMESPACES = (
    *("spectra", "attention", "nll", "residual", "sinks", "circuits", "vision"),
    *("sweeps", "remote", "stats", "claims", "experiments", "figures"),
)


def names(module: Any) -> list[str]:
    """The public names of a namespace: those it lists, or else what is defined in it."""
    listed = getattr(module, "__all__", None)
    if listed is not None:
        return sorted(listed, key=str.lower)
    own = [n for n, x in vars(module).items() if getattr(x, "__module__", "") == module.__name__]
    return sorted((name for name in own if not name.startswith("_")), key=str.lower)


def line(path: str, value: Any) -> str:
    """A name with the first paragraph of its docstring."""
    described = inspect.isclass(value) or inspect.isfunction(value) or inspect.ismodule(value)
    text = " ".join((inspect.getdoc(value) or "").split("\n\n")[0].split()) if described else ""
    return f"- `{path}`" + (f": {text}" if text else "")


def page() -> str:
    """The text of docs/api.md."""
    lines = [
        "# Public names",
        "",
        "Made by `python docs/generate_api.py` from the package itself.",
        "`import spectral_sinks as ss` comes first.",
        "",
        "## At the top",
        "",
        *(line(f"ss.{name}", getattr(ss, name)) for name in sorted(ss.__all__, key=str.lower)),
    ]
    for space in NAMESPACES:
        module = getattr(ss, space)
        title = " ".join((inspect.getdoc(module) or "").split())
        lines += ["", f"## `ss.{space}`", "", title, ""]
        lines += [line(f"ss.{space}.{name}", getattr(module, name)) for name in names(module)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("api.md").write_text(page())
