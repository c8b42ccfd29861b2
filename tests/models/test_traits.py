"""What a short pass shows of a family: edits equal hooks by hand, and what is lacking is refused."""

import copy
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support import tiny_models
from torch import Tensor

import spectral_sinks as ss
from spectral_sinks.models.attention_sdpa import whole_maps

SCRIPT = Path(__file__).parents[2] / "docs" / "generate_families.py"
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
D, HEADS, TOKENS = 32, 4, 12
IDS = torch.randint(2, 96, (2, TOKENS), generator=torch.Generator().manual_seed(3))
TURN = torch.eye(D) + 0.4 * torch.randn(D, D, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def tiny() -> Callable[[str], tuple[Any, ss.LanguageModel]]:
    build = runpy.run_path(str(SCRIPT))["build"]

    def make(family: str) -> tuple[Any, ss.LanguageModel]:
        plain = build(family)
        return plain, ss.load(copy.deepcopy(plain))

    return make


def logits(model: ss.LanguageModel, site: ss.Site, edit: Callable[[Tensor], Tensor]) -> Tensor:
    return tiny_models.logits(model, IDS, {site: edit})


def hooked(plain: Any, *handles: Any) -> Tensor:
    with torch.no_grad():
        expected = plain(IDS, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return expected


@pytest.mark.parametrize("kind", ["queries", "keys", "values"])
@pytest.mark.parametrize(
    ("family", "blocks", "name", "order"),
    [
        ("GPT-BigCode", "transformer.h", "attn.c_attn", "blocks"),
        ("GPT-BigCode, multi_query off", "transformer.h", "attn.c_attn", "heads"),
        ("Falcon 7B", "transformer.h", "self_attention.query_key_value", "blocks"),
        ("Falcon 40B", "transformer.h", "self_attention.query_key_value", "groups"),
        ("BLOOM", "transformer.h", "self_attention.query_key_value", "heads"),
    ],
)
def test_a_fused_matrix_is_taken_apart_as_the_family_does(
    kind: Any, family: str, blocks: str, name: str, order: str, tiny: Any
) -> None:
    plain, model = tiny(family)
    assert model.layout.fused == order
    layer = plain.get_submodule(f"{blocks}.1")
    norm = layer.get_submodule(model.layout.attention_norm)
    size, place = D // HEADS, ["queries", "keys", "values"].index(kind)
    rows = torch.arange(layer.get_submodule(name).weight.numel() // D)
    if order == "heads":
        chosen = rows.view(HEADS, 3, size)[:, place].flatten()
    elif order == "groups":  # two groups of two queries, a key and a value
        chosen = rows.view(2, 4, size)[:, [[0, 1], [2], [3]][place]].flatten()
    else:
        chosen = rows.split([D, size, size])[place]
    seen: list[Tensor] = []

    def entry(_: Any, given: Any, named: Any) -> None:
        seen.append(given[0] if given else named["hidden_states"])

    def replaced(module: Any, _: Any, output: Tensor) -> Tensor:
        changed = output.clone()
        changed[..., chosen] = module.forward(norm(seen[-1] @ TURN))[..., chosen]
        return changed

    handles = (
        layer.register_forward_pre_hook(entry, with_kwargs=True),
        layer.get_submodule(name).register_forward_hook(replaced),
    )
    expected = hooked(plain, *handles)
    assert (expected - hooked(plain)).abs().max() > 1e-3
    assert torch.allclose(logits(model, ss.Site(kind, 1), lambda x: x @ TURN), expected, atol=1e-4)


@pytest.mark.parametrize("family", ["Phi", "Cohere", "StableLM, parallel", "GPT-J", "Falcon 7B"])
def test_an_mlp_that_shares_its_norm_with_attention_reads_an_edit_alone(family: str, tiny: Any) -> None:
    plain, model = tiny(family)
    layer = plain.get_submodule(model.layout.layers)[1]
    norm = layer.get_submodule(model.layout.attention_norm)
    seen: list[Tensor] = []
    handles = (
        layer.register_forward_pre_hook(
            lambda _, given, named: seen.append(given[0] if given else named["hidden_states"]),
            with_kwargs=True,
        ),
        layer.mlp.register_forward_pre_hook(lambda _, given: (norm.forward(seen[-1] @ TURN),)),
    )
    expected = hooked(plain, *handles)
    assert (expected - hooked(plain)).abs().max() > 1e-3
    assert torch.allclose(logits(model, ss.Site("mlp-input", 1), lambda x: x @ TURN), expected, atol=1e-4)


@pytest.mark.parametrize("head", [0, 1, 3])
def test_a_head_whose_values_are_narrower_than_its_queries(head: int, tiny: Any) -> None:
    plain, model = tiny("MiMo-V2-Flash")
    projection = plain.model.layers[1].self_attn.o_proj
    assert model.value_size == projection.in_features // HEADS == 6
    kept = (torch.arange(24) // 6 != head).float()
    expected = hooked(plain, projection.register_forward_pre_hook(lambda _, given: (given[0] * kept,)))
    assert torch.allclose(logits(model, ss.Site("head", 1, head), lambda x: x * 0), expected, atol=1e-5)
    assert len(ss.head_use(model, ss.Windows.of_ids(IDS, model), position=0)) > 0


def test_sites_see_what_is_added_where_the_model_multiplies_it(tiny: Any) -> None:
    plain, model = tiny("Granite")
    assert model.layout.traits.write_factor == 0.22 and model.layout.traits.logit_factor == 1 / 8
    assert torch.allclose(tiny_models.logits(model, IDS, {}), hooked(plain), atol=1e-5)
    layer = plain.model.layers[1]

    def shifted(_: Any, __: Any, output: Any) -> Any:
        return (output[0] + 1 / 0.22, *output[1:]) if isinstance(output, tuple) else output + 1 / 0.22

    for kind, part in (("attention", layer.self_attn), ("mlp", layer.mlp)):
        expected = hooked(plain, part.register_forward_hook(shifted))
        assert torch.allclose(logits(model, ss.Site(kind, 1), lambda x: x + 1), expected, atol=1e-5)
    kept = (torch.arange(D) // 8 != 2).float()
    expected = hooked(
        plain, layer.self_attn.o_proj.register_forward_pre_hook(lambda _, given: (given[0] * kept,))
    )
    assert torch.allclose(logits(model, ss.Site("head", 1, 2), lambda x: x * 0), expected, atol=1e-5)


def test_a_read_is_what_a_module_returned_before_the_model_added_to_it(tiny: Any) -> None:
    plain, model = tiny("Falcon 7B")
    kept: list[Tensor] = []
    hook = plain.transformer.h[1].mlp.register_forward_hook(lambda _, __, output: kept.append(output.clone()))
    hooked(plain, hook)
    site = ss.Site("mlp", 1)
    read = ss.trace(model, IDS, {}, [site], readout=lambda _, read, __: read[site].clone())
    assert torch.allclose(read, kept[0], atol=1e-5)


def test_layers_without_attention_have_no_attention_site_and_no_rows(tiny: Any) -> None:
    _, model = tiny("Qwen3-Next")
    windows = ss.Windows.of_ids(IDS, model)
    assert model.attention_layers == (1,)
    assert set(ss.attention_by_head(model, windows, length=TOKENS)["layer"]) == {1}
    with pytest.raises(ss.InputError, match=r"layer 0 of .* has no softmax attention; the layers 1 have"):
        logits(model, ss.Site("attention", 0), lambda x: x)
    with pytest.raises(ss.InputError, match=r"2 of 3 layers of .*, such as 0, have none"):
        ss.attention.attention_by_position(model, windows, length=TOKENS)
    with pytest.raises(ss.InputError, match="needs softmax attention in every layer"):
        ss.residual.mean_values(model, windows)


@pytest.mark.parametrize(
    ("family", "site", "message"),
    [
        ("Gemma 4", ss.Site("mlp", 1), "what its MLP adds to the residual stream is not the output of a"),
        ("MiniMax", ss.Site("attention", 0), "what its attention adds to the residual stream is not"),
        ("DeepSeek V3", ss.Site("keys", 1), "its keys come from a matrix that keys and"),
        ("CodeGen", ss.Site("queries", 1), "does not act on its attention as one of these should"),
        ("DiffLlama", ss.Site("head", 1, 0), "its heads share what W_O reads in another way"),
    ],
)
def test_a_site_that_a_family_lacks_is_refused_with_the_reason(
    family: str, site: ss.Site, message: str, tiny: Any
) -> None:
    _, model = tiny(family)
    with pytest.raises(ss.InputError, match=message):
        logits(model, site, lambda x: x)


def test_what_heads_write_is_refused_where_a_norm_lies_before_the_projection(tiny: Any) -> None:
    _, model = tiny("BitNet")
    with pytest.raises(ss.InputError, match="something other than a gate before W_O, such as a norm"):
        ss.head_use(model, ss.Windows.of_ids(IDS, model), position=0)


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("Gemma 3n", "does not pass one residual stream from layer to layer"),
        ("OpenAI GPT", "has no norm between its last layer and its unembedding"),
    ],
)
def test_a_model_that_cannot_be_measured_is_refused_at_load(family: str, message: str, tiny: Any) -> None:
    with pytest.raises(ss.InputError, match=message):
        tiny(family)


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("LongCat-Flash", r"has 2 modules of attention \('self_attn' is a list\)"),
        ("HRM-Text", r"are in 2 lists \(model.L_module.layers, model.H_module.layers\)"),
    ],
)
def test_a_stack_of_another_form_is_refused_as_what_it_is(family: str, message: str, tiny: Any) -> None:
    with pytest.raises(ss.InputError, match=message):
        tiny(family)


def test_a_model_that_does_not_run_is_refused_with_the_reason() -> None:
    attention: Any = {"kv_n_heads": 2, "clip_qkv": None, "rope_theta": 10000.0}
    mlp: Any = {"ffn_hidden_size": 48}
    config = transformers.DbrxConfig(
        vocab_size=96, d_model=D, n_heads=HEADS, n_layers=1, attn_config=attention, ffn_config=mlp
    )
    with pytest.raises(ss.InputError, match="does not run on 5 tokens in transformers itself"):
        ss.load(transformers.DbrxForCausalLM(config))


def test_recurrent_layers_of_the_same_name_have_no_attention(tiny: Any) -> None:
    plain, model = tiny("RecurrentGemma")
    assert model.attention_layers == (2,)
    removed = logits(model, ss.Site("attention", 2), lambda x: x * 0)
    attention = plain.model.layers[2].temporal_block
    handle = attention.register_forward_hook(lambda _, __, output: (output[0] * 0, *output[1:]))
    torch.testing.assert_close(removed, hooked(plain, handle), rtol=1e-4, atol=1e-5)
    with pytest.raises(ss.InputError, match=r"layer 0 of .* has no softmax attention"):
        logits(model, ss.Site("head", 0, 1), lambda x: x)


def test_the_head_of_a_modernbert_decoder_reads_through_its_transform(tiny: Any, tmp_path: Path) -> None:
    plain, model = tiny("ModernBERT decoder")
    expected = "model.final_norm, lm_head.dense, an activation and lm_head.norm"
    plain.save_pretrained(tmp_path)
    assert model.reads_through == expected
    assert ss.read_spectrum(tmp_path, use_cache=False).reads_through == expected
    assert ss.describe(tmp_path)["reads_through"] == expected
    gain = plain.lm_head.norm.weight.detach().double()
    weight = plain.decoder.weight.detach().double()
    for given in (tmp_path, model):
        found = ss.read_spectrum(given, convention="folded", use_cache=False)
        torch.testing.assert_close(found.values, torch.linalg.svdvals(weight * gain))


def test_a_mixture_of_attention_experts_has_maps_and_no_heads(tiny: Any) -> None:
    plain, model = tiny("JetMoE")
    windows = ss.Windows.of_ids(IDS, model)
    table = ss.attention_by_head(model, windows, length=TOKENS)
    with torch.no_grad():
        maps = plain(IDS, output_attentions=True, use_cache=False).attentions
    truth = torch.stack([each[..., 0].mean((0, 2)) for each in maps]).flatten().double()
    got = table.groupby(["layer", "head"])["attention"].mean().to_numpy()
    torch.testing.assert_close(torch.tensor(got), truth, rtol=1e-5, atol=1e-6)
    with pytest.raises(ss.InputError, match=r"no module was found that is W_O .*'attention_projection'"):
        logits(model, ss.Site("head", 1, 0), lambda x: x)
    with pytest.raises(ss.InputError, match="is not W_O times their values"):
        ss.head_use(model, windows, position=0)


@pytest.mark.parametrize("family", ["Granite, sliding windows", "Granite MoE, sliding windows", "gpt-oss"])
def test_attention_received_counts_a_learned_sink_wherever_it_is_read(family: str, tiny: Any) -> None:
    plain, model = tiny(family)
    windows = ss.Windows.of_ids(IDS, model)
    maps = runpy.run_path(str(SCRIPT))["eager_maps"](plain, IDS)
    truth = torch.stack([each[..., 0].mean((0, 2)) for each in maps]).double()
    assert (torch.stack([each.sum(-1) for each in maps]) < 0.99).any()
    by_head = ss.attention_by_head(model, windows, length=TOKENS)
    got = by_head.groupby(["layer", "head"])["attention"].mean().to_numpy().reshape(truth.shape)
    torch.testing.assert_close(torch.tensor(got), truth, rtol=1e-5, atol=1e-6)
    by_position = ss.attention.attention_by_position(model, windows, length=TOKENS)
    alpha = torch.as_tensor(by_position.alpha[..., 0]).mean(0).double()
    torch.testing.assert_close(alpha, truth, rtol=1e-5, atol=1e-6)
    with whole_maps(model):
        read = ss.trace(model, IDS, {}, readout=lambda final, read, weights: weights, attention=True)
    for one, other in zip(read, maps, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert model.config._attn_implementation == "eager"


def test_the_padding_row_that_transformers_sets_to_zero_is_zero_in_the_spectrum(
    tiny: Any, tmp_path: Path
) -> None:
    plain, _ = tiny("Youtu")
    plain.save_pretrained(tmp_path)
    stored = plain.lm_head.weight.detach().double()
    assert stored[plain.config.pad_token_id].norm() > 0.5
    loaded = ss.load(tmp_path)
    zeroed = stored.clone()
    zeroed[plain.config.pad_token_id] = 0
    assert torch.equal(loaded.unembedding_weight.double(), zeroed)
    for given in (tmp_path, loaded):
        for matrix in ("unembedding", "embedding"):
            found = ss.read_spectrum(given, matrix, use_cache=False)
            torch.testing.assert_close(found.values, torch.linalg.svdvals(zeroed))


def test_maps_and_what_attention_adds_are_read_in_one_pass_of_bloom(tiny: Any) -> None:
    """Its attention returns the sum with the residual: what is added is W_O, which comes before the maps."""
    plain, model = tiny("BLOOM")
    site, kept = ss.Site("attention", 1), list[Tensor]()
    read, maps = ss.trace(
        model, IDS, {}, [site], readout=lambda _, read, maps: (read[site], torch.stack(maps)), attention=True
    )
    dense = plain.transformer.h[1].self_attention.dense
    handle = dense.register_forward_hook(lambda _, __, out: kept.append(out))
    with torch.no_grad():
        expected = plain(IDS, output_attentions=True, use_cache=False).attentions
    handle.remove()
    assert torch.allclose(read, kept[0], atol=1e-5)
    assert torch.allclose(maps, torch.stack(expected), atol=1e-5)
    with pytest.raises(ss.InputError, match="does not run its attention through transformers'"):
        ss.head_use(model, ss.Windows.of_ids(IDS, model), position=0)
