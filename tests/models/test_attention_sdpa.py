"""Fast attention that shows the opening: logits and maps against eager, and where it cannot be had."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny_models
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import spectral_sinks as ss
from spectral_sinks.models.attention_sdpa import OPENING, TOKENS, opening_attention

FAMILIES = [family for family in tiny_models.FAMILIES if family not in ("gemma2", "gpt_oss")]


def fast(family: str, dtype: torch.dtype = torch.float32, **sizes: Any) -> Any:
    module = tiny_models.build(family, **sizes).to(dtype)
    module.set_attn_implementation(OPENING)
    assert module.config._attn_implementation == OPENING
    return module


def maps(model: ss.LanguageModel, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits and the attention weights of all layers, as a trace sees them."""
    return ss.trace(
        model,
        ids,
        {},
        readout=lambda final, read, weights: (model.unembed(final), torch.stack(weights)),
        attention=True,
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_maps_are_those_of_eager(family: str) -> None:
    quick = ss.load(fast(family))
    assert quick.reads_attention
    for rows, tokens in ((1, 20), (3, 20), (3, 64), (1, 100), (2, 100), (2, 128)):
        ids = tiny_models.ids(rows, tokens, seed=tokens)
        with torch.no_grad():
            eager = tiny_models.plain(family)(ids, output_attentions=True, use_cache=False)
        logits, weights = maps(quick, ids)
        expected = torch.stack(eager.attentions)[..., :TOKENS, :TOKENS]
        assert weights.shape == expected.shape and weights.dtype == torch.float32
        assert (logits - eager.logits).abs().max() <= 1e-4
        assert (weights - expected).abs().max() <= 1e-5
        assert torch.allclose(weights.sum(-1), torch.ones(()), atol=1e-5)


def test_a_sliding_window_hides_position_0() -> None:
    ids = tiny_models.ids(2, 100)
    for family in ("mistral", "gemma3"):
        _, weights = maps(ss.load(fast(family)), ids)
        windowed = [layer for layer in weights if (layer[:, :, 8:, 0] == 0).all()]
        assert windowed, "mistral everywhere, gemma3 in some layers"
        assert all((layer[:, :, 7, 0] > 0).all() for layer in windowed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "qwen3"])
