"""What trained encoders show is what transformers' own outputs show, and pairs are paired."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageClassification

import spectral_sinks as ss

ROOT = Path(__file__).parents[2]


def script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "experiments" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two trained runs, one with registers, and the tables of both."""
    root, draw, train = (
        tmp_path_factory.mktemp("trained"),
        np.random.default_rng(0),
        script("training/train_vit"),
    )
    for label in ("a", "b"):
        (root / "images" / label).mkdir(parents=True)
        for index in range(60):
            picture = draw.integers(0, 235 if label == "a" else 255, (12, 12, 3), dtype=np.uint8)
            Image.fromarray(picture).save(root / "images" / label / f"{index}.png")
    for name, registers in (("plain", 0), ("registers", 2)):
        sizes = {"width": 16, "layers": 2, "heads": 2, "side": 12, "batch": 8, "warmup": 2, "steps": 6}
        train.train(
            train.Recipe(
                root / "images",
                root / name,
                registers=registers,
                checkpoints=(0, 3),
                evaluate_every=3,
                **sizes,
            )
        )
    trained = script("vision/trained")
    runs = (root / "plain", root / "registers")
    trained.main(trained.Options(runs, root / "images", root / "out", heads=5, batch_size=4))
    return root


def table(made: Path, name: str = "vision_trained") -> pd.DataFrame:
    return pd.read_csv(made / "out" / f"{name}.csv")


def held(made: Path) -> tuple[torch.Tensor, torch.Tensor]:
    names = (made / "plain" / "heldout.txt").read_text().split()
    pictures = [np.array(Image.open(made / "images" / name)) for name in names]
    pixels = (torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 255 - 0.5) / 0.25
    return pixels, torch.tensor([name.startswith("b") for name in names]).long()


def test_rows_are_there(made: Path) -> None:
    found = table(made)
    for _, rows in found.groupby("run"):
        assert rows["step"].unique().tolist() == [0, 3, 6]
    kinds = found.groupby("run")["kind"].unique().map(set).to_dict()
    assert kinds == {"plain": {"cls", "patches"}, "registers": {"cls", "registers", "patches"}}
    assert len(found) == 3 * 3 * (2 + 3)
    assert found.loc[found["layer"] >= 0].notna().all().all()
    assert (made / "out" / "vision_trained.png").stat().st_size > 10_000


@pytest.mark.parametrize("run", ["plain", "registers"])
@pytest.mark.parametrize("folder", ["step-000000", "step-000003", "model"])
def test_rows_agree_with_transformers(run: str, folder: str, made: Path) -> None:
    """Accuracy, norms and attention from the model's own `hidden_states` and eager maps."""
    step = 6 if folder == "model" else int(folder[-1])
    found = table(made)
    found = found[(found["run"] == run) & (found["step"] == step)].set_index(["layer", "kind"]).sort_index()
    model = AutoModelForImageClassification.from_pretrained(made / run / folder, attn_implementation="eager")
    pixels, labels = held(made)
    with torch.no_grad():
        out = model(pixel_values=pixels, output_hidden_states=True, output_attentions=True)
    right = float((out.logits.argmax(-1) == labels).float().mean())
    assert np.allclose(found["accuracy"], right, atol=1e-5)
    start = 1 + model.config.to_dict().get("num_register_tokens", 0)
    kinds = {"cls": [0], "registers": list(range(1, start)), "patches": list(range(start, start + 9))}
    for layer in range(-1, 2):
        norms = out.hidden_states[layer + 1].double().norm(dim=-1)
        median = float(np.median(norms[:, kinds["patches"]].numpy()))
        for kind in found.loc[layer].index:
            row = found.loc[(layer, kind)]
            assert row["largest"] == pytest.approx(float(norms[:, kinds[kind]].max()) / median, rel=1e-4)
            assert row["norm"] == pytest.approx(float(norms[:, kinds[kind]].mean()) / median, rel=1e-4)
            if layer < 0:
                assert np.isnan(row["top"])
                continue
            alpha = out.attentions[layer].mean(2)[:, :, kinds[kind]]
            assert row["top"] == pytest.approx(float(alpha.amax(-1).mean()), rel=1e-4)
            assert row["top_low"] <= row["top"] <= row["top_high"]
            assert row["mass"] == pytest.approx(float(alpha.sum(-1).mean()), rel=1e-4)
            assert row["one_place"] == pytest.approx(float(alpha.mean(0).amax(-1).mean()), rel=1e-4)
            before = out.hidden_states[layer].norm(dim=-1)
            entering = before[:, kinds[kind]] / float(np.median(before[:, start:].numpy()))
            chosen = [
                float(entering[image, int(alpha[image, head].argmax())])
                for image in range(len(alpha))
                for head in range(2)
            ]
            assert row["top_norm"] == pytest.approx(np.mean(chosen), rel=1e-4)
        if layer >= 0:
            whole = found.loc[layer]["mass"].sum()
            assert whole == pytest.approx(1, abs=1e-4), "attention is shared among the kinds"


def test_the_summary(made: Path) -> None:
    summary, found = table(made, "vision_trained_summary"), table(made)
    by = summary.set_index(["run", "quantity"])["value"].sort_index()
    last = found[found["step"] == 6]
    for run in ("plain", "registers"):
        here = last[(last["run"] == run) & (last["kind"] == "patches") & (last["layer"] >= 0)]
        assert by[run, "accuracy"] == pytest.approx(here["accuracy"].iloc[0], abs=1e-5)
        said = "attention to the most attended of patches, all heads"
        assert by[run, said] == pytest.approx(here["top"].mean(), rel=1e-4)
        masses = [by[run, name] for name in by[run].index if name.startswith("attention to all of")]
        assert sum(masses) == pytest.approx(1, abs=1e-4)
    assert by["registers", "accuracy, difference"] == pytest.approx(
        by["registers", "accuracy"] - by["plain", "accuracy"], abs=1e-5
    )
    for kind in ("cls", "patches"):
        name = f"attention to the most attended of {kind}"
        change = by["registers", f"{name}, all heads"] - by["plain", f"{name}, all heads"]
        assert by["registers", f"{name}, difference"] == pytest.approx(change, abs=1e-5)
    assert "accuracy, difference" not in by["plain"].index
    assert (summary["low"].isna() | (summary["low"] <= summary["high"])).all()


def test_heads(made: Path) -> None:
    found = table(made, "vision_trained_heads").set_index(["run", "token", "layer", "head"]).sort_index()
    model = ss.load_vision(made / "registers" / "model")
    pixels, _ = held(made)
    kept = pixels[:: -(-len(pixels) // 5)]
    direct = ss.head_use(model, ss.pixels(kept, model), "reg2")
    means = direct.groupby(["layer", "head"])[["attention", "value_ratio"]].mean()
    here = found.loc[("registers", "reg2")][["attention", "value_ratio"]]
    assert np.allclose(here, means, rtol=1e-4)
    assert set(found.loc["plain"].index.get_level_values("token")) == {"cls", "patch"}


def test_limit(made: Path, tmp_path: Path) -> None:
    trained = script("vision/trained")
    options = trained.Options((made / "plain",), made / "images", tmp_path, limit=6, heads=2)
    seen = list(trained.checkpoints(made / "plain", options))
    names = (made / "plain" / "heldout.txt").read_text().split()
    assert len(seen[0].right) == 6 and [one.step for one in seen] == [0, 3, 6]
    shown = seen[0].outliers.pixels.images
    step = len(names) // 6
    assert [Path(name).name for name in shown.names] == [Path(name).name for name in names[::step][:6]]
