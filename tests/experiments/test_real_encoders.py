"""`real/dinov2.py` and `real/minilm.py` on tiny encoders: their numbers by the library's own way, and a
planted circuit.
"""

import json
import tarfile
from pathlib import Path

import dinov2
import image_study
import minilm
import numpy as np
import pandas as pd
import pytest
import torch
from support import planted_outliers, planted_vision_circuits, tiny_models

import spectral_sinks as ss


@pytest.fixture(scope="module")
def planted() -> tuple[ss.VisionModel, ss.Pixels, dict[str, np.ndarray]]:
    model, pixels, _ = planted_vision_circuits.made("dinov2", "cls")
    batch = torch.stack([pixels[place] for place in range(len(pixels))])
    drawn = torch.tensor([1 + place % 25 for place in range(len(pixels))])
    return model, pixels, image_study.Pass(model, True).run(batch, drawn)


def test_one_pass_says_what_the_library_says(
    planted: tuple[ss.VisionModel, ss.Pixels, dict[str, np.ndarray]],
) -> None:
    model, pixels, found = planted
    use = ss.head_use(model, pixels, "cls")
    shape = found["values"][:, :, 0, :, 0].shape
    for which, name in ((0, "attention"), (2, "value_ratio"), (3, "queries_on_sink")):
        expected = use[name].to_numpy().reshape(shape)
        np.testing.assert_allclose(found["values"][:, :, 0, :, which], expected, atol=1e-6)
    np.testing.assert_allclose(found["norms"], ss.outliers(model, pixels).norm, rtol=1e-5)
    alpha = ss.attention.attention_by_position(model, pixels).alpha
    seen = ss.vision_sinks(model, pixels)
    maps: list[torch.Tensor] = []
    with ss.attention.attending(model, lambda call: maps.append(call.weights())):
        ss.trace(
            model, torch.stack([pixels[place] for place in range(len(pixels))]), {}, readout=lambda *_: 0
        )
    own = np.stack([weights[..., 0, 0] for weights in maps], 1)
    moved = alpha * seen.written
    share = (moved[..., 0] - own / alpha.shape[-1] * seen.written[..., 0]) / moved.sum(-1)
    np.testing.assert_allclose(found["values"][:, :, 0, :, 1], share, atol=1e-6)
    nothing = np.where(seen.value_ratio <= 0.2, alpha, 0).sum(-1)
    np.testing.assert_allclose(found["nothing"][..., 0], nothing, atol=1e-6)


def test_the_chosen_patch_is_measured_by_other_queries(
    planted: tuple[ss.VisionModel, ss.Pixels, dict[str, np.ndarray]],
) -> None:
    model, pixels, found = planted
    maps: list[torch.Tensor] = []
    with ss.attention.attending(model, lambda call: maps.append(call.weights())):
        ss.trace(
            model, torch.stack([pixels[place] for place in range(len(pixels))]), {}, readout=lambda *_: 0
        )
    for layer, weights in enumerate(maps):
        for image in range(len(pixels)):
            at = int(1 + weights[image, :, 0::2, 1:].double().sum(1).mean(0).argmax())
            assert found["chosen"][image, layer] == at
            rows = [row for row in range(1, weights.shape[2], 2) if row != at]
            expected = weights[image][:, rows, at].mean(-1)
            np.testing.assert_allclose(found["values"][image, layer, 1, :, 0], expected, atol=1e-6)


def test_the_planted_circuit_is_found_with_the_modes_of_the_library(
    planted: tuple[ss.VisionModel, ss.Pixels, dict[str, np.ndarray]],
) -> None:
    model, pixels, found = planted
    heads = dinov2.by_head(found, 20, 0, draws=20)
    circuits = heads[heads["circuit"]]
    where = [(planted_vision_circuits.LAYER, planted_vision_circuits.HEAD, "cls")]
    assert list(zip(circuits["layer"], circuits["head"], circuits["kind"], strict=True)) == where
    theirs = ss.circuits.detectors(model, pixels, "cls").summary().set_index(["layer", "head"])
    row = circuits.iloc[0]
    expected = theirs.loc[where[0][:2]]
    for name in ("margin", "always_on", "rival", "top_two"):
        assert row[name] == pytest.approx(expected[name], abs=2e-3), name


