"""Register neurons, their repair and ablations of trained registers, where the answer is planted."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from support import tiny_encoders
from support.planted_outliers import PLANTABLE, TARGET, marked, plant, random_twin
from torch import Tensor

import spectral_sinks as ss

LAYER, NEURONS = 1, (3, 8)
PLANTED = [(LAYER, neuron) for neuron in NEURONS]


def load(family: str, **planted: Any) -> ss.VisionModel:
    return ss.load_vision(plant(family, **{"layer": LAYER, "neurons": NEURONS} | planted))


def exits(model: ss.VisionModel, batch: Tensor) -> list[Tensor]:
    sites = [ss.Site("exit", layer) for layer in range(model.layers)]
    return ss.trace(model, batch, {}, sites, readout=lambda _, reads, __: [reads[site] for site in sites])


def mean(table: pd.DataFrame, **where: Any) -> float:
    for name, value in where.items():
        table = table[table[name] == value]
    assert len(table) == 1
    return float(table["mean"].iloc[0])


@pytest.mark.parametrize("family", PLANTABLE)
def test_vision_planted_register_neurons_are_found(family: str) -> None:
    """Exactly the planted ones lead, with the activations that a loop over outlier patches gives."""
    model = load(family)
    images, marks = marked()
    pixels = ss.pixels(images, model)
    table = ss.vision.register_neurons(model, pixels, count=5, batch_size=4)
    assert set(table.head(2).itertuples(index=False, name=None)) == {
        (layer, neuron, *table.loc[table["neuron"] == neuron, ["activation", "elsewhere"]].iloc[0])
        for layer, neuron in PLANTED
    }
    assert table["activation"].iloc[1] > 5 * table["activation"].iloc[2]
    assert table["activation"].is_monotonic_decreasing
    assert table.attrs["outliers"] == int(marks.sum())
    assert (table.attrs["images"], table.attrs["layer"], table.attrs["top_layer"]) == (5, 1, 1)
    pd.testing.assert_frame_equal(ss.vision.register_neurons(model, pixels, count=5, batch_size=1), table)

    seen: dict[int, Tensor] = {}
    handles = []
    for layer in range(2):
        block = model.module.get_submodule(f"{model.layout.layers}.{layer}.mlp")
        last = [part for part in block.modules() if isinstance(part, torch.nn.Linear)][-1]

        def keep(_: Any, given: Any, layer: int = layer) -> None:
            seen[layer] = given[0][:, len(model.prefix) :]

        handles.append(last.register_forward_pre_hook(keep))
    with torch.no_grad():
        model.module(**model.inputs(images))
    for handle in handles:
        handle.remove()
    flat = marks.flatten(1)
    for layer, neuron, activation, elsewhere in table.itertuples(index=False, name=None):
        for value, chosen in ((activation, flat), (elsewhere, ~flat)):
            by_hand = [float(seen[layer][i, chosen[i], neuron].abs().mean()) for i in range(5)]
            assert value == pytest.approx(np.mean(by_hand), rel=1e-4)


@pytest.mark.parametrize("family", PLANTABLE)
@pytest.mark.parametrize("registers", [1, 3])
def test_vision_planted_norms_move_and_nothing_else(family: str, registers: int) -> None:
    """Beside plain zero tokens, the edit takes the planted direction off the patches and gives it to them."""
    model = load(family)
    images, marks = marked()
    start = len(model.prefix)
    end = start + registers
    before = exits(model, images)
    with ss.vision.install_registers(model, [], registers):
        plain = exits(model, images)
    with ss.vision.install_registers(model, PLANTED, registers):
        after = exits(model, images)
    flat = marks.flatten(1)
    for layer in range(LAYER):
        assert torch.equal(after[layer], plain[layer])
    here, was = after[LAYER], plain[LAYER]
    assert torch.equal(here[:, :start], was[:, :start])
    off = [channel for channel in range(model.d) if channel != TARGET]
    torch.testing.assert_close(here[:, start:, off], was[:, start:, off], rtol=1e-4, atol=1e-5)
    change = (was - here)[:, end:, TARGET]
    assert float(change[~flat].abs().max()) < 0.01 * float(change[flat].min())
    assert float(was[:, end:][flat].norm(dim=-1).min()) > 100
    for layer in range(LAYER, model.layers):
        patches = after[layer][:, end:]
        assert float(patches[flat].norm(dim=-1).max()) < 1.5 * float(patches[~flat].norm(dim=-1).max())
        torch.testing.assert_close(
            after[layer][:-1, start:end].norm(dim=-1),
            before[layer][:, start:][flat].norm(dim=-1).view(5, -1).amax(1, True).expand(-1, registers),
            rtol=0.02,
            atol=0,
        )
        assert float(after[layer][-1, start:end].norm(dim=-1).max()) < 5  # the image without marks
    moved = here[:-1, start:end, TARGET] - was[:-1, start:end, TARGET]
    largest = change[:-1].amax(1, True).expand(-1, registers)
    torch.testing.assert_close(moved, largest, rtol=0.01, atol=0)  # they had a small activation themselves


@pytest.mark.parametrize("family", ["dinov2", "siglip", "vit classifier"])
def test_vision_planted_repair_against_its_controls(family: str) -> None:
    model = load(family)
    images, marks = marked()
    table = ss.vision.register_repair(model, ss.pixels(images, model), PLANTED, draws=2, batch_size=4)
    share = float(marks.float().mean())
    states = list(table["state"].unique())
    assert states == ["original", "repaired", "silenced", "tokens alone", "random 1", "random 2"]
    for layer in range(model.layers):
        for state in states:
            gone = layer < LAYER or state in ("repaired", "silenced")
            found = mean(table, state=state, layer=layer, measure="outlier share")
            assert found == pytest.approx(0 if gone else share)
            if state in ("tokens alone", "random 1", "random 2", "repaired") and layer >= LAYER:
                norm = mean(table, state=state, layer=layer, measure="register norm")
                assert (norm > 200) == (state == "repaired")
    original = table[table["state"] == "original"].set_index("measure")["mean"]
    assert original["patch cosine"] == pytest.approx(1) and original["patch error"] == 0
    assert ("cls cosine" in original) == (family != "siglip") == ("attention entropy" in original)
    ends = table.dropna()
    assert ((ends["low"] <= ends["mean"] + 1e-9) & (ends["mean"] <= ends["high"] + 1e-9)).all()
    again = ss.vision.register_repair(model, ss.pixels(images, model), PLANTED, draws=2, batch_size=1)
    pd.testing.assert_frame_equal(again, table, rtol=1e-4, atol=1e-5)


def test_vision_planted_repair_attention_is_that_of_eager_maps() -> None:
    module = plant("dinov2", layer=LAYER, neurons=NEURONS)
    for block in module.encoder.layer if hasattr(module, "encoder") else module.layers:
        for name, part in block.named_modules():
            if name.endswith(("q_proj", "k_proj")):
                part.weight.data *= 12
    model = ss.load_vision(module)
    images, marks = marked()
    neurons = ss.vision.register_neurons(model, ss.pixels(images, model), count=2)
    table = ss.vision.register_repair(model, ss.pixels(images, model), neurons, registers=2, draws=1)
    model.module.set_attn_implementation("eager")
    with ss.vision.install_registers(model, neurons, 2):
        maps = ss.trace(model, images, {}, attention=True, readout=lambda _, __, maps: maps)
    flat = marks.flatten(1)
    entropy = 1.0
    for layer, weights in enumerate(maps):
        rows = weights[:, :, 0].double().numpy()
        patches = rows[..., 3:] / rows[..., 3:].sum(-1, keepdims=True)
        entropy = -(patches * np.log(patches)).sum(-1).mean() / np.log(25)
        on = np.mean([rows[i, :, 3:][:, flat[i].numpy()].sum(-1).mean() for i in range(5)])
        for measure, value in {
            "attention entropy": entropy,
            "attention on outliers": on,
            "attention on registers": rows[..., 1:3].sum(-1).mean(),
        }.items():
            assert mean(table, state="repaired", layer=layer, measure=measure) == pytest.approx(
                value, rel=1e-4
            )
    assert entropy < 0.999


def test_vision_planted_layers_and_cut_offs() -> None:
    """The top layer is where outliers arise, however late they are looked for; a cut-off by hand is kept."""
    model = load("dinov2", layer=0)
    images, _ = marked()
    pixels = ss.pixels(images, model)
    table = ss.vision.register_neurons(model, pixels, layer=-1, count=500)
    assert table.attrs["top_layer"] == 0 and set(table["layer"]) == {0} and len(table) == 64
    assert set(table["neuron"].head(2)) == set(NEURONS)
    later = ss.vision.register_neurons(model, pixels, layer=2, top_layer=1, cutoff=150, count=500)
    assert set(later["layer"]) == {0, 1} and later.attrs["cutoff"] == 150 and later.attrs["outliers"] == 10
    assert ss.vision.DINOV2_LARGE == {"layer": -2, "cutoff": 150.0, "top_layer": 17, "count": 50}


def test_vision_planted_nothing_says_so() -> None:
    model = ss.load_vision(random_twin("dinov2"))
    images, _ = marked()
    pixels = ss.pixels(images, model)
    with pytest.raises(ss.InputError, match=r"no outlier patch in 6 images at layer 1: the largest norm"):
        ss.vision.register_neurons(model, pixels)
    with pytest.raises(ss.InputError, match="layers 0 to 2"):
        ss.vision.register_neurons(model, pixels, layer=3)
    with pytest.raises(ss.InputError, match="top layer 3"):
        ss.vision.register_neurons(load("dinov2"), pixels, top_layer=3)
    with pytest.raises(ss.InputError, match="at least one"):
        ss.vision.register_repair(model, pixels, [])
    with pytest.raises(ss.InputError, match="left for the control"):
        ss.vision.register_repair(model, pixels, [(0, neuron) for neuron in range(40)])
    with pytest.raises(ss.InputError, match="no trained registers"):
        ss.vision.register_ablation(model, pixels)


def ablated(family: str = "dinov2 registers", scale: float = 1.0) -> tuple[ss.VisionModel, ss.Pixels]:
    module = tiny_encoders.build(family)
    with torch.no_grad():
        for name, part in module.named_parameters():
            if name.endswith("register_tokens"):
                part.mul_(scale)
    model = ss.load_vision(module)
    return model, ss.pixels(tiny_encoders.images(5), model)


@pytest.mark.parametrize("family", ["dinov2 registers", "dinov2 registers classifier", "dinov3"])
def test_vision_planted_ablation_at_the_embedding(family: str) -> None:
    """Registers are the same in all images there: only zero and removal act, as in models made so."""
    model, pixels = ablated(family)
    table = ss.vision.register_ablation(model, pixels, layers=(-1,), batch_size=2)
    assert list(table["edit"].unique()) == ["none", "removed", "zero", "mean", "noise", "swapped", "shuffled"]
    base = features(model, tiny_encoders.images(5))
    for edit in ("none", "mean", "noise", "swapped", "shuffled"):
        assert mean(table, edit=edit, measure="cls error") < 1e-5
        assert mean(table, edit=edit, measure="patch error") < 1e-5
    bare = tiny_encoders.build(family, num_register_tokens=0)
    weights = model.module.state_dict()
    name = next(name for name in weights if name.endswith("register_tokens"))
    bare.load_state_dict(weights | {name: weights[name][:, :0]})
    zeroed = tiny_encoders.build(family, num_register_tokens=weights[name].shape[1])
    zeroed.load_state_dict(weights | {name: torch.zeros_like(weights[name])})
    for edit, module in (("removed", bare), ("zero", zeroed)):
        found = features(ss.load_vision(module), tiny_encoders.images(5))
        for part in ("cls", "patch"):
            a, b = found[part], base[part]
            error = float(((a - b).norm(dim=-1) / b.norm(dim=-1)).mean())
            cosine = float((a * b).sum(-1).div(a.norm(dim=-1) * b.norm(dim=-1)).mean())
            assert mean(table, edit=edit, measure=f"{part} error") == pytest.approx(error, rel=1e-3)
            assert mean(table, edit=edit, measure=f"{part} cosine") == pytest.approx(cosine, rel=1e-3)
            assert error > 1e-3
        if model.classes:
            same = (found["logits"].argmax(-1) == base["logits"].argmax(-1)).float().mean()
            assert mean(table, edit=edit, measure="agreement") == pytest.approx(float(same))


def features(model: ss.VisionModel, batch: Tensor) -> dict[str, Tensor]:
    """Read features of [CLS] and patches, and logits where there are any."""

    def readout(final: Tensor, *_: Any) -> dict[str, Tensor]:
        found = {"cls": final[:, :1], "patch": final[:, len(model.prefix) :]}
        return found | ({"logits": model.logits()} if model.classes else {})

    return ss.trace(model, batch, {}, readout=readout)


@pytest.mark.parametrize("family", ["dinov2 registers", "dinov3"])
def test_vision_planted_ablation_at_every_exit(family: str) -> None:
    """Shuffled registers change nothing; mean, swapped and zero are what hooks on the layers make."""
    model, pixels = ablated(family)
    table = ss.vision.register_ablation(model, pixels, batch_size=2)
    pd.testing.assert_frame_equal(
        ss.vision.register_ablation(model, pixels, batch_size=5), table, rtol=1e-4, atol=1e-5
    )
    assert mean(table, edit="shuffled", measure="cls error") < 1e-5
    batch = tiny_encoders.images(5)
    here, base = list(model.registers), features(model, batch)
    before = [residual[:, here] for residual in exits(model, batch)]
    donors = {
        "mean": [torch.stack([held.mean(0)] * 5) for held in before],
        "swapped": [held[[1, 2, 3, 4, 0]] for held in before],
        "zero": [torch.zeros_like(held) for held in before],
    }
    for edit, donor in donors.items():
        handles = []
        for layer, values in enumerate(donor):

            def put(_: Any, __: Any, out: Any, values: Tensor = values) -> Any:
                x = (out[0] if isinstance(out, tuple) else out).clone()
                x[:, here] = values
                return (x, *out[1:]) if isinstance(out, tuple) else x

            block = model.module.get_submodule(f"{model.layout.layers}.{layer}")
            handles.append(block.register_forward_hook(put))
        found = features(model, batch)
        for handle in handles:
            handle.remove()
        for part in ("cls", "patch"):
            a, b = found[part], base[part]
            error = float(((a - b).norm(dim=-1) / b.norm(dim=-1)).mean())
            assert mean(table, edit=edit, measure=f"{part} error") == pytest.approx(error, rel=1e-3)
            assert error > 1e-4


def test_vision_planted_constant_registers_matter_and_their_content_does_not() -> None:
    """Large registers that hardly depend on the image: zero hurts, mean and swapped cost next to nothing."""
    model, pixels = ablated(scale=100.0)
    table = ss.vision.register_ablation(model, pixels)
    for harmless in ("mean", "noise", "swapped"):
        assert mean(table, edit="zero", measure="cls error") > 4 * mean(
            table, edit=harmless, measure="cls error"
        )


@pytest.mark.usefixtures("unchecked")
def test_vision_planted_ablation_with_labels_and_bad_requests() -> None:
    model, pixels = ablated("dinov2 registers classifier")
    logits = features(model, tiny_encoders.images(5))["logits"].argmax(-1)
    labels = logits.clone()
    labels[0] = (labels[0] + 1) % model.classes

    class Pictures(list[Tensor]):
        labels: Any = None
        record: dict[str, Any]

    pictures = Pictures(tiny_encoders.images(5))
    pictures.labels, pictures.record = labels.tolist(), {"data_hash": "five"}
    given = ss.Pixels(pictures, model, {})
    table = ss.vision.register_ablation(model, given, edits=["zero"])
    assert mean(table, edit="none", measure="accuracy") == pytest.approx(0.8)
    assert mean(table, edit="none", measure="agreement") == 1
    requests: list[tuple[dict[str, Any], str]] = [
        ({"edits": ["halved"]}, "choose from removed"),
        ({"layers": (3,)}, "expected some of -1"),
        ({"layers": ()}, "expected some of -1"),
    ]
    for options, message in requests:
        with pytest.raises(ss.InputError, match=message):
            ss.vision.register_ablation(model, pixels, **options)
    with pytest.raises(ss.InputError, match="at least two images"):
        ss.vision.register_ablation(model, ss.pixels(tiny_encoders.images(1), model))


def test_vision_planted_maps_and_their_picture(tmp_path: Path) -> None:
    """Norms stand where the marks are before, and nowhere after; attention is that of the repair table."""
    model = load("dinov2")
    images, marks = marked()
    pixels = ss.pixels(images, model)
    maps = ss.vision.register_maps(model, pixels, PLANTED, registers=2, batch_size=4)
    assert list(maps) == ["norm before", "norm after", "attention before", "attention after"]
    assert all(found.shape == (6, 5, 5) for found in maps.values())
    assert ((maps["norm before"] > 100) == marks.numpy()).all()
    assert maps["norm after"].max() < 5
    table = ss.vision.register_repair(model, pixels, PLANTED, registers=2, draws=1)
    for state, name in (("original", "attention before"), ("repaired", "attention after")):
        on = (maps[name] * marks.numpy()).sum((1, 2))[:5].mean()
        layer = model.layers - 1
        assert mean(table, state=state, layer=layer, measure="attention on outliers") == pytest.approx(on)
    ss.figures.registers([image.permute(1, 2, 0).numpy() for image in images[:3]], maps, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000
    bare = ss.vision.register_maps(load("siglip"), ss.pixels(images, load("siglip")), PLANTED)
    assert list(bare) == ["norm before", "norm after"]
