"""Circuits made by hand in image encoders: every tool returns that head and token, none on the twin."""

from typing import Any

import numpy as np
import pytest
import torch
from support import planted_vision_circuits, tiny_encoders, tiny_models
from support.planted_vision_circuits import ANY, CASES, HEAD, HEADS, LAYER, eager

import spectral_sinks as ss
from spectral_sinks.measure.circuits import no_op
from spectral_sinks.measure.circuits.bands import key_directions
from spectral_sinks.measure.circuits.qk_detectors import Placed
from spectral_sinks.models.attention_capture import AttentionCall, attending
from spectral_sinks.models.rotary import arranged, key_turns, unturned_keys


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Intervals are tested elsewhere, and take most of the time."""
    monkeypatch.setattr(no_op, "mean_interval", lambda values: (min(values), max(values)))


def look(model: ss.VisionModel, pixels: ss.Pixels, position: Any) -> ss.circuits.Circuits:
    return ss.no_op_circuits(model, pixels, planted_vision_circuits.spectrum(), position)


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_vision_planted_circuit_is_found(family: str, kind: str) -> None:
    model, pixels, at = planted_vision_circuits.made(family, kind)
    found = look(model, pixels, kind)
    assert found.found == [(LAYER, HEAD)] and found.detectors.sinks.tolist() == at
    row = found.heads.set_index(["layer", "head"]).loc[(LAYER, HEAD)]
    assert row["use"] == "no-op" and row["dormant"] == 1 and row["value_ratio"] < 0.05
    assert set(found.heads.drop(index=LAYER * HEADS + HEAD)["use"]) == {"active"}
    assert row["modes_needed"] == 1 and row["top_one"] > 0.99
    assert row["always_on"] > 0.95 and row["rival"] < 0.1 and row["weighted"] < row["attention"] - 0.5
    direction = key_directions(model, found.detectors)[LAYER, HEAD]
    assert float(direction[planted_vision_circuits.MARK].abs() / direction.norm()) > 0.98
    sides = found.sides(LAYER, HEAD)
    assert sides["key_1"].idxmax() == at[0] and (sides["query_1"] > 0).all()
    layers = found.by_layer().set_index("layer")
    assert layers["no_op_heads"].tolist() == layers["one_or_two"].tolist() == [0, 1, 0]
    assert layers.loc[LAYER, "no_op_mass"] == pytest.approx(row["attention"] / HEADS, rel=1e-6)
    assert layers.loc[LAYER, "mass"] > layers.loc[LAYER, "no_op_mass"]


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_vision_planted_circuit_is_lost_in_the_randomised_twin(family: str, kind: str) -> None:
    model, pixels, _ = planted_vision_circuits.made(family, kind)
    found = look(planted_vision_circuits.twin(model), pixels, kind)
    assert found.found == [] and set(found.heads["use"]) == {"active"}
    assert found.by_layer()["no_op_heads"].sum() == 0


@pytest.mark.parametrize("family", ["dinov2 registers", "dinov3"])
def test_vision_planted_circuit_is_on_no_other_token(family: str) -> None:
    model, pixels, at = planted_vision_circuits.made(family, "patch")
    for position in ("cls", "reg1", [place + 1 if place < 20 else place - 1 for place in at]):
        assert look(model, pixels, position).found == []
    assert look(model, pixels, at).found == [(LAYER, HEAD)], "the numbers say the same as the name"


@pytest.mark.parametrize("family", ANY)
def test_vision_attention_by_position_is_that_of_eager_maps(family: str) -> None:
    pixels = tiny_encoders.pixels(family)
    found = ss.attention.attention_by_position(tiny_encoders.model(family), pixels, batch_size=2)
    maps, _ = eager(family, tiny_encoders.images())
    expected = torch.stack(maps, 1).mean(-2)
    assert not found.causal and found.alpha.shape == (3, 3, 4, pixels.length)
    assert np.allclose(found.alpha, expected.detach(), atol=1e-6)
    assert np.array_equal(found.ids[0], pixels.tokens(tiny_encoders.images())[0])


@pytest.mark.parametrize("family", ["dinov2 registers", "siglip"])
def test_vision_attention_by_head_is_that_of_eager_maps(family: str) -> None:
    model = ss.load_vision(tiny_encoders.build(family, attention="eager"))
    found = ss.attention_by_head(model, ss.pixels(tiny_encoders.images(), model), 3, batch_size=2)
    maps, _ = eager(family, tiny_encoders.images())
    expected = torch.stack(maps, 1).detach()[..., 3].mean(-1)
    assert np.allclose(found["attention"], expected.flatten(), atol=1e-6)


@pytest.mark.parametrize("family", ANY)
def test_vision_head_use_and_margin_are_those_of_eager_maps(family: str) -> None:
    """A position that differs between images; the margin is that of the maps' logarithms."""
    model, pixels = tiny_encoders.model(family), tiny_encoders.pixels(family)
    at = [6, 1, 20]
    columns = ["attention", "weighted", "queries_on_sink", "value_ratio"]
    table = ss.head_use(model, pixels, at, batch_size=2).set_index(["document", "layer", "head"])
    margins = ss.circuits.detectors(model, pixels, at, batch_size=2).table.set_index(
        ["document", "layer", "head"]
    )
    maps, norms = eager(family, tiny_encoders.images())
    for (image, layer, head), row in table.iterrows():  # type: ignore[misc]
        sink, tokens = at[image], range(pixels.length)
        a, n = maps[layer][image, head].detach(), norms[layer][image, head].detach()
        queries = [i for i in tokens if i != sink]
        weighted = a[queries] * n
        on = a[queries, sink]
        expected = (on.mean(), weighted[:, sink].sum() / weighted.sum(), (on >= 0.5).double().mean())
        assert np.allclose(
            row[columns].tolist(), [*map(float, expected), float(n[sink] / n.mean())], atol=1e-5
        )
        logs = a.log()[queries]
        gap = (logs[:, sink] - logs[:, queries].mean(-1)).mean()
        assert margins.loc[(image, layer, head), "margin"] == pytest.approx(float(gap), abs=2e-5)


