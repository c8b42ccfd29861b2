"""`spectral-sinks vision` on a folder of images and a checkpoint with planted outlier neurons."""

import json
from pathlib import Path

import numpy as np
import planted_vision
import pytest
import tiny
import tinyvision
import transformers
from PIL import Image

pytestmark = pytest.mark.filterwarnings("ignore:band edges")  # 5 classes read 5 of 32 directions


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    planted_vision.plant("vit classifier").save_pretrained(folder)
    size = {"height": tinyvision.SIDE, "width": tinyvision.SIDE}
    transformers.ViTImageProcessorPil(size=size, image_mean=[0.5] * 3, image_std=[0.1] * 3).save_pretrained(
        folder
    )
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """White patches on grey noise whose patches have the mean 0.5."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    size = tinyvision.PATCH
    for label in ("cat", "dog"):
        (folder / label).mkdir()
        for index in range(4):
            noise = rng.integers(-40, 41, (5, size, 5, size // 2, 3))
            both = np.stack([noise, -noise], axis=4).reshape(20, 20, 3) + 127
            row, column = divmod(5 * index + 3, 5)
            both[row * size : (row + 1) * size, column * size : (column + 1) * size] = 255
            Image.fromarray(both.astype(np.uint8)).save(folder / label / f"{index}.png")
    return folder


def test_what_was_planted_is_reported(
    checkpoint: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--json", "--registers", 1, "--neurons", 1, "--figures", tmp_path / "figures")
    ran = tiny.run(capsys, "vision", checkpoint, pictures, *options)
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
    ran = tiny.run(capsys, "vision", checkpoint, pictures / "cat", "--rule", "100", "--limit", 3)
    assert ran.status == 0, ran.err
    said = " ".join(ran.out.split())  # whatever the width of the terminal
    assert "Outlier patches of" in said and "3 images of 25 patches; onset layer 1" in said


def test_bad_input(checkpoint: Path, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in (
        ((checkpoint, "/nowhere"), "does not exist"),
        ((checkpoint, pictures, "--rule", "best"), "robust, published or a norm"),
        ((checkpoint, pictures, "--matrix", "nothing"), "nothing"),
        (("/nowhere", pictures), "nowhere"),
    ):
        ran = tiny.run(capsys, "vision", *arguments)
        assert ran.status == 2 and said in ran.err, ran.err
        assert "Traceback" not in ran.err
