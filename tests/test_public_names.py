"""The public face: names cost nothing until they are used, and old ones still work."""

import ast
import importlib
import importlib.util
import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from support import tiny_models

import spectral_sinks as ss

ROOT = Path(__file__).parents[1]
HEAVY = ("datasets", "matplotlib", "nnsight", "pandas", "torch", "tqdm", "transformers")
NAMESPACES = (
    *("attention", "circuits", "claims", "experiments", "figures", "nll", "remote", "residual", "sinks"),
    *("spectra", "stats", "sweeps", "vision"),
)


def generator() -> Any:
    spec = importlib.util.spec_from_file_location("generate_api", ROOT / "docs" / "generate_api.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def loaded_by(code: str) -> set[str]:
    """The heavy libraries that a fresh process has imported after `code`."""
    ending = f"; import json, sys; print(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    ran = subprocess.run([sys.executable, "-c", code + ending], capture_output=True, text=True, check=True)
    return set(json.loads(ran.stdout.splitlines()[-1]))


def test_importing_the_package_imports_no_heavy_library() -> None:
    assert loaded_by("import spectral_sinks as ss; dir(ss); ss.__version__; ss.spectra; ss.sinks") == set()


def test_the_mathematics_imports_torch_and_no_model_library() -> None:
    names = "; ".join(f"ss.spectra.{name}" for name in ss.spectra.__all__)
    assert loaded_by(f"import spectral_sinks as ss; {names}") == {"torch", "tqdm"}, "torch imports tqdm"


def test_help_imports_no_heavy_library() -> None:
    code = """
import contextlib
from spectral_sinks.cli import main
with contextlib.suppress(SystemExit):
    main(["--help"])
0"""
    assert loaded_by(code) == set()


def test_a_description_needs_no_model_and_the_sinks_of_the_shipped_corpus_no_data_sets() -> None:
    assert loaded_by("import spectral_sinks as ss; ss.describe") == {"torch", "tqdm", "transformers"}
    assert "datasets" not in loaded_by("import spectral_sinks as ss; ss.find_sinks; ss.documents(); ss.load")


def test_the_top_has_the_names_of_the_first_week_and_the_namespaces() -> None:
    assert set(NAMESPACES) <= set(ss.__all__)
    assert len(set(ss.__all__) - set(NAMESPACES)) <= 64
    assert set(ss.__all__) <= set(dir(ss))


def test_every_listed_name_is_there() -> None:
    for space in (ss, *(getattr(ss, name) for name in NAMESPACES)):
        for name in space.__all__:
            assert getattr(space, name) is not None, f"{space.__name__}.{name}"


def test_no_name_has_two_meanings() -> None:
    homes: dict[str, Any] = {}
    for space in NAMESPACES:
        if space != "figures":  # a figure has the name of what it shows
            for name in getattr(ss, space).__all__:
                value = getattr(getattr(ss, space), name)
                assert homes.setdefault(name, value) is value, name
    for name in set(ss.__all__) - set(NAMESPACES):
        assert homes.get(name, getattr(ss, name)) is getattr(ss, name), name


def test_the_stubs_are_what_the_tables_say() -> None:
    for file, text in generator().stubs().items():
        assert file.read_text() == text, f"{file}: run python docs/generate_api.py"


def test_a_stub_names_what_python_finds() -> None:
    for file in generator().stubs():
        inside = file.parent.relative_to(ROOT).parts
        package = importlib.import_module(".".join(inside))
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ImportFrom):
                home = importlib.import_module("." * node.level + (node.module or ""), package.__name__)
                for alias in node.names:
                    assert getattr(package, alias.name) is getattr(home, alias.name)


def old_names() -> dict[str, str]:
    tree = ast.parse((ROOT / "spectral_sinks" / "__init__.py").read_text())
    table = next(n for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "_MOVED")
    moved = {
        n: f"{space}.{n}" for space, names in ast.literal_eval(table.value).items() for n in names.split()
    }
    renamed = {
        "Move": "attention.AttentionEdit",
        "Measured": "stats.Estimate",
        "test_time_registers": "vision.install_registers",
    }
    return moved | renamed


def test_an_old_name_warns_and_works_each_time() -> None:
    old = old_names()
    assert len(old) == 121 + 3
    for name, new in old.items():
        space, _, inside = new.partition(".")
        value = getattr(getattr(ss, space), inside)
        for _ in range(2):  # the first use must not hide the second
            with pytest.warns(DeprecationWarning, match=rf"ss\.{name} is now ss\.{new}"):
                assert getattr(ss, name) is value
        assert name not in ss.__all__


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = ss.nothing
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not hasattr(ss, "another_thing")


def test_the_package_runs_as_the_command() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "spectral_sinks", "merge", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "Join the results folders" in ran.stdout


def test_an_old_argument_warns_and_works() -> None:
    model = tiny_models.model()
    windows = ss.Windows.of_ids(tiny_models.ids(2, 9), model)
    with pytest.warns(DeprecationWarning, match=r"compare\(moves=\.\.\.\) is now compare\(interventions="):
        old = ss.compare(model, windows, moves={"mask": ss.attention.MaskKey(0)})  # pyright: ignore
    new = ss.compare(model, windows, {"mask": ss.attention.MaskKey(0)})
    assert old.table.equals(new.table)
    with pytest.warns(DeprecationWarning, match=r"find_sinks\(tokens="):
        found = ss.find_sinks(model, windows, ss.read_spectrum(model, bands=4), tokens=9, draws=1)  # pyright: ignore
    assert found.length == 9
    with pytest.raises(TypeError, match="got both 'moves' and 'interventions'"):
        ss.compare(model, windows, moves={}, interventions={})  # pyright: ignore
