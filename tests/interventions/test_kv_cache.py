"""A cache that is large enough changes nothing; a bounded one does what a Llama in float64 does by hand."""

from contextlib import ExitStack
from typing import Any, cast

import numpy as np
import pytest
import torch
import transformers
from support import tiny_models
from support.reference_cache import bounded_llama

import spectral_sinks as ss
from spectral_sinks.models.rotary import key_turns, rotations

IDS = tiny_models.ids(2, 30)
FULL = ["llama", "qwen2", "qwen3", "gemma2", "gpt2", "gpt_neox", "olmo2", "phi3", "gpt_oss"]
"""Families with layers of full attention."""


def read(model: ss.LanguageModel, ids: torch.Tensor, cache: Any, block: int) -> torch.Tensor:
    """The logits of a text that is read in blocks."""
    with torch.no_grad(), ss.attending(model, cache):
        return torch.cat([model.module(x, past_key_values=cache).logits for x in ids.split(block, 1)], dim=1)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        *[(family, {"evict": "attention"}) for family in FULL],
        *[("llama", options) for options in ({}, {"positions": "text"}, {"evict": "random"})],
    ],
)
def test_a_cache_that_is_large_enough_changes_nothing(family: str, options: dict[str, Any]) -> None:
    model = tiny_models.model(family)
    if family == "gpt2":
        options = options | {"positions": "text"}
    with torch.no_grad():
        plain = transformers.DynamicCache(config=model.config)
        expected = model.module(IDS, past_key_values=plain).logits
    for size, block in ((30, 13), (None, 30)):
        found = read(model, IDS, ss.nll.KVCache(model, size, **options), block)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("evict", ["window", "attention", "random"])
def test_in_half_precision_keys_that_have_not_moved_lose_nothing(dtype: torch.dtype, evict: Any) -> None:
    model = ss.load(tiny_models.plain("llama").to(dtype), tokenizer=tiny_models.tokenizer())
    as_text, counted = (
        read(model, IDS, ss.nll.KVCache(model, 30, evict=evict, positions=positions), 7)
        for positions in ("text", "cache")
    )
    assert torch.equal(counted, as_text)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_pass_with_other_texts_is_refused(family: str) -> None:
    model = gemma3() if family == "gemma3" else tiny_models.model(family)
    cache = ss.nll.KVCache(model, 9)
    expected = read(model, IDS[:1], cache, 7)
    with pytest.raises(ss.InputError, match="holds 1 texts, and this pass has 2"):
        read(model, IDS[:2], cache, 7)
    cache.reset()
    torch.testing.assert_close(read(model, IDS[:1], cache, 7), expected)


@pytest.mark.parametrize(
    ("block", "positions", "first"), [(1, "cache", 3), (5, "cache", 0), (5, "text", 3), (5, "cache", 3)]
)
def test_a_window_is_that_of_a_llama_by_hand(block: int, positions: Any, first: int) -> None:
    model = tiny_models.model("llama")
    cache = ss.nll.KVCache(model, 8, first=first, positions=positions)
    found = read(model, IDS[:1, :16], cache, block)
    for row, ids in enumerate(IDS[:1, :16]):
        expected, kept = bounded_llama(
            model.module, ids, 8, first=first, recent=8 - first, block=block, positions=positions
        )
        torch.testing.assert_close(found[row].double(), expected, atol=2e-4, rtol=1e-4)
        assert [layer.entries()[row].tolist() for layer in cache.bounded] == kept
    assert kept[0][0] == [*range(first), *range(16 - 8 + first, 16)]


@pytest.mark.parametrize(("block", "positions", "first"), [(1, "cache", 0), (5, "cache", 2), (5, "text", 0)])
def test_what_received_least_attention_goes(block: int, positions: Any, first: int) -> None:
    model = tiny_models.model("llama")
    cache = ss.nll.KVCache(model, 9, first=first, evict="attention", recent=4, positions=positions)
    found = read(model, IDS[:1, :16], cache, block)
    for row, ids in enumerate(IDS[:1, :16]):
        expected, kept = bounded_llama(
            model.module, ids, 9, first=first, recent=4, block=block, positions=positions
        )
        assert [layer.entries()[row].tolist() for layer in cache.bounded] == kept
        torch.testing.assert_close(found[row].double(), expected, atol=2e-4, rtol=1e-4)
    others = {tuple(own) for layer in kept for own in layer}
    assert len(others) > 1, "each head keeps entries of its own"


