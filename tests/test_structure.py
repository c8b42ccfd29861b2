"""The arrows between the rooms: who may import whom."""

import ast
import functools
import importlib
import json
import zlib
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "spectral_sinks"
MODULES = sorted(PACKAGE.rglob("*.py"))
EXPERIMENTS = sorted((ROOT / "experiments").rglob("*.py"))

SPECTRA = {"errors", "spectra"}
MODELS = SPECTRA | {"models", "files"}
DATA = MODELS | {"data", "stats"}
INTERVENTIONS = MODELS | {"remote", "interventions"}
MEASURE = INTERVENTIONS | {"measure", "stats", "data"}
SWEEPS = MEASURE | {"sweeps"}
ALLOWED = {
    "errors": set[str](),
    "files": {"errors", "files"},
    "stats": {"errors", "stats"},
    "spectra": SPECTRA,
    "models": MODELS,
    "data": DATA,
    "remote": MODELS | {"remote"},
    "interventions": INTERVENTIONS,
    "measure": MEASURE,
    "sweeps": SWEEPS,
    "figures": {"errors", "files", "stats", "figures"},
    "claims": {"errors", "claims"},
    "experiments": SWEEPS | {"experiments"},
    "pages": SWEEPS | {"pages"},
    "__init__": SWEEPS | {"figures", "pages", "claims", "experiments"},
    "__main__": {"cli"},
    "cli": SWEEPS | {"figures", "pages", "claims", "experiments", "cli", "spectral_sinks"},
}
"""What the modules of each room may import of the package; a room that is not listed is a violation."""

FLOORS = ("results", "memory", "attention", "nll", "circuits", "residual", "sinks", "vision")
"""The rooms of measure/, the lowest first: each may import itself and those before it."""

MODEL_LIBRARIES = {"nnsight", "timm", "transformers"}
"""What pure mathematics and pictures never need."""


def imported(source: str, package: str = "spectral_sinks") -> set[str]:
    """Full names of what a module imports, wherever in it; `package` is where relative ones start."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = parents[: len(parents) + 1 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def rooms(names: set[str]) -> set[str]:
    """Find the rooms of the package among imported names; the package itself as `spectral_sinks`."""
    split = [name.split(".") for name in names if name.split(".")[0] == "spectral_sinks"]
    return {parts[1] if len(parts) > 1 else parts[0] for parts in split}


def strangers(names: set[str], public: set[str] | None) -> set[str]:
    """Find what an experiment imports of the package besides public names; rooms are none."""
    ours = {name for name in names if name.startswith("spectral_sinks.") and not name.endswith("__")}
    rooms = set(ALLOWED) - (public or set())  # the face of a room is public, what lies in it is not
    hidden = {name for name in ours if name.split(".")[1] in rooms or name.split(".")[1].startswith("_")}
    return {
        name
        for name in ours
        if name in hidden or name.count(".") > 1 or (public and name.split(".")[1] not in public)
    }


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_arrows_point_down(path: Path) -> None:
    inside = path.relative_to(PACKAGE).with_suffix("").parts
    room = inside[0]
    assert room in ALLOWED, f"{room} has no place in the order of the rooms"
    names = imported(path.read_text(), ".".join(["spectral_sinks", *inside[:-1]]))
    assert rooms(names) <= ALLOWED[room]
    if room in ("errors", "files", "spectra", "stats", "figures", "claims"):
        assert not {name.split(".")[0] for name in names} & MODEL_LIBRARIES


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.name)
def test_experiments_see_public_names_only(path: Path) -> None:
    public = getattr(importlib.import_module("spectral_sinks"), "__all__", None)
    tree = ast.parse(path.read_text())
    used = imported(path.read_text())
    aliases = [
        alias
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
        if alias.name == "spectral_sinks"
    ]
    assert all(alias.asname == "ss" for alias in aliases), "write: import spectral_sinks as ss"
    if aliases:
        used |= {
            f"spectral_sinks.{node.attr}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "ss"
        }
    assert not strangers(used, set(public) if public else None)


def test_the_package_is_found() -> None:
    assert {"errors.py", "spectra/spectrum.py"} <= {str(path.relative_to(PACKAGE)) for path in MODULES}


@pytest.mark.parametrize(
    ("source", "package", "expected"),
    [
        ("import spectral_sinks.models.language as m", "", {"models"}),
        ("from spectral_sinks.models import language", "", {"models"}),
        ("from spectral_sinks import cli, spectra", "", {"cli", "spectra"}),
        ("def f():\n    from spectral_sinks.figures import page", "", {"figures"}),
        ("from . import cache", "spectral_sinks.spectra", {"spectra"}),
        ("from ..models.language import load", "spectral_sinks.spectra", {"models"}),
        ("from .cli import main", "spectral_sinks", {"cli"}),
        ("import spectral_sinks as ss", "", {"spectral_sinks"}),
        ("import torch, spectral_sinks_extra", "", set[str]()),
    ],
)
def test_an_import_of_any_form_is_seen(source: str, package: str, expected: set[str]) -> None:
    assert rooms(imported(source, package)) == expected


def test_what_experiments_may_not_import_is_seen() -> None:
    def found(source: str, public: set[str] | None = None) -> bool:
        return bool(strangers(imported(source), public))

    assert not found("import torch\nimport spectral_sinks as ss\nfrom spectral_sinks import load")
    assert not found("from spectral_sinks import load", {"load"})
    assert found("from spectral_sinks import load", {"sweep"})
    assert found("from spectral_sinks import models", {"load"})
    assert found("from spectral_sinks.models import load") and found("from spectral_sinks import _load")
    assert found("import spectral_sinks.models.language")
    assert not found("import spectral_sinks as ss\nfrom spectral_sinks import images", {"images"})
    assert found("from spectral_sinks.data.images import Images", {"images"}) and found(
        "from spectral_sinks import pixels", {"load"}
    )


@functools.cache
def runtime_imports(path: Path) -> set[str]:
    """Find the modules of the package that a file imports when it runs, not those for type checkers alone."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    names = imported(ast.unparse(tree))
    modules = {module_name(other) for other in MODULES}
    return {name for full in names for name in (full, full.rpartition(".")[0]) if name in modules}


