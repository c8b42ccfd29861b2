"""Moves of the sink against attention by hand, in every kind of attention that the families have."""

import copy
import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from support import reference_attention, tiny_models
from support.reference_attention import Row, Rule
from torch import Tensor

import spectral_sinks as ss
from spectral_sinks.models.attention_capture import AttentionCall, AttentionHook

TOKENS, ODD = 20, 4
FAMILIES = ("llama", "gpt2", "qwen3", "gpt_oss", "mistral", "gemma2")
"""Grouped heads, learned positions, norms of queries and keys, learned sinks, sliding windows, caps."""


@functools.cache
def double(family: str = "llama") -> ss.LanguageModel:
    module = tiny_models.plain(family)
    if family != "gpt_oss":  # its experts have no product in float64
        module = module.double()
    return ss.load(module, tokenizer=tiny_models.tokenizer())


def near(found: Tensor, expected: Tensor, family: str = "llama") -> bool:
    return bool((found - expected).abs().max() < (2e-5 if family == "gpt_oss" else 2e-6))


def ids() -> Tensor:
    """Two windows; token 7 occurs at one position of the first and at two of the second."""
    drawn = tiny_models.ids(2, TOKENS)
    drawn[drawn == 7] = 8
    drawn[0, 5] = drawn[1, 3] = drawn[1, 11] = 7
    return drawn


def logits(model: ss.LanguageModel, look: AttentionHook | None = None, given: Tensor | None = None) -> Tensor:
    with ss.attending(model, look or (lambda call: None)), torch.no_grad():
        return model.module(ids() if given is None else given, use_cache=False).logits


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def marked(row: Row) -> list[int]:
    return [5] if row.window == 0 else [3, 11]


def mask(row: Row, keys: list[int], since: int = 0) -> None:
    for j in keys:
        if row.at != j and row.at >= since:
            row.seen = row.seen & (torch.arange(TOKENS) != j)


def drop(row: Row, keys: list[int]) -> None:
    row.dropped |= {j for j in keys if row.at != j}


def restrict(row: Row, rows: list[int]) -> None:
    if row.at in rows:
        row.seen = torch.arange(TOKENS) == row.at


def put(row: Row, keys: list[int], value: Tensor) -> None:
    for j in keys:
        row.values[j] = value


def copy_key(row: Row, keys: list[int], source: int = 0) -> None:
    for j in keys:
        row.keys[j], row.values[j] = row.keys[source], row.values[source]


def stream(row: Row, first: int | set[int], recent: int) -> None:
    kept = range(first) if isinstance(first, int) else first
    for j in range(TOKENS):
        if j not in kept and row.at - j >= recent:
            row.seen = row.seen & (torch.arange(TOKENS) != j)


def group(row: Row, model: ss.LanguageModel) -> int:
    return row.head * model.key_heads // model.heads


def logit(row: Row, value: float) -> None:
    own = (
        torch.tensor(value) if row.logit is None else torch.logaddexp(*map(torch.tensor, (row.logit, value)))
    )
    row.logit = float(own)


