"""`vision/across.py` and `vision/registers.py` on tiny encoders whose answers are known."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
from support import planted_outliers, tiny_encoders

EXPERIMENTS = Path(__file__).parents[2] / "experiments" / "vision"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXPERIMENTS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planted_outliers.pictures(tmp_path_factory.mktemp("pictures"), ("LABEL_0", "LABEL_1"))


def test_across_tells_outliers_from_none(pictures: Path, tmp_path: Path) -> None:
    models = (
        planted_outliers.save(planted_outliers.plant("vit classifier"), tmp_path / "a" / "planted"),
        planted_outliers.save(planted_outliers.random_twin("vit classifier"), tmp_path / "a" / "twin"),
    )
    across = script("across")
    options = across.Options(tuple(map(str, models)), pictures, tmp_path / "out")
    across.main(options)
    table = pd.read_csv(tmp_path / "out" / "vision_across.csv").set_index("model")
    assert list(table.index) == ["a/planted", "a/twin"]
    planted, twin = table.loc["a/planted"], table.loc["a/twin"]
    assert planted["outlier_share"] == pytest.approx(1 / 25, abs=1e-4) and planted["onset_layer"] == 1
    assert planted["published_share"] == pytest.approx(1 / 25, abs=1e-4)
    assert "outliers" in planted["verdict"] and "outliers" not in twin["verdict"]
    assert twin["outlier_share"] == 0 and np.isnan(twin["onset_layer"])


def test_registers_of_a_tiny_encoder(pictures: Path, tmp_path: Path) -> None:
    folder = planted_outliers.save(tiny_encoders.build("dinov2 registers classifier"), tmp_path / "model")
    names = tmp_path / "names.txt"
    names.write_text("LABEL_0/0.png\nLABEL_1/0.png\nLABEL_1/2.png\n")
    registers = script("registers")
    table = registers.main(registers.Options(str(folder), pictures, tmp_path / "out", names))
    by = table.set_index(["edit", "measure"])["mean"]
    assert by["none", "agreement"] == 1 and by["shuffled", "cls error"] == pytest.approx(0, abs=1e-5)
    assert by["zero", "cls error"] > 1e-3 and by["removed", "patch error"] > 1e-3
    assert (table["n"] == 3).all() and "accuracy" in set(table["measure"])
    assert (tmp_path / "out" / "vision_registers.png").stat().st_size > 5000
