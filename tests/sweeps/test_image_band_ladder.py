"""The ladder on images: its rows against single effects, and its controls against draws made here."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from support import tiny_encoders
from transformers import ViTImageProcessorPil

import spectral_sinks as ss

FAMILY, SITE, DRAWS = "dinov2 registers classifier", ss.Site("exit", 1), 3
LABELS = [0, 1, 2, 3, 4, 0]


@pytest.fixture(scope="module")
def model() -> ss.VisionModel:
    return tiny_encoders.model(FAMILY)


@pytest.fixture(scope="module")
def given() -> ss.Pixels:
    return tiny_encoders.pixels(FAMILY, len(LABELS))


def ladder(model: ss.VisionModel, given: ss.Pixels, spectrum: ss.Spectrum) -> pd.DataFrame:
    return ss.sweeps.image_ladder(model, given, SITE, spectrum, labels=LABELS, draws=DRAWS, batch_size=4)


def test_rows_are_single_effects(model: ss.VisionModel, given: ss.Pixels) -> None:
    generator = torch.Generator().manual_seed(1)
    spectrum = ss.Spectrum.from_matrix(torch.randn(90, 32, generator=generator), bands=4)
    table = ladder(model, given, spectrum)
    assert set(table["filter"]) == {"keep", "remove", "dark"}
    cells = {
        ("keep", 3): ss.phi(spectrum, 1, 3),
        ("remove", 2): ss.remove(spectrum.band(2)),
        ("dark", None): ss.remove(spectrum.dark()),
    }
    for (name, band), edit in cells.items():
        rows = ss.evaluate_images(model, given, {"x": {SITE: edit}}, labels=LABELS)["x"].table
        part = table[
            (table["filter"] == name) & (table["band"].isna() if band is None else table["band"] == band)
        ]
        assert set(part["quantity"]) == {
            *("kl", "accuracy", "cls_cosine", "registers_cosine", "patches_cosine"),
            *("cls_nearest", "patches_nearest"),
        }
        for row in part.itertuples():
            assert row.mean == pytest.approx(rows[row.quantity].mean(), abs=1e-5)
            assert row.rank == edit.rank and row.n == len(LABELS) and row.site == "exit" and row.layer == 1
            assert row.removed_energy_share == pytest.approx(rows["removed_energy_share"].mean(), abs=1e-5)
    whole = table[(table["filter"] == "keep") & (table["band"] == 4)].set_index("quantity")["mean"]
    assert whole["kl"] == 0 and whole["cls_cosine"] == 1


def test_controls_have_the_rank_or_the_energy(model: ss.VisionModel, given: ss.Pixels) -> None:
    with pytest.warns(ss.SpectralWarning, match="null space"):
        spectrum = ss.read_spectrum(model, bands=8, use_cache=False)
    table = ladder(model, given, spectrum).dropna(subset="rank_mean").set_index(["filter", "quantity"])
    assert set(table.index.get_level_values(0)) == {"dark", "read", "unread"}
    x = torch.stack([given[place] for place in range(len(given))])
    seen = ss.trace(model, x, {}, [SITE], readout=lambda _, read, __: read[SITE]).flatten(0, 1)
    for name, part in {"read": spectrum.null().complement(), "unread": spectrum.null()}.items():
        cells = {f"rank {seed}": {SITE: ss.rnd(32, part.rank, seed)} for seed in range(DRAWS)}
        matched = {seed: ss.spectra.energy_matched(part, seen, seed) for seed in range(DRAWS)}
        cells |= {f"energy {seed}": {SITE: ss.remove(each)} for seed, each in matched.items()}
        effects = ss.evaluate_images(model, given, cells, labels=LABELS)
        row = table.loc[(name, "kl")]
        for control in ("rank", "energy"):
            drawn = [effects[f"{control} {seed}"].table["kl"].mean() for seed in range(DRAWS)]
            assert row[f"{control}_mean"] == pytest.approx(np.mean(drawn), rel=1e-3)
            assert row[f"{control}_least"] == pytest.approx(min(drawn), rel=1e-3)
            assert row[f"{control}_most"] == pytest.approx(max(drawn), rel=1e-3)
            assert row[f"{control}_as_bad"] == sum(value >= row["mean"] for value in drawn)
            cosines = [effects[f"{control} {seed}"].table["cls_cosine"].mean() for seed in range(DRAWS)]
            other = table.loc[(name, "cls_cosine")]
            assert other[f"{control}_as_bad"] == sum(value <= other["mean"] for value in cosines)
        for effect in (effects[f"energy {seed}"] for seed in range(DRAWS)):
            removed = effect.table["removed_energy_share"].mean()
            assert removed == pytest.approx(row["removed_energy_share"], rel=0.02)


@pytest.fixture(scope="module")
def experiment() -> Any:
    path = Path(__file__).parents[2] / "experiments" / "vision" / "bands.py"
    spec = importlib.util.spec_from_file_location("vision_bands", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("family", ["dinov2 registers classifier", "siglip"])
@pytest.mark.filterwarnings("ignore:band edges")
def test_the_experiment_on_a_folder(family: str, experiment: Any, tmp_path: Path) -> None:
    """Images in turn from each class, tables and figures written, with a head and without."""
    tiny_encoders.plain(family).save_pretrained(tmp_path / "model")
    ViTImageProcessorPil(size={"height": 20, "width": 20}).save_pretrained(tmp_path / "model")
    generator = np.random.default_rng(0)
    for place in range(8):
        folder = tmp_path / "images" / ("cat", "dog")[place % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 255, (20, 20, 3), np.uint8)).save(folder / f"{place}.png")
    (tmp_path / "names.txt").write_text("cat/0.png\ncat/2.png\ncat/4.png\ndog/3.png\n")
    options = experiment.Options(
        model=str(tmp_path / "model"),
        images=tmp_path / "images",
        out=tmp_path / "out",
        names=tmp_path / "names.txt",
        matrix="classifier" if "classifier" in family else "embedding",
        bands=4,
        limit=3,
        draws=2,
    )
    record = experiment.main(options)
    assert record["images"] == 3 and record["untouched"]["patches_cosine"] == 1
    assert ("kl" in record["untouched"]) is ("classifier" in family)
    assert json.loads((options.out / "vision_bands.json").read_text())["rank"] == record["rank"]
    summary = pd.read_csv(options.out / "vision_bands_summary.csv")
    assert set(summary["layer"]) == {0, 1, 2} and summary["rank_mean"].notna().all()
    tokens = pd.read_csv(options.out / "vision_bands_tokens.csv")
    kinds = {"cls", "registers", "patches"} if "dino" in family else {"patches"}
    assert kinds <= set(tokens["position_class"]) <= kinds | {"outlier patches"}
    assert np.allclose(tokens.groupby(["position_class", "layer"])["mean"].sum(), 1, atol=1e-3)
    for name in ("vision_bands.png", "vision_bands_tokens.png"):
        assert (options.out / name).stat().st_size > 10_000
    assert [Path(name).name for name in experiment.read(options).names] == ["0.png", "3.png", "2.png"]
