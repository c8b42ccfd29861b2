"""The accuracy of an image classifier is the same number from every measurement that reports it."""

from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from support import tiny_encoders

import spectral_sinks as ss

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
