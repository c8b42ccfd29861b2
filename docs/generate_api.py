"""Write what people and type checkers read about the public names: docs/api.md and the stubs.

python docs/generate_api.py
"""

import ast
import inspect
from pathlib import Path
from typing import Any

import spectral_sinks as ss

NAMESPACES = (
    *("spectra", "attention", "nll", "residual", "sinks", "circuits", "vision"),
    *("sweeps", "remote", "stats", "claims", "experiments", "figures"),
)
PACKAGE = Path(ss.__file__).parent
MADE = "# Made by: python docs/generate_api.py"


def names(module: Any) -> list[str]:
    """The public names of a namespace."""
    return sorted(module.__all__, key=str.lower)


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
        *(line(f"ss.{name}", getattr(ss, name)) for name in names(ss)),
    ]
    for space in NAMESPACES:
        module = getattr(ss, space)
        title = " ".join((inspect.getdoc(module) or "").split())
        lines += ["", f"## `ss.{space}`", "", title, ""]
        lines += [line(f"ss.{space}.{name}", getattr(module, name)) for name in names(module)]
    return "\n".join(lines) + "\n"


def stub(file: Path) -> str:
    """The stub of a package whose names are imported when they are first used: its table, as imports."""
    call = next(
        node
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "lazy_loader.attach"
    )
    table = {key.arg: ast.literal_eval(key.value) for key in call.keywords}
    imports = {("", name) for name in table.get("submodules", ())} | {
        (module, name) for module, listed in table.get("submod_attrs", {}).items() for name in listed
    }
    lines = [f"from .{module} import {name} as {name}" for module, name in sorted(imports)]
    version = ["", "__version__: str"] if file.parent == PACKAGE else []
    listed = [f"    {name!r}," for name in sorted(name for _, name in imports)]
    return "\n".join([MADE, *lines, *version, "", "__all__ = [", *listed, "]", ""])


def stubs() -> dict[Path, str]:
    """Every stub of the package, by its file."""
    lazy = [file for file in sorted(PACKAGE.rglob("__init__.py")) if "lazy_loader.attach" in file.read_text()]
    return {file.with_suffix(".pyi"): stub(file) for file in lazy}


if __name__ == "__main__":
    Path(__file__).with_name("api.md").write_text(page())
    for file, text in stubs().items():
        file.write_text(text)
