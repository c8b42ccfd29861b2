"""Image encoders of every family: parts found, tokens counted, passes equal transformers' own."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from support import tiny_encoders
from torch import Tensor

import spectral_sinks as ss

PREFIX = {
    "dinov2": ("cls",),
    "dinov2 registers": ("cls", "reg1", "reg2", "reg3", "reg4"),
    "dinov2 registers classifier": ("cls", "reg1", "reg2"),
    "dinov3": ("cls", "reg1", "reg2", "reg3", "reg4"),
    "dinov3 gated": ("cls",),
    "deit": ("cls", "distillation"),
    "deit classifier": ("cls", "distillation"),
    "siglip": (),
}


def passed(model: ss.VisionModel, x: Tensor, edits: Any = None) -> tuple[Tensor, Tensor]:
    """Output after the final norm, and the exit of layer 1."""
    site = ss.Site("exit", 1)
    return ss.trace(model, x, edits or {}, [site], readout=lambda final, read, _: (final, read[site]))


@pytest.mark.parametrize("family", tiny_encoders.FAMILIES)
def test_a_traced_pass_is_the_models_own(family: str) -> None:
    model, plain = tiny_encoders.model(family), tiny_encoders.plain(family)
    x = tiny_encoders.images()
    seen: list[Tensor] = []
    layers = plain.get_submodule(model.layout.layers)
    handle = layers[1].register_forward_hook(lambda _, __, out: seen.append(out))
    with torch.no_grad():
        expected = plain(x)
    handle.remove()
    final, inside = passed(model, x)
    assert torch.equal(inside, seen[0])
    if model.classes:
        logits = ss.trace(model, x, {}, readout=lambda *_: model.logits())
        assert torch.equal(logits, expected.logits)
    else:
        assert torch.equal(final, expected.last_hidden_state)


@pytest.mark.parametrize("family", tiny_encoders.FAMILIES)
def test_tokens_are_prefix_then_patches(family: str) -> None:
    model = tiny_encoders.model(family)
    assert model.prefix == PREFIX.get(family, ("cls",))
    pixels = tiny_encoders.pixels(family)
    count = len(model.prefix)
    assert pixels.grid == (5, 5) and pixels.length == count + 25
    final, _ = passed(model, pixels[0][None])
    assert final.shape[1] == pixels.length
    kinds = pixels.tokens(torch.stack([pixels[0], pixels[1]]))
    assert kinds.tolist() == [[*range(count), *[count] * 25]] * 2
    assert [model.prefix[place] for place in model.registers] == [n for n in model.prefix if "reg" in n]


@pytest.mark.parametrize("family", tiny_encoders.FAMILIES)
def test_a_change_of_one_patch_enters_at_its_token(family: str) -> None:
    model = tiny_encoders.model(family)
    x = tiny_encoders.images(1)
    other = x.clone()
    row, column, size = 3, 1, model.patch_size
    other[:, :, row * size : (row + 1) * size, column * size : (column + 1) * size] += 1
    site = ss.Site("embedding")
    one, two = (
        ss.trace(model, each, {}, [site], readout=lambda final, read, _: read[site][0]) for each in (x, other)
    )
    moved = (one - two).abs().amax(-1).nonzero().flatten().tolist()
    assert moved == [len(model.prefix) + row * 5 + column]


@pytest.mark.parametrize("family", tiny_encoders.FAMILIES)
def test_other_sizes_are_read(family: str) -> None:
    model, plain = tiny_encoders.model(family), tiny_encoders.plain(family)
    x = torch.randn(2, 3, 24, 28, generator=torch.Generator().manual_seed(1))
    assert model.grid(x) == (6, 7)
    final, _ = passed(model, x)
    assert final.shape[1] == len(model.prefix) + 42
    options = {} if model.family.startswith("dino") else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        expected = plain(x, **options)
    if not model.classes:
        assert torch.equal(final, expected.last_hidden_state)


@pytest.mark.parametrize("family", tiny_encoders.FAMILIES)
def test_attention_is_seen(family: str) -> None:
    """The weights are those of transformers' eager attention, and the pass is unchanged to rounding."""
    model = tiny_encoders.model(family)
    x = tiny_encoders.images()
    eager = tiny_encoders.build(family, attention="eager")
    with torch.no_grad():
        expected = eager(x, output_attentions=True).attentions
    seen: list[Tensor] = []

    def look(call: ss.attention.AttentionCall) -> None:
        assert not call.causal
        seen.append(call.weights())

    untouched, _ = passed(model, x)
    with ss.attending(model, look):
        final, _ = passed(model, x)
    assert len(seen) == model.layers
    for found, weights in zip(seen, expected, strict=True):
        torch.testing.assert_close(found, weights, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(final, untouched, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", tiny_encoders.FAMILIES)
@pytest.mark.parametrize("kind", ["embedding", "attention", "mlp", "exit", "mlp-input", "queries", "values"])
def test_a_filter_and_its_complement_sum_to_what_was_there(family: str, kind: Any) -> None:
    model = tiny_encoders.model(family)
    x = tiny_encoders.images(2)
    site = ss.Site(kind, 0 if kind == "embedding" else 1)
    block = ss.remove(ss.random_subspace(model.d, 5, seed=2))
    read = [site]

    def at(edits: Any) -> Tensor:
        return ss.trace(model, x, edits, read, readout=lambda final, found, _: found[site])

    whole, kept, rest = at({}), at({site: block}), at({site: block.complement()})
    torch.testing.assert_close(kept + rest, whole, atol=1e-5, rtol=1e-5)
    nothing = ss.rnd(model.d, 0)
    assert torch.equal(passed(model, x, {site: nothing})[0], passed(model, x)[0])


@pytest.mark.parametrize("family", tiny_encoders.FAMILIES)
def test_heads_add_up_to_attention(family: str) -> None:
    """Without its heads attention writes its bias alone; scaled as the layer scales it."""
    model = tiny_encoders.model(family)
    x = tiny_encoders.images(1)
    zero = {ss.Site("head", 1, head): torch.zeros_like for head in range(model.heads)}
    write = ss.Site("attention", 1)
    found = ss.trace(model, x, zero, [write], readout=lambda final, read, _: read[write][0])
    torch.testing.assert_close(found, found[:1].expand_as(found), atol=1e-5, rtol=1e-4)
    untouched = ss.trace(model, x, {}, [write], readout=lambda final, read, _: read[write][0])
    assert (untouched - found).abs().max() > 1e-2


def test_batch_equals_singles() -> None:
    model = tiny_encoders.model()
    x = tiny_encoders.images(4)
    together, _ = passed(model, x)
    singles = torch.cat([passed(model, each[None])[0] for each in x])
    torch.testing.assert_close(together, singles, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", tiny_encoders.FAMILIES)
def test_a_folder_is_loaded(family: str, tmp_path: Path) -> None:
    """Saved in the published format, loaded by folder with its processor: the same pass, the same hash."""
    tiny_encoders.plain(family).save_pretrained(tmp_path)
    processor().save_pretrained(tmp_path)
    if family.startswith("dinov3"):  # under the name that its checkpoints use
        written = tmp_path / "preprocessor_config.json"
        settings = json.loads(written.read_text()) | {"image_processor_type": "DINOv3ViTImageProcessorFast"}
        written.write_text(json.dumps(settings))
        with pytest.warns(ss.SpectralWarning, match="torchvision"):
            loaded = ss.load_vision(tmp_path)
    else:
        loaded = ss.load_vision(tmp_path)
    model = tiny_encoders.model(family)
    x = tiny_encoders.images()
    assert torch.equal(passed(loaded, x)[0], passed(model, x)[0])
    assert loaded.fingerprint == model.fingerprint and loaded.classes == model.classes
    picture = Image.new("RGB", (50, 31), (200, 10, 60))
    pixels = ss.pixels([picture], loaded)
    assert pixels[0].shape == (3, 20, 20)
    one = torch.tensor([200, 10, 60])[:, None, None] / 255
    torch.testing.assert_close(pixels[0], ((one - 0.5) / 0.25).expand(3, 20, 20), atol=1e-5, rtol=1e-5)
    assert ss.pixels([picture], loaded, size=32)[0].shape == (3, 32, 32)


def processor() -> Any:
    settings = {
        "size": {"height": 20, "width": 20},
        "image_mean": [0.5] * 3,
        "image_std": [0.25] * 3,
    }
    return transformers.ViTImageProcessorPil(**settings)


@pytest.mark.parametrize(("family", "whole"), [("clip", "CLIPModel"), ("siglip", "SiglipModel")])
def test_the_vision_tower_of_two_is_loaded(family: str, whole: str, tmp_path: Path) -> None:
    config: Any = getattr(transformers, whole.replace("Model", "Config"))(
        vision_config=tiny_encoders.SIZES,
        text_config={
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 8,
            "vocab_size": 11,
            "max_position_embeddings": 8,
        },
    )
    both = getattr(transformers, whole)(config).eval()
    both.save_pretrained(tmp_path)
    x = tiny_encoders.images()
    with torch.no_grad():
        expected = both.vision_model(x).last_hidden_state
    assert torch.equal(passed(ss.load_vision(tmp_path), x)[0], expected)
    assert torch.equal(passed(ss.load_vision(both), x)[0], expected)


def test_bad_input(tmp_path: Path) -> None:
    model = tiny_encoders.model()
    text = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=5))
    with pytest.raises(ss.InputError, match="no image encoder"):
        ss.load_vision(text)
    with pytest.raises(ss.InputError, match="layers 0 to 2"):
        model.layer(3)
    with pytest.raises(ss.InputError, match="patches of 4 x 4"):
        ss.pixels(torch.zeros(1, 3, 3, 20), model)
    with pytest.raises(ss.InputError, match="reads"):
        ss.pixels(torch.zeros(1, 1, 20, 20), model)
    with pytest.raises(ss.InputError, match="no images"):
        ss.pixels([], model)
    with pytest.raises(ss.InputError, match="NaN"):
        ss.pixels(torch.full((1, 3, 20, 20), torch.nan), model)
    with pytest.raises(ss.InputError, match="processor"):
        ss.pixels([Image.new("RGB", (8, 8))], model)
    with pytest.raises(ss.InputError, match="no classifier head"):
        ss.trace(model, tiny_encoders.images(), {}, readout=lambda *_: model.logits())
    broken = tiny_encoders.plain()
    with torch.no_grad():
        broken.encoder.layer[0].norm1.weight[0] = torch.inf
    with pytest.raises(ss.InputError, match="norm1"):
        ss.load_vision(broken)
    with pytest.raises(ss.InputError, match="does not exist"):
        ss.load_vision(tiny_encoders.plain(), parts={"mlp": "nowhere"})
    tiny_encoders.plain().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ss.InputError, match="no weights"):
        ss.load_vision(tmp_path)


