"""What heads do with their sink, against eager attention and a loop over pairs of tokens."""

import json
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from support import tiny_models
from torch import Tensor

import spectral_sinks as ss
from spectral_sinks.measure.circuits import qk_detectors
from spectral_sinks.measure.circuits.bands import key_directions
from spectral_sinks.measure.circuits.heads import use_of, use_table
from spectral_sinks.measure.circuits.no_op import conditions
from spectral_sinks.measure.circuits.qk_detectors import Placed
from spectral_sinks.models import attention_capture as attending_module
from spectral_sinks.models.attention_capture import AttentionCall, attending
from spectral_sinks.models.norms import gain_of
from spectral_sinks.models.rotary import arranged, key_gain, key_norm, key_turns, unturned_keys
from spectral_sinks.models.weights import attention_weights

TOKENS, POSITION = 14, 3


def watched(family: str, ids: Tensor, *paths: str) -> tuple[Any, dict[str, list[Tensor]]]:
    """Run a plain model and keep its eager maps, and what some modules of every layer returned."""
    plain, model = tiny_models.plain(family), tiny_models.model(family)
    seen: dict[str, list[Tensor]] = {path: [] for path in paths}
    handles = [
        block.get_submodule(path).register_forward_hook(lambda *given, p=path: seen[p].append(given[2]))
        for block in plain.get_submodule(model.layout.layers)
        for path in paths
    ]
    with torch.no_grad():
        output = plain(ids, output_attentions=True, use_cache=False)
    for handle in handles:
        handle.remove()
    return output, seen


