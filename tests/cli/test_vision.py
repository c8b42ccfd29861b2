"""`spectral-sinks vision` on a folder of images and a checkpoint with planted outlier neurons."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import planted_outliers, tiny_models

from spectral_sinks.cli import progress

pytestmark = pytest.mark.filterwarnings("ignore:band edges")  # 5 classes read 5 of 32 directions


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planted_outliers.save(planted_outliers.plant("vit classifier"), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planted_outliers.pictures(tmp_path_factory.mktemp("pictures"), ("cat", "dog"))


def test_what_was_planted_is_reported(
    checkpoint: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--json", "--registers", 1, "--neurons", 1, "--figures", tmp_path / "figures")
    ran = tiny_models.run(capsys, "vision", checkpoint, pictures, *options)
    assert ran.status == 0, ran.err
    record = json.loads(ran.out)
    assert tiny_models.keys_of(tiny_models.documented_keys()["vision"]) <= set(record)
    assert record["outliers"]["onset_layer"] == 1
    assert record["outliers"]["outlier_share"] == pytest.approx(1 / 25)
    assert [row["images"] for row in record["outliers"]["layers"]] == [0, 0, 8, 8]
    assert record["reads"] == "classifier, rank 5 of 32"
    assert record["pixels"]["images"] == 8 and record["pixels"]["tokens"] == 26
    assert [(row["layer"], row["neuron"]) for row in record["register_neurons"]] == [(1, 3)]
    share = {
        row["state"]: row["mean"]
        for row in record["registers"]
        if row["measure"] == "outlier share" and row["layer"] == 2
    }
    assert share["original"] == pytest.approx(1 / 25) and share["repaired"] == 0
    assert share["random 1"] == pytest.approx(1 / 25)
    assert {row["question"] for row in record["probes"]} >= {"position accuracy", "class accuracy"}
    written = {path.name for path in (tmp_path / "figures").iterdir()}
    assert written == {"norms.png", "outliers.png", "attention.png", "attention_maps.png", "registers.png"}


def test_for_people(checkpoint: Path, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ran = tiny_models.run(capsys, "vision", checkpoint, pictures / "cat", "--rule", "100", "--limit", 3)
    assert ran.status == 0, ran.err
    said = " ".join(ran.out.split())  # whatever the width of the terminal
    assert "Outlier patches of" in said and "3 images of 25 patches; onset layer 1" in said


@pytest.mark.filterwarnings("always:no test-time registers")
def test_without_outliers_there_are_no_registers_to_try(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    twin = planted_outliers.save(planted_outliers.random_twin("vit classifier"), tmp_path)
    ran = tiny_models.run(capsys, "vision", twin, pictures, "--registers", 1, "--json")
    assert ran.status == 0 and "no test-time registers: no outlier patch" in ran.err
    record = json.loads(ran.out)
    assert record["registers"] == [] and record["outliers"]["onset_layer"] is None


def test_bad_input(checkpoint: Path, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in (
        ((checkpoint, "/nowhere"), "does not exist"),
        ((checkpoint, pictures, "--rule", "best"), "robust, published or a norm"),
        ((checkpoint, pictures, "--matrix", "nothing"), "nothing"),
        (("/nowhere", pictures), "nowhere"),
    ):
        ran = tiny_models.run(capsys, "vision", *arguments)
        assert ran.status == 2 and said in ran.err, ran.err
        assert "Traceback" not in ran.err


def test_the_first_screen_answers(
    checkpoint: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = tiny_models.run(capsys, "vision", checkpoint, pictures)
    said = " ".join(ran.out.split())
    assert "on 8 images of 20 x 20 pixels (5 x 5 patches)." in said
    assert "Outlier tokens: yes, since layer 1." in said
    assert "4.00% of the patches are outliers" in said and "in 8 of 8 images" in said
    assert "Attention: over all layers and heads," in said and "to [CLS] (most in layer" in said
    assert "Uniform attention gives each token 3.85%." in said  # 1 / 26
    assert "No-op heads:" in said
    assert "Registers: not measured. --registers 1 measures what test-time registers change." in said
    options = ("--registers", 1, "--neurons", 1)
    said = " ".join(tiny_models.run(capsys, "vision", checkpoint, pictures, *options).out.split())
    assert "with 1 test-time register, the share of outliers at layer 1 changes from 4.00% to 0.00%;" in said
    assert "with as many random neurons, it is 4.00% to 4.00%." in said


def test_a_bare_encoder_is_passed_over_once(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pictures keep their shapes, and all that the first screen says comes from one pass."""
    twin = planted_outliers.save(planted_outliers.random_twin("dinov2"), tmp_path / "twin")
    folder = tmp_path / "shapes"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for place, (width, height) in enumerate(((40, 20), (20, 40), (20, 20))):
        values = rng.integers(100, 156, (height, width, 3)).astype(np.uint8)
        Image.fromarray(values).save(folder / f"{place}.png")
    arguments = ("vision", twin, folder, "--size", 20)
    record = json.loads(tiny_models.run(capsys, *arguments, "--json").out)
    assert record["passes"] == 1 and record["circuits"] == {}
    assert record["pixels"]["grids"] == {"7 x 4": 1, "4 x 7": 1, "5 x 5": 1}
    assert "Outlier tokens: no." in record["answers"][1] and "cut-off is" in record["answers"][1]
    assert len(record["sinks"]["layers"]) == 3 and len(record["sinks"]["heads"]) == 12
    assert "once there are outliers that they could take over." in record["answers"][-1]
    ran = tiny_models.run(capsys, *arguments, "--figures", tmp_path / "figures")
    said = " ".join(ran.out.split())
    assert "3 images that keep their 3 shapes, in 26 to 29 tokens." in said
    assert "which changes proportions by at most 14.3%." in said
    assert progress._noted[0].startswith("norms and attention, 3 of 3 images, about 0 s left")
    assert len(list((tmp_path / "figures").iterdir())) == 4
    square = json.loads(tiny_models.run(capsys, *arguments, "--square", "--json").out)
    assert square["pixels"]["rows"] == square["pixels"]["columns"] == 5
    refused = tiny_models.run(capsys, "vision", twin, folder, "--square")
    assert refused.status == 2 and "--square without --size" in refused.err
