"""Traces: what may go at a site, where a pass may begin, filters in hooks and in traces of one's own."""

import weakref

import pytest
import torch
import transformers
from nnsight import save
from support import tiny_models
from torch import Tensor

import spectral_sinks as ss
from spectral_sinks.interventions.tracing import Resume, deepest
from spectral_sinks.measure.sinks.dark_share import carrier_shares

IDS = tiny_models.ids()


@pytest.fixture(scope="module")
def model() -> ss.LanguageModel:
    return tiny_models.model()


@pytest.fixture
def dark(model: ss.LanguageModel) -> ss.Filter:
    return ss.remove(ss.read_spectrum(model, bands=8).dark())


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_pass_from_a_layers_exit_is_the_whole_pass(family: str, layer: int) -> None:
    model = tiny_models.model(family)
    dark = ss.remove(ss.read_spectrum(model, bands=8).dark())
    site = ss.Site("exit", layer)
    residual = ss.trace(model, IDS, {}, [site], readout=lambda final, read, weights: read[site])
    whole = tiny_models.logits(model, IDS, {site: dark})
    from_there = tiny_models.logits(model, IDS, {}, resume=Resume(layer, dark(residual)))
    assert torch.equal(from_there, whole)


def test_what_a_function_leaves_of_a_residual_is_read_and_the_residual_is_not_held(
    model: ss.LanguageModel, dark: ss.Filter
) -> None:
    sites = [ss.Site("embedding"), ss.Site("mlp", 0), *(ss.Site("exit", layer) for layer in range(3))]
    alive: list[weakref.ref[Tensor]] = []
    held: list[int] = []

    def norms(x: Tensor) -> Tensor:
        held.append(sum(each() is not None for each in alive))
        alive.append(weakref.ref(x))
        return x.norm(dim=-1)

    edits = {sites[2]: dark}
    whole, found = (
        ss.trace(model, IDS, edits, reads, readout=lambda final, read, weights: dict(read))
        for reads in (sites, {site: norms for site in sites})
    )
    assert list(found) == list(whole) == sites
    for site in sites:
        assert torch.equal(found[site], whole[site].norm(dim=-1)), "after the edit at the same site"
    assert len(held) == len(sites) and max(held) <= 2, "those that the layer at work reads and writes"


def test_reads_come_after_the_edit_at_the_same_site(model: ss.LanguageModel, dark: ss.Filter) -> None:
    sites = [ss.Site("embedding"), ss.Site("exit", 0), ss.Site("mlp", 1), ss.Site("exit", 2)]
    before, after = (
        ss.trace(model, IDS, edits, sites, readout=lambda final, read, weights: dict(read))
        for edits in ({}, {ss.Site("exit", 0): dark})
    )
    states = tiny_models.plain()(IDS, output_hidden_states=True).hidden_states
    assert torch.equal(before[sites[0]], states[0]) and torch.equal(before[sites[1]], states[1])
    assert torch.equal(after[sites[0]], before[sites[0]])
    assert torch.equal(after[sites[1]], dark(before[sites[1]]))
    assert not torch.equal(after[sites[2]], before[sites[2]])


def test_attention_weights_are_those_of_transformers(model: ss.LanguageModel) -> None:
    expected = tiny_models.plain()(IDS, output_attentions=True).attentions
    found = ss.trace(model, IDS, {}, readout=lambda final, read, weights: weights, attention=True)
    assert len(found) == 3 and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_filter_works_in_a_hook_and_in_a_trace_of_ones_own(
    model: ss.LanguageModel, dark: ss.Filter
) -> None:
    expected = tiny_models.logits(model, IDS, {ss.Site("exit", 1): dark})
    twin = tiny_models.plain()
    twin.model.layers[1].register_forward_hook(lambda module, inputs, output: dark(output))
    with torch.no_grad():
        assert torch.equal(twin(IDS).logits, expected)
    with torch.no_grad(), model.nn.trace(input_ids=IDS):
        layer = model.nn.model.layers[1]
        layer.output = dark(layer.output)
        own = save(model.nn.lm_head.output)
    assert torch.equal(own, expected)


def test_tokens_by_id_are_found_at_the_site(model: ss.LanguageModel, dark: ss.Filter) -> None:
    chosen = sorted({int(i) for i in IDS[:, 5]})
    site = ss.Site("exit", 2)
    by_id = ss.trace(model, IDS, {site: dark.at(chosen)}, [site], readout=lambda f, read, w: read[site])
    plain = ss.trace(model, IDS, {}, [site], readout=lambda f, read, w: read[site])
    selected = torch.isin(IDS, torch.tensor(chosen))
    assert torch.equal(by_id[~selected], plain[~selected])
    assert torch.equal(by_id[selected], dark(plain)[selected])


def test_a_model_is_unchanged_after_a_trace(model: ss.LanguageModel, dark: ss.Filter) -> None:
    before = tiny_models.logits(model, IDS, {})
    tiny_models.logits(model, IDS, {ss.Site(kind, 1): dark for kind in ("queries", "mlp", "exit")})
    assert torch.equal(tiny_models.logits(model, IDS, {}), before)


@pytest.mark.parametrize(
    ("site", "message"),
    [
        (ss.Site("exit", 3), "layer 3: .* has layers 0 to 2"),
        (ss.Site("mlp", -1), "layer -1"),
        (ss.Site("head", 1, 4), "head 4: .* has heads 0 to 3"),
    ],
)
def test_sites_that_the_model_lacks(model: ss.LanguageModel, site: ss.Site, message: str) -> None:
    for edits, reads in (({site: lambda x: x}, []), ({}, [site])):
        with pytest.raises(ss.InputError, match=message):
            ss.trace(model, IDS, edits, reads, readout=lambda *_: 0)


