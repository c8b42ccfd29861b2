"""Training a small image encoder: it learns, goes on where it stopped, and leaves what the package reads."""

import importlib.util
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor

import spectral_sinks as ss

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("train_vit", ROOT / "experiments" / "training" / "train_vit.py")
assert SPEC is not None and SPEC.loader is not None
MODULE = sys.modules["train_vit"] = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(MODULE)
SCRIPT: dict[str, Any] = vars(MODULE)
STEPS = 24


def paint(folder: Path, side: int = 12) -> Path:
    """Sixty noisy pictures of two classes, red and blue."""
    draw = np.random.default_rng(0)
    for channel, name in ((2, "blue"), (0, "red")):
        (folder / name).mkdir(parents=True)
        for index in range(30):
            picture = draw.integers(0, 120, (side, side, 3), dtype=np.uint8)
            picture[..., channel] += 120
            Image.fromarray(picture).save(folder / name / f"{index}.png")
    return folder


def recipe(images: Path, out: Path, **given: Any) -> Any:
    small: dict[str, Any] = {"width": 16, "layers": 2, "heads": 2, "side": 12, "batch": 8, "warmup": 4}
    small |= {"steps": STEPS, "learning_rate": 3e-3, "checkpoints": (0, 8), "evaluate_every": 8}
    return SCRIPT["Recipe"](images, out, **small | given)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return paint(tmp_path_factory.mktemp("images") / "colours")


@pytest.fixture(scope="module")
def trained(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    made = recipe(images, tmp_path_factory.mktemp("run") / "plain")
    SCRIPT["train"](made)
    return made


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(a: Path, b: Path) -> bool:
    first, second = weights(a), weights(b)
    return first.keys() == second.keys() and all(torch.equal(x, second[name]) for name, x in first.items())


def test_it_learns(trained: Any) -> None:
    log = pd.read_csv(trained.out / "log.csv")
    assert log["step"].tolist() == [8, 16, 24]
    assert log["heldout_nll"].is_monotonic_decreasing and log["heldout_nll"].iloc[-1] < 0.3
    assert log["accuracy"].iloc[-1] == 1
    kept = sorted(path.parent.name for path in trained.out.glob("*/model.safetensors"))
    assert kept == ["model", "step-000000", "step-000008"]
    assert not same(trained.out / "step-000000", trained.out / "step-000008")


def test_what_is_held_out_is_never_trained_on(trained: Any, tmp_path: Path) -> None:
    held = (trained.out / "heldout.txt").read_text().split()
    assert 0 < len(held) < 20 and all(SCRIPT["held_out"](name) for name in held)
    other = tmp_path / "images"
    shutil.copytree(trained.images, other)
    for name in held:
        Image.new("RGB", (12, 12), "green").save(other / name)
    SCRIPT["train"](recipe(other, tmp_path / "run"))
    assert same(tmp_path / "run" / "model", trained.out / "model"), "what they show changes no weight"


@pytest.mark.parametrize("registers", [0, 3])
def test_checkpoints_have_the_published_format(registers: int, images: Path, tmp_path: Path) -> None:
    made = recipe(images, tmp_path / "run", registers=registers, steps=8)
    SCRIPT["train"](made)
    folder = made.out / "model"
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == ("dinov2_with_registers" if registers else "dinov2")
    assert config["id2label"] == {"0": "blue", "1": "red"}
    model = ss.load_vision(folder)
    assert model.prefix == ("cls", "reg1", "reg2", "reg3")[: registers + 1]
    assert model.labels == ("blue", "red")

    processor = AutoImageProcessor.from_pretrained(folder, backend="pil", local_files_only=True)
    names = (made.out / "heldout.txt").read_text().split()
    files = [images / name for name in names]
    shown: Any = ss.images(files, labels=[Path(name).parent.name for name in names])
    read = ss.pixels(shown, model)
    assert read.grid == (3, 3) and read.length == 10 + registers
    assert shown.record.items() <= read.record.items() and read.record["tokens"] == 10 + registers
    by_hand = torch.stack([torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) for file in files])
    by_hand = (by_hand / 255 - 0.5) / 0.25
    assert torch.allclose(torch.stack([read[i] for i in range(len(read))]), by_hand, atol=1e-5)
    direct = processor(images=Image.open(files[0]), return_tensors="pt")["pixel_values"][0]
    assert torch.allclose(direct, by_hand[0], atol=1e-5)
    logits = ss.trace(model, by_hand, {}, readout=lambda *_: model.logits())
    assert read.labels is not None
    log = pd.read_csv(made.out / "log.csv").iloc[-1]
    assert float((logits.argmax(-1) == read.labels).float().mean()) == pytest.approx(log["accuracy"])
    nll = -logits.double().log_softmax(-1)[torch.arange(len(logits)), read.labels].mean()
    assert float(nll) == pytest.approx(log["heldout_nll"], abs=1e-5)


