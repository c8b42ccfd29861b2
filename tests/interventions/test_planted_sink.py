"""A sink built by hand along a direction of one band: removing that band, and no other, destroys it."""

import pytest
import torch
import transformers
from torch import Tensor

import spectral_sinks as ss

D, HEADS, VOCABULARY, BANDS = 40, 5, 90, 20
FIRST = [1, 10, 20]
"""The head of the spectrum, its middle, its dark tail."""


def gaussian(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sinking(band: int) -> tuple[ss.LanguageModel, ss.Spectrum, ss.Windows]:
    """Every query asks for the first direction of a band of W_U, which token 0 alone carries."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=D,
        num_hidden_layers=3,
        num_attention_heads=HEADS,
        intermediate_size=48,
        max_position_embeddings=64,
        attention_bias=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e9},
    )
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    left = torch.linalg.qr(gaussian(VOCABULARY, D, seed=1).double()).Q
    right = torch.linalg.qr(gaussian(D, D, seed=2).double()).Q
    carrier = right[:, 2 * (band - 1)].float()
    slow = torch.zeros(D // HEADS)
    slow[3] = 1.0  # the pair of dimensions that RoPE hardly turns
    with torch.no_grad():
        for index, parameter in enumerate(p for p in model.parameters() if p.ndim == 2):
            parameter.copy_(0.05 * gaussian(*parameter.shape, seed=10 + index))
        model.lm_head.weight.copy_((left * torch.linspace(10, 1, D, dtype=torch.float64)) @ right.T)
        words = gaussian(VOCABULARY, D, seed=3)
        words -= (words @ carrier).outer(carrier)
        words[0] += 30 * carrier
        model.model.embed_tokens.weight.copy_(words)
        for layer in model.model.layers:
            attention = layer.self_attn
            attention.q_proj.weight.zero_()
            attention.q_proj.bias.copy_(slow.repeat(HEADS) * 10)
            attention.k_proj.weight.copy_(slow.repeat(HEADS).outer(carrier))
            for projection in (attention.k_proj, attention.v_proj, attention.o_proj):
                projection.bias.zero_()
    ids = torch.randint(1, VOCABULARY, (3, 64), generator=torch.Generator().manual_seed(4))
    ids[:, 0] = 0
    loaded = ss.load(model)
    return loaded, ss.read_spectrum(loaded, bands=BANDS), ss.Windows.of_ids(ids, loaded)


@pytest.mark.parametrize("band", FIRST)
def test_removing_the_band_of_the_sink_and_no_other_destroys_it(band: int) -> None:
    model, spectrum, windows = sinking(band)
    exit0 = ss.Site("exit", 0)
    cells = {str(j): {exit0: ss.remove(spectrum.band(j))} for j in range(1, BANDS + 1)}
    effects = ss.evaluate_all(model, windows, cells)
    uniform = sum(1 / n for n in range(1, 65)) / 64
    assert ss.uniform_attention() == pytest.approx(uniform) and round(uniform, 4) == 0.0741
    for j in range(1, BANDS + 1):
        before, after = effects[str(j)].baseline_sink_mass, effects[str(j)].sink_mass
        assert before is not None and after is not None
        assert min(before) > 0.9, "every layer has the sink"
        assert after[0] == before[0], "below the site nothing changes"
        if j == band:
            assert after[1] == pytest.approx(uniform, abs=0.01)
        else:
            assert min(after) > 0.9


@pytest.mark.parametrize("band", FIRST)
def test_keeping_spares_the_sink_only_with_its_band(band: int) -> None:
    model, spectrum, windows = sinking(band)
    specs = ("3-9", f"3-9,{band}")
    cells = {spec: {ss.Site("exit", 0): ss.keep(spectrum.subspace(spec))} for spec in specs}
    without, spared = (effect.sink_mass for effect in ss.evaluate_all(model, windows, cells).values())
    assert without is not None and without[1] < 0.09
    assert spared is not None and min(spared) > 0.9


def test_the_first_token_alone_carries_it_and_a_swap_spares_it() -> None:
    model, spectrum, windows = sinking(20)
    removed = ss.remove(spectrum.dark())
    filters = {
        "first": removed.at("first"),
        "others": removed.at("all-but-first"),
        "swap": removed.filled(ss.Swap()),
        "keys": removed,
    }
    sites = dict.fromkeys(filters, ss.Site("exit", 0)) | {"keys": ss.Site("keys", 1)}
    cells = {name: {sites[name]: f} for name, f in filters.items()}
    mass = {name: effect.sink_mass for name, effect in ss.evaluate_all(model, windows, cells).items()}
    assert all(layers is not None for layers in mass.values())
    assert mass["first"][1] < 0.09
    assert min(mass["others"]) > 0.9
    assert min(mass["swap"]) > 0.9, "position 0 is one token in every document"
    assert mass["keys"][1] < 0.09 and mass["keys"][2] > 0.9, "only the keys of layer 1 went without"
    queries = ss.evaluate(model, windows, {ss.Site("queries", 1): removed}).sink_mass
    assert queries is not None and queries[1] > 0.9, "queries fire without reading it"