def test_half_precision(family: str, dtype: torch.dtype) -> None:
    ids = tiny_models.ids(2, 100)
    with torch.no_grad():
        eager = tiny_models.plain(family).to(dtype)(ids, output_attentions=True, use_cache=False)
    logits, weights = maps(ss.load(fast(family, dtype)), ids)
    coarse = {torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    expected = torch.stack(eager.attentions)[..., :TOKENS, :TOKENS].float()
    assert weights.dtype == torch.float32
    assert (weights - expected).abs().max() <= 30 * coarse
    assert (weights - expected).abs().mean() <= coarse
    assert (logits - eager.logits.float()).abs().mean() <= 30 * coarse


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_effects_are_those_of_eager(family: str) -> None:
    eager, quick = tiny_models.model(family), ss.load(fast(family))
    cells: dict[str, Any] = {
        "exit": {ss.Site("exit", 0): ss.rnd(32, 9)},
        "inside": {ss.Site("keys", 1): ss.rnd(32, 9), ss.Site("mlp", 2): ss.rnd(32, 4)},
    }
    ids = tiny_models.ids(3, 100)
    slow, found = (ss.evaluate_all(model, ss.Windows.of_ids(ids, model), cells) for model in (eager, quick))
    for name in cells:
        assert found[name].nll == pytest.approx(slow[name].nll, abs=1e-5)
        assert found[name].sink_mass == pytest.approx(slow[name].sink_mass, abs=1e-5)
    a, b = (
        ss.attention_by_head(model, ss.Windows.of_ids(ids, model), 2, length=50) for model in (eager, quick)
    )
    assert (a["attention"] - b["attention"]).abs().max() <= 1e-5


def test_only_64_tokens_are_kept() -> None:
    quick, ids = ss.load(fast("llama")), tiny_models.ids(2, 128)
    windows = ss.Windows.of_ids(ids, quick)
    with pytest.raises(
        ss.InputError, match=r"over 100 tokens, .*keeps the maps of only the first 64.*attention='eager'"
    ):
        ss.attention_by_head(quick, windows, length=100)
    with pytest.raises(ss.InputError, match="over 64 tokens, the window is shorter"):
        ss.attention_by_head(quick, ss.Windows.of_ids(ids[:, :63], quick))
    ss.attention_by_head(quick, windows)
    ss.attention_by_head(tiny_models.model(), windows, length=100)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_what_auto_chooses(family: str, tmp_path: Path) -> None:
    folder = tiny_models.save(tmp_path / "model", family)
    model = ss.load(folder)
    chosen = model.config._attn_implementation
    assert chosen == ("eager" if family in ("gemma2", "gpt_oss") else OPENING) and model.reads_attention
    ids = tiny_models.ids(2, 70)
    with torch.no_grad():
        assert (maps(model, ids)[0] - tiny_models.plain(family)(ids).logits).abs().max() <= 1e-4
    assert ss.load(folder, attention="eager").config._attn_implementation == "eager"
    if chosen == "eager":
        with pytest.raises(ss.InputError, match=r"has no sdpa attention: use attention='eager'"):
            ss.load(folder, attention=OPENING)
    else:
        assert ss.load(folder, attention=OPENING).config._attn_implementation == OPENING


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_objects_that_cannot_are_refused(family: str) -> None:
    """A cap or a learned sink would be left out of the weights, or fail in the midst of a pass."""
    module = tiny_models.plain(family)
    module.config._attn_implementation = OPENING
    with pytest.raises(ss.InputError, match="has no sdpa attention: use attention='eager'"):
        ss.load(module)


class Attention(nn.Module):
    is_causal = True
    num_key_value_groups = 2


def drawn(tokens: int, keys: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    return [torch.randn(2, heads, tokens, 8, generator=generator) for heads in (4, keys, keys)]


def by_definition(query: Tensor, key: Tensor, scaling: float, mask: Tensor | None) -> Tensor:
    """Softmax of scaled products in float64; `mask` adds, row i of key head j // 2 serves query head j."""
    scores = torch.einsum("bhqd,bhkd->bhqk", query.double(), key.double()[:, [0, 0, 1, 1]]) * scaling
    return (scores if mask is None else scores + mask).softmax(-1)


@pytest.mark.parametrize("tokens", [1, 20, 64, 100])
@pytest.mark.parametrize("scaling", [None, 0.7])
def test_the_weights_by_definition(tokens: int, scaling: float | None) -> None:
    """Causal or not, by the module or the call, with a mask of truth values or of numbers."""
    module, (query, key, value) = Attention(), drawn(tokens)
    scale = 8**-0.5 if scaling is None else scaling
    count = min(tokens, TOKENS)
    later = torch.full((tokens, tokens), -torch.inf, dtype=torch.float64).triu(1)
    window = torch.ones(tokens, tokens, dtype=torch.bool).tril().triu(-4).expand(2, 1, tokens, tokens)
    adds = torch.zeros(2, 1, tokens, tokens).masked_fill(~window, torch.finfo(torch.float32).min)
    slope = torch.arange(tokens).float().expand(1, 4, tokens, tokens) * 0.1  # by head, like ALiBi
    closed = torch.zeros(tokens, tokens).masked_fill(~window, -torch.inf).double()
    for causal, of_module, mask, whole in [
        (None, True, None, later),
        (True, False, None, later),
        (None, False, None, None),
        (False, True, None, None),
        (None, True, window, closed),
        (None, True, adds, closed),
        (None, True, slope, slope.double()),
    ]:
        module.is_causal = of_module
        output, weights = opening_attention(module, query, key, value, mask, scaling, is_causal=causal)
        expected = by_definition(query, key, scale, whole)
        values = torch.einsum("bhqk,bhkd->bqhd", expected, value.double()[:, [0, 0, 1, 1]])
        assert (output - values).abs().max() <= 1e-5
        kernel, _ = sdpa_attention_forward(module, query, key, value, mask, 0.0, scaling, causal)
        assert torch.equal(output, kernel)
        if whole is None or mask is slope:  # where later keys count, weights are among the opening alone
            cut = None if whole is None else whole[..., :count, :count]
            expected = by_definition(query[:, :, :count], key[:, :, :count], scale, cut)
        assert (weights - expected[..., :count, :count]).abs().max() <= 1e-5
