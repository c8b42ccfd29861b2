"""Adapters of peft: every number is that of the model into which they are merged, and of its own logits."""

import copy
import json
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from support import readings, tiny_encoders, tiny_models
from torch import nn

import spectral_sinks as ss
from spectral_sinks.interventions.silencing import mlp_output
from spectral_sinks.models import adapters

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")

WRITERS, READERS = ["o_proj", "down_proj"], ["q_proj", "k_proj", "v_proj", "up_proj", "gate_proj"]
ADAPTERS = ("lora_", "ia3_", "modules_to_save", "ln_tuning", "trainable_tokens")
ALL = [*WRITERS, *READERS]


def lora(targets: list[str], **options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(
        **{"r": 4, "lora_dropout": 0.5, "task_type": "CAUSAL_LM"} | options, target_modules=targets
    )


def adapted(config: Any, family: str = "llama", seed: int = 0, **sizes: Any) -> Any:
    """Return a model of peft whose adapter is random, in training mode, in which dropout would act."""
    made: Any = peft.get_peft_model(tiny_models.build(family, **sizes), config)
    randomise(made, seed)
    return made.train()


def randomise(model: Any, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if any(
                part in name for part in ("lora_", "ia3_", "modules_to_save", "ln_tuning", "trainable_tokens")
            ):
                if "magnitude" in name or "ia3_" in name:
                    weight.mul_(1 + 0.5 * torch.rand(weight.shape, generator=generator))
                elif "lora_" in name:
                    weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
                else:
                    weight.add_(0.3 * torch.randn(weight.shape, generator=generator))


def loaded(model: Any) -> ss.LanguageModel:
    return ss.load(model, tokenizer=tiny_models.tokenizer())


CONFIGS: dict[str, Any] = {
    "lora on everything": lora(ALL),
    "lora on the head": lora([*ALL, "lm_head"]),
    "lora on the embedding": lora([*ALL, "embed_tokens"]),
    "lora with a bias": lora(READERS[:3], lora_bias=True, lora_dropout=0.0),
    "rank-stabilised lora": lora(ALL, use_rslora=True),
    "dora": lora([*ALL, "lm_head"], use_dora=True, lora_dropout=0.0),
    "ia3": peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"],
        feedforward_modules=["down_proj"],
        task_type="CAUSAL_LM",
    ),
    "modules to save": lora(["q_proj"], modules_to_save=["lm_head", "embed_tokens"]),
    "tokens to train": lora(["q_proj"], trainable_token_indices=[3, 5, 8]),
    "norms": peft.LNTuningConfig(
        target_modules=["input_layernorm", "post_attention_layernorm", "model.norm"], task_type="CAUSAL_LM"
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_number_is_that_of_the_merged_model(name: str) -> None:
    family = "qwen2" if "bias" in name else "llama"
    model = adapted(CONFIGS[name], family, tie_word_embeddings=False)
    base = readings.readings(loaded(tiny_models.build(family, tie_word_embeddings=False)))
    merged = copy.deepcopy(model).merge_and_unload()
    found = readings.readings(loaded(model))
    readings.assert_same(found, readings.readings(loaded(merged)))
    changed = readings.differ(found, base)
    assert {"exit 0 nll", "exit 0 kl"} <= changed, "the adapter counts"
    if name in ("lora on the head", "dora", "modules to save"):
        assert "unembedding raw" in changed
    if name in ("lora on the embedding", "modules to save", "tokens to train"):
        assert "embedding raw" in changed
    if "everything" in name:
        assert {
            "head write",
            "head 1.1 nll",
            "o 1 0",
            "q 1 0",
            "k 1 0",
            "v 1 0",
            "up 1 -1",
            "down 1 -1",
        } <= changed
        assert f"{readings.NAMED} raw" in changed
    if name == "norms":
        assert {"final gain", "unembedding folded", "unembedding centred"} <= changed


@pytest.mark.parametrize("family", ["gpt2", "gemma3", "qwen3", "phi3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_families_and_half_precision(family: str, dtype: torch.dtype) -> None:
    targets = {
        "gpt2": ["c_attn", "c_proj", "c_fc"],
        "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    }
    named = "transformer.h.1.mlp.c_fc.weight" if family == "gpt2" else "model.layers.1.mlp.down_proj.weight"
    model = peft.get_peft_model(
        tiny_models.build(family).to(dtype), lora(targets.get(family, ALL)), autocast_adapter_dtype=False
    )
    randomise(model)
    model.eval()
    merged = copy.deepcopy(model).merge_and_unload()
    found, expected = (readings.readings(loaded(each), named) for each in (model, merged))
    if dtype == torch.float32:
        readings.assert_same(found, expected)
    else:
        weights = [name for name in expected if "nll" not in name and " kl" not in name]
        weights = [name for name in weights if name not in ("head use", "lens")]
        readings.assert_same(*({name: each[name] for name in weights} for each in (found, expected)), 0.03)


@pytest.mark.parametrize("tied", [False, True])
def test_the_nll_is_that_of_the_wrapper(tied: bool) -> None:
    model = adapted(lora([*ALL, "lm_head", "embed_tokens"]), tie_word_embeddings=tied)
    ours = loaded(model)
    ids = tiny_models.ids()
    with torch.no_grad():
        logits = model.eval()(input_ids=ids).logits
    torch.testing.assert_close(tiny_models.logits(ours, ids, {}), logits, rtol=1e-4, atol=1e-4)
    nll = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert ss.evaluate(ours, ss.Windows.of_ids(ids, ours), {}).nll == pytest.approx(float(nll), abs=1e-5)
    assert not ours.tied, "the adapters of embedding and head differ"
    if tied:
        with model.disable_adapter():
            assert loaded(model).tied


def test_a_head_site_counts_the_adapter_of_its_head() -> None:
    model = adapted(lora(["o_proj"]))
    ours, ids = loaded(model), tiny_models.ids()

    def without(module: nn.Module, given: Any) -> Any:
        x = given[0].clone()
        x[..., 8:16] = 0
        return (x,)

    handle = model.base_model.model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(without)
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).logits
    handle.remove()
    found = tiny_models.logits(ours, ids, {ss.Site("head", 1, 1): lambda x: x * 0})
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_several_active_disabled_and_merged_adapters() -> None:
    first, second = lora(ALL), lora(["o_proj", "lm_head"], r=2)
    model = adapted(first)
    model.add_adapter("second", second)
    randomise(model, 1)
    ours = loaded(model)
    seen: dict[str, tuple[dict[str, torch.Tensor], str]] = {}

    def look(name: str, names: list[str]) -> None:
        merged = copy.deepcopy(model).merge_and_unload(adapter_names=names) if names else tiny_models.build()
        found = readings.readings(ours)
        readings.assert_same(found, readings.readings(loaded(merged)))
        seen[name] = found, ours.fingerprint

    look("first", ["default"])
    model.set_adapter("second")
    look("second", ["second"])
    model.base_model.set_adapter(["default", "second"])
    look("both", ["default", "second"])
    with model.disable_adapter():
        look("none", [])
    model.set_adapter("default")
    model.merge_adapter()
    readings.assert_same(readings.readings(ours), seen["first"][0])
    assert len({fingerprint for _, fingerprint in seen.values()}) == 4
    for a in seen:
        for b in seen:
            assert a == b or "exit 0 nll" in readings.differ(seen[a][0], seen[b][0])


def test_adapters_that_transformers_adds_itself() -> None:
    module = tiny_models.build()
    module.add_adapter(lora(ALL))
    randomise(module)
    merged = peft.get_peft_model(tiny_models.build(), lora(ALL))
    randomise(merged)
    found = readings.readings(loaded(module.train()))
    readings.assert_same(found, readings.readings(loaded(merged.eval().merge_and_unload())))


def test_lora_on_a_bert_head() -> None:
    bert = peft.get_peft_model(
        tiny_models.build("bert"), peft.LoraConfig(r=2, target_modules=["dense", "query"])
    )
    randomise(bert)
    merged = copy.deepcopy(bert).merge_and_unload()
    words = tiny_models.encoder_tokenizer()
    models = [ss.load(each, tokenizer=words) for each in (bert, merged)]
    windows = [ss.Windows.of_ids(tiny_models.ids(), model) for model in models]
    nll = [ss.evaluate(model, each, {}).nll for model, each in zip(models, windows, strict=True)]
    assert nll[0] == pytest.approx(nll[1], abs=1e-5)
    shares = [
        ss.residual.weight_shares(model, {"x": ss.random_subspace(32, 4, 0)})["share"].to_numpy()
        for model in models
    ]
    assert shares[0] == pytest.approx(shares[1], abs=1e-5)


def test_an_image_encoder_with_an_adapter(tmp_path: Path) -> None:
    tiny_encoders.build("vit classifier").save_pretrained(tmp_path / "base")
    base = transformers.ViTForImageClassification.from_pretrained(tmp_path / "base")
    names = ["q_proj", "v_proj", "o_proj", "fc1", "fc2", "projection", "classifier"]
    model: Any = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=names))
    randomise(model)
    model.save_pretrained(tmp_path / "adapter")
    merged = copy.deepcopy(model).merge_and_unload()
    found, expected = ss.load_vision(model), ss.load_vision(merged)
    by_folder = ss.load_vision(tmp_path / "adapter")
    subspaces = {"x": ss.random_subspace(found.d, 4, 0)}
    plain = ss.load_vision(tiny_encoders.build("vit classifier"))
    for each in (found, by_folder):
        for matrix in ("embedding", "classifier"):
            a, b, c = (
                ss.read_spectrum(m, matrix, bands=1, use_cache=False).values for m in (each, expected, plain)
            )
            assert torch.allclose(a, b, atol=1e-5) and not torch.allclose(a, c, atol=1e-2)
        a, b = (ss.residual.weight_shares(m, subspaces)["share"].to_numpy() for m in (each, expected))
        assert a == pytest.approx(b, abs=1e-5)
    assert type(mlp_output(found, 1)).__module__.startswith("peft"), "whose input are the neurons"
    read = ss.read_spectrum(tmp_path / "adapter", "classifier", bands=1, use_cache=False).values
    assert torch.allclose(read, ss.read_spectrum(expected, "classifier", bands=1).values, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=2, task_type="CAUSAL_LM"),
        lora(["o_proj"], alora_invocation_tokens=[3, 4], lora_dropout=0.0),
    ],
    ids=lambda config: str(config.peft_type),
)
@pytest.mark.filterwarnings("ignore")
def test_adapters_that_do_more_than_weights_do_are_refused(config: Any) -> None:
    model = peft.get_peft_model(tiny_models.build(), config)
    with pytest.raises(ss.InputError, match="does more than weights do, such as adding tokens"):
        ss.load(model)


def test_experts_with_an_adapter_are_refused() -> None:
    config = peft.LoraConfig(
        r=2, target_modules=[], target_parameters=["mlp.experts.gate_up_proj"], task_type="CAUSAL_LM"
    )
    model = loaded(peft.get_peft_model(tiny_models.build("gpt_oss"), config))
    with pytest.raises(ss.InputError, match=r"in a ParamWrapper, which .*merge an adapter"):
        ss.residual.weight_shares(model, {"x": ss.random_subspace(model.d, 4, 0)})


def test_a_model_with_an_adapter_is_not_handed_to_other_processes() -> None:
    import pickle

    with pytest.raises(ss.InputError, match=r"has adapters, .*merge the adapters first"):
        pickle.dumps(loaded(adapted(lora(["o_proj"]))))


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path, Any]:
    """A model's folder, that of an adapter alone, and the model of peft."""
    base = tiny_models.save(tmp_path / "base")
    module = transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    model = peft.get_peft_model(module, lora([*ALL, "lm_head"]))
    randomise(model)
    model.save_pretrained(tmp_path / "adapter")
    return base, tmp_path / "adapter", model.eval()