def test_a_killed_run_goes_on_bit_for_bit(trained: Any, images: Path, tmp_path: Path) -> None:
    made = recipe(images, tmp_path / "run")
    augmented, calls = SCRIPT["augmented"], 0

    def dies(*given: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 13:  # after step 12, which no checkpoint holds
            raise KeyboardInterrupt
        return augmented(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SCRIPT, "augmented", dies)
        with pytest.raises(KeyboardInterrupt):
            SCRIPT["train"](made)
        assert pd.read_csv(made.out / "log.csv")["step"].tolist() == [8]
        SCRIPT["train"](made)
    assert calls == 13 + STEPS - 8, "it began at step 8"
    for name in ("step-000008", "model"):
        assert same(made.out / name, trained.out / name)
    assert (made.out / "log.csv").read_text() == (trained.out / "log.csv").read_text()
    with pytest.raises(ss.InputError, match=r"recipe\.json is of another run"):
        SCRIPT["train"](replace(made, seed=1))


def test_seed_and_smoothing_matter(trained: Any, images: Path, tmp_path: Path) -> None:
    for name, given in (("seed", {"seed": 1}), ("smoothing", {"label_smoothing": 0.2})):
        SCRIPT["train"](recipe(images, tmp_path / name, **given))
        assert not same(tmp_path / name / "model", trained.out / "model")
    smoothed, plain = (
        pd.read_csv(out / "log.csv")["heldout_nll"].iloc[-1] for out in (tmp_path / "smoothing", trained.out)
    )
    assert smoothed > plain, "it is less sure"


def test_registers_differ(images: Path, trained: Any, tmp_path: Path) -> None:
    """Equal ones would stay equal, and four be no more than one; all else begins as without registers."""
    made = recipe(images, tmp_path / "run", registers=4)
    SCRIPT["train"](made)
    for name in ("step-000000", "model"):
        tokens = weights(made.out / name)["dinov2_with_registers.embeddings.register_tokens"][0]
        apart = torch.cdist(tokens, tokens)[~torch.eye(4, dtype=torch.bool)]
        assert apart.min() > 0.5 * tokens.norm(dim=-1).mean() > 0
    begun, plain = (weights(out / "step-000000") for out in (made.out, trained.out))
    for name, weight in plain.items():
        assert torch.equal(begun[name.replace("dinov2.", "dinov2_with_registers.")], weight)


def test_crops_and_flips() -> None:
    """Every augmented image is one of the shifted, maybe mirrored, windows of the padded image."""
    picture = torch.arange(3 * 64, dtype=torch.uint8).reshape(1, 3, 8, 8)
    made = SCRIPT["augmented"](picture.expand(200, -1, -1, -1), torch.Generator().manual_seed(0))
    plain = (picture[0].double() / 255 - 0.5) / 0.25
    padded = torch.zeros(3, 10, 10, dtype=torch.float64)
    padded[:, 1:9, 1:9] = plain
    windows = [padded[:, t : t + 8, s : s + 8] for t in range(3) for s in range(3)]
    windows += [window.flip(-1) for window in windows]
    matches = torch.stack([(made - window).abs().amax((1, 2, 3)) < 1e-5 for window in windows], 1)
    assert (matches.sum(1) == 1).all() and matches.any(0).all(), "each is one, and all 18 occur"


def test_bad_input(images: Path, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    shutil.copytree(images / "red", flat)
    with pytest.raises(ss.InputError, match="one folder of images for each class"):
        SCRIPT["train"](recipe(flat, tmp_path / "run"))
    broken = tmp_path / "broken"
    shutil.copytree(images, broken)
    (broken / "red" / "7.png").write_bytes(b"no picture")
    with pytest.raises(ss.InputError, match=r"red/7\.png is not a readable image"):
        SCRIPT["train"](recipe(broken, tmp_path / "run"))
    few = tmp_path / "few"
    for name in ("blue", "red"):
        (few / name).mkdir(parents=True)
        held = next(
            f for f in sorted((images / name).iterdir()) if not SCRIPT["held_out"](f"{name}/{f.name}")
        )
        shutil.copy(held, few / name)
    with pytest.raises(ss.InputError, match="0 of the 2 images are held out"):
        SCRIPT["train"](recipe(few, tmp_path / "run"))
    assert not (tmp_path / "run").exists()