@pytest.mark.parametrize("family", ["dinov3", "vit"])
def test_vision_keys_are_turned_as_the_model_turns_them(family: str) -> None:
    model, pixels = tiny_encoders.model(family), tiny_encoders.pixels(family, side=24)
    places = [0, 3, pixels.length - 1]
    turns = key_turns(model, places, pixels[0])
    eye = torch.eye(model.head_size, dtype=torch.float64).expand(len(places), model.layers, -1, -1)
    assert torch.equal(turns[0], eye[0]), "the prefix is not turned"
    assert torch.equal(turns, eye) == (family == "vit")
    assert torch.allclose(turns @ turns.mT, eye, atol=1e-6)
    seen: list[int] = []
    with unturned_keys(model) as unturned:

        def check(call: AttentionCall) -> None:
            before = arranged(unturned[call.layer], call)[:, :, places].double()
            after = call.key[:, :, places].double()
            assert torch.allclose(
                torch.einsum("bhps,pst->bhpt", before, turns[:, call.layer]), after, atol=1e-5
            )
            seen.append(call.layer)

        with torch.no_grad(), attending(model, check):
            ss.trace(model, torch.stack(list(pixels)), {}, readout=lambda *_: None)
    assert seen == [0, 1, 2]


def test_vision_sinks_of_several_places_meet_where_the_first_stands() -> None:
    """Turned together, queries and keys keep their scores, and every sink's key is where the first one is."""
    model, pixels = tiny_encoders.model("dinov3"), tiny_encoders.pixels("dinov3")
    sinks = torch.tensor([6, 19, 2])
    checked: list[int] = []
    with unturned_keys(model) as unturned:
        placed = Placed.of(model, pixels, sinks, unturned)

        def check(call: AttentionCall) -> None:
            query, key = placed.sides(call, [0, 1, 2])
            scores = call.query.double() @ call.key.double().mT * call.scaling
            assert torch.allclose(query @ key.mT, scores, atol=1e-4)
            for image, sink in enumerate(sinks.tolist()):
                there = (
                    arranged(unturned[call.layer], call)[image, :, sink].double() @ placed.turns[call.layer]
                )
                assert torch.allclose(key[image, :, sink], there, atol=1e-4)
            assert not torch.allclose(key[1], call.key[1].double(), atol=1e-2)
            checked.append(call.layer)

        with torch.no_grad(), attending(model, check):
            ss.trace(model, torch.stack(list(pixels)), {}, readout=lambda *_: None)
    assert checked == [0, 1, 2]


