"""A planted spike is traced to the neurons that were planted, and every contribution is recomputed."""

import copy
import json
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from support import tiny_models
from support.planted_circuits import ALWAYS, MARK, MORE, made
from support.planted_sinks import D, gaussian, sinking
from torch import Tensor

import spectral_sinks as ss
from spectral_sinks.interventions.silencing import mlp_output, neuron_count, silenced
from spectral_sinks.measure.sinks import spike_neurons
from spectral_sinks.models.experts import mixture_of
from spectral_sinks.models.weights import mlp_weights

PLANTED, LAYER = (5, 11), 0


@pytest.fixture(scope="module")
def planted() -> tuple[ss.LanguageModel, ss.Windows]:
    """Token 0 carries little at first; two neurons of layer 0 see it and write the carrier, 3 : 1."""
    model, _, windows = sinking(20)
    module = model.module.model
    word = module.embed_tokens.weight[0].detach()
    carrier = word / word.norm()
    mark = torch.linalg.qr(torch.stack([carrier, gaussian(D, seed=8)], 1)).Q[:, 1]
    with torch.no_grad():
        module.embed_tokens.weight[:] -= (module.embed_tokens.weight @ mark).outer(mark)
        module.embed_tokens.weight[0] = 5 * mark
        mlp = module.layers[LAYER].mlp
        for neuron, size in zip(PLANTED, (60.0, 20.0), strict=True):
            for rows in (mlp.gate_proj.weight, mlp.up_proj.weight):
                rows[neuron] = mark
            mlp.down_proj.weight[:, neuron] = size * carrier / 30
    return model, windows


@pytest.fixture(scope="module")
def found(planted: Any) -> ss.sinks.SpikeWriters:
    return ss.spike_writers(*planted, counts=(1, 2), draws=3, batch_size=2)


def test_the_planted_neurons_are_found(found: ss.sinks.SpikeWriters) -> None:
    assert (found.layer, found.position) == (LAYER, 0) and found.cosine > 0.99
    assert tuple(found.neurons["neuron"][:2]) == PLANTED
    ratio = found.neurons["contribution"][0] / found.neurons["contribution"][1]
    assert ratio == pytest.approx(3, rel=1e-3)
    assert tuple(found.neurons["predicted_rank"][:2]) == (1, 2) and found.agreement["top_ten"] >= 2
    assert found.pairs["neuron"][0] == PLANTED[0] and found.pairs["cosine"][0] > 0.95
    assert found.pairs["rank"][0] == 1
    summary = found.summary().set_index("count")
    assert summary.loc[2, "share"] == pytest.approx(1, abs=0.02)
    assert summary.loc[0, "mass_above"] > 0.8 and summary.loc[2, "mass_above"] < 0.3
    assert summary.loc[2, "mass_above_least"] > 0.8 and summary.loc[2, "norm_ratio"] < 1.5
    json.dumps(found.record())


def test_silencing_is_a_zero_before_the_matrix(planted: Any, found: ss.sinks.SpikeWriters) -> None:
    model, windows = planted
    ids = torch.stack(windows.rows)

    def nll() -> Tensor:
        with torch.no_grad():
            logits = model.module(ids).logits[:, :-1].double().transpose(1, 2)
        return torch.nn.functional.cross_entropy(logits, ids[:, 1:], reduction="none").mean(1)

    before, down = nll(), model.module.model.layers[LAYER].mlp.down_proj.weight
    kept = down.detach().clone()
    with torch.no_grad():
        down[:, PLANTED[0]] = 0
    delta = nll() - before
    with torch.no_grad():
        down.copy_(kept)
    rows = found.table[(found.table["count"] == 1) & (found.table["kind"] == "largest at position 0")]
    np.testing.assert_allclose(rows["delta_nll"], delta, atol=1e-5)
    drawn = found.table[(found.table["kind"] == "random") & (found.table["count"] == 2)]
    assert drawn["draw"].nunique() == 3 and len(drawn) == 3 * 3