def cases(model: ss.LanguageModel) -> dict[str, tuple[AttentionHook, Rule]]:
    shape = (model.layers, model.key_heads, model.head_size)
    values, key = drawn(*shape), drawn(*shape, seed=1)
    logits = drawn(model.layers, model.heads, seed=2)
    some: dict[str, Any] = {"layers": [1], "heads": (1, 3)}

    def chosen(rule: Rule) -> Rule:
        return lambda row: rule(row) if row.layer == 1 and row.head in (1, 3) else None

    return {
        "mask": (ss.attention.MaskKey(0), lambda row: mask(row, [0])),
        "mask since": (ss.attention.MaskKey(0, since=6), lambda row: mask(row, [0], 6)),
        "mask some": (ss.attention.MaskKey(2, **some), chosen(lambda row: mask(row, [2]))),
        "mask token": (ss.attention.MaskKey(token=7), lambda row: mask(row, marked(row))),
        "drop": (ss.attention.MaskKey(0, renormalise=False), lambda row: drop(row, [0])),
        "drop some": (ss.attention.MaskKey(0, renormalise=False, **some), chosen(lambda row: drop(row, [0]))),
        "drop token": (ss.attention.MaskKey(token=7, renormalise=False), lambda row: drop(row, marked(row))),
        "restrict": (ss.attention.Restrict(ODD), lambda row: restrict(row, [ODD])),
        "restrict some": (ss.attention.Restrict(ODD, **some), chosen(lambda row: restrict(row, [ODD]))),
        "restrict token": (ss.attention.Restrict(token=7), lambda row: restrict(row, marked(row))),
        "zero": (ss.attention.SetValue(0), lambda row: put(row, [0], torch.zeros(model.head_size))),
        "value": (
            ss.attention.SetValue(ODD, values),
            lambda row: put(row, [ODD], values[row.layer, group(row, model)]),
        ),
        "value some": (
            ss.attention.SetValue(ODD, values, **some),
            chosen(lambda row: put(row, [ODD], values[row.layer, group(row, model)])),
        ),
        "value token": (
            ss.attention.SetValue(value=values[:1], token=7),
            lambda row: put(row, marked(row), values[0, group(row, model)]),
        ),
        "copy": (ss.attention.CopyKey(ODD), lambda row: copy_key(row, [ODD])),
        "copy some": (ss.attention.CopyKey(ODD, **some), chosen(lambda row: copy_key(row, [ODD]))),
        "copy token": (ss.attention.CopyKey(token=7), lambda row: copy_key(row, marked(row))),
        "copy token later": (
            ss.attention.CopyKey(token=7, source=8),
            lambda row: copy_key(row, [11] if row.window == 1 else [], 8),
        ),
        "copy token next": (
            ss.attention.CopyKey(token=7, source=10),
            lambda row: copy_key(row, [11] if row.window == 1 else [], 10),
        ),
        "bias": (
            ss.attention.KeyBias(key, values),
            lambda row: row.extra.append(
                (key[row.layer, group(row, model)], values[row.layer, group(row, model)])
            ),
        ),
        "bias in a layer": (
            ss.attention.KeyBias(key[:1], layers=[2]),
            lambda row: (
                row.extra.append((key[0, group(row, model)], torch.zeros(model.head_size).double()))
                if row.layer == 2
                else None
            ),
        ),
        "off by one": (ss.attention.SinkLogit(), lambda row: logit(row, 0.0)),
        "logits": (
            ss.attention.SinkLogit(logits),
            lambda row: logit(row, float(logits[row.layer, row.head])),
        ),
        "logit by head": (
            ss.attention.SinkLogit(logits[0]),
            lambda row: logit(row, float(logits[0, row.head])),
        ),
        "logit some": (ss.attention.SinkLogit(1.5, **some), chosen(lambda row: logit(row, 1.5))),
        "streaming": (ss.attention.Streaming(2, 4), lambda row: stream(row, 2, 4)),
        "kept elsewhere": (ss.attention.Streaming({2, 5}, 4), lambda row: stream(row, {2, 5}, 4)),
        "window": (ss.attention.Streaming(0, 3), lambda row: stream(row, 0, 3)),
        "streaming some": (ss.attention.Streaming(1, 4, **some), chosen(lambda row: stream(row, 1, 4))),
    }


NAMES = list(cases(double()))
FEW = ("mask some", "drop token", "restrict token", "value some", "copy some", "bias", "logit some")
PAIRS = [(family, name) for family in FAMILIES for name in (FEW if family in ("qwen3", "gemma2") else NAMES)]


@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_rule_the_hand_agrees(family: str) -> None:
    model = double(family)
    assert near(logits(model), reference_attention.run(model, ids())[0], family)


