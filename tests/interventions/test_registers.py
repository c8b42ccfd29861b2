"""Test-time registers as an edit: what they move, what they leave alone, and models with them built in."""

import copy
import io
from typing import Any

import pytest
import torch
from support import tiny_encoders
from support.tiny_encoders import FAMILIES, WITH_HEAD
from torch import Tensor

import spectral_sinks as ss

NEURONS = [(0, 3), (0, 7), (1, 0), (2, 11)]


def stream(model: ss.VisionModel, batch: Tensor) -> tuple[list[Tensor], Tensor]:
    """Run a pass: the exits of all layers, and the output of the final norm."""
    sites = [ss.Site("exit", layer) for layer in range(model.layers)]
    return ss.trace(
        model, batch, {}, sites, readout=lambda final, reads, _: ([reads[s] for s in sites], final)
    )


def outputs(found: Any) -> dict[str, Tensor]:
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def same(found: Any, expected: Any) -> bool:
    a, b = outputs(found), outputs(expected)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("registers", [1, 3])
def test_the_edit_is_what_a_loop_over_tokens_makes(family: str, registers: int) -> None:
    """The MLP of an edited layer, recomputed from its input with every neuron set by hand, in fp64."""
    module = tiny_encoders.build(family).double()
    model = ss.load_vision(module)
    start = len(model.prefix)
    batch = tiny_encoders.images(2).double()
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    with ss.vision.install_registers(model, NEURONS, registers):
        assert model.prefix[start:] == tuple(f"test{index + 1}" for index in range(registers))
        handles = []
        for layer in range(model.layers):
            path = f"{model.layout.layers}.{layer}.{model.layout.mlp}"

            def keep(part: Any, given: Any, out: Tensor, layer: int = layer) -> None:
                seen[layer] = given[0], out

            handles.append(module.get_submodule(path).register_forward_hook(keep))
        with torch.no_grad():
            module(**model.inputs(batch))
        for handle in handles:
            handle.remove()
    for layer in range(model.layers):
        mlp = copy.deepcopy(module.get_submodule(f"{model.layout.layers}.{layer}.{model.layout.mlp}"))
        entry, written = seen[layer]
        assert entry.shape[1] == start + registers + 25
        last = [part for part in mlp.modules() if isinstance(part, torch.nn.Linear)][-1]
        acts: list[Tensor] = []

        def note(_: Any, given: Any, acts: list[Tensor] = acts) -> None:
            acts.append(given[0].clone())

        last.register_forward_pre_hook(note)
        with torch.no_grad():
            mlp(entry)
            (act,) = acts
            for image in range(2):
                for at, neuron in NEURONS:
                    if at != layer:
                        continue
                    values = [
                        float(act[image, token, neuron]) for token in range(start + registers, act.shape[1])
                    ]
                    for token in range(start, start + registers):
                        act[image, token, neuron] = max(values, key=abs)
                    act[image, start + registers :, neuron] = 0
            torch.testing.assert_close(last(act), written, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_asked_is_the_untouched_model_and_afterwards_too(family: str) -> None:
    model, batch = tiny_encoders.model(family), tiny_encoders.images()
    exits, final = stream(model, batch)
    fingerprint = model.fingerprint
    with ss.vision.install_registers(model, [], 0):
        again, last = stream(model, batch)
        assert all(torch.equal(a, b) for a, b in zip([*exits, final], [*again, last], strict=True))
        assert model.fingerprint == fingerprint
    with ss.vision.install_registers(model, NEURONS, 2):
        assert model.fingerprint != fingerprint
        assert not torch.equal(stream(model, batch)[1][:, -25:], final[:, -25:])
    assert model.fingerprint == fingerprint
    assert torch.equal(stream(model, batch)[1], final)
    built = ss.vision.with_registers(model, [], 0)
    with torch.no_grad():
        assert same(built(**model.inputs(batch)), tiny_encoders.plain(family)(**model.inputs(batch)))


@pytest.mark.parametrize("family", ["dinov2 registers", "dinov2 registers classifier", "dinov3"])
def test_no_neurons_is_a_model_with_more_registers_that_are_zero(family: str) -> None:
    """Against transformers' own model with a longer register parameter: rotations and heads included."""
    model, batch = tiny_encoders.model(family), tiny_encoders.images(side=28)
    longer = tiny_encoders.build(family, num_register_tokens=len(model.registers) + 2)
    weights = tiny_encoders.plain(family).state_dict()
    name = next(name for name in weights if name.endswith("register_tokens"))
    weights[name] = torch.cat([weights[name], torch.zeros(1, 2, tiny_encoders.D)], dim=1)
    longer.load_state_dict(weights)
    other = ss.load_vision(longer)
    with ss.vision.install_registers(model, [], 2):
        for a, b in zip(stream(model, batch)[0], stream(other, batch)[0], strict=True):
            torch.testing.assert_close(a, b)
        if model.classes:
            torch.testing.assert_close(
                *(ss.trace(m, batch, {}, readout=lambda *_, m=m: m.logits()) for m in (model, other))
            )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_edited_layer_leaves_prefix_and_other_neurons(family: str) -> None:
    """With the added tokens already there, moving neurons changes nothing of the prefix in that layer."""
    model, batch = tiny_encoders.model(family), tiny_encoders.images()
    start = len(model.prefix)
    with ss.vision.install_registers(model, [], 2):
        plain, _ = stream(model, batch)
    with ss.vision.install_registers(model, [(1, 4)], 2):
        edited, _ = stream(model, batch)
    assert torch.equal(plain[0], edited[0])
    assert torch.equal(plain[1][:, :start], edited[1][:, :start])
    assert not torch.equal(plain[1][:, start : start + 2], edited[1][:, start : start + 2])
    assert torch.equal(edited[1][:, start], edited[1][:, start + 1])
    change = (edited[1] - plain[1])[:, start:].flatten(0, 1).double()
    singular = torch.linalg.svdvals(change)
    assert singular[1] < 1e-4 * singular[0]  # one neuron writes one direction


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", [20, 28])
def test_batch_equals_singles_and_built_in_equals_the_block(family: str, side: int) -> None:
    model, batch = tiny_encoders.model(family), tiny_encoders.images(3, side)
    start = len(model.prefix)
    built = ss.vision.with_registers(model, NEURONS, 2)
    wrapped = ss.load_vision(ss.vision.with_registers(model, NEURONS, 2))
    with ss.vision.install_registers(model, NEURONS, 2):
        exits, final = stream(model, batch)
        prefix, fingerprint = model.prefix, model.fingerprint
        for index in range(3):
            alone, last = stream(model, batch[index : index + 1])
            torch.testing.assert_close(last[0], final[index], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(alone[-1][0], exits[-1][index], rtol=1e-4, atol=1e-4)
    assert wrapped.prefix == prefix
    assert wrapped.fingerprint == fingerprint
    assert wrapped.added == (start, start + 1)
    assert wrapped.cls == (None if family == "siglip" else 0)
    again, last = stream(wrapped, batch)
    assert torch.equal(last, final) and torch.equal(again[-1], exits[-1])
    assert ss.pixels(batch, wrapped).length == final.shape[1]
    with torch.no_grad():
        found = built(**model.inputs(batch))
        plain = tiny_encoders.plain(family)(**model.inputs(batch))
    assert type(found) is type(plain)
    assert {n: v.shape for n, v in outputs(found).items()} == {n: v.shape for n, v in outputs(plain).items()}
    if "last_hidden_state" in found:
        kept = torch.cat([final[:, :start], final[:, start + 2 :]], dim=1)
        assert torch.equal(found.last_hidden_state, kept)
        with torch.no_grad():
            every = ss.vision.with_registers(model, NEURONS, 2, keep=True)(**model.inputs(batch))
        assert torch.equal(every.last_hidden_state, final)
        if "pooler_output" in found:  # SigLIP's pools over all tokens
            assert torch.equal(every.pooler_output, found.pooler_output)


@pytest.mark.parametrize("family", WITH_HEAD)
def test_heads_do_not_see_added_tokens(family: str) -> None:
    """What the head gives equals the head on the stream without them."""
    model, batch = tiny_encoders.model(family), tiny_encoders.images()
    start = len(model.prefix)
    with ss.vision.install_registers(model, NEURONS, 2):
        found, final = ss.trace(model, batch, {}, readout=lambda final, *_: (final, model.logits()))[::-1]
    final = torch.cat([final[:, :start], final[:, start + 2 :]], dim=1)
    module = model.module
    with torch.no_grad():
        if "dinov2" in family:
            patches = final[:, start:].mean(1)
            expected = module.classifier(torch.cat([final[:, 0], patches], dim=1))
        elif family == "deit classifier":
            both = module.cls_classifier(final[:, 0]) + module.distillation_classifier(final[:, 1])
            expected = both / 2
        else:
            expected = module.classifier(final[:, 0])
    torch.testing.assert_close(found, expected)


def test_the_pooling_head_of_siglip_does_not_see_added_tokens() -> None:
    model, batch = tiny_encoders.model("siglip"), tiny_encoders.images()
    with ss.vision.install_registers(model, NEURONS, 2):
        final = stream(model, batch)[1]
    with torch.no_grad():
        expected = tiny_encoders.plain("siglip").head(final[:, 2:])
        for keep in (False, True):
            built: Any = ss.vision.with_registers(model, NEURONS, 2, keep=keep)
            torch.testing.assert_close(built(batch).pooler_output, expected)


@pytest.mark.parametrize("family", ["dinov2", "dinov3", "siglip", "clip", "vit classifier"])
def test_built_in_survives_copying_and_pickling(family: str) -> None:
    model, batch = tiny_encoders.model(family), tiny_encoders.images()
    built = ss.vision.with_registers(model, NEURONS)
    with torch.no_grad():
        expected = built(**model.inputs(batch))
        file = io.BytesIO()
        torch.save(built, file)
        file.seek(0)
        for other in (copy.deepcopy(built), torch.load(file, weights_only=False)):
            assert same(other(**model.inputs(batch)), expected)
            assert {n: t.shape for n, t in other.state_dict().items()} == {
                n: t.shape for n, t in model.module.state_dict().items()
            }
        next(built.parameters()).add_(1)
        assert same(model.module(**model.inputs(batch)), tiny_encoders.plain(family)(**model.inputs(batch)))


def test_attention_of_every_kind_sees_the_added_tokens() -> None:
    """Eager maps and the queries and keys that `attending` shows count them."""
    model = ss.load_vision(tiny_encoders.build("dinov3", attention="eager"))
    batch = tiny_encoders.images()
    calls: list[Tensor] = []
    with ss.vision.install_registers(model, NEURONS, 3):
        maps = ss.trace(model, batch, {}, attention=True, readout=lambda final, _, maps: maps)
        with ss.attending(model, lambda call: calls.append(call.weights())):
            stream(model, batch)
    for seen, shown in zip(calls, maps, strict=True):
        assert shown.shape[-1] == 5 + 3 + 25
        torch.testing.assert_close(seen, shown)


@pytest.mark.parametrize("family", ["dinov2 registers", "dinov2 registers classifier", "dinov3"])
def test_without_registers_is_a_model_that_never_had_them(family: str) -> None:
    model, batch = tiny_encoders.model(family), tiny_encoders.images(side=28)
    fingerprint, final = model.fingerprint, stream(model, batch)[1]
    bare = tiny_encoders.build(family, num_register_tokens=0)
    weights = tiny_encoders.plain(family).state_dict()
    name = next(name for name in weights if name.endswith("register_tokens"))
    bare.load_state_dict(weights | {name: weights[name][:, :0]})
    with ss.vision.without_registers(model):
        assert model.prefix == ("cls",)
        assert model.fingerprint != fingerprint
        exits, _ = stream(model, batch)
        logits = ss.trace(model, batch, {}, readout=lambda *_: model.logits()) if model.classes else None
    other = ss.load_vision(bare)
    for a, b in zip(exits, stream(other, batch)[0], strict=True):
        assert torch.equal(a, b)
    if logits is not None:
        assert torch.equal(logits, ss.trace(other, batch, {}, readout=lambda *_: other.logits()))
    assert model.fingerprint == fingerprint
    assert torch.equal(stream(model, batch)[1], final)


def test_bad_requests_say_what_to_do() -> None:
    model = tiny_encoders.model("dinov2")
    for neurons, registers, message in (
        ([(9, 0)], 1, "layers 0 to 2"),
        ([(0, 64)], 1, "neurons 0 to 63"),
        ([(0, 1), (0, 1)], 1, "named twice"),
        ([(0, 1)], -1, "0 or more"),
    ):
        with (
            pytest.raises(ss.InputError, match=message),
            ss.vision.install_registers(model, neurons, registers),
        ):
            pass
        with pytest.raises(ss.InputError, match=message):
            ss.vision.with_registers(model, neurons, registers)
    with (
        ss.vision.install_registers(model, NEURONS),
        pytest.raises(ss.InputError, match="already"),
        ss.vision.install_registers(model, NEURONS),
    ):
        pass
    assert model.prefix == ("cls",)
    with pytest.raises(ss.InputError, match="leave out `keep`"):
        ss.vision.with_registers(tiny_encoders.model("vit classifier"), NEURONS, keep=True)
    with pytest.raises(ss.InputError, match="no trained registers"), ss.vision.without_registers(model):
        pass
