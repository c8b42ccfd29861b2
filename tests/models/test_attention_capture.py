"""Attention in blocks of queries: what is seen is what eager attention computes, what is changed is used."""

import pickle
from dataclasses import replace

import pytest
import torch
from support import tiny_models
from torch import Tensor

import spectral_sinks as ss
from spectral_sinks.models import attention_capture as module
from spectral_sinks.models.attention_capture import AttentionCall, attending


def run(model: ss.LanguageModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model.module(ids, use_cache=False).logits


@pytest.mark.parametrize("block", [2**22, 700])
@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_weights_and_logits_are_those_of_eager(
    family: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WEIGHTS", block)
    model, ids = ss.load(tiny_models.plain(family)), tiny_models.ids(2, 40)
    with torch.no_grad():
        eager = tiny_models.plain(family)(ids, output_attentions=True, use_cache=False)
    seen: list[Tensor] = []

    def look(call: AttentionCall) -> None:
        assert call.layer == len(seen) % model.layers
        seen.append(torch.cat([call.weights(rows) for rows in call.blocks()], dim=2))

    with attending(model, look):
        logits = run(model, ids)
        traced = ss.trace(
            model, ids, {}, readout=lambda final, *_: model.unembed(final), attention=lambda weights: weights
        )
    assert len(seen) == 2 * model.layers
    assert (logits - eager.logits).abs().max() <= 1e-5 and torch.equal(traced, logits)
    for mine, theirs in zip(seen, eager.attentions, strict=False):
        assert (mine - theirs).abs().max() <= 3e-6
    assert torch.equal(run(model, ids), run(ss.load(tiny_models.plain(family)), ids))


def test_a_change_is_used_and_blocks_nest() -> None:
    model, ids = ss.load(tiny_models.plain()), tiny_models.ids(2, 20)
    order: list[str] = []

    def zero(call: AttentionCall) -> AttentionCall:
        order.append("zero")
        return replace(call, value=torch.zeros_like(call.value)) if call.layer == 1 else call

    def check(call: AttentionCall) -> None:
        order.append("check")
        assert bool((call.value == 0).all()) == (call.layer == 1)

    with attending(model, zero):
        alone = run(model, ids)
        with attending(model, check):
            both = run(model, ids)
    layer = model.module.model.layers[1].self_attn
    handle = layer.o_proj.register_forward_hook(lambda *given: torch.zeros_like(given[2]))
    expected = run(model, ids)
    handle.remove()
    assert order[model.layers :] == ["zero", "check"] * model.layers
    assert torch.equal(alone, both) and (alone - expected).abs().max() <= 1e-5
    assert (alone - run(model, ids)).abs().max() > 1e-3


def test_the_outer_block_acts_again_after_the_inner_one() -> None:
    model, ids = ss.load(tiny_models.plain()), tiny_models.ids(2, 20)
    plain = run(model, ids)
    with attending(model, ss.attention.MaskKey(0)):
        outer = run(model, ids)
        with attending(model, ss.attention.MaskKey(1)):
            both = run(model, ids)
        assert torch.equal(run(model, ids), outer)
    assert torch.equal(run(model, ids), plain)
    assert (outer - plain).abs().max() > 1e-4 and (both - outer).abs().max() > 1e-4


def test_a_bias_is_added_to_the_scores_of_its_queries() -> None:
    model, ids = ss.load(tiny_models.plain()), tiny_models.ids(2, 12)
    bias = torch.randn(4, 12, 12, generator=torch.Generator().manual_seed(0))
    seen: list[int] = []

    def look(call: AttentionCall) -> AttentionCall:
        mine = replace(call, bias=bias)
        expected = (call.scores() + bias).softmax(-1)
        assert torch.allclose(mine.weights(), expected, atol=1e-6)
        assert torch.allclose(mine.weights(slice(5, 9)), expected[:, :, 5:9], atol=1e-6)
        seen.append(call.layer)
        return mine

    plain = run(model, ids)
    with attending(model, look):
        assert (run(model, ids) - plain).abs().max() > 1e-3
    assert seen == list(range(model.layers))


@torch.no_grad()
def test_a_mask_of_numbers_is_added_as_eager_attention_adds_it() -> None:
    model, ids = ss.load(tiny_models.plain()), tiny_models.ids(2, 12)
    mask = torch.randn(2, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    mask = mask.masked_fill(torch.ones(12, 12).triu(1).bool(), torch.finfo(torch.float32).min)
    expected = tiny_models.plain()(ids, attention_mask=mask, use_cache=False).logits
    with attending(model, lambda call: None):
        found = model.module(ids, attention_mask=mask, use_cache=False).logits
    assert (found - expected).abs().max() <= 1e-5 and (expected - run(model, ids)).abs().max() > 1e-3


def test_weights_that_are_dropped_and_a_query_that_sees_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WEIGHTS", 300)
    model, ids = ss.load(tiny_models.plain()), tiny_models.ids(2, 12)
    kept = torch.rand(12, 12, generator=torch.Generator().manual_seed(0)) > 0.5
    seen: list[int] = []

    def look(call: AttentionCall) -> AttentionCall:
        mask = call.visible().clone()
        mask[..., 7, :] = False
        mine = replace(call, kept=kept, mask=mask)
        expected = call.scores().softmax(-1) * kept
        expected[:, :, 7] = 0
        assert torch.allclose(mine.weights(), expected, atol=1e-6)
        assert torch.allclose(mine.weights(slice(5, 9)), expected[:, :, 5:9], atol=1e-6)
        value = call.value.repeat_interleave(call.groups, dim=1)
        assert torch.allclose(mine.output(), (expected @ value).transpose(1, 2), atol=1e-6)
        seen.append(call.layer)
        return mine

    with attending(model, look):
        assert run(model, ids).isfinite().all()
    assert seen == list(range(model.layers))


def test_a_learned_sink_takes_its_share() -> None:
    model, ids = ss.load(tiny_models.plain()), tiny_models.ids(1, 12)
    sinks = torch.tensor([0.0, 1.0, -1.0, 50.0])
    kept: list[Tensor] = []

    def look(call: AttentionCall) -> AttentionCall:
        mine = replace(call, sinks=sinks)
        scores = torch.cat([call.scores(), sinks.view(1, -1, 1, 1).expand(1, 4, 12, 1)], dim=-1)
        assert torch.allclose(mine.weights(), scores.softmax(-1)[..., :-1], atol=1e-6)
        kept.append(mine.weights().sum(-1))
        return mine

    with attending(model, look):
        run(model, ids)
    assert all((total < 1).all() and (total[:, 3] < 1e-6).all() for total in kept)


def test_whole_maps_are_those_of_the_change() -> None:
    model, ids = ss.load(tiny_models.plain()), tiny_models.ids(1, 100)

    def first(call: AttentionCall) -> AttentionCall:
        mask = call.visible().clone()
        mask[..., 1:, 0] = False
        return replace(call, mask=mask)

    with attending(model, first):
        windows = ss.Windows.of_ids([ids[0].tolist()], model, [0])
        assert ss.attention_by_head(model, windows, length=64)["attention"].max() == pytest.approx(1 / 64)
        with module.attending(model, lambda call: None), pytest.raises(ss.InputError, match="process"):
            pickle.dumps(model)


def test_a_layer_that_fails_leaves_the_model_as_it_was() -> None:
    model, ids = ss.load(tiny_models.plain()), tiny_models.ids(1, 12)

    def fail(call: AttentionCall) -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"), attending(model, fail):
        run(model, ids)
    assert model.config._attn_implementation == "eager"
    assert torch.equal(run(model, ids), tiny_models.plain()(ids, use_cache=False).logits)