def windows(model: ss.LanguageModel, rows: int = 3, tokens: int = TOKENS) -> ss.Windows:
    return ss.Windows.of_ids(tiny_models.ids(rows, tokens), model)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_head_use_is_that_of_a_loop_over_tokens(family: str) -> None:
    model = tiny_models.model(family)
    layout, ids = model.layout, tiny_models.ids(2, TOKENS)
    output, seen = watched(family, ids, layout.values)
    found = ss.head_use(model, ss.Windows.of_ids(ids, model), POSITION).set_index(
        ["document", "layer", "head"]
    )
    for layer in range(model.layers):
        values = seen[layout.values][layer][..., model.projection_index("values")]
        values = values.view(2, TOKENS, -1, model.head_size).double()
        gain = torch.ones(model.d)
        if layout.attention_write != layout.attention:
            block = model.module.get_submodule(f"{layout.layers}.{layer}")
            gain = gain_of(block.get_submodule(layout.attention_write), model.d)
        for window in range(2):
            for head in (0, 3):
                weights = output.attentions[layer][window, head].double()
                write = (model.head_write(layer, head).detach() * gain).double()
                value = values[window, :, head * model.key_heads // model.heads] @ write
                queries = [i for i in range(TOKENS) if weights[i, POSITION] > 0 and i != POSITION]
                pairs = torch.stack([weights[i, :, None] * value for i in queries])
                norms, update = pairs.norm(dim=-1), pairs.sum(1)
                singular = torch.linalg.svdvals(update)
                row = found.loc[(window, layer, head)]
                on = weights[queries, POSITION]
                assert row["attention"] == pytest.approx(float(on.mean()), rel=1e-4)
                assert row["weighted"] == pytest.approx(
                    float(norms[:, POSITION].sum() / norms.sum()), rel=1e-4
                )
                assert row["queries_on_sink"] == pytest.approx(float((on >= 0.5).double().mean()))
                lengths = value.norm(dim=-1)
                assert row["value_ratio"] == pytest.approx(
                    float(lengths[POSITION] / lengths.mean()), rel=1e-4
                )
                stable = float(singular.square().sum() / singular[0] ** 2)
                assert row["stable_rank"] == pytest.approx(stable, rel=1e-4)


@pytest.mark.parametrize(
    "family", [f for f in tiny_models.FAMILIES if f != "gemma2"]
)  # whose scores are capped
def test_the_margin_is_that_of_the_logarithms_of_eager_attention(family: str) -> None:
    model, ids = tiny_models.model(family), tiny_models.ids(2, TOKENS)
    output, _ = watched(family, ids)
    found = ss.circuits.detectors(model, ss.Windows.of_ids(ids, model), POSITION)
    table = found.table.set_index(["document", "layer", "head"])["margin"]
    for layer, maps in enumerate(output.attentions):
        for window in range(2):
            for head in range(model.heads):
                logs = maps[window, head].double().log()
                seen = torch.isfinite(logs)
                gaps: list[float] = []
                for i in range(POSITION + 1, TOKENS):
                    others = [j for j in range(TOKENS) if seen[i, j] and j != POSITION]
                    if seen[i, POSITION] and others:
                        gaps.append(float(logs[i, POSITION] - logs[i, others].mean()))
                assert table[window, layer, head] == pytest.approx(np.mean(gaps), abs=2e-5)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
@pytest.mark.parametrize("tokens", [2, 4, 9])  # as many as key heads, where heads and tokens look alike
def test_turned_keys_are_those_of_the_call(family: str, tokens: int) -> None:
    model, place = ss.load(tiny_models.plain(family)), tokens - 1
    turns = key_turns(model, place)
    errors: list[float] = []
    with unturned_keys(model) as unturned:

        def check(call: AttentionCall) -> None:
            before = arranged(unturned[call.layer], call)[:, :, place].double()
            after = call.key[:, :, place]
            errors.append(float((before @ turns[call.layer] - after).abs().max() / after.abs().max()))

        with torch.no_grad(), attending(model, check):
            model.module(tiny_models.ids(3, tokens), use_cache=False)
    assert len(errors) == model.layers and max(errors) < 1e-5


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_the_key_direction_reads_what_the_mode_reads(family: str) -> None:
    """Along windows, the key side follows `residual . direction` over the norms' scales, up to a constant."""
    model, ids = tiny_models.model(family), tiny_models.ids(12, 6)
    rows = ss.Windows.of_ids(ids, model)
    found = ss.circuits.detectors(model, rows, 4)
    directions = key_directions(model, found)
    keys: dict[int, Tensor] = {}
    before: dict[int, Tensor] = {}
    layer = 1
    with unturned_keys(model), attending(model, lambda call: keys.__setitem__(call.layer, call.key)):
        site = ss.Site("exit", 0)
        entry = ss.trace(model, ids, {}, [site], readout=lambda final, read, weights: read[site])
        path = f"{model.layout.layers}.{layer}.{model.layout.keys}"
        hook = model.module.get_submodule(path).register_forward_hook(
            lambda *given: before.__setitem__(0, given[2][..., model.projection_index("keys")])
        )
        with torch.no_grad():
            model.module(ids, use_cache=False)
        hook.remove()
    x = entry[:, 4].double()
    centred = x - x.mean(-1, keepdim=True) if model.centres_residual else x
    scale = centred.square().mean(-1).sqrt() if model.layout.attention_norm else torch.ones(len(x))
    raw = before[0][:, 4].double()
    norm = key_norm(model, layer)
    for head in range(model.heads):
        shared = head * model.key_heads // model.heads
        side = keys[layer][:, shared, 4].double() @ found.modes[layer].key[head, :, 0]
        part = raw if norm is not None and norm.weight.numel() > model.head_size else None
        if norm is not None:
            own = raw.view(len(x), -1, model.head_size)[:, shared] if part is None else part
            side = side * (own.square().mean(-1) + 1e-6).sqrt()
        expected = x @ directions[layer, head] / scale
        offset = side - expected
        assert float(offset.std() / side.std()) < 1e-3
    assert key_gain(model, layer).shape == (model.key_heads, model.head_size)


def test_all_modes_make_the_margin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qk_detectors, "KEPT", 10**6)
    model = tiny_models.model("qwen3")
    found = ss.circuits.detectors(model, windows(model), POSITION)
    assert found.ranks.shape[-1] == model.head_size
    assert np.allclose(found.table["top_two"], 1, atol=1e-6)
    assert torch.allclose(found.controls[..., -1], torch.ones(()).double(), atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_oss"])
def test_batches_and_blocks_change_nothing(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_models.model(family)
    rows = ss.Windows.of_ids([*tiny_models.ids(3, 12), *tiny_models.ids(2, 9, seed=1)], model)
    plain = tiny_models.logits(model, tiny_models.ids(2, 12), {})
    once = ss.head_use(model, rows), ss.circuits.detectors(model, rows).table
    monkeypatch.setattr(attending_module, "WEIGHTS", 200)
    again = ss.head_use(model, rows, batch_size=1), ss.circuits.detectors(model, rows, batch_size=1).table
    for one, other in zip(once, again, strict=True):
        pd.testing.assert_frame_equal(one, other, rtol=1e-3, atol=1e-4)
    assert torch.equal(tiny_models.logits(model, tiny_models.ids(2, 12), {}), plain)


def test_queries_before_the_sink_count_where_attention_runs_both_ways() -> None:
    model, ids = ss.load(tiny_models.plain()), tiny_models.ids(2, TOKENS)
    maps: list[Tensor] = []

    def both_ways(call: AttentionCall) -> AttentionCall:
        maps.append(replace(call, causal=False, mask=None).weights())
        return replace(call, causal=False, mask=None)

    with attending(model, both_ways):
        use = ss.head_use(model, ss.Windows.of_ids(ids, model), POSITION)
        margins = ss.circuits.detectors(model, ss.Windows.of_ids(ids, model), POSITION).table
    others = [i for i in range(TOKENS) if i != POSITION]
    for layer in range(model.layers):
        on = maps[layer][:, :, others, POSITION]
        assert np.allclose(use.loc[use["layer"] == layer, "attention"], on.mean(-1).flatten(), atol=1e-6)
        logs = maps[layer].log()[:, :, others]
        gaps = (logs[..., POSITION] - logs[..., others].mean(-1)).mean(-1)
        assert np.allclose(margins.loc[margins["layer"] == layer, "margin"], gaps.flatten(), atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt_neox"])
def test_keys_are_placed_where_the_sink_is(family: str) -> None:
    """In layer 0, where a key depends on its own token alone: each token is put at the sink's position."""
    model, ids = ss.load(tiny_models.plain(family)), tiny_models.ids(1, 7)
    moved = ids.repeat(7, 1)
    moved[:, POSITION] = ids[0]
    kept: dict[str, Tensor] = {}
    turns = key_turns(model, POSITION)
    with unturned_keys(model) as unturned:

        def look(call: AttentionCall) -> None:
            if call.layer == 0:
                kept["placed"] = Placed(turns, unturned, torch.full((7,), POSITION)).keys(
                    call, list(range(len(call.key)))
                )
                kept["keys"] = call.key.repeat_interleave(call.groups, dim=1).double()

        with torch.no_grad(), attending(model, look):
            model.module(moved, use_cache=False)
            expected = kept["keys"][:, :, POSITION].transpose(0, 1)
            model.module(ids, use_cache=False)
    others = [j for j in range(7) if j != POSITION]
    expected = expected - expected[:, others].mean(1, keepdim=True)
    assert torch.allclose(kept["placed"][0], expected, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("position", [1, 3])
def test_detectors_are_the_singular_vectors_of_all_scores(position: int) -> None:
    """Without rotations: every number of a head recomputed from the matrix of its queries' scores."""
    model, ids = tiny_models.model("gpt2"), tiny_models.ids(1, TOKENS)
    calls: dict[int, AttentionCall] = {}
    with attending(model, lambda call: calls.__setitem__(call.layer, call)), torch.no_grad():
        model.module(ids, use_cache=False)
    found = ss.circuits.detectors(model, ss.Windows.of_ids(ids, model), position)
    table = found.table.set_index(["layer", "head"])
    queries, others = TOKENS - position - 1, [j for j in range(TOKENS) if j != position]
    orders: list[list[int]] = []
    for layer, call in calls.items():
        for head in range(model.heads):
            asks = call.query[0, head, position + 1 :].double() * call.scaling
            key = call.key[0, head].double()
            before = [[j for j in range(i + 1) if j != position] for i in range(position + 1, TOKENS)]
            u, s, vt = torch.linalg.svd(asks @ (key - key[others].mean(0)).T)
            size = model.head_size
            left, right = u[:, :size] * queries**0.5, vt[:size].T * TOKENS**0.5
            strength = s[:size] / (queries * TOKENS) ** 0.5
            against = torch.stack([right[position] - right[seen].mean(0) for seen in before])
            parts = (left * strength * against).mean(0)
            order, margin, row = parts.argsort(descending=True), float(parts.sum()), table.loc[(layer, head)]
            carried = parts[order].cumsum(0)
            orders.append(order[:2].tolist())
            assert row["margin"] == pytest.approx(margin, abs=1e-6)
            assert found.ranks[layer, head].tolist() == [place + 1 for place in order[:2].tolist()]
            assert [row["top_one"], row["top_two"]] == pytest.approx(
                (carried[:2] / margin).tolist(), rel=1e-3
            )
            enough = [n for n in range(1, size + 1) if carried[n - 1] >= margin / 2]
            assert int(found.needed[layer, head]) == (enough[0] if margin > 0 else 0)
            query, side = left[:, order[0]], right[:, order[0]] / right[position, order[0]]
            assert row["always_on"] == pytest.approx(float(query.mean() ** 2 / (query**2).mean()), rel=1e-3)
            assert row["rival"] == pytest.approx(max(0.0, float(side[others].max())), rel=1e-3)
            root = strength[order[:2]].sqrt()
            for sides, expected in (
                (found.query_sides[layer][head, position + 1 :], left[:, order[:2]] * root),
                (found.key_sides[layer][head], right[:, order[:2]] * root),
            ):
                assert torch.allclose(sides.abs(), expected.abs(), rtol=1e-3, atol=1e-6)
            values, vectors = torch.linalg.eigh(asks.T @ asks / queries)
            whiten, colour = (vectors * values**power @ vectors.T for power in (-0.5, 0.5))
            gaps = torch.stack([key[position] - key[seen].mean(0) for seen in before])
            form = whiten @ (asks.T @ gaps / queries) @ colour
            for seed in (0, 7):
                normal = torch.randn(
                    size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
                )
                basis = torch.linalg.qr(normal).Q
                drawn = (basis.T @ form @ basis).diagonal().sort(descending=True).values[:2].cumsum(0)
                assert torch.allclose(found.controls[layer, head, seed], drawn / margin, rtol=1e-3)
    assert any(order != sorted(order) for order in orders), "the strongest mode is not always the leading one"
    assert (found.needed == 0).any() and (found.needed > 0).any()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_a_sink_at_another_position_of_each_window(family: str) -> None:
    """Margins and uses are those of each window alone; no number knows which window comes first."""
    model, ids, places = tiny_models.model(family), tiny_models.ids(3, TOKENS), [5, 3, 8]
    found = ss.circuits.detectors(model, ss.Windows.of_ids(ids, model), places, batch_size=2)
    use = ss.head_use(model, ss.Windows.of_ids(ids, model), places, batch_size=2)
    for window, place in enumerate(places):
        one = ss.Windows.of_ids(ids[window : window + 1], model)
        alone = ss.circuits.detectors(model, one, place).table["margin"].to_numpy()
        together = found.table.loc[found.table["document"] == window, "margin"].to_numpy()
        assert together == pytest.approx(alone, abs=1e-5)
        alone = ss.head_use(model, one, place).drop(columns="document")
        together = use[use["document"] == window].drop(columns="document").reset_index(drop=True)
        pd.testing.assert_frame_equal(together, alone, rtol=1e-4)
    turned = ss.circuits.detectors(model, ss.Windows.of_ids(ids.flip(0), model), places[::-1])
    table = turned.table.assign(document=2 - turned.table["document"])
    table = table.sort_values(["document", "layer", "head"], ignore_index=True)
    pd.testing.assert_frame_equal(table, found.table, rtol=5e-3, atol=1e-4)
    assert torch.equal(turned.ranks, found.ranks) and torch.equal(turned.needed, found.needed)
    assert torch.allclose(found.turns, key_turns(model, 5)) and found.shown == 5
    assert torch.allclose(turned.turns, key_turns(model, 8)) and turned.shown == 8
    longer = ss.Windows.of_ids([ids[0, :9], ids[1], ids[2]], model)
    longest = ss.circuits.detectors(model, longer, places)
    assert longest.shown == 3 and longest.key_sides[0].shape[1] == TOKENS, "the first longest window"


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_bands_of_values_and_readings_recomputed(family: str) -> None:
    model, ids, places = tiny_models.model(family), tiny_models.ids(3, TOKENS), [5, 3, 8]
    layout, spectrum = model.layout, ss.read_spectrum(model, bands=8)
    windows = ss.Windows.of_ids(ids, model, [0, 0, 1])
    found = ss.no_op_circuits(model, windows, spectrum, places, batch_size=2)
    _, seen = watched(family, ids, layout.values)
    bands, edges = [str(band) for band in range(1, 9)], spectrum.edges

    def by_band(x: Tensor, y: Tensor) -> Tensor:
        products = (x @ spectrum.vectors) * (y @ spectrum.vectors)
        parts = torch.stack([products[a:b].sum() for a, b in pairwise(edges)])
        return parts / parts.sum()

    sites = [ss.Site("embedding"), ss.Site("exit", 0), ss.Site("exit", 1)]
    stream = ss.trace(model, ids, {}, sites, readout=lambda final, read, weights: read)
    for layer in range(model.layers):
        block = model.module.get_submodule(f"{layout.layers}.{layer}")
        write = layout.attention_write
        gain = (
            torch.ones(model.d) if write == layout.attention else gain_of(block.get_submodule(write), model.d)
        )
        values = seen[layout.values][layer][..., model.projection_index("values")]
        values = values.view(3, TOKENS, -1, model.head_size).double()
        residuals = [stream[sites[layer]][w, place].double() for w, place in enumerate(places)]
        energy = torch.stack([by_band(x, x) for x in residuals])
        table = found.sink_shares[found.sink_shares["layer"] == layer][bands].to_numpy()
        assert table == pytest.approx(torch.stack([energy[:2].mean(0), energy[2]]).numpy(), abs=1e-6)
        for head in range(model.heads):
            shared = head * model.key_heads // model.heads
            output = (model.head_write(layer, head).detach() * gain).double()
            written = [values[w, place, shared] @ output for w, place in enumerate(places)]
            shares = torch.stack([by_band(x, x) for x in written])
            here = (found.value_shares["layer"] == layer) & (found.value_shares["head"] == head)
            expected = torch.stack([shares[:2].mean(0), shares[2]]).numpy()
            assert found.value_shares.loc[here, bands].to_numpy() == pytest.approx(expected, abs=1e-6)
            row = found.heads[(found.heads["layer"] == layer) & (found.heads["head"] == head)].iloc[0]
            assert row["value_dark"] == pytest.approx(expected[:, -1].mean(), abs=1e-6)
            read = found.read_shares.loc[here, bands].to_numpy()
            assert row["reading_dark"] == pytest.approx(read[:, -1].mean())
            assert row["key_dark"] == pytest.approx(float(found.key_shares[layer, head, -1]))
            assert row["random_top_two"] == float(found.detectors.controls[layer, head, :, 1].max())
            profile = found.profile(layer, head).set_index("what")
            assert profile.loc["value", "share"].to_numpy() == pytest.approx(expected.mean(0), abs=1e-6)
            assert profile.loc["reading", "share"].to_numpy() == pytest.approx(read.mean(0))
            assert profile.loc["reading", "random"].to_numpy() == pytest.approx(table.mean(0))
            assert np.allclose(profile.loc["key direction", "share"], found.key_shares[layer, head])
            sides = found.sides(layer, head)
            assert (sides.loc[5, ["key_1", "key_2"]] > 0).all(), "the sink's, whichever sign a mode came with"
            if family == "gpt2":
                reads = [w for w in attention_weights(model, layer) if w.part == "k"]
                direction = found.detectors.modes[layer].key[head, :, 0] @ reads[head].folded().double()
                parts = torch.stack([by_band(x, direction) for x in residuals])
                mean = torch.stack([parts[:2].mean(0), parts[2]])
                assert read == pytest.approx(mean.numpy(), rel=1e-4, abs=1e-5), (layer, head)
    draws = torch.randn(40_000, model.d, generator=torch.Generator().manual_seed(0)).square()
    sample = (draws[:, edges[-2] :].sum(1) / draws.sum(1)).numpy()
    last = found.profile(0, 0).query("what == 'value' and band == 8").iloc[0]
    assert [last["random"], last["random_low"], last["random_high"]] == pytest.approx(
        [sample.mean(), *np.quantile(sample, [0.025, 0.975])], abs=4e-3
    )


def test_layers_are_summed_up_from_their_heads() -> None:
    """Tables written by hand: two documents, two layers, two heads."""
    model = tiny_models.model()
    found = ss.no_op_circuits(model, windows(model, 2), ss.read_spectrum(model, bands=8))
    places = pd.MultiIndex.from_product([range(2)] * 3, names=["document", "layer", "head"])
    use = pd.DataFrame(
        {
            "attention": [0.8, 0.4, 0.1, 0.3, 0.6, 0.2, 0.5, 0.7],
            "value_ratio": [0.1, 0.3, 0.2, 0.9, 0.21, 0.1, 0.2, 0.2],
        },
        places,
    ).reset_index()
    heads = pd.DataFrame(
        {
            "layer": [0, 0, 0, 0, 1, 1, 1],
            "attention": [0.3, 0.29, 0.9, 0.9, 0.5, 0.5, 0.5],
            "value_ratio": [0.2, 0.1, 0.21, 0.1, 0.1, 0.1, 0.1],
            "modes_needed": [2, 1, 1, 3, 1, 0, 2],
        }
    )
    table = replace(found, use=use, heads=heads).by_layer().set_index("layer")
    assert table["mass"].tolist() == pytest.approx([(0.6 + 0.4) / 2, (0.2 + 0.6) / 2])
    assert table["no_op_mass"].tolist() == pytest.approx([(0.4 + 0.1) / 2, (0.05 + 0.6) / 2])
    assert table["no_op_heads"].tolist() == [2, 3] and table["one_or_two"].tolist() == [1, 2]
    assert (table["mass_low"] <= table["mass"]).all() and (table["mass"] <= table["mass_high"]).all()


def test_half_of_a_query_on_the_sink_is_enough() -> None:
    """Two tokens and no questions: the second puts half of itself on the first, to the bit."""
    model = ss.load(tiny_models.plain())
    for layer in model.module.model.layers:
        layer.self_attn.q_proj.weight.data.zero_()
    use = ss.head_use(model, ss.Windows.of_ids([[3, 4], [5, 6]], model))
    assert (use["attention"] == 0.5).all() and (use["queries_on_sink"] == 1).all() and use["dormant"].all()


def test_a_document_is_dormant_where_nine_tenths_of_queries_are_on_the_sink() -> None:
    model = tiny_models.model()
    shares = (0.899, 0.9, 1.0, 0.0)
    values = torch.tensor([[0.9, 0.5, share, 0.1, 1.0, 0.0, 1.0] for share in shares], dtype=torch.float64)
    frame = use_table([([0], 0, values[None])], windows(model).document)
    assert frame["dormant"].tolist() == [False, True, True, False]
    assert frame["use"].tolist() == ["active", "no-op", "no-op", "active"]


@pytest.mark.parametrize(
    ("change", "lacking"),
    [
        ({}, []),
        ({"attention": 0.29}, ["attention"]),
        ({"value_ratio": 0.21}, ["a sink that writes nothing"]),
        ({"top_two": 0.49}, ["one or two modes"]),
        ({"random_top_two": 0.9}, ["one or two modes"]),
        ({"margin": -1.0}, ["one or two modes"]),
        ({"always_on": 0.79}, ["queries always on"]),
        ({"rival": 0.51}, ["a key of the sink alone"]),
        ({"rival": float("nan")}, ["a key of the sink alone"]),
    ],
)
def test_every_part_of_the_rule_is_needed(change: dict[str, float], lacking: list[str]) -> None:
    row = {"attention": 0.3, "value_ratio": 0.2, "top_two": 0.5, "random_top_two": 0.3, "margin": 1.0}
    row |= {"always_on": 0.8, "rival": 0.5}
    assert [name for name, holds in conditions(row | change).items() if not holds] == lacking


def test_windows_of_a_document_are_averaged() -> None:
    model = tiny_models.model()
    ids = tiny_models.ids(4, 10)
    apart = ss.head_use(model, ss.Windows.of_ids(ids, model))
    pooled = ss.head_use(model, ss.Windows.of_ids(ids, model, [5, 5, 5, 8]))
    three = apart[apart["document"] < 3].groupby(["layer", "head"])["value_ratio"].mean().to_numpy()
    assert np.allclose(pooled.loc[pooled["document"] == 5, "value_ratio"], three)
    assert set(pooled["document"]) == {5, 8}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((False, 0.1, 1.0), "active"),
        ((True, 0.2, 9.0), "no-op"),
        ((True, 0.21, 1.0), "neither"),
        ((True, 0.5, 1.5), "broadcast"),
        ((True, 0.49, 1.5), "neither"),
        ((True, 0.5, 1.51), "neither"),
    ],
)
def test_the_calibrated_rules(given: tuple[bool, float, float], expected: str) -> None:
    assert use_of(*given) == expected


@pytest.mark.parametrize("position", [-1, TOKENS - 1, TOKENS])
def test_a_position_that_nobody_can_attend_to(position: int) -> None:
    model = tiny_models.model()
    for measure in (ss.head_use, ss.circuits.detectors):
        with pytest.raises(ss.InputError, match=f"position {position}.*0 to {TOKENS - 2}"):
            measure(model, windows(model), position)


def test_a_spectrum_of_another_width() -> None:
    model = tiny_models.model()
    other = ss.Spectrum.from_matrix(torch.randn(50, 40, generator=torch.Generator().manual_seed(0)))
    with pytest.raises(ss.InputError, match="width 40"):
        ss.no_op_circuits(model, windows(model), other)


def test_the_command(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_models.save(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(tiny_models.text(40, seed) for seed in range(3)))
    given = ("circuits", folder, "--text", text, "--separator", "\\n\\n", "--length", 24)
    shown = tiny_models.run(capsys, *given)
    assert shown.status == 0 and "none" in shown.out
    ran = tiny_models.run(capsys, *given, "--json", "--position", 2, "--figures", tmp_path / "figures")
    found = json.loads(ran.out)
    assert found["position"] == 2 and found["tokens_per_window"] == 24 and found["documents"] == 3
    assert found["circuits"] == [] and len(found["heads"]) == tiny_models.LAYERS * tiny_models.HEADS
    assert {"attention", "attention_low", "dormant", "use", "lacking", "ranks"} <= set(found["heads"][0])
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["heads.png"]
    failed = tiny_models.run(capsys, *given, "--position", 23)
    assert failed.status == 2 and "position 23" in failed.err


def test_the_embedded_model_has_no_op_circuits(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    ran = tiny_models.run(
        capsys, "circuits", "--documents", 3, "--per-document", 1, "--json", "--figures", tmp_path / "pages"
    )
    found = {(row["layer"], row["head"]): row for row in json.loads(ran.out)["circuits"]}
    assert (1, 3) in found and (2, 3) in found
    assert {f"layer{layer}_head{head}.png" for layer, head in found} | {"heads.png"} == {
        path.name for path in (tmp_path / "pages").iterdir()
    }
    assert all(row["value_ratio"] <= 0.2 and row["top_two"] > row["random_top_two"] for row in found.values())


def test_strength_is_a_mean_over_windows() -> None:
    """Of its part of the scores the root mean square: the same whether a window comes once or four times."""
    model = tiny_models.model("gpt2")
    one, four = (
        ss.circuits.detectors(
            model, ss.Windows.of_ids(tiny_models.ids(1, 20).repeat(count, 1), model, [0] * count)
        )
        for count in (1, 4)
    )
    for once, often in zip(one.modes, four.modes, strict=True):
        assert torch.allclose(once.strength, often.strength, rtol=1e-9)
    assert one.table[["margin", "top_two"]].to_numpy() == pytest.approx(
        four.table[["margin", "top_two"]].to_numpy(), rel=1e-6
    )