def test_vision_images_one_by_one_give_what_a_batch_gives() -> None:
    model, pixels, at = planted_vision_circuits.made("dinov3", "patch")
    whole = ss.head_use(model, pixels, "patch")
    for image, place in enumerate(at):
        alone = ss.head_use(model, ss.pixels(pixels[image][None], model), place)
        part = whole[whole["document"] == image]
        assert np.allclose(alone[["attention", "weighted"]], part[["attention", "weighted"]], atol=1e-6)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("family", "position", "said"),
    [
        ("dinov2", "reg1", "has cls, patch"),
        ("siglip", "cls", "has patch"),
        ("dinov2", 26, "position 26: the shortest window has 26 tokens"),
        ("dinov2", -1, "position -1"),
        ("dinov2", [1, 2], "2 positions for 3 windows"),
        ("dinov2", [1, 2, 99], "position 99: window 2 has 26 tokens"),
        ("dinov2", 0.5, "expected a whole number"),
    ],
)
def test_vision_positions_that_are_none(family: str, position: Any, said: str) -> None:
    with pytest.raises(ss.InputError, match=said):
        ss.head_use(tiny_encoders.model(family), tiny_encoders.pixels(family), position)


def test_vision_and_text_are_not_mixed() -> None:
    windows = ss.Windows.of_ids(tiny_models.ids(2, 6), tiny_models.model())
    with pytest.raises(ss.InputError, match="reads images"):
        ss.head_use(tiny_encoders.model(), windows)
    with pytest.raises(ss.InputError, match="reads windows of tokens"):
        ss.attention.attention_by_position(tiny_models.model(), tiny_encoders.pixels())
    with pytest.raises(ss.InputError, match=r"no token of .* is called that; give one .* or a number"):
        ss.head_use(tiny_models.model(), windows, "cls")


def test_vision_positions_by_window_work_on_text() -> None:
    model = tiny_models.model()
    windows = ss.Windows.of_ids(tiny_models.ids(2, 8), model)
    both = ss.circuits.detectors(model, windows, [1, 3]).table
    for place, at in enumerate((1, 3)):
        alone = ss.circuits.detectors(model, windows, at).table
        chosen = [table[table["document"] == place]["margin"] for table in (both, alone)]
        assert np.allclose(*chosen, atol=1e-5)


@pytest.mark.usefixtures("unchecked")
def test_vision_sinks_are_not_asked_of_the_text_rule() -> None:
    model, pixels = tiny_encoders.model(), tiny_encoders.pixels()
    with pytest.raises(ss.InputError, match="vision_sinks"):
        ss.find_sinks(model, pixels, ss.Spectrum.from_matrix(torch.randn(40, model.d)))  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["dinov2 registers", "siglip"])
def test_vision_the_patch_is_that_to_which_any_one_head_gives_most(family: str) -> None:
    model, pixels = tiny_encoders.model(family), tiny_encoders.pixels(family)
    first = len(model.prefix)
    maps, _ = eager(family, tiny_encoders.images())
    alpha = torch.stack(maps, 1).mean(-2)[..., first:]
    expected = first + alpha.amax((1, 2)).argmax(-1)
    assert not torch.equal(expected, first + alpha.mean((1, 2)).argmax(-1)), "not the mean over heads"
    assert torch.equal(ss.circuits.detectors(model, pixels, "patch").sinks, expected)


@pytest.mark.parametrize(
    ("family", "rows"), [("dinov2", [1]), ("vit", [1]), ("dinov3", [1, planted_vision_circuits.SIZE])]
)
def test_without_rotations_one_row_tells_that_there_are_none(family: str, rows: list[int]) -> None:
    """A pass on as many copies of an image as a head is wide would take minutes at 518 pixels."""
    model, pixels, _ = planted_vision_circuits.made(family, "cls")
    seen: list[int] = []

    def count(module: torch.nn.Module, given: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        seen.append(len(output))

    handle = model.patch_embedding.register_forward_hook(count)
    turns = key_turns(model, [0, 7], pixels[0])
    handle.remove()
    assert seen == rows
    assert turns.shape == (2, model.layers, model.head_size, model.head_size)
    assert torch.equal(turns, torch.eye(model.head_size).double().expand_as(turns)) == (len(rows) == 1)