def test_what_cannot_be_traced(model: ss.LanguageModel, dark: ss.Filter) -> None:
    with pytest.raises(
        ss.InputError, match=r"function at exit 1 returned shape \(4, 11, 32\) for \(4, 12, 32\)"
    ):
        tiny_models.logits(model, IDS, {ss.Site("exit", 1): lambda x: x[:, 1:]})
    with pytest.raises(ss.InputError, match="begins above layer 1 has sites at or below it"):
        tiny_models.logits(model, IDS, {ss.Site("mlp", 1): dark}, resume=Resume(1, torch.zeros(4, 12, 32)))
    fast = ss.load(tiny_models.build(attention="sdpa"))
    with pytest.raises(ss.InputError, match="'sdpa' attention; load it with attention='eager'"):
        ss.trace(fast, IDS, {}, readout=lambda *_: 0, attention=True)


def test_an_error_of_a_users_function_comes_through(model: ss.LanguageModel) -> None:
    def broken(x: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        tiny_models.logits(model, IDS, {ss.Site("exit", 1): broken})
    tiny_models.logits(model, IDS, {})


@pytest.mark.usefixtures("unchecked")
def test_sites_by_name() -> None:
    assert ss.Site.parse("exit", 2) == ss.Site("exit", 2)
    assert ss.Site.parse("head:3", 1) == ss.Site("head", 1, 3)
    assert ss.Site.parse("embedding", 5) == ss.Site("embedding")
    assert [str(ss.Site.parse(t, 1)) for t in ("mlp", "head:2", "embedding")] == [
        "mlp 1",
        "head 1.2",
        "embedding",
    ]
    assert ss.Site("exit", 0).rank < ss.Site("queries", 1).rank < ss.Site("mlp", 1).rank
    for text in ("exits", "head", "head:x", "mlp:1", ""):
        with pytest.raises(ss.InputError, match="site"):
            ss.Site.parse(text)
    for wrong in (("head", 1), ("exit", 1, 2), ("embedding", 1), ("nowhere", 1)):
        with pytest.raises(ss.InputError, match="site"):
            ss.Site(*wrong)


def calls(module: torch.nn.Module) -> list[int]:
    """Return a list that grows by one with every call of a module."""
    seen: list[int] = []
    module.register_forward_pre_hook(lambda *_: seen.append(1))
    return seen


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("last", [0, 1, 2])
def test_a_pass_may_end_with_a_layer(family: str, last: int) -> None:
    model = ss.load(tiny_models.plain(family))
    layers = [calls(part) for part in model.module.get_submodule(model.layout.layers)]
    norm = calls(model.module.get_submodule(model.layout.final_norm))
    site = ss.Site("exit", last)
    expected = ss.trace(model, IDS, {}, [site], readout=lambda final, read, weights: read[site])
    for seen in (*layers, norm):
        seen.clear()
    final, maps = ss.trace(
        model, IDS, {}, readout=lambda final, read, weights: (final, weights), attention=True, last=last
    )
    assert torch.equal(final, expected) and len(maps) == last + 1
    assert [len(seen) for seen in layers] == [1] * (last + 1) + [0] * (2 - last) and not norm


def test_where_a_pass_cannot_end(model: ss.LanguageModel) -> None:
    for last, sites, message in (
        (3, [], "ends with layer 3: expected 0 to 2"),
        (-1, [], "ends with layer -1"),
        (0, [ss.Site("mlp", 1)], "ends with layer 0 has sites above it"),
    ):
        with pytest.raises(ss.InputError, match=message):
            ss.trace(model, IDS, {}, sites, readout=lambda *_: None, last=last)
    resume = Resume(1, torch.zeros(*IDS.shape, model.d))
    with pytest.raises(ss.InputError, match="ends with layer 1: expected 2 to 2"):
        ss.trace(model, IDS, {}, readout=lambda *_: None, resume=resume, last=1)
    assert deepest([]) == 0 and deepest([ss.Site("exit", 2), ss.Site("embedding")]) == 2


def test_nothing_is_unembedded_where_no_logits_are_read() -> None:
    model = ss.load(tiny_models.plain())
    windows = ss.Windows.of_ids(tiny_models.ids(3, 64), model)
    spectrum, site = ss.read_spectrum(model, bands=8), ss.Site("exit", 0)
    top, unembedded = calls(model.module.model.layers[2]), calls(model.module.lm_head)
    ss.find_sinks(model, windows, spectrum, draws=2)
    ss.attention_by_head(model, windows)
    ss.head_use(model, windows)
    assert top and not unembedded
    top.clear()
    ss.energy(model, windows, spectrum, [site])
    ss.mean_residual(model, windows, site)
    carrier_shares(model, windows, site, {"raw": spectrum.dark()}, [])
    assert not top and not unembedded, "nor do layers run above what is read"


def test_filters_count_positions_from_the_beginning_of_a_text_in_a_cache() -> None:
    model, ids = tiny_models.model(), tiny_models.ids(2, 17)
    dark = ss.read_spectrum(model, bands=4).dark(0.25)
    site = ss.Site("exit", 0)
    for tokens in ("all", "first", "all-but-first", ss.At(0, 9), ids > 50, [7, 8, 9]):
        edits = {site: ss.remove(dark, tokens=tokens)}
        whole = tiny_models.logits(model, ids, edits)
        cache = transformers.DynamicCache(config=model.config)
        parts = [tiny_models.logits(model, part, edits, cache=cache) for part in ids.split(6, 1)]
        torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-4, rtol=1e-4)
    with pytest.raises(ss.InputError, match="need the whole text"):
        tiny_models.logits(model, ids, {site: ss.remove(dark, ss.Noise())}, cache=cache)
