"""Gates between attention and W_O, learned sinks and routed experts, against loops in float64 over what the
families' own classes compute.
"""

import copy
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from support import planted_circuits
from support.planted_circuits import GATED, HEAD, HEADS, LAYER, MORE, SIZE, VOCABULARY, D, gaussian
from torch import Tensor

import spectral_sinks as ss
from spectral_sinks.measure.attention.capture import show_attention
from spectral_sinks.models.attention_capture import AttentionCall
from spectral_sinks.models.weights import head_weights

POSITION, TOKENS = 2, 9
LAGUNA = planted_circuits.SIZES | planted_circuits.EXPERTS | {"shared_expert_intermediate_size": 16}
HYBRID = {"layer_types": ["linear_attention", "full_attention", "full_attention"]}
CONFIGS = MORE | {
    "qwen3_next": ("Qwen3NextConfig", MORE["qwen3_next"][1] | HYBRID),
    "laguna": ("LagunaConfig", LAGUNA | {"gating": "per-head"}),
}
IDS = torch.randint(1, VOCABULARY, (2, TOKENS), generator=torch.Generator().manual_seed(2))


class Seen(NamedTuple):
    """What the family's own class computed in one layer, float64."""

    maps: Tensor
    values: Tensor
    """By query head, as `[windows, heads, tokens, size]`."""
    gates: Tensor
    read: Tensor
    """What W_O reads, in the same shape."""


def random(family: str) -> Any:
    """Make a model of the family's own class whose gates, sinks and attention differ between tokens."""
    name, sizes = CONFIGS[family]
    module: Any = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, name)(**sizes), attn_implementation="eager"
    )
    with torch.no_grad():
        for index, (path, parameter) in enumerate(module.named_parameters()):
            random = gaussian(*parameter.shape, seed=index)
            if path.endswith("sinks"):
                parameter.copy_(random)
            elif parameter.ndim > 1:
                parameter.copy_(1.2 * random / parameter.shape[-1] ** 0.5)
    return module.eval()