def test_random_eviction_keeps_both_ends_and_repeats_with_its_seed() -> None:
    model = tiny_models.model("llama")
    kept: list[torch.Tensor] = []
    for seed in (0, 0, 1):
        cache = ss.nll.KVCache(model, 10, first=2, evict="random", recent=3, seed=seed)
        read(model, IDS, cache, block=4)
        kept.append(torch.stack([layer.entries() for layer in cache.bounded]))
    assert torch.equal(kept[0], kept[1]) and not torch.equal(kept[0], kept[2])
    assert kept[0].shape == (3, 2, 2, 10)
    assert (kept[0][..., :2] == torch.arange(2)).all() and (kept[0][..., -3:] == torch.arange(27, 30)).all()
    assert (kept[0].diff(dim=-1) > 0).all()


@pytest.mark.parametrize("family", [name for name in FULL if name != "gpt2"])
def test_rotations_are_those_of_the_model(family: str) -> None:
    model = tiny_models.model(family)
    places = torch.tensor([0, 3, 90])
    with torch.no_grad():
        matrices = key_turns(model, places.tolist())
    for layer, rotation in enumerate(rotations(model)):
        assert rotation is not None
        for place, matrix in zip(places, matrices[:, layer], strict=True):
            size = model.head_size
            unit = torch.eye(size)[None, None]
            scale = matrix.norm(dim=0)
            turned = rotation.turned(unit, place.expand(size))[0, 0].double() * scale
            torch.testing.assert_close(turned, matrix, atol=1e-5, rtol=0)
            back = rotation.turned(rotation.turned(unit, place.expand(size)), -place.expand(size))
            torch.testing.assert_close(back, unit, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "options", [{}, {"bits": 4, "group": 3}, {"evict": "attention"}, {"evict": "random"}]
)
def test_the_memory_is_that_of_the_tensors(options: dict[str, Any]) -> None:
    model = tiny_models.model("llama")
    cache = ss.nll.KVCache(model, 12, first=2, **options)
    read(model, IDS, cache, block=6)
    tensors = [x for layer in cache.bounded for x in layer.tensors]
    assert cache.nbytes == sum(x.untyped_storage().nbytes() for x in tensors) > 0
    rows, heads, size, entries, layers = 2, 2, model.head_size, 12, 3
    exact = 2 * layers * rows * heads * entries * size * 4
    own = {"attention": 8, "random": 4}.get(options.get("evict", ""), 0)
    if "bits" not in options:
        assert cache.nbytes == exact + own * layers * rows * heads * entries
    else:
        assert cache.nbytes < exact
    cache.reset()
    assert cache.nbytes == 0 and cache.get_seq_length() == 0


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("exact_first", [True, False])
def test_stored_integers_are_close_and_the_first_may_be_exact(bits: Any, exact_first: bool) -> None:
    model = tiny_models.model("llama")
    exact, rounded = (
        ss.nll.KVCache(model, 12, first=2, bits=b, keys_by="token", exact_first=exact_first)
        for b in (None, bits)
    )
    for cache in (exact, rounded):  # one block, so that both read the same keys
        read(model, IDS[:, :12], cache, block=12)
    for a, b in zip(exact.bounded, rounded.bounded, strict=True):
        if a.index == 0:
            for plain, other in ((a.stored_keys, b.stored_keys), (a.stored_values, b.stored_values)):
                x, y = plain.read(), other.read()
                if plain is a.stored_keys:  # rounded as they are before their rotation by position
                    x = a.rotation.turned(x, -torch.arange(12))
                step = (x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True)) / (2**bits - 1)
                assert ((x - y).abs() <= 0.5001 * step).all()
                assert torch.equal(x[:, :, :2], y[:, :, :2]) == exact_first
                assert not torch.equal(x[:, :, 2:], y[:, :, 2:])


