"""DINOv2 ViT-S/14 on two made pictures: against plain transformers, and the conditions of a no-op that it
lacks.
"""

from collections.abc import Callable
from pathlib import Path

import image_study
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel

import spectral_sinks as ss


@pytest.fixture(scope="module")
def folder(real_model: Callable[[str], Path]) -> Path:
    return real_model("dinov2-small")


@pytest.fixture(scope="module")
def pixels(folder: Path) -> ss.Pixels:
    """Smooth random colours, as of a landscape out of focus."""
    rng = np.random.default_rng(0)
    small = [Image.fromarray(rng.integers(0, 255, (6, 6, 3), dtype=np.uint8)) for _ in range(2)]
    pictures = [picture.resize((224, 224), Image.Resampling.BICUBIC) for picture in small]
    return ss.pixels(pictures, ss.load_vision(folder), size=224)


def test_one_pass_is_that_of_plain_transformers(folder: Path, pixels: ss.Pixels) -> None:
    model = pixels.model
    theirs = AutoModel.from_pretrained(folder, attn_implementation="eager")
    batch = torch.stack([pixels[0], pixels[1]])
    with torch.no_grad():
        expected = theirs(batch, output_attentions=True, output_hidden_states=True)
    found = image_study.Pass(model, False).run(batch, torch.tensor([5, 9]))
    to_cls = torch.stack([weights[:, :, 1:, 0].mean(-1) for weights in expected.attentions], 1)
    np.testing.assert_allclose(found["values"][:, :, 0, :, 0], to_cls, atol=1e-5)
    norms = torch.stack([state.norm(dim=-1) for state in expected.hidden_states], 1)
    np.testing.assert_allclose(found["norms"], norms, rtol=1e-3)


def test_what_a_value_writes_is_scaled_by_the_layer(folder: Path, pixels: ss.Pixels) -> None:
    model, theirs = pixels.model, AutoModel.from_pretrained(folder)
    layer = theirs.get_submodule(
        "encoder.layer.0" if hasattr(theirs.encoder, "layer") else "encoder.layers.0"
    )
    weight = model.head_write(0, 3)
    scaled = weight.detach() * layer.layer_scale1.lambda1
    np.testing.assert_allclose(image_study.written(model, 0)[3], scaled.detach(), rtol=1e-6)


def test_cls_draws_attention_and_writes_something(pixels: ss.Pixels) -> None:
    use = ss.head_use(pixels.model, pixels, "cls").groupby(["layer", "head"]).mean(numeric_only=True)
    by_layer = use["attention"].groupby("layer").mean()
    assert by_layer[0] > 10 / pixels.length and by_layer.idxmax() < 11
    writing = use[use["attention"] > 0.2]
    assert len(writing) and (writing["value_ratio"] > 0.1).all()
    assert use["value_ratio"].median() > 0.3, "no nothing vector as in MiniLM, whose median is below 0.1"