def module_name(path: Path) -> str:
    """Give the dotted name of a file of the package."""
    parts = ("spectral_sinks", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SERIALIZATION = "spectral_sinks.remote.serialization"

FACES = {path for path in MODULES if path.name == "__init__.py"}


@pytest.mark.parametrize(
    "path",
    sorted(set((PACKAGE / "measure").rglob("*.py")) - FACES),
    ids=lambda path: str(path.relative_to(PACKAGE)),
)
def test_rooms_of_measure_import_lower_rooms_only(path: Path) -> None:
    floor = path.relative_to(PACKAGE / "measure").with_suffix("").parts[0]
    inside = {
        name.split(".")[2] for name in runtime_imports(path) if name.startswith("spectral_sinks.measure.")
    }
    allowed = set(FLOORS[: FLOORS.index(floor) + 1])
    if floor == "circuits":  # circuits and nll stand side by side
        allowed -= {"nll"}
    assert inside <= allowed


def test_no_files_import_each_other_in_a_circle() -> None:
    graph = {module_name(path): runtime_imports(path) for path in MODULES if path not in FACES}
    order = TopologicalSorter({name: others & graph.keys() for name, others in graph.items()})
    order.prepare()  # raises CycleError, which names the circle


def test_a_circle_is_seen() -> None:
    with pytest.raises(CycleError):
        TopologicalSorter({"a": {"b"}, "b": {"a"}}).prepare()


NAMED_AFTER = ("cli", "figures")
"""A command or a figure, and its file, has the name of what it shows."""


def test_no_two_files_have_one_name() -> None:
    homes: dict[str, list[str]] = {}
    for path in MODULES:
        inside = path.relative_to(PACKAGE)
        if inside.parts[0] not in NAMED_AFTER and not path.stem.startswith("__"):
            homes.setdefault(path.stem, []).append(str(inside))
    assert {stem: paths for stem, paths in homes.items() if len(paths) > 1} == {}


def test_no_two_public_functions_or_classes_have_one_name() -> None:
    homes: dict[str, list[str]] = {}
    for path in MODULES:
        inside = path.relative_to(PACKAGE)
        for node in ast.parse(path.read_text()).body:
            defined = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
            if defined and inside.parts[0] not in NAMED_AFTER:
                homes.setdefault(node.name, []).append(str(inside))
    assert {name: paths for name, paths in homes.items() if len(paths) > 1} == {}


def test_a_server_gets_every_module_that_a_measurement_imports() -> None:
    texts = json.loads(zlib.decompress(importlib.import_module(SERIALIZATION).sources()[0]))
    graph = {module_name(path): runtime_imports(path) for path in MODULES}
    reached, todo = set[str](), {name for name in graph if name.startswith("spectral_sinks.measure")}
    while todo:
        name = todo.pop()
        reached.add(name)
        # importing a module imports the packages around it
        around = {name.rsplit(".", depth)[0] for depth in range(1, name.count(".") + 1)}
        todo |= (graph[name] | (around & graph.keys())) - reached
    assert "spectral_sinks.spectra.svd" in reached, "of a measurement's own imports"
    assert reached <= texts.keys()