@pytest.mark.parametrize(
    "family", ["llama", "gemma2", "gemma3", "gpt2", "gpt_neox", "phi3", "qwen2", "qwen3"]
)
def test_contributions_add_up_in_every_family(family: str) -> None:
    model, windows = made(family, place=2)
    found = ss.spike_writers(model, windows, position=2, layer=1, counts=(1,), draws=1)
    site, ids = ss.Site("mlp", 1), torch.stack(windows.rows)
    written = ss.trace(model, ids, {}, [site], readout=lambda f, read, w: read[site].double()[:, 2].mean(0))
    assert found.layers["along_carrier"].notna().all()
    assert found.neurons["contribution"].sum() == pytest.approx(float(written.norm()), rel=1e-3)
    heads = found.heads[found.heads["layer"] == 0]
    if family not in ("gemma2", "gemma3"):  # which have a norm after attention
        assert heads["along_carrier"].sum() == pytest.approx(
            found.layers["attention_along_carrier"][0], rel=1e-3, abs=1e-4
        )


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_the_neurons_of_every_family_are_what_its_matrix_reads(family: str) -> None:
    model = tiny_models.model(family)
    if family == "gpt_oss":
        with pytest.raises(ss.InputError, match="mixture of experts"):
            mlp_output(model, 0)
        return
    (down,) = [weight for weight in mlp_weights(model, 1) if weight.part == "down"]
    assert len(down.rows) == 48 if family != "gpt2" else len(down.rows) == 128
    ids = tiny_models.ids(2, 12)
    every = [(1, neuron) for neuron in range(len(down.rows))]
    site = ss.Site("mlp", 1)

    def mlp() -> Tensor:
        return ss.trace(model, ids, {}, [site], readout=lambda final, read, weights: read[site])

    with silenced(model, neurons=every):
        gone = mlp()
    assert (gone - gone[:1, :1]).abs().max() < 1e-5, "a bias at most is left"
    assert (mlp() - gone).abs().max() > 0.1


def test_silent_heads_are_heads_without_output() -> None:
    for family in ("llama", "gpt2", "gemma2", "gpt_neox", "gpt_oss"):
        model = tiny_models.model(family)
        windows = ss.Windows.of_ids(tiny_models.ids(2, 12), model)
        site = ss.Site("attention", 1)

        def written(edits: Any, model: Any = model, windows: Any = windows, site: Any = site) -> Tensor:
            ids = torch.stack(windows.rows)
            return ss.trace(model, ids, edits, [site], readout=lambda final, read, weights: read[site])

        expected = written({ss.Site("head", 1, head): torch.zeros_like for head in (0, 3)})
        with silenced(model, heads=[(1, 0), (1, 3)]):
            torch.testing.assert_close(written({}), expected, atol=1e-5, rtol=1e-4)


def test_what_has_no_answer_is_refused(planted: Any) -> None:
    model, windows = planted
    for options, said in (
        ({"position": 64}, "the windows have 64 tokens"),
        ({"position": 3}, "no sink at position 3"),
        ({"layer": 2}, "below another layer of softmax attention, and the last .* is 2"),
        ({"counts": (0,)}, "0 silent neurons: layer 0 has 48"),
        ({"counts": (49,)}, "49 silent neurons"),
    ):
        with pytest.raises(ss.InputError, match=said):
            ss.spike_writers(model, windows, **options)
    given, _, texts = sinking(20)
    with torch.no_grad():
        for layer in given.module.model.layers:
            layer.mlp.down_proj.weight.zero_()
    with pytest.raises(ss.InputError, match="the spike has another source"):
        ss.spike_writers(given, texts)
    with pytest.raises(ss.InputError, match="head 5"), silenced(model, heads=[(0, 5)]):
        pass


