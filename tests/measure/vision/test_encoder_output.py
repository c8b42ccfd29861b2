"""What an image encoder gives is the same number from every measurement that reports it."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from PIL import Image
from support import tiny_encoders

import spectral_sinks as ss
from spectral_sinks.measure.vision import outlier_tokens
from spectral_sinks.measure.vision.register_passes import output_changes, recorded_pass

NAMES = ("ant", "bee", "cat")


def always_bee() -> ss.VisionModel:
    """A classifier of ants, bees and cats that calls every image a bee."""
    module = tiny_encoders.build("dinov2 registers classifier")
    module.classifier = torch.nn.Linear(module.classifier.in_features, len(NAMES))
    module.num_labels = module.config.num_labels = len(NAMES)
    module.config.id2label = dict(enumerate(NAMES))
    module.config.label2id = {name: index for index, name in enumerate(NAMES)}
    with torch.no_grad():
        module.classifier.weight.zero_()
        module.classifier.bias.copy_(torch.tensor([0.0, 1.0, 0.0]))
    size = {"height": tiny_encoders.SIDE, "width": tiny_encoders.SIDE}
    return ss.load_vision(module, processor=transformers.ViTImageProcessor(size=size))


@pytest.fixture
def bees_and_a_cat(tmp_path: Path) -> ss.Images:
    """A folder that holds some of the head's classes, so that its numbers are not those of the head."""
    draw = torch.Generator().manual_seed(0)
    for name in ("bee/1", "bee/2", "bee/3", "cat/1"):
        path = tmp_path / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        values = torch.randint(256, (tiny_encoders.SIDE, tiny_encoders.SIDE, 3), generator=draw)
        Image.fromarray(values.to(torch.uint8).numpy()).save(path)
    return ss.images(tmp_path)


def test_labels_are_matched_by_name(bees_and_a_cat: ss.Images) -> None:
    model = always_bee()
    pixels = ss.pixels(bees_and_a_cat, model)
    effect = ss.evaluate_images(model, pixels, {"nothing": {}})["nothing"]
    repair = ss.vision.register_repair(model, pixels, [(1, 3)], draws=1)
    ablation = ss.vision.register_ablation(model, pixels, edits=["zero"])
    assert effect.table["accuracy"].mean() == 0.75
    for table in (repair, ablation):
        accuracy = table[table["measure"] == "accuracy"]
        assert len(accuracy) and (accuracy["mean"] == 0.75).all()


def test_names_that_the_head_lacks_give_no_accuracy(bees_and_a_cat: ss.Images) -> None:
    model = always_bee()
    model.module.config.id2label = {0: "dog", 1: "fox", 2: "owl"}
    pixels = ss.pixels(bees_and_a_cat, model)
    for table in (
        ss.vision.register_repair(model, pixels, [(1, 3)], draws=1),
        ss.vision.register_ablation(model, pixels, edits=["zero"]),
    ):
        assert "accuracy" not in set(table["measure"])


@pytest.mark.parametrize("family", tiny_encoders.FAMILIES)
def test_changes_of_the_output_are_those_of_evaluate_images(family: str) -> None:
    model = ss.load_vision(tiny_encoders.build(family))
    pixels = ss.pixels(tiny_encoders.images(3), model)
    removed = {ss.Site("exit", 1): ss.remove(ss.random_subspace(model.d, 9, 0))}
    table = ss.evaluate_images(model, pixels, {"cut": removed})["cut"].table
    batch = torch.stack([pixels[i] for i in range(3)])
    old, new = recorded_pass(model, batch), recorded_pass(model, batch, removed)
    every = torch.ones(old.patches.shape[:2], dtype=torch.bool)
    found = dict(output_changes(new, old, every, None))
    names = {"patch cosine": "patches_cosine", "patch error": "patches_error"}
    names |= {} if model.cls is None else {"cls cosine": "cls_cosine", "cls error": "cls_error"}
    names |= {"agreement": "top1_agreement"} if model.classes else {}
    assert set(found) == set(names)
    for measure, column in names.items():
        # suffix replay starts at the exit, so float32 sums may be split otherwise
        np.testing.assert_allclose(found[measure], table[column], rtol=1e-5, err_msg=measure)
    assert np.mean(found["patch error"]) > 0.01


def test_an_edit_of_registers_is_the_same_from_both_measurements() -> None:
    model = ss.load_vision(tiny_encoders.build("dinov2 registers classifier"))
    pixels = ss.pixels(tiny_encoders.images(4), model)

    def zero(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x[:, list(model.registers)] = 0
        return x

    cells = {"zero": {ss.Site("exit", layer): zero for layer in range(model.layers)}}
    table = ss.evaluate_images(model, pixels, cells)["zero"].table
    found = ss.vision.register_ablation(model, pixels, edits=["zero"])
    mean = found[found["edit"] == "zero"].set_index("measure")["mean"]
    for measure, column in (
        ("cls cosine", "cls_cosine"),
        ("cls error", "cls_error"),
        ("patch cosine", "patches_cosine"),
        ("patch error", "patches_error"),
        ("agreement", "top1_agreement"),
    ):
        assert mean[measure] == pytest.approx(table[column].mean(), rel=1e-5), measure
    assert mean["cls error"] > 0.01


def test_a_class_that_ties_with_the_untouched_one_agrees(bees_and_a_cat: ss.Images) -> None:
    model = always_bee()
    pixels = ss.pixels(bees_and_a_cat, model)

    def scale(x: torch.Tensor) -> torch.Tensor:
        return 2 * x  # the head has no weights: logits stay what its bias says

    with torch.no_grad():
        model.module.classifier.bias.copy_(torch.tensor([1.0, 1.0, 0.0]))
    effect = ss.evaluate_images(model, pixels, {"scale": {ss.Site("exit", 0): scale}})["scale"]
    repair = ss.vision.register_repair(model, pixels, [(1, 3)], draws=1)
    assert effect.table["top1_agreement"].mean() == 1
    assert (repair[repair["measure"] == "agreement"]["mean"] == 1).all()


def test_norms_are_measured_once_and_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ss.load_vision(tiny_encoders.build("dinov2 registers"))
    pixels = ss.pixels(tiny_encoders.images(4), model)
    known = ss.outliers(model, pixels, rule=1.0)
    cut = float(np.median(known.patches[:, -1]))
    fresh = ss.vision.register_neurons(model, pixels, layer=-1, cutoff=cut, count=3)
    changed = ss.vision.register_repair(model, pixels, fresh, draws=1)
    ablated = ss.vision.register_ablation(model, pixels, edits=["zero"])

    def again(*_: object) -> None:
        raise AssertionError("the norms of all images were measured a second time")

    monkeypatch.setattr(outlier_tokens, "_norms", again)
    with pytest.raises(AssertionError, match="a second time"):
        ss.vision.register_repair(model, pixels, fresh, draws=1)
    pd.testing.assert_frame_equal(
        ss.vision.register_neurons(model, pixels, layer=-1, cutoff=cut, count=3, measured=known), fresh
    )
    pd.testing.assert_frame_equal(
        ss.vision.register_repair(model, pixels, fresh, draws=1, measured=known), changed
    )
    pd.testing.assert_frame_equal(
        ss.vision.register_ablation(model, pixels, edits=["zero"], measured=known), ablated
    )
    with pytest.raises(ss.InputError, match="other pixels"):
        ss.outliers(model, ss.pixels(tiny_encoders.images(2), model), measured=known)