@pytest.mark.parametrize(("family", "name"), PAIRS)
def test_a_move_is_what_the_hand_computes(family: str, name: str) -> None:
    model = double(family)
    look, rule = cases(model)[name]
    expected, maps = reference_attention.run(model, ids(), rule)
    seen: list[Tensor] = []

    def watch(call: AttentionCall) -> None:
        seen.append(torch.cat([call.weights(rows) for rows in call.blocks()], dim=2))

    with ss.attending(model, look):
        found = logits(model, watch)
    assert near(found, expected, family)
    assert not near(found, logits(model), "gpt_oss"), "it does something"
    assert all(near(a, b, family) for a, b in zip(seen, maps, strict=True))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_oss", "gemma3"])
def test_moves_nest_in_the_order_written(family: str) -> None:
    model = double(family)
    names = ("copy some", "bias", "value some", "bias in a layer", "drop", "drop token", "logits", "restrict")
    looks, rules = zip(*(cases(model)[name] for name in names), strict=True)
    with ExitStack() as stack:
        for look in looks:
            stack.enter_context(ss.attending(model, look))
        found = logits(model)

    def together(row: Row) -> None:
        for rule in rules:
            rule(row)

    assert near(found, reference_attention.run(model, ids(), together)[0], family)
    twice = ss.attention.KeyBias(0.5, 1.0)
    with ss.attending(model, twice):
        found = logits(model, twice)
    half, one = (torch.full((model.head_size,), x, dtype=torch.float64) for x in (0.5, 1.0))
    expected, _ = reference_attention.run(model, ids(), lambda row: row.extra.extend([(half, one)] * 2))
    assert near(found, expected, family)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "qwen3"])
def test_a_key_bias_can_stand_for_the_masked_sink(family: str) -> None:
    """Where every text opens with BOS, its key and value are constants: masked, they can be given back."""
    model = double(family)
    windows = ss.Windows.of_ids(ids(), model)
    keys, values = ss.residual.mean_keys(model, windows), ss.residual.mean_values(model, windows)
    with ss.attending(model, ss.attention.MaskKey(0)):
        alone, found = logits(model), logits(model, ss.attention.KeyBias(keys, values))
    assert near(found, logits(model)) and not near(alone, logits(model), "gpt_oss")


def test_moves_that_change_nothing_change_no_bit() -> None:
    for family in ("llama", "gpt2", "gpt_oss"):
        model, d = tiny_models.model(family), tiny_models.D
        plain = logits(model)
        for look in (
            ss.attention.Streaming(0, TOKENS),
            ss.attention.Streaming(TOKENS, 1),
            ss.attention.MaskKey(0, layers=()),
            ss.attention.MaskKey(0, heads=()),
            ss.attention.MaskKey(0, heads=(), renormalise=False),
            ss.attention.MaskKey(TOKENS - 1),
            ss.attention.MaskKey(token=90, since=TOKENS),
            ss.attention.SetValue(ODD, heads=()),
            ss.attention.Restrict(0),
            ss.attention.CopyKey(ODD, source=ODD),
            ss.attention.SinkLogit(layers=[]),
        ):
            assert torch.equal(logits(model, look), plain), look
        with ss.attending(model, lambda call: None):
            plain = tiny_models.logits(model, ids(), {})
            for edit in (
                ss.spectra.scale(d, 1.0),
                ss.spectra.amplify(d, 1.0),
                ss.spectra.carry(d, ODD, ss.At(ODD)),
            ):
                assert torch.equal(tiny_models.logits(model, ids(), {ss.Site("exit", 1): edit}), plain)


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_is_its_windows_one_by_one(name: str) -> None:
    model = tiny_models.model()
    look = cases(model)[name][0]
    singles = torch.cat([logits(model, look, row[None]) for row in ids()])
    assert (logits(model, look) - singles).abs().max() < 5e-6


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "gpt_oss"])
def test_a_cache_agrees_with_a_whole_pass(family: str) -> None:
    """Positions and token ids are those of the text, also where a sliding cache has let go of the first."""
    model = double(family)
    prompts = ids()[:, :12]
    for name in ("mask", "mask token", "drop", "restrict token", "zero", "bias", "logits", "streaming"):
        look = cases(model)[name][0]
        with ss.attending(model, look):
            cached, whole = (ss.generate(model, prompts, new=10, cached=c) for c in (True, False))
        assert torch.equal(cached, whole), name
    edits = {ss.Site("exit", 1): ss.spectra.amplify(model.d, 9.0, ss.At(3, 11))}
    found = [ss.generate(model, prompts, edits, new=10, cached=c) for c in (True, False)]
    assert torch.equal(*found) and not torch.equal(found[0], ss.generate(model, prompts, new=10))


