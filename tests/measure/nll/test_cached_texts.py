"""The NLL through a cache: that of one whole pass where nothing is dropped, in blocks of any size."""

import gc
from typing import Any

import pytest
import torch
import transformers
from support import tiny_models

import spectral_sinks as ss

IDS = tiny_models.ids(2, 33)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_without_eviction_it_is_the_nll_of_one_pass(family: str) -> None:
    model = tiny_models.model(family)
    with torch.no_grad():
        logits = tiny_models.plain(family)(IDS).logits.double()
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), IDS[:, 1:], reduction="none")
    for block in (7, 32, 64):
        found = ss.nll.cached_nll(model, IDS, block=block)
        torch.testing.assert_close(found.nll.double(), expected, atol=1e-5, rtol=1e-5)
    assert found.tokens_per_second > 0
    cache = transformers.DynamicCache(config=model.config)
    again = ss.nll.cached_nll(model, IDS, cache, block=64)
    own = sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values))
    assert again.nbytes == found.nbytes == own


def test_a_window_is_the_mask_of_a_window_if_the_block_is_one_token() -> None:
    """With the positions of the text, the cache shows what the mask of `Streaming` shows in one layer."""
    model = ss.load(tiny_models.build(num_hidden_layers=1), tokenizer=tiny_models.tokenizer())
    cache = ss.nll.KVCache(model, 8, first=2, positions="text")
    found = ss.nll.cached_nll(model, IDS, cache, block=1).nll
    with ss.attending(model, ss.attention.Streaming(2, 7)), torch.no_grad():
        logits = model.module(IDS).logits  # the cache holds two and six, and the token sees itself
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), IDS[:, 1:], reduction="none")
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_cache_is_emptied_first_and_stays_within_its_size() -> None:
    model = tiny_models.model("llama")
    for evict in ("window", "attention", "random"):
        cache = ss.nll.KVCache(model, 8, first=2, evict=evict)
        one, two = (ss.nll.cached_nll(model, IDS, cache, block=12) for _ in "12")
        assert torch.equal(one.nll, two.nll) and one.nbytes == two.nbytes == cache.nbytes
        assert all(layer.held == 8 and layer.seen == 33 for layer in cache.bounded)


def test_means_by_position_are_means_over_tokens_then_texts() -> None:
    nll = torch.arange(64, dtype=torch.float32).view(2, 32)
    table = ss.nll.CachedNLL(nll, 0, 1.0, 1.0, 8).by_position([1, 3, 33])
    assert table["nll"].tolist() == pytest.approx([16.5, 32.5])
    assert table[["start", "stop"]].to_numpy().tolist() == [[1, 3], [3, 33]]
    assert (table["low"] <= table["nll"]).all() and (table["nll"] <= table["high"]).all()
    for edges in ([1], [3, 2], [0, 4], [1, 34]):
        with pytest.raises(ss.InputError, match="edges"):
            ss.nll.CachedNLL(nll, 0, 1.0, 1.0, 8).by_position(edges)


def test_texts_may_exceed_the_context_where_positions_rotate() -> None:
    ids = tiny_models.ids(1, 150)
    llama, gpt2 = (tiny_models.model(family) for family in ("llama", "gpt2"))
    found = ss.nll.cached_nll(llama, ids, ss.nll.KVCache(llama, 16, first=2), block=30)
    assert found.nll.shape == (1, 149) and found.nll.isfinite().all()
    with pytest.raises(ss.InputError, match="no rotary positions and a context of 128"):
        ss.nll.cached_nll(gpt2, ids, ss.nll.KVCache(gpt2, 16, positions="text"))


def test_bad_input_is_refused() -> None:
    model = tiny_models.model("llama")
    with pytest.raises(ss.InputError, match="at least two tokens"):
        ss.nll.cached_nll(model, IDS[:, :1])
    with pytest.raises(ss.InputError, match="blocks of 0"):
        ss.nll.cached_nll(model, IDS, block=0)
    with pytest.raises(ss.InputError, match="encoder"):
        ss.nll.cached_nll(tiny_models.model("bert"), IDS)