def seen(module: Any, layer: int) -> Seen:
    """Read one layer of the class's own forward pass, with the gate by the formula of its source."""
    twin: Any = copy.deepcopy(module).double()
    twin.config._experts_implementation = "eager"  # the others have no float64
    attention = twin.model.layers[layer].self_attn
    kept: dict[str, Tensor] = {}
    names = ("q_proj", "v_proj", "gate_proj", "g_proj")
    for name in (name for name in names if hasattr(attention, name)):
        part = getattr(attention, name)
        part.register_forward_hook(lambda _, __, out, name=name: kept.__setitem__(name, out))
    attention.o_proj.register_forward_pre_hook(lambda _, given: kept.__setitem__("read", given[0]))
    attention.register_forward_hook(lambda _, __, out: kept.__setitem__("maps", out[1]))
    with torch.no_grad():
        twin(IDS, output_attentions=True, use_cache=False)

    def by_head(x: Tensor) -> Tensor:
        return x.view(*IDS.shape, -1, SIZE).transpose(1, 2)

    values = by_head(kept["v_proj"])
    values = values.repeat_interleave(HEADS // values.shape[1], dim=1)
    if "gate_proj" in kept:
        gates = by_head(kept["gate_proj"]).sigmoid()
    elif "g_proj" in kept:
        factor = torch.nn.functional.softplus(kept["g_proj"])
        whole = factor.shape[-1] > HEADS
        gates = by_head(factor) if whole else factor.transpose(1, 2)[..., None].expand_as(values)
    elif kept["q_proj"].shape[-1] == 2 * HEADS * SIZE:
        gates = kept["q_proj"].view(*IDS.shape, HEADS, 2 * SIZE)[..., SIZE:].transpose(1, 2).sigmoid()
    else:
        gates = torch.ones_like(values)
    found = Seen(kept["maps"].double(), values, gates, by_head(kept["read"]))
    assert torch.allclose(found.gates * (found.maps @ found.values), found.read, atol=1e-6)
    return found


@pytest.mark.parametrize("family", ["qwen3_next", "afmoe", "laguna", "gpt_oss", "mixtral"])
def test_head_use_is_that_of_a_loop_over_queries_and_tokens(family: str) -> None:
    module = random(family)
    model = ss.load(copy.deepcopy(module))
    assert model.layout.traits.gated == (family in (*GATED, "laguna"))
    use = ss.head_use(model, ss.Windows.of_ids(IDS, model), POSITION)
    table = use.set_index(["document", "layer", "head"])
    assert sorted(set(use["layer"])) == list(model.attention_layers)
    layer = model.attention_layers[-1]
    truth, writes = seen(module, layer), head_weights(model, layer)
    for window in range(2):
        for head in (0, 3):
            maps, gates = truth.maps[window, head], truth.gates[window, head]
            write = writes[head].folded().double()
            # what token j adds to query i: the weight, the gate of the query, the value, W_O
            added = (gates[:, None] * truth.values[window, head]) @ write
            queries = range(POSITION + 1, TOKENS)
            norms = torch.stack([added[i].norm(dim=-1) for i in queries])
            parts = torch.stack([maps[i, :, None] * added[i] for i in queries])
            update, sizes = parts.sum(1), parts.norm(dim=-1)
            singular = torch.linalg.svdvals(update).square()
            row = table.loc[(window, layer, head)]
            rows = maps[list(queries)]
            expected = {
                "attention": rows[:, POSITION].mean(),
                "weighted": sizes[:, POSITION].sum() / sizes.sum(),
                "value_ratio": norms[:, POSITION].mean() / norms.mean(),
                "stable_rank": singular.sum() / singular[0],
                "to_sink_logit": 1 - rows.sum(-1).mean(),
                "gate": gates[list(queries)].mean(),
            }
            for name, value in expected.items():
                assert row[name] == pytest.approx(float(value), rel=2e-3, abs=2e-5), name


@pytest.mark.parametrize("family", ["qwen3_next", "laguna"])
def test_the_value_of_a_sink_lies_in_the_bands_that_the_gate_lets_through(family: str) -> None:
    module = random(family)
    model = ss.load(copy.deepcopy(module))
    spectrum = ss.read_spectrum(model, use_cache=False)
    found = ss.no_op_circuits(model, ss.Windows.of_ids(IDS, model), spectrum, POSITION)
    assert sorted(set(found.heads["layer"])) == list(model.attention_layers)
    layer, head = model.attention_layers[-1], 1
    truth = seen(module, layer)
    write = head_weights(model, layer)[head].folded().double()
    shares = found.value_shares.set_index(["document", "layer", "head"])
    for window in range(2):
        gates = truth.gates[window, head, POSITION + 1 :]
        written = gates * truth.values[window, head, POSITION] @ write
        bands = (written @ spectrum.vectors.double()).square().sum(0)
        energy = torch.stack([bands[a:b].sum() for a, b in pairwise(spectrum.edges)])
        row = torch.tensor(shares.loc[(window, layer, head)].to_numpy())
        assert torch.allclose(row, energy / energy.sum(), atol=1e-4)
    dark = found.heads.set_index(["layer", "head"]).loc[(layer, head), "key_dark"]
    assert dark == pytest.approx(float(found.key_shares[layer, head, -1]))


@pytest.mark.parametrize("family", ["qwen3_next", "afmoe"])
@pytest.mark.parametrize("opens", [False, True])
def test_a_strong_value_behind_a_shut_gate_is_a_no_op(family: str, opens: bool) -> None:
    """The value of the sink is strong in half of the head's channels; the gate is shut, or open, in these."""
    model, windows = planted_circuits.made(family, "broadcast")
    shut = torch.arange(SIZE) < SIZE // 2
    rows = planted_circuits.parts(model, LAYER, HEAD)
    gate = rows.get("gate")
    if gate is None:
        whole = model.module.model.layers[LAYER].self_attn.gate_proj.weight.detach()
        gate = whole.view(HEADS, SIZE, D)[HEAD]
    with torch.no_grad():
        rows["v"][~shut, planted_circuits.MARK] = 0
        gate.zero_()  # the channel that all tokens carry asks for the gate
        gate[shut, planted_circuits.ALWAYS] = 20.0 if opens else -20.0
        gate[~shut, planted_circuits.ALWAYS] = 20.0
    found = ss.no_op_circuits(model, windows, ss.read_spectrum(model, use_cache=False))
    row = found.heads.set_index(["layer", "head"]).loc[(LAYER, HEAD)]
    assert row["gate"] == pytest.approx(1.0 if opens else 0.5, abs=0.01)
    assert row["use"] == ("broadcast" if opens else "no-op")
    assert found.found == ([] if opens else [(LAYER, HEAD)])


@pytest.mark.parametrize("logit", [-2.0, 1.5])
def test_attention_to_no_token_is_that_of_the_learned_logit(logit: float) -> None:
    """All scores are 0: query i gives `e^s / (i + 1 + e^s)` to the logit s, and the rest in equal parts."""
    module = random("gpt_oss")
    with torch.no_grad():
        attention = module.model.layers[LAYER].self_attn
        attention.q_proj.weight.zero_()
        attention.q_proj.bias.zero_()
        attention.sinks.fill_(logit)
    model = ss.load(module)
    use = ss.head_use(model, ss.Windows.of_ids(IDS, model), 0)
    here = use[use["layer"] == LAYER]
    visible = torch.arange(2, TOKENS + 1)
    whole = visible + torch.tensor(logit).exp()
    assert here["to_sink_logit"].to_numpy() == pytest.approx(float(1 - (visible / whole).mean()), rel=1e-4)
    assert here["attention"].to_numpy() == pytest.approx(float((1 / whole).mean()), rel=1e-4)


def test_an_edit_of_what_queries_read_leaves_the_gate_as_it_is() -> None:
    """One matrix makes queries and gates in Qwen3-Next."""
    model = ss.load(random("qwen3_next"))
    windows, gates = ss.Windows.of_ids(IDS, model), list[Tensor]()

    def keep(call: AttentionCall, places: list[int]) -> None:
        if call.layer == LAYER:
            assert call.gate is not None
            gates.append(call.gate)

    show_attention(model, windows, [keep])
    part = model.module.model.layers[LAYER].self_attn.q_proj
    index = model.projection_index("queries")
    outputs: list[Tensor] = []
    handle = part.register_forward_hook(lambda _, __, out: outputs.append(out.detach()))
    read: list[Tensor] = []
    other = model.module.model.layers[LAYER].self_attn.o_proj.register_forward_pre_hook(
        lambda _, given: read.append(given[0].detach())
    )
    site = ss.Site("queries", LAYER)
    edited = ss.trace(model, IDS, {site: lambda x: 0 * x}, readout=lambda final, *_: final.clone())
    plain = ss.trace(model, IDS, {}, readout=lambda final, *_: final.clone())
    handle.remove()
    other.remove()
    assert not torch.allclose(edited, plain)
    # queries are 0, so that attention is uniform, and the gate is that of the unedited residual
    values = seen(model.module, LAYER).values
    uniform = torch.ones(TOKENS, TOKENS, dtype=torch.float64).tril()
    uniform = uniform / uniform.sum(-1, keepdim=True)
    expected = (gates[0].double() * (uniform @ values)).transpose(1, 2).flatten(2)
    assert torch.allclose(read[0].double(), expected, atol=1e-4)
    assert len(index) == HEADS * SIZE and len(outputs) >= 2