@pytest.mark.parametrize("blocks", [1, 2])
def test_tokens_are_those_of_each_beam(blocks: int) -> None:
    """The score of a beam is that of its whole text under the same edit; beams change places on the way."""
    model, prompt = tiny_models.model("llama"), tiny_models.ids(3, 8)
    settings: dict[str, Any] = {"num_beams": 4, "num_return_sequences": 4, "max_new_tokens": 10}
    settings |= {"do_sample": False, "eos_token_id": None, "length_penalty": 0.0}
    frequent = int(model.module.generate(prompt, **settings)[:, 8:].mode().values.mode().values)
    edit = ss.attention.MaskKey(token=frequent)
    with ExitStack() as stack:
        for look in (edit, lambda call: None)[:blocks]:
            stack.enter_context(ss.attending(model, look))
        beams = model.module.generate(prompt, **settings, return_dict_in_generate=True, output_scores=True)
    assert (beams.sequences[:, 8:-1] == frequent).any(1).sum() > 3
    with torch.no_grad(), ss.attending(model, edit):
        scores = model.module(beams.sequences, use_cache=False).logits[:, 7:-1].log_softmax(-1)
    own = scores.gather(2, beams.sequences[:, 8:, None]).sum((1, 2))
    torch.testing.assert_close(own, beams.sequences_scores, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        plain = model.module(beams.sequences, use_cache=False).logits[:, 7:-1].log_softmax(-1)
    assert (plain.gather(2, beams.sequences[:, 8:, None]).sum((1, 2)) - own).abs().max() > 1e-2
    assert not hasattr(model.module, "_reorder_cache")


def test_a_cache_filled_outside_has_no_ids() -> None:
    model = tiny_models.model()
    with torch.no_grad():
        cache = model.module(ids()[:, :8], use_cache=True).past_key_values
        with (
            ss.attending(model, ss.attention.MaskKey(token=7)),
            pytest.raises(ss.InputError, match="token ids"),
        ):
            model.module(ids()[:, 8:], past_key_values=cache)
        with ss.attending(model, ss.attention.MaskKey(token=7)):
            model.module(ids()[:, :5], use_cache=False)
            with pytest.raises(ss.InputError, match="token ids"):
                model.module(ids()[:, 8:], past_key_values=copy.deepcopy(cache))
    embedded = model.module.get_input_embeddings()(ids())
    with (
        ss.attending(model, ss.attention.Restrict(token=7)),
        pytest.raises(ss.InputError, match="embeddings"),
    ):
        model.module(inputs_embeds=embedded)


def test_sink_logits_can_be_learned() -> None:
    """Gradients are those of finite differences, and descent lowers the loss, alone and through a trace."""
    model, text = double("gpt2"), ids()
    start = drawn(model.layers, model.heads, seed=3)
    logit = start.clone().requires_grad_()

    def loss(values: Tensor) -> Tensor:
        with ss.attending(model, ss.attention.SinkLogit(values)):
            final = model.module(text, use_cache=False).logits
        return torch.nn.functional.cross_entropy(final[:, :-1].flatten(0, 1), text[:, 1:].flatten())

    loss(logit).backward()
    assert logit.grad is not None and (logit.grad != 0).all()
    for place in ((0, 0), (1, 2), (2, 3)):
        step = torch.zeros_like(start)
        step[place] = 1e-4
        with torch.no_grad():
            slope = (loss(start + step) - loss(start - step)) / 2e-4
        assert logit.grad[place] == pytest.approx(float(slope), rel=1e-4, abs=1e-9)

    learned = torch.zeros_like(start).requires_grad_()
    optimiser = torch.optim.Adam([learned], lr=0.3)
    first = float(loss(learned).detach())
    for _ in range(8):
        optimiser.zero_grad()
        with ss.attending(model, ss.attention.SinkLogit(learned)):
            value = ss.trace(
                model,
                text,
                {},
                readout=lambda final, *_: torch.nn.functional.cross_entropy(
                    model.unembed(final[:, :-1]).flatten(0, 1), text[:, 1:].flatten()
                ),
                gradients=True,
            )
        value.backward()
        optimiser.step()
    assert float(loss(learned).detach()) < first - 1e-4


def test_a_key_bias_can_be_learned() -> None:
    model = double()
    key, value = (drawn(1, 1, model.head_size, seed=s).requires_grad_() for s in (4, 5))
    with ss.attending(model, ss.attention.KeyBias(key, value)):
        model.module(ids(), use_cache=False).logits.square().mean().backward()
    assert key.grad is not None and value.grad is not None
    assert key.grad.abs().max() > 0 and value.grad.abs().max() > 0


def test_a_text_of_one_token_alone_leaves_each_to_itself() -> None:
    model, same = tiny_models.model(), torch.full((1, TOKENS), 7)
    seen: list[Tensor] = []
    with ss.attending(model, ss.attention.MaskKey(token=7)):
        found = logits(model, lambda call: seen.append(call.weights()), same)
    assert all(torch.equal(weights, torch.eye(TOKENS).expand_as(weights)) for weights in seen)
    assert found.isfinite().all() and (found - found[:, :1]).abs().max() < 1e-5


BAD: list[tuple[str, Callable[[], Any]]] = [
    ("needs a position or a token", lambda: ss.attention.MaskKey()),
    ("needs a position or a token", lambda: ss.attention.Restrict(0, token=3)),
    ("count from 0", lambda: ss.attention.SetValue(-1)),
    ("of an earlier one only", lambda: ss.attention.CopyKey(2, source=3)),
    ("layer 3: .* layers 0 to 2", lambda: logits(tiny_models.model(), ss.attention.MaskKey(0, layers=[3]))),
    ("head -1: .* heads 0 to 3", lambda: logits(tiny_models.model(), ss.attention.SinkLogit(heads=[-1]))),
    ("the text has 20 tokens", lambda: logits(tiny_models.model(), ss.attention.MaskKey(20))),
    ("has a context of 128", lambda: logits(tiny_models.model(), ss.attention.Restrict(128))),
    ("outside the vocabulary of 97", lambda: logits(tiny_models.model(), ss.attention.MaskKey(token=97))),
    ("a value of shape", lambda: logits(tiny_models.model(), ss.attention.SetValue(0, torch.zeros(2, 8)))),
    ("a key of shape", lambda: logits(tiny_models.model(), ss.attention.KeyBias(torch.zeros(3, 3, 8)))),
    (
        "a value of shape",
        lambda: logits(tiny_models.model(), ss.attention.KeyBias(0.0, torch.zeros(2, 2, 8))),
    ),
    ("choose layers, not heads", lambda: ss.attention.KeyBias(0.0, heads=[1])),
    ("sink logits of shape", lambda: logits(tiny_models.model(), ss.attention.SinkLogit(torch.zeros(5)))),
    ("at least 0 and 1", lambda: ss.attention.Streaming(1, 0)),
    ("at least 0 and 1", lambda: ss.attention.Streaming({3, -1}, 4)),
    ("outside the vocabulary", lambda: ss.attention.Prefix((97,)).check(tiny_models.model())),
    ("counted from 0", lambda: ss.At()),
    ("counted from 0", lambda: ss.At(-2)),
    ("the text has 20 tokens", lambda: ss.spectra.scale(4, 2.0, ss.At(20))(torch.zeros(20, 4))),
    ("finite number", lambda: ss.spectra.scale(4, float("nan"))),
    ("the text has 20 tokens", lambda: ss.spectra.carry(4, 20, "all")(torch.zeros(20, 4))),
    ("expected different ones, 0 to 3", lambda: ss.spectra.channels(4, [4])),
    ("expected different ones", lambda: ss.spectra.channels(4, [1, 1])),
]


@pytest.mark.parametrize(("message", "make"), BAD, ids=[f"{i} {m}" for i, (m, _) in enumerate(BAD)])
def test_what_cannot_act_is_refused(message: str, make: Callable[[], Any]) -> None:
    with pytest.raises(ss.InputError, match=message):
        make()


def test_a_source_that_a_sliding_cache_has_let_go_of_is_refused() -> None:
    model = tiny_models.model("mistral")
    with (
        ss.attending(model, ss.attention.CopyKey(9)),
        pytest.raises(ss.InputError, match="not among the keys"),
    ):
        ss.generate(model, ids()[:, :12], new=3)


@pytest.mark.parametrize(
    "edit",
    [
        ss.attention.MaskKey(0),
        ss.attention.MaskKey(1, since=4),
        ss.attention.MaskKey(token=7),
        ss.attention.Restrict(3),
        ss.attention.SetValue(0, value=0.5),
        ss.attention.CopyKey(3, source=1),
        ss.attention.Streaming(2, 3),
        ss.attention.Streaming({1, 4}, 3),
    ],
)
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_positions_count_from_the_beginning_of_a_text_that_is_padded_on_the_left(
    family: str, edit: Any
) -> None:
    """Each text of a padded batch is what it is alone, in one pass and while the batch generates."""
    model = tiny_models.model(family)
    texts = [tiny_models.ids(1, count, seed=count)[0] for count in (9, 6, 7)]
    padded = torch.stack([torch.cat([torch.full((9 - len(text),), tiny_models.EOS), text]) for text in texts])
    mask = torch.tensor([[0] * (9 - len(text)) + [1] * len(text) for text in texts])
    new = 1 if isinstance(edit, ss.attention.CopyKey) else 8  # a sliding cache drops the source
    greedy: dict[str, Any] = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None}
    with torch.no_grad(), ss.attending(model, edit):
        places = (mask.cumsum(1) - 1).clamp_min(0)
        found = model.module(padded, attention_mask=mask, position_ids=places).logits
        grown = model.module.generate(padded, attention_mask=mask, **greedy)
        for row, text in enumerate(texts):
            alone = model.module(text[None]).logits[0]
            torch.testing.assert_close(found[row, 9 - len(text) :], alone, atol=1e-5, rtol=1e-4)
            own = model.module.generate(text[None], attention_mask=torch.ones(1, len(text)), **greedy)
            assert torch.equal(grown[row, 9:], own[0, len(text) :])
    if edit.__class__ is ss.attention.MaskKey and edit.position == 0:
        with torch.no_grad():
            plain = model.module(padded, attention_mask=mask, position_ids=places).logits
        assert (plain[1] - found[1]).abs().max() > 1e-2, "the edit acts"


def test_a_position_beyond_the_shortest_text_of_a_padded_batch_is_refused() -> None:
    model, ids = tiny_models.model(), tiny_models.ids(2, 6)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    refused = pytest.raises(ss.InputError, match="the text has 4 tokens, 0 to 3")
    with torch.no_grad(), ss.attending(model, ss.attention.MaskKey(4)), refused:
        model.module(ids, attention_mask=mask)