def test_a_folder_of_an_adapter_loads_with_its_base(folders: tuple[Path, Path, Any]) -> None:
    base, adapter, model = folders
    found = ss.load(adapter, attention="eager")
    assert found.name == str(adapter) and found.bos == tiny_models.BOS, "the tokenizer of the base"
    readings.assert_same(readings.readings(found), readings.readings(loaded(model)))
    by_folder = ss.read_spectrum(adapter, use_cache=False)
    expected = ss.read_spectrum(found, use_cache=False)
    assert torch.equal(by_folder.values, expected.values)
    assert not torch.allclose(by_folder.values, ss.read_spectrum(base).values, rtol=1e-3)


def test_folders_of_adapters_that_cannot_be_loaded(
    folders: tuple[Path, Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter, model = folders
    with pytest.raises(ss.InputError, match=r"holds an adapter and no model: load both by load\(.*or name"):
        ss.describe(adapter)
    with monkeypatch.context() as patch:
        patch.setattr(adapters, "find_spec", lambda name: None)
        with pytest.raises(ss.InputError, match="holds an adapter, which peft loads: pip install peft"):
            ss.load(adapter)
    written = json.loads((adapter / "adapter_config.json").read_text())
    (base / "adapter_config.json").write_text(json.dumps(written))
    with pytest.raises(ss.InputError, match="holds a model and an adapter, and which of them is meant"):
        ss.load(base)
    (base / "adapter_config.json").unlink()
    (adapter / "adapter_config.json").write_text(json.dumps(written | {"base_model_name_or_path": None}))
    with pytest.raises(ss.InputError, match="does not name the model that it adapts: load that model"):
        ss.load(adapter)
    (adapter / "adapter_config.json").write_text(json.dumps(written | {"base_model_name_or_path": str(base)}))
    torch.save(peft.get_peft_model_state_dict(model), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(ss.InputError, match="a pickled adapter can run code"):
        ss.load(adapter)
    assert ss.load(adapter, allow_pickle=True).layers == 3


def test_peft_is_not_imported_for_a_model_without_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "peft")
    assert loaded(tiny_models.build()).layers == 3 and "peft" not in sys.modules