def test_parts_that_do_not_add_up_are_refused() -> None:
    with pytest.raises(ss.InputError, match="is not entry"):
        ss.load_vision(tiny_encoders.plain("vit"), parts={"mlp_write": "layernorm_after"})


def test_a_missing_head_is_no_silent_noise(tmp_path: Path) -> None:
    """A checkpoint without the classifier that its architecture names is refused."""
    tiny_encoders.plain("vit").save_pretrained(tmp_path)
    written = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(written.replace('"ViTModel"', '"ViTForImageClassification"'))
    with pytest.raises(ss.InputError, match="lacks 2 of the weights"):
        ss.load_vision(tmp_path)


def test_checkpoints_of_other_libraries_are_refused(tmp_path: Path) -> None:
    timm, clip = tmp_path / "timm", tmp_path / "clip"
    for folder in (timm, clip):
        folder.mkdir()
    (timm / "config.json").write_text('{"architecture": "vit_small_patch14_dinov2", "num_classes": 0}')
    (clip / "open_clip_config.json").write_text('{"model_cfg": {"embed_dim": 512}}')
    with pytest.raises(ss.InputError, match=r"of timm \(vit_small_patch14_dinov2\).*convert it"):
        ss.load_vision(timm)
    with pytest.raises(ss.InputError, match=r"of OpenCLIP.*give the same encoder as transformers has it"):
        ss.load_vision(clip)
    with pytest.raises(ss.InputError, match="torch's Linear is no encoder of transformers"):
        ss.load_vision(torch.nn.Linear(2, 2))