def test_no_layer_above_the_last_attention_of_a_hybrid_is_an_onset() -> None:
    name, sizes = MORE["qwen3_next"]
    kinds = ["full_attention", "full_attention", "linear_attention", "linear_attention"]
    config = getattr(transformers, name)(**(sizes | {"num_hidden_layers": 4, "layer_types": kinds}))
    module = transformers.AutoModelForCausalLM.from_config(config).eval()
    model = ss.load(module, tokenizer=tiny_models.tokenizer())
    windows = ss.Windows.of_ids(tiny_models.ids(3, 12) % 80, model)
    for layer in (1, 2):
        with pytest.raises(
            ss.InputError, match=rf"layer {layer}: .* softmax attention, and the last .* is 1"
        ):
            ss.spike_writers(model, windows, layer=layer)


EXPERT, NEURON = 2, 5


def mixture(family: str) -> tuple[ss.LanguageModel, ss.Windows]:
    """The router of layer 0 sends the marked token to one expert, one neuron of which writes a direction."""
    model, windows = made(family)
    mlp = model.module.model.layers[0].mlp
    experts, d = mlp.experts, model.d
    direction = torch.nn.functional.normalize(gaussian(d, seed=31), dim=0)
    direction[[MARK, ALWAYS]] = 0
    turned = experts.is_transposed
    with torch.no_grad():
        router: Any = mlp.router if family in ("gpt_oss",) else mlp.gate
        router.weight.zero_()
        router.weight[:, MARK] = torch.tensor([0.0, 1.0, 2.0, 0.5])
        first = experts.gate_up_proj[EXPERT].T if turned else experts.gate_up_proj[EXPERT]
        width = len(first) // 2
        for row in (2 * NEURON, 2 * NEURON + 1) if turned else (NEURON, width + NEURON):
            first[row].zero_()
            first[row, MARK] = 1.0
        down = experts.down_proj[EXPERT] if turned else experts.down_proj[EXPERT].T
        down[NEURON] = 0.15 * direction
    return model, windows


def by_hand(model: ss.LanguageModel, windows: ss.Windows) -> Tensor:
    """Return what each routed neuron of layer 0 adds at position 0, `[windows, neurons, d]`, in float64."""
    mlp = model.module.model.layers[0].mlp
    kept: list[Any] = []
    handle = mlp.experts.register_forward_pre_hook(lambda _, given: kept.extend(given))
    with torch.no_grad():
        model.module(torch.stack(windows.rows), use_cache=False)
    handle.remove()
    x, chosen, weights = kept[0].double(), kept[1], kept[2].double()
    experts, rows = mlp.experts, range(0, len(x), windows.length)
    width = experts.down_proj.shape[1 if experts.is_transposed else 2]
    total = torch.zeros(len(rows), len(experts.down_proj) * width, model.d, dtype=torch.float64)
    for window, row in enumerate(rows):
        for place, expert in enumerate(chosen[row].tolist()):
            both, down = experts.gate_up_proj[expert].double(), experts.down_proj[expert].double()
            if experts.is_transposed:  # gpt-oss
                read = x[row] @ both + experts.gate_up_proj_bias[expert].double()
                gate, up = read[::2].clamp(max=experts.limit), read[1::2].clamp(-experts.limit, experts.limit)
                act = (up + 1) * gate * torch.sigmoid(gate * experts.alpha)
            else:
                gate, up = (both @ x[row]).split(width)
                act, down = torch.nn.functional.silu(gate) * up, down.T
            added = weights[row, place] * act[:, None] * down
            total[window, expert * width : (expert + 1) * width] += added.detach()
    return total


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "qwen3_next", "gpt_oss"])
def test_the_planted_neuron_of_an_expert_is_found(family: str) -> None:
    model, windows = mixture(family)
    found = ss.spike_writers(model, windows, layer=0, counts=(1,), draws=2, batch_size=3)
    parts = by_hand(model, windows)
    width = parts.shape[1] // 4
    top, ids = found.neurons.iloc[0], torch.stack(windows.rows)
    assert (top["expert"], top["neuron"]) == (EXPERT, EXPERT * width + NEURON)
    assert found.pairs["neuron"][0] == top["neuron"] and found.pairs["rank"][0] == 1
    site = ss.Site("mlp", 0)
    written = ss.trace(model, ids, {}, [site], readout=lambda f, read, w: read[site].double()[:, 0].mean(0))
    contribution = (parts.mean(0) @ (written / written.norm())).numpy()
    table = found.neurons.set_index("neuron")["contribution"].sort_index()
    np.testing.assert_allclose(table[: len(contribution)], contribution, rtol=1e-4, atol=1e-7)
    if family != "gpt_oss":  # whose experts have biases
        assert table.sum() == pytest.approx(float(written.norm()), rel=1e-4)
    # a silent neuron is a row of zeros
    changed: Any = copy.deepcopy(model.module)
    down = changed.model.layers[0].mlp.experts.down_proj
    with torch.no_grad():
        (down[EXPERT] if down.shape[1] == width else down[EXPERT].T)[NEURON] = 0

        def nll(module: Any) -> Tensor:
            logits = module(ids).logits[:, :-1].double().transpose(1, 2)
            return torch.nn.functional.cross_entropy(logits, ids[:, 1:], reduction="none").mean(1)

        delta = nll(changed) - nll(model.module)
    rows = found.table[(found.table["count"] == 1) & (found.table["kind"] == "largest at position 0")]
    np.testing.assert_allclose(rows["delta_nll"], delta, atol=1e-5)
    assert float(delta.abs().max()) > 2e-5