def test_dinov2_writes_tables_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = planted_outliers.save(planted_outliers.plant("dinov2"), tmp_path / "model")
    (tmp_path / "pictures").mkdir()
    pictures = planted_outliers.pictures(tmp_path / "pictures", ("a", "b"))
    packed = tmp_path / "packed.tar"
    with tarfile.open(packed, "w") as archive:
        archive.add(pictures, "x")
    options = dinov2.Options(
        images=(packed,), model=folder, out=tmp_path / "out", work=tmp_path / "work",
        sizes=(20,), limits=(4,), larger=(28,), few=(2,), register_size=20, register_pictures=3, draws=2,
    )  # fmt: skip
    dinov2.main(options)
    norms = pd.read_csv(tmp_path / "out" / "norms.csv")
    marked = norms[(norms["size"] == 20) & (norms["layer"] == 1)].iloc[0]
    assert marked["outlier_share"] > 0 and marked["with_outliers"] == 4
    assert marked["largest_over_median"] > 10
    assert set(norms["size"]) == {20, 28}
    layers = pd.read_csv(tmp_path / "out" / "layers.csv")
    parts = layers[layers["kind"].isin(["cls", "patch", "rest"])]
    whole = parts.groupby(["set", "layer"])["attention"].sum()
    np.testing.assert_allclose(whole, 1, atol=1e-4)
    registers = pd.read_csv(tmp_path / "out" / "registers.csv")
    assert {"original", "repaired", "silenced", "random 1"} <= set(registers["state"])
    record = json.loads((tmp_path / "out" / "dinov2.json").read_text())
    assert record["pictures"] == {"packed": 4} and record["verdict"]
    assert (tmp_path / "out" / "no_op.png").stat().st_size > 5000
    assert "pictures" in capsys.readouterr().err
    dinov2.main(options)
    assert "pictures" not in capsys.readouterr().err, "nothing is measured twice"


def test_dinov2_without_pictures_says_so(tmp_path: Path) -> None:
    with pytest.raises(ss.InputError, match=r"no pictures are given.*--images FOLDER"):
        dinov2.main(dinov2.Options())
    with pytest.raises(ss.InputError, match="neither a folder of images nor a tar file"):
        image_study.read_pictures([tmp_path / "none.tar"], 3)


def test_minilm_on_a_tiny_encoder(tmp_path: Path) -> None:
    inside = tiny_models.plain("bert").base_model
    inside.save_pretrained(tmp_path / "model")
    tiny_models.encoder_tokenizer().save_pretrained(tmp_path / "model")
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": tiny_models.text(90, seed)}) + "\n" for seed in range(3)))
    minilm.main(minilm.Options(tmp_path / "model", out=tmp_path / "out", text=text, draws=2))
    layers = pd.read_csv(tmp_path / "out" / "layers.csv")
    assert set(layers["kind"]) == {"cls", "sep", "random"} and len(layers) == 9
    cut = pd.read_csv(tmp_path / "out" / "without.csv")
    model = ss.load(tmp_path / "model")
    windows = ss.cut(ss.documents(text), model, length=64, per_document=1)
    rows = torch.stack([row[1:] for row in windows.rows])
    with torch.no_grad():
        maps = inside(rows, output_attentions=True).attentions
    first = cut[cut["windows"] == "no [CLS]"].set_index("layer")["first"]
    for layer, weights in enumerate(maps):
        assert first[layer] == pytest.approx(float(weights[..., 0].mean()), abs=1e-5)
    record = json.loads((tmp_path / "out" / "minilm.json").read_text())
    assert "embedding" in record["spectrum"] and "[SEP]" in record["verdict"]
