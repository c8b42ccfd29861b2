"""`spectral-sinks vision` on a folder of images and a checkpoint with planted outlier neurons."""

import json
from pathlib import Path

import pytest
from support import planted_outliers, tiny_models

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