@pytest.mark.parametrize("family", ["qwen3_next", "afmoe"])
def test_all_neurons_of_a_mixture_are_what_its_mlp_adds(family: str) -> None:
    """With all of them silent, also those of the shared expert, the MLP of layer 2 adds nothing."""
    model, windows = made(family)
    ids, layer = torch.stack(windows.rows), 2
    every = [(layer, neuron) for neuron in range(neuron_count(model, layer))]
    site = ss.Site("mlp", layer)
    with silenced(model, neurons=every):
        gone = ss.trace(model, ids, {}, [site], readout=lambda final, read, weights: read[site])
    there = ss.trace(model, ids, {}, [site], readout=lambda final, read, weights: read[site])
    assert gone.norm() < 1e-3 * there.norm()
    shared = sum(part == "down" and unit == -1 for part, unit in units(model, layer))
    assert shared == 1 and len(every) == sum(w.rows.shape[0] for w in mlp_weights(model, layer) if w.writes)


def units(model: ss.LanguageModel, layer: int) -> list[tuple[str, int]]:
    return [(weight.part, weight.unit) for weight in mlp_weights(model, layer)]


def test_experts_whose_matrices_are_not_known_are_refused() -> None:
    model, _ = made("mixtral")
    experts = model.module.model.layers[0].mlp.experts
    del experts.is_concatenated
    with pytest.raises(ss.InputError, match="not stored as transformers' interface for experts"):
        mixture_of(model, 0)
    experts.is_concatenated = True
    experts.has_post_expert_norm = True
    with pytest.raises(ss.InputError, match="pass a norm each before they are added"):
        mixture_of(model, 0)


def test_an_mlp_that_returns_one_token_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """OPT flattens the windows before its MLP."""
    config = transformers.OPTConfig(
        vocab_size=50,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        word_embed_proj_dim=32,
    )
    model = ss.load(transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval())
    monkeypatch.setattr(spike_neurons, "EPSILON", 0.0)
    ids = torch.randint(2, 50, (2, 12), generator=torch.Generator().manual_seed(0))
    found = ss.spike_writers(model, ss.Windows.of_ids(ids, model), layer=0, counts=(1,), draws=1)
    kept: list[Tensor] = []
    layer = model.module.model.decoder.layers[0]
    handle = layer.fc2.register_forward_hook(lambda _, __, out: kept.append(out.detach()))
    with torch.no_grad():
        model.module(ids, use_cache=False)
    handle.remove()
    written = kept[0].view(2, 12, 32)[:, 0].double().mean(0)
    along = (written - layer.fc2.bias.detach()) @ (written / written.norm())
    assert found.neurons["contribution"].sum() == pytest.approx(float(along), rel=1e-4)