def test_caches_of_transformers_are_right_or_refused() -> None:
    model = tiny_models.model("gemma2")
    expected = ss.nll.cached_nll(model, IDS).nll
    for block in (1, 7, 33):
        static = transformers.StaticCache(config=model.config, max_cache_len=40)
        torch.testing.assert_close(
            ss.nll.cached_nll(model, IDS, static, block=block).nll, expected, atol=1e-5, rtol=1e-5
        )
    short = transformers.StaticCache(config=model.config, max_cache_len=20)
    with pytest.raises(ss.InputError, match="static cache of 20 entries cannot hold a text of 33"):
        ss.nll.cached_nll(model, IDS, short)
    with pytest.raises(ss.InputError, match="made for"):
        ss.nll.cached_nll(model, IDS, ss.nll.KVCache(tiny_models.model("llama"), 8))


def test_a_text_of_16000_tokens_is_read_in_flat_memory_as_by_a_plain_loop() -> None:
    model = ss.load(
        tiny_models.build(num_hidden_layers=2, max_position_embeddings=512), tokenizer=tiny_models.tokenizer()
    )
    ids, held = tiny_models.ids(1, 16_000), []

    def live(_: int) -> None:
        read = len(held)
        measured = read in (9, 62)
        if measured:
            gc.collect()  # passes leave cycles of references behind
        tensors = [x for x in gc.get_objects() if type(x) is torch.Tensor] if measured else []
        held.append(sum(x.numel() * x.element_size() for x in tensors))

    cache = ss.nll.KVCache(model, 64)
    found = ss.nll.cached_nll(model, ids, cache, block=256, progress=live)
    assert len(held) == 63 and held[9] > 0
    assert held[62] - held[9] < 4 * 16_000 + 100_000, "no more than the NLL itself grows"
    assert found.nbytes == cache.nbytes == 2 * 2 * 2 * 64 * model.head_size * 4
    plain, logits = ss.nll.KVCache(model, 64), []
    with torch.no_grad():
        for part in ids.split(256, dim=1):
            logits.append(model.module(part, past_key_values=plain).logits)
    expected = torch.nn.functional.cross_entropy(torch.cat(logits, 1)[0, :-1], ids[0, 1:], reduction="none")
    torch.testing.assert_close(found.nll[0], expected, atol=1e-5, rtol=1e-5)


def test_a_whole_text_beyond_the_context_is_that_of_one_pass_and_is_said() -> None:
    model, ids = tiny_models.model(), tiny_models.ids(1, 200)
    with torch.no_grad():
        logits = tiny_models.plain()(ids).logits
    expected = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none")
    said = "positions go up to 199, and .* knows none beyond its context of 128"
    for cache in (None, ss.nll.KVCache(model), ss.nll.KVCache(model, 200)):
        with pytest.warns(ss.SpectralWarning, match=said):
            found = ss.nll.cached_nll(model, ids, cache)
        torch.testing.assert_close(found.nll[0], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("unchecked")
def test_ids_may_be_lists_and_lie_in_the_vocabulary() -> None:
    model, ids = tiny_models.model("llama"), IDS[:2, :9]
    expected = ss.nll.cached_nll(model, ids).nll
    for same in (ids.int(), ids.tolist(), ids.numpy()):
        given: Any = same
        assert torch.equal(ss.nll.cached_nll(model, given).nll, expected)
    for bad in (-1, 97):
        wrong = ids.clone()
        wrong[1, 3] = bad
        with pytest.raises(ss.InputError, match=f"token id {bad} lies outside the vocabulary of 97"):
            ss.nll.cached_nll(model, wrong)


def test_a_comparison_of_caches_needs_one_and_marks_its_controls() -> None:
    model = tiny_models.model("llama")
    with pytest.raises(ss.InputError, match="no cache to measure"):
        ss.nll.compare_caches(model, IDS, {})
    table = ss.nll.compare_caches(model, IDS[:2, :9], {"mine": {}, "four": {"size": 4, "first": 1}}).table
    assert table["kind"].tolist() == ["control", "bounded"], "a cache that drops nothing is a control"
