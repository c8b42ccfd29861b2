"""Masks mark planted sinks in unseen text, rules survive a round trip, and what does not fit is refused."""

import dataclasses
import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from support import tiny_models
from support.planted_sinks import VOCABULARY, D, sinking

import spectral_sinks as ss


def scattered(rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Texts that hold the planted token 0 at some early places, and these places."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (rows, 64), generator=generator)
    places = torch.randint(1, 30, (rows,), generator=generator)
    ids[torch.arange(rows), places] = 0
    return ids, ids == 0


@pytest.fixture(scope="module")
def planted() -> Any:
    """The sink goes with its token: the rule is learned on six texts."""
    model, spectrum, _ = sinking(20)
    ids, _ = scattered(6, seed=0)
    found = ss.find_sinks(model, ss.Windows.of_ids(ids, model), spectrum, draws=2)
    return model, found, ss.SinkRule.learn(model, found, spectrum)


def test_the_mask_marks_the_planted_token_in_unseen_text(planted: Any) -> None:
    model, found, rule = planted
    ids, truth = scattered(5, seed=9)
    assert torch.equal(found.mask(ids), truth) and found.positions == () and found.token_ids == (0,)
    for by in ("norm", "token", "place"):
        assert torch.equal(ss.sink_mask(model, ids, rule, by=by, batch_size=2), truth), by
    assert not ss.sink_mask(model, ids, rule, by="position").any()


@pytest.mark.parametrize("by", ["norm", "position", "token", "place"])
@pytest.mark.parametrize("left", [True, False])
def test_padding_is_not_marked_and_moves_no_position(by: Any, left: bool) -> None:
    """The padding is the token that is the sink, and the texts have other lengths."""
    model, spectrum, windows = sinking(20)
    rule = ss.SinkRule.learn(model, ss.find_sinks(model, windows, spectrum, draws=2))
    texts = [row[:length] for row, length in zip(scattered(4, seed=9)[0], (64, 40, 40, 12), strict=True)]
    ids, mask = torch.zeros(4, 70, dtype=torch.long), torch.zeros(4, 70, dtype=torch.long)
    truth = torch.zeros(4, 70, dtype=torch.bool)
    for row, text in enumerate(texts):
        own = slice(70 - len(text), 70) if left else slice(0, len(text))
        ids[row, own], mask[row, own] = text, 1
        truth[row, own] = ss.sink_mask(model, text[None], rule, by=by)[0]
    assert truth.any(1).sum() >= (by != "token") * 3
    found = ss.sink_mask(model, ids, rule, by=by, attention_mask=mask, batch_size=2)
    assert torch.equal(found, truth)
    assert torch.equal(ss.sink_mask(model, ids, rule, by=by, attention_mask=mask.bool()), truth)


def test_a_position_is_marked_whatever_it_holds() -> None:
    model, spectrum, windows = sinking(20)
    found = ss.find_sinks(model, windows, spectrum, draws=2)
    rule = ss.SinkRule.learn(model, found)
    ids, truth = scattered(5, seed=9)
    assert torch.equal(rule.mask(ids, "position").nonzero()[:, 1], torch.zeros(5, dtype=torch.long))
    assert torch.equal(rule.mask(ids), rule.mask(ids, "position")) and rule.dark == {}
    assert torch.equal(ss.sink_mask(model, ids, rule), truth), "the norm goes with the token"
    short = torch.randint(1, VOCABULARY, (2, 3))
    assert found.mask(short).sum() == 2


def test_the_rule_holds_the_carrier_and_its_channel() -> None:
    """With a gain of the final norm, the planted carrier is channel 0."""
    model, spectrum, windows = sinking(20, gain=0.1)
    found = ss.find_sinks(model, windows, spectrum, draws=2)
    rule = ss.SinkRule.learn(model, found, spectrum, batch_size=2)
    with torch.no_grad():
        states = model.module(torch.stack(windows.rows), output_hidden_states=True).hidden_states
    for layer in (0, 1):
        mean = states[layer][:, 0].mean(0)
        torch.testing.assert_close(rule.carriers[layer], mean / mean.norm(), atol=1e-5, rtol=0)
    assert rule.channels() == [0] and rule.table["channels"].tolist()[0] == "0"
    table = found.channels()
    assert table["channel"].tolist() == [0] and table["tokens"][0] == 4 * 3 and table["first"][0] == -1
    assert rule.cutoffs[0] == pytest.approx(
        np.maximum(found.levels[0] + 10 * found.levels[1], 2 * found.levels[0])[0], rel=1e-6
    )


def test_agreement_is_counted_by_document(planted: Any) -> None:
    model, _, rule = planted
    spectrum = ss.read_spectrum(model, bands=20)
    ids, _ = scattered(6, seed=3)
    ids[0, 60] = 0  # too late for find_sinks, and so not compared
    held = ss.find_sinks(model, ss.Windows.of_ids(ids, model), spectrum, draws=0)
    found = ss.sinks.mask_agreement(model, held, rule)
    summary = found.summary().set_index("by")
    for by in ("norm", "token", "place"):
        assert summary.loc[by, ["masked", "seen", "both", "precision", "recall"]].tolist() == [6, 6, 6, 1, 1]
    assert summary.loc["position", "recall"] == 0 and np.isnan(summary.loc["position", "precision"])
    # a rule that marks one token too many, half of the time
    ids[:3, 5] = 7
    ids[3:][ids[3:] == 7] = 8
    wide = ss.SinkRule(**(vars(rule) | {"token_ids": (0, 7)}))
    held = ss.find_sinks(model, ss.Windows.of_ids(ids, model), spectrum, draws=0)
    table = ss.sinks.mask_agreement(model, held, wide).table
    here = table[table["by"] == "token"]
    expected = [int(((row == 0) | (row == 7))[:33].sum()) for row in ids]
    assert here["masked"].tolist() == expected
    np.testing.assert_allclose(here["precision"], here["both"] / np.array(expected))


def test_a_rule_survives_the_round_trip(planted: Any, tmp_path: Path) -> None:
    model, _, rule = planted
    folder = tmp_path / "new" / "folder"
    rule.save(folder)
    rule.save(folder)
    read = ss.SinkRule.load(folder)
    assert read.record() == rule.record() and json.dumps(read.record())
    assert torch.equal(read.carriers, rule.carriers) and torch.equal(read.cutoffs, rule.cutoffs)
    assert read.dark.keys() == {"raw"} and torch.equal(read.dark["raw"], rule.dark["raw"])
    assert read.spaces["raw"].rank == D // 20
    ids, truth = scattered(3, seed=1)
    assert torch.equal(ss.sink_mask(model, ids, read), truth)
    assert sorted(path.name for path in folder.iterdir()) == [
        "rule.json",
        "rule.safetensors",
    ]


def test_what_is_not_a_rule_is_refused(planted: Any, tmp_path: Path) -> None:
    _, _, rule = planted
    with pytest.raises(ss.InputError, match="holds no rule"):
        ss.SinkRule.load(tmp_path)
    rule.save(tmp_path)
    text = (tmp_path / "rule.json").read_text()
    for wrong, said in (
        ("{", "is not JSON"),
        ("[]", "not a rule of this version"),
        (text.replace('"format": 1', '"format": 2'), "not a rule of this version"),
        (text.replace('"positions"', '"places"'), "is not whole"),
        (text.replace('"embedding"', '"nowhere"').replace('"exit', '"way'), "is not whole|choose from"),
    ):
        (tmp_path / "rule.json").write_text(wrong)
        with pytest.raises(ss.InputError, match=said):
            ss.SinkRule.load(tmp_path)
    (tmp_path / "rule.json").write_text(text)
    (tmp_path / "rule.safetensors").write_bytes(b"other")
    with pytest.raises(ss.InputError, match="do not belong together"):
        ss.SinkRule.load(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ss.InputError, match="cannot be written"):
        rule.save(tmp_path / "file")


@pytest.mark.usefixtures("unchecked")
def test_what_does_not_fit_is_refused(planted: Any) -> None:
    model, found, rule = planted
    ids, _ = scattered(2, seed=1)
    with pytest.raises(ss.InputError, match=r"width 40, and .* of width 32"):
        ss.sink_mask(tiny_models.model(), ids, rule)
    other, spectrum, windows = sinking(10)
    with pytest.raises(ss.InputError, match="other weights"):
        ss.sink_mask(other, ids, rule)
    with pytest.raises(ss.InputError, match="choose from norm, position, token, place"):
        ss.sink_mask(model, ids, rule, by=cast(Any, "size"))
    for mask, message in (
        (torch.ones(2, 3), r"shape \(2, 3\) for ids of shape \(2, 64\)"),
        (torch.tensor([[1] * 64, [0] * 64]), "text 1 is empty or has gaps"),
        (torch.tensor([[1, 0] * 32, [1] * 64]), "text 0 is empty or has gaps"),
    ):
        with pytest.raises(ss.InputError, match=message):
            ss.sink_mask(model, ids, rule, attention_mask=cast(Any, mask))
    with pytest.raises(ss.InputError, match="use sink_mask"):
        rule.mask(ids, "norm")
    with pytest.raises(ss.InputError, match="knows the embedding and the exits 0 to 2"):
        ss.sink_mask(model, ids, rule, site=ss.Site("mlp", 1))
    with pytest.raises(ss.InputError, match="outside the vocabulary"):
        ss.sink_mask(model, ids + 90, rule)
    with pytest.raises(ss.InputError, match="find its own first"):
        ss.SinkRule.learn(tiny_models.model("gpt2"), found)
    for layer in other.module.model.layers:
        layer.self_attn.q_proj.bias.data.zero_()
    none = ss.find_sinks(other, windows, spectrum, draws=2)
    with pytest.raises(ss.InputError, match="no sink was found"):
        ss.SinkRule.learn(other, none)


@pytest.mark.usefixtures("unchecked")
def test_ids_of_any_kind_are_marked_alike(planted: Any) -> None:
    model, found, rule = planted
    ids, truth = scattered(3, seed=4)
    for kind in (ids.int(), ids.to(torch.uint8), ids.tolist(), ids.numpy()):
        assert torch.equal(found.mask(kind), truth) and torch.equal(rule.mask(kind), truth)
        for by in ("norm", "place"):
            assert torch.equal(ss.sink_mask(model, kind, rule, by=by), truth), by
    large = dataclasses.replace(rule, token_ids=(0, 70000))  # more than the type of the ids holds
    assert torch.equal(large.mask(ids.to(torch.uint8)), truth)
    for wrong in (ids[0], [[1, 2, 3], [4, 5]], ids.float()):
        with pytest.raises(ss.InputError, match=r"batch, tokens"):
            found.mask(wrong)


def test_there_is_no_exit_below_the_first_layer(planted: Any) -> None:
    _, _, rule = planted
    with pytest.raises(ss.InputError, match=r"exit -1: the rule .* knows the embedding and the exits 0"):
        rule.channels(ss.Site("exit", -1))