@pytest.mark.parametrize(
    ("family", "rows", "options"),
    [
        ("llama", 1, {}),
        ("llama", 3, {"bits": 8, "group": 2}),
        ("llama", 3, {"evict": "attention"}),
        ("gpt_oss", 2, {"evict": "random"}),
        ("gemma2", 2, {}),
    ],
)
def test_generate_takes_the_cache(family: str, rows: int, options: dict[str, Any]) -> None:
    model = tiny_models.model(family)
    prompt, settings = (
        tiny_models.ids(rows, 10),
        {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None},
    )
    with ss.attending(model, cache := ss.nll.KVCache(model, 8, first=2, **options)):
        text = model.module.generate(prompt, past_key_values=cache, **settings)
    assert text.shape == (rows, 14) and {layer.held for layer in cache.bounded} == {8}
    # the same tokens, one by one
    cache.reset()
    ids = prompt
    with torch.no_grad(), ss.attending(model, cache):
        for step in range(4):
            new = ids if not step else ids[:, -1:]
            logits = model.module(new, past_key_values=cache).logits[:, -1]
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(ids, text)


def test_a_large_cache_generates_what_the_plain_one_does_also_with_beams() -> None:
    model, prompt = tiny_models.model("llama"), tiny_models.ids(2, 10)
    for beams, evict in ((1, "random"), (3, "attention")):
        settings = {"num_beams": beams, "max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
        plain = model.module.generate(prompt, **settings)
        with ss.attending(model, cache := ss.nll.KVCache(model, 40, evict=evict)):
            assert torch.equal(model.module.generate(prompt, past_key_values=cache, **settings), plain)


def test_layers_with_a_window_of_their_own_keep_it() -> None:
    model = tiny_models.model("gemma2")
    cache = ss.nll.KVCache(model, 12, first=2)
    kinds = [type(layer) for layer in transformers.DynamicCache(config=model.config).layers]
    assert len(cache.bounded) == sum(kind is transformers.cache_utils.DynamicLayer for kind in kinds) < 3
    read(model, IDS, cache, block=5)
    for own in set(cache.layers) - set(cache.bounded):
        assert own.keys.shape[2] == model.config.sliding_window - 1
    assert {layer.held for layer in cache.bounded} == {12}


@pytest.mark.parametrize(
    ("family", "options", "said"),
    [
        ("llama", {"size": 4}, "cannot keep the first 4"),
        ("llama", {"size": 8, "first": -1}, "first=-1"),
        ("llama", {"size": 8, "evict": "oldest"}, "choose 'window'"),
        ("llama", {"size": 8, "positions": "model"}, "choose 'cache' or 'text'"),
        ("llama", {"size": 8, "bits": 3}, "choose 8, 4, 2"),
        ("llama", {"size": 8, "recent": 2}, "leave `recent` out"),
        ("llama", {"size": 8, "recent": 5, "evict": "attention"}, "room for 1 to 4"),
        ("llama", {"size": 8, "bits": 4}, "smaller `group`"),
        ("mistral", {"size": 8}, "sliding window of its own"),
        ("gpt2", {"size": 8}, "no rotary positions"),
        ("bert", {"size": 8}, "encoder"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(
    family: str, options: Any, said: str, unchecked: None
) -> None:
    with pytest.raises(ss.InputError, match=said):
        ss.nll.KVCache(tiny_models.model(family), **options)


def test_attention_that_nobody_shows_is_asked_for() -> None:
    model = tiny_models.model("llama")
    cache = ss.nll.KVCache(model, 8, evict="attention")
    with torch.no_grad(), pytest.raises(ss.InputError, match=r"with ss\.attending\(model, cache\)"):
        model.module(IDS, past_key_values=cache)
    with pytest.raises(ss.InputError, match="made for"), ss.attending(tiny_models.model("qwen2"), cache):
        pass


def test_padding_is_refused() -> None:
    model = tiny_models.model("llama")
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    with torch.no_grad(), pytest.raises(ss.InputError, match="padded"):
        model.module(IDS, attention_mask=mask, past_key_values=ss.nll.KVCache(model, 8))
    with torch.no_grad():
        model.module(IDS, attention_mask=mask, past_key_values=transformers.DynamicCache())


def test_a_bounded_cache_does_not_go_back() -> None:
    model = tiny_models.model("llama")
    cache = ss.nll.KVCache(model, 8)
    read(model, IDS, cache, block=30)
    assert not cache.is_croppable and cache.get_max_length() == 8
    with pytest.raises(ss.InputError, match="cannot go back"):
        cache.crop(-2)
    cache.crop(0)
    cache.batch_repeat_interleave(2)
    assert cache.bounded[0].stored_keys.shape == (4, 2, 8)
    cache.batch_select_indices(torch.tensor([0]))
    assert cache.bounded[0].stored_keys.shape == (1, 2, 8)


@pytest.mark.parametrize("assistance", [{"prompt_lookup_num_tokens": 2}, {"assistant_model": None}])
def test_assisted_generation_is_refused_before_it_begins(assistance: dict[str, Any]) -> None:
    model = tiny_models.model("llama")
    if "assistant_model" in assistance:
        assistance = {"assistant_model": tiny_models.plain("llama")}
    cache = ss.nll.KVCache(model, 8)
    with pytest.raises(ss.InputError, match="assisted generation"):
        model.module.generate(IDS[:1], past_key_values=cache, max_new_tokens=3, **assistance)
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize(
    ("family", "options"),
    [("llama", {}), ("llama", {"evict": "attention"}), ("llama", {"bits": 4, "group": 2}), ("gemma2", {})],
)
def test_each_beam_has_a_cache_of_its_own(family: str, options: dict[str, Any]) -> None:
    """The score of a beam is that of its text alone, read through a fresh cache."""
    model, prompt = tiny_models.model(family), tiny_models.ids(2, 10)
    with ss.attending(model, cache := ss.nll.KVCache(model, 8, first=2, **options)):
        beams = model.module.generate(
            prompt,
            past_key_values=cache,
            num_beams=3,
            num_return_sequences=3,
            max_new_tokens=4,
            do_sample=False,
            eos_token_id=None,
            length_penalty=0.0,
            return_dict_in_generate=True,
            output_scores=True,
        )
    assert len(beams.sequences.unique(dim=0)) == 6
    for text, score in zip(beams.sequences, beams.sequences_scores, strict=True):
        cache.reset()
        with torch.no_grad(), ss.attending(model, cache):
            parts = [text[None, :10], *text[None, 10:-1].split(1, dim=1)]
            last = [model.module(x, past_key_values=cache).logits[0, -1].log_softmax(-1) for x in parts]
        own = torch.stack(last).gather(1, text[10:, None]).sum()
        torch.testing.assert_close(own, score, atol=1e-4, rtol=1e-4)


def test_masks_and_positions_that_do_not_fit_are_refused() -> None:
    model = tiny_models.model("llama")
    whole = torch.ones(2, 1, 30, 30, dtype=torch.bool).tril()
    with torch.no_grad():
        with pytest.raises(ss.InputError, match="numbers keys by their positions"):
            model.module(IDS, attention_mask=whole, past_key_values=ss.nll.KVCache(model, 8))
        for positions, fits in (("cache", False), ("text", True)):
            cache = ss.nll.KVCache(model, 8, positions=positions)
            model.module(IDS, past_key_values=cache, position_ids=torch.arange(30)[None])
            places = torch.arange(1)[None]
            if fits:
                model.module(IDS[:, :1], past_key_values=cache, position_ids=places)
            else:
                with pytest.raises(ss.InputError, match="do not continue the 30 tokens"):
                    model.module(IDS[:, :1], past_key_values=cache, position_ids=places)
                model.module(IDS[:, :1], past_key_values=cache, position_ids=places + 30)


def test_a_prompt_in_chunks_is_read_in_blocks() -> None:
    model = tiny_models.model("llama")
    settings = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    cache = ss.nll.KVCache(model, 8, first=2)
    text = model.module.generate(IDS, past_key_values=cache, prefill_chunk_size=7, **settings)
    cache.reset()
    logits = read(model, IDS, cache, block=7)[:, -1]
    assert torch.equal(text[:, 30], logits.argmax(-1))
    assert [layer.seen for layer in cache.bounded] == [30] * 3


def gemma3() -> ss.LanguageModel:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    return ss.load(tiny_models.build("gemma3", layer_types=kinds), tokenizer=tiny_models.tokenizer())


def test_a_model_whose_first_layer_slides_is_read_and_reset() -> None:
    model = gemma3()
    plain = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        expected = model.module(IDS, past_key_values=plain).logits
    cache = ss.nll.KVCache(model, 30)
    for _ in range(2):
        torch.testing.assert_close(read(model, IDS, cache, 7), expected, atol=1e-5, rtol=1e-5)
        assert cache.get_seq_length() == 30 and cache.bounded == [cache.layers[1]]
        cache.reset()
    small = ss.nll.KVCache(model, 12, first=2)
    first = read(model, IDS, small, 7)
    small.reset()
    assert torch.equal(read(model, IDS, small, 7), first) and cache.get_seq_length() == 0


EDITS: dict[str, Any] = {
    "mask": ss.attention.MaskKey(0),
    "mask token": ss.attention.MaskKey(token=7, since=9),
    "drop token": ss.attention.MaskKey(token=7, renormalise=False, heads=[1]),
    "value": ss.attention.SetValue(0, 1.5),
    "value token": ss.attention.SetValue(token=7, value=-0.5),
    "restrict token": ss.attention.Restrict(token=7),
    "copy token": ss.attention.CopyKey(token=7),
    "streaming": ss.attention.Streaming({0, 22}, 3),
    "logit": ss.attention.SinkLogit(1.0),
    "bias": ss.attention.KeyBias(0.3, 0.7),
}


def marked() -> torch.Tensor:
    """Texts in which token 7 comes early, so that it is dropped, and late."""
    drawn = IDS.clone()
    drawn[drawn == 7] = 8
    drawn[:, [1, 5, 24]] = 7
    return drawn


@pytest.mark.parametrize("name", EDITS)
def test_edits_choose_the_tokens_of_the_text(name: str) -> None:
    """In one layer, the cache shows what the mask of `Streaming` shows in one whole pass."""
    model = ss.load(tiny_models.build(num_hidden_layers=1), tokenizer=tiny_models.tokenizer())
    edit = EDITS[name]
    with torch.no_grad(), ss.attending(model, edit):
        found = read(model, marked(), ss.nll.KVCache(model, 8, first=2, positions="text"), block=1)
        with ss.attending(model, ss.attention.Streaming(2, 7)):
            expected = model.module(marked(), use_cache=False).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    plain = read(model, marked(), ss.nll.KVCache(model, 8, first=2, positions="text"), block=1)
    assert not torch.allclose(found[:, 24:], plain[:, 24:], atol=1e-3)


def test_positions_of_keys_are_those_of_the_entries() -> None:
    model = tiny_models.model("llama")
    cache = ss.nll.KVCache(model, 8, first=2)
    seen: list[list[int]] = []
    held: list[list[int]] = []

    def look(call: ss.attention.AttentionCall) -> None:
        seen.append(call.key_positions.tolist())
        assert call.key.shape[2] == len(seen[-1])
        assert call.query_positions.tolist() == seen[-1][-call.query.shape[2] :]

    with torch.no_grad(), ss.attending(model, look):
        for start in range(0, 30, 6):
            before = [layer.entries()[0, 0].tolist() if start else [] for layer in cache.bounded]
            held += [[*own, *range(start, start + 6)] for own in before]
            model.module(IDS[:, start : start + 6], past_key_values=cache)
    assert seen == held and seen[-1] == [0, 1, *range(18, 30)]


def test_the_value_of_a_kept_token_is_replaced_wherever_it_stands() -> None:
    model = tiny_models.model("llama")
    at: list[list[int]] = []

    def look(call: ss.attention.AttentionCall) -> None:
        same = (call.value == 3.25).all(-1)[0].all(0).nonzero().flatten()
        at.append(call.key_positions[same].tolist())

    cache = ss.nll.KVCache(model, 8, first=2)
    with (
        torch.no_grad(),
        ss.attending(model, ss.attention.SetValue(token=7, value=3.25)),
        ss.attending(model, look),
    ):
        for part in marked().split(1, dim=1):
            model.module(part, past_key_values=cache)
    assert at[-1] == [1, 24] and at[3 * 6] == [1, 5] and at[3 * 15] == [1]


@pytest.mark.parametrize("evict", ["attention", "random"])
def test_an_edit_by_position_is_refused_once_heads_hold_other_tokens(evict: Any) -> None:
    model = tiny_models.model("llama")
    cache = ss.nll.KVCache(model, 12, evict=evict)
    with torch.no_grad(), ss.attending(model, cache), ss.attending(model, ss.attention.MaskKey(0)):
        model.module(IDS[:, :20], past_key_values=cache)  # nothing has been dropped yet
        with pytest.raises(ss.InputError, match=r"in each head of layer 0, .*evict='window'"):
            model.module(IDS[:, 20:21], past_key_values=cache)
    cache.reset()
    with torch.no_grad(), ss.attending(model, cache), ss.attending(model, ss.attention.SinkLogit(0.0)):
        for part in IDS.split(10, dim=1):
            model.module(part, past_key_values=cache)


def test_a_key_bias_is_refused_where_positions_are_counted_anew() -> None:
    model = tiny_models.model("llama")
    cache = ss.nll.KVCache(model, 8)
    with torch.no_grad(), ss.attending(model, ss.attention.KeyBias(0.3)):
        model.module(IDS[:, :8], past_key_values=cache)
        model.module(IDS[:, 8:9], past_key_values=cache)
        with pytest.raises(ss.InputError, match="counts positions from its first entry, 1 further on"):
            model.module(IDS[:, 9:10], past_key_values=cache)


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral"])
@pytest.mark.parametrize("block", [1, 13, 30])
def test_a_static_cache_shows_edits_the_tokens_that_it_holds(family: str, block: int) -> None:
    model = tiny_models.model(family)
    for edit in (ss.attention.MaskKey(0), ss.attention.SetValue(token=7), ss.attention.Streaming(2, 6)):
        cache = transformers.StaticCache(config=model.config, max_cache_len=40)
        with torch.no_grad(), ss.attending(model, edit):
            expected = model.module(marked(), use_cache=False).logits
        found = []
        with torch.no_grad(), ss.attending(model, edit):
            found = [model.module(x, past_key_values=cache).logits for x in marked().split(block, 1)]
        torch.testing.assert_close(torch.cat(found, 1), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("block", [1, 6])
def test_other_entries_than_the_first_may_stay(block: int) -> None:
    """Other tokens stay as `Streaming` shows them, or, before they come, as many recent ones more."""
    model = ss.load(tiny_models.build(num_hidden_layers=1), tokenizer=tiny_models.tokenizer())
    cache = ss.nll.KVCache(model, 8, first={3, 12}, positions="text")
    found = read(model, IDS, cache, block)
    assert cache.bounded[0].entries()[1, 1].tolist() == [3, 12, *range(24, 30)]
    assert cache.bounded[0].places is not None and cache.bounded[0].held == 8
    if block == 1:
        with ss.attending(model, ss.attention.Streaming({3, 12}, 7)), torch.no_grad():
            expected = model.module(IDS, use_cache=False).logits
        torch.testing.assert_close(found[:, 20:], expected[:, 20:], atol=1e-5, rtol=1e-5)
    same = ss.nll.KVCache(model, 8, first=[0, 1], positions="text")
    plain = ss.nll.KVCache(model, 8, first=2, positions="text")
    torch.testing.assert_close(read(model, IDS, same, block), read(model, IDS, plain, block))
    with pytest.raises(ss.InputError, match="in place of the first entries"):
        ss.nll.KVCache(model, 8, first=[3], evict="random")


def test_a_block_around_a_measurement_counts_attention_once() -> None:
    """`cached_nll` opens a block itself, and the same cache may be the hook of one around it."""
    model, found = tiny_models.model(), []
    for times in (0, 1, 2):
        cache = ss.nll.KVCache(model, 12, evict="attention")
        with ExitStack() as stack:
            for _ in range(times):
                stack.enter_context(ss.attending(model, cache))
            found.append(ss.nll.cached_nll(model, IDS, cache, block=4).nll)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.usefixtures("unchecked")
def test_sizes_may_be_integers_of_numpy() -> None:
    model = tiny_models.model()
    cache = ss.nll.KVCache(model, cast(int, np.int64(8)), first=cast(int, np.int64(3)))
    assert cache.rule == ss.nll.KVCache(model, 8, first=3).rule
