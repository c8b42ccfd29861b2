"""Write docs/families.md: what works for each family of models, measured on tiny random models.

python docs/generate_families.py
"""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from transformers.utils import logging

import spectral_sinks as ss
from spectral_sinks.measure.sinks.neuron_contributions import contributions
from spectral_sinks.models.experts import mixture_of

PAGE = Path(__file__).with_name("families.md")
VOCABULARY, D, HEADS, TOKENS = 96, 32, 4, 24
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": D,
    "num_hidden_layers": 3,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
EQUAL = SIZES | {"num_key_value_heads": HEADS}
OLDER = {"vocab_size": VOCABULARY, "n_embd": D, "n_layer": 3, "n_head": HEADS, "n_positions": 128}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
LATENT = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}
LINEAR = {
    "head_dim": 8,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
HEAD = {"head_dim": 8}
FALCON = {k: v for k, v in SIZES.items() if k[:4] in ("voca", "hidd", "num_") and "key" not in k}
OPT = FALCON | {"ffn_dim": 48, "max_position_embeddings": 128, "word_embed_proj_dim": D, "pad_token_id": 1}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("Llama", SIZES),
    "Mistral": ("Mistral", SIZES | {"sliding_window": 8}),
    "Mixtral": ("Mixtral", SIZES | LOCAL),
    "Ministral 3": ("Ministral3", SIZES | HEAD),
    "Qwen 2": ("Qwen2", SIZES),
    "Qwen 2 MoE": ("Qwen2Moe", SIZES | EXPERTS | {"shared_expert_intermediate_size": 16}),
    "Qwen 3": ("Qwen3", SIZES | HEAD),
    "Qwen 3 MoE": ("Qwen3Moe", SIZES | EXPERTS | HEAD),
    "Qwen3-Next": ("Qwen3Next", SIZES | EXPERTS | LINEAR | {"shared_expert_intermediate_size": 16}),
    "Qwen 3.5": ("Qwen3_5Text", SIZES | LINEAR),
    "Qwen 3.5 MoE": (
        "Qwen3_5MoeText",
        SIZES | EXPERTS | LINEAR | {"shared_expert_intermediate_size": 16},
    ),
    "Gemma": ("Gemma", SIZES | HEAD),
    "Gemma 2": ("Gemma2", SIZES | HEAD | {"sliding_window": 8}),
    "Gemma 3": ("Gemma3Text", SIZES | HEAD | {"sliding_window": 8}),
    "Gemma 3n": (
        "Gemma3nText",
        SIZES
        | HEAD
        | {
            "num_hidden_layers": 4,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 8,
            "num_kv_shared_layers": 1,
            "laurel_rank": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "activation_sparsity_pattern": [0.0] * 4,
            "altup_num_inputs": 2,
        },
    ),
    "Gemma 4": (
        "Gemma4Text",
        SIZES
        | HEAD
        | {
            "global_head_dim": 8,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 8,
            "num_kv_shared_layers": 0,
        },
    ),
    "VaultGemma": ("VaultGemma", SIZES | HEAD | {"final_logit_softcapping": 3.0}),
    "RecurrentGemma": (
        "RecurrentGemma",
        SIZES | HEAD | {"lru_width": D, "attention_window_size": 32, "logits_soft_cap": 5.0},
    ),
    "GPT-2": ("GPT2", OLDER),
    "OpenAI GPT": ("OpenAIGPT", OLDER),
    "GPT-BigCode": ("GPTBigCode", OLDER),
    "GPT-BigCode, multi_query off": ("GPTBigCode", OLDER | {"multi_query": False}),
    "GPT-J": ("GPTJ", OLDER | {"rotary_dim": 4}),
    "CodeGen": ("CodeGen", OLDER | {"rotary_dim": 4}),
    "GPT-Neo": (
        "GPTNeo",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": D,
            "num_layers": 4,
            "num_heads": HEADS,
            "max_position_embeddings": 128,
            "attention_types": [[["global", "local"], 2]],
            "window_size": 8,
        },
    ),
    "GPT-NeoX": ("GPTNeoX", SIZES),
    "GPT-NeoX Japanese": ("GPTNeoXJapanese", FALCON | {"max_position_embeddings": 128}),
    "gpt-oss": ("GptOss", SIZES | LOCAL | HEAD),
    "CTRL": ("CTRL", OLDER | {"dff": 48}),
    "OPT": ("OPT", OPT),
    "OPT-350m": ("OPT", OPT | {"word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "BLOOM": ("Bloom", {"vocab_size": VOCABULARY, "hidden_size": D, "n_layer": 3, "n_head": HEADS}),
    "MPT": (
        "Mpt",
        {"vocab_size": VOCABULARY, "d_model": D, "n_layers": 3, "n_heads": HEADS, "max_seq_len": 128},
    ),
    "Falcon 7B": ("Falcon", FALCON | {"multi_query": True}),
    "Falcon 40B": ("Falcon", FALCON | {"num_kv_heads": 2, "new_decoder_architecture": True}),
    "Falcon RW": (
        "Falcon",
        FALCON | {"multi_query": False, "parallel_attn": False, "alibi": True, "bias": True},
    ),
    "Phi": ("Phi", SIZES),
    "Phi-3, Phi-4": ("Phi3", SIZES),
    "Phi-3.5 MoE": ("Phimoe", SIZES | LOCAL),
    "Persimmon": ("Persimmon", SIZES),
    "BioGPT": ("BioGpt", {key: size for key, size in SIZES.items() if "key_value" not in key}),
    "XGLM": (
        "XGLM",
        {"vocab_size": VOCABULARY, "d_model": D, "num_layers": 3, "attention_heads": HEADS, "ffn_dim": 48},
    ),
    "StableLM": ("StableLm", SIZES),
    "StableLM, parallel": ("StableLm", SIZES | {"use_parallel_residual": True}),
    "StarCoder 2": ("Starcoder2", SIZES),
    "Cohere": ("Cohere", SIZES | {"logit_scale": 0.25}),
    "Cohere 2": ("Cohere2", SIZES | {"logit_scale": 0.25, "sliding_window": 8}),
    "Granite": ("Granite", SIZES | {"logits_scaling": 8.0, "residual_multiplier": 0.22}),
    "Granite MoE": ("GraniteMoe", SIZES | LOCAL | {"logits_scaling": 6.0, "residual_multiplier": 0.22}),
    "Granite MoE, shared expert": ("GraniteMoeShared", SIZES | LOCAL | {"shared_intermediate_size": 32}),
    "Granite, sliding windows": ("GraniteSWA", SIZES),
    "Granite MoE, sliding windows": ("GraniteMoeSWA", SIZES | LOCAL),
    "Granite hybrid": (
        "GraniteMoeHybrid",
        SIZES
        | LOCAL
        | {
            "layer_types": ["mamba", "attention", "mamba"],
            "shared_intermediate_size": 32,
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_d_state": 8,
            "mamba_n_groups": 1,
            "mamba_chunk_size": 16,
            "logits_scaling": 6.0,
            "residual_multiplier": 0.22,
        },
    ),
    "HyperCLOVA X": ("HyperCLOVAX", SIZES | {"logits_scaling": 0.5}),
    "MiniCPM3": (
        "MiniCPM3",
        EQUAL | LATENT | {"dim_model_base": 8, "scale_depth": 1.4, "scale_emb": 12},
    ),
    "OLMo": ("Olmo", SIZES),
    "OLMo 2": ("Olmo2", SIZES),
    "OLMo 3": ("Olmo3", SIZES | {"sliding_window": 8}),
    "OLMoE": ("Olmoe", SIZES | EXPERTS),
    "GLM": ("Glm", SIZES | HEAD),
    "GLM-4": ("Glm4", SIZES | HEAD),
    "GLM-4 MoE": ("Glm4Moe", SIZES | HEAD | ROUTED),
    "DeepSeek V3": ("DeepseekV3", EQUAL | LATENT | ROUTED),
    "Youtu": ("Youtu", EQUAL | LATENT),
    "LongCat-Flash": (
        "LongcatFlash",
        LATENT
        | {
            "vocab_size": VOCABULARY,
            "hidden_size": D,
            "num_layers": 2,
            "num_attention_heads": HEADS,
            "head_dim": 4,
            "n_routed_experts": 4,
            "zero_expert_num": 2,
            "moe_topk": 2,
            "ffn_hidden_size": 48,
            "expert_ffn_hidden_size": 16,
            "max_position_embeddings": 128,
        },
    ),
    "JetMoE": (
        "JetMoe",
        {key: size for key, size in SIZES.items() if key != "num_attention_heads"}
        | LOCAL
        | {"kv_channels": 8},
    ),
    "Llama 4": (
        "Llama4Text",
        SIZES | HEAD | {"intermediate_size_mlp": 48, "num_local_experts": 2, "num_experts_per_tok": 1},
    ),
    "LFM2": ("Lfm2", SIZES | {"layer_types": ["conv", "full_attention", "conv"]}),
    "Jamba": (
        "Jamba",
        SIZES
        | {
            "num_experts": 2,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "use_mamba_kernels": False,
            "mamba_d_state": 4,
            "mamba_dt_rank": 4,
        },
    ),
    "Zamba 2": (
        "Zamba2",
        EQUAL
        | {
            "mamba_d_state": 8,
            "mamba_ngroups": 1,
            "n_mamba_heads": 4,
            "num_mem_blocks": 1,
            "use_mamba_kernels": False,
            "layers_block_type": ["hybrid", "mamba", "hybrid"],
        },
    ),
    "MiniMax": (
        "MiniMax",
        SIZES | LOCAL | HEAD | {"layer_types": ["full_attention", "linear_attention", "full_attention"]},
    ),
    "MiMo-V2-Flash": (
        "MiMoV2Flash",
        SIZES
        | {
            "head_dim": 8,
            "v_head_dim": 6,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        },
    ),
    "Nemotron": ("Nemotron", SIZES),
    "NanoChat": ("NanoChat", SIZES | {"final_logit_softcapping": 15.0}),
    "SmolLM3": ("SmolLM3", SIZES),
    "EXAONE 4": ("Exaone4", SIZES | {"sliding_window": 8, "sliding_window_pattern": 2}),
    "ERNIE 4.5": ("Ernie4_5", SIZES),
    "Seed-OSS": ("SeedOss", SIZES | HEAD),
    "Apertus": ("Apertus", SIZES),
    "AfMoE": ("Afmoe", SIZES | EXPERTS),
    "Laguna": ("Laguna", SIZES | HEAD | EXPERTS | {"shared_expert_intermediate_size": 16, "gating": True}),
    "BitNet": ("BitNet", SIZES),
    "DiffLlama": ("DiffLlama", SIZES),
    "ModernBERT decoder": ("ModernBertDecoder", EQUAL | {"cls_token_id": 0, "sep_token_id": 1}),
    "HRM-Text": ("HrmText", EQUAL | HEAD),
    "Mamba": ("Mamba", {"vocab_size": VOCABULARY, "hidden_size": D, "num_hidden_layers": 3, "state_size": 8}),
}
"""The families of the page: the prefix of the configuration's class, and tiny sizes."""

SITES: tuple[Any, ...] = ("queries", "keys", "values", "head", "attention", "mlp-input", "mlp")


def build(family: str) -> Any:
    """Return a tiny random model whose attention is not uniform and whose gains are not 1."""
    kind, sizes = FAMILIES[family]
    config = getattr(transformers, f"{kind}Config")(**sizes)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for part in model.modules():
            for name, weight in part.named_parameters(recurse=False):
                random = torch.randn(weight.shape, generator=generator)
                if "norm" in type(part).__name__.lower():
                    weight.add_(0.2 * random)
                elif type(part).__name__ in ("Linear", "Conv1D", "Embedding") and name == "weight":
                    weight.copy_(1.2 * random / weight.shape[-1] ** 0.5)
    return model.eval()


def row(family: str) -> dict[str, str]:
    """Measure one family; each cell is "yes" or the reason why not.

    Every number is compared with plain transformers: the loss, the loss under a hook, the attention maps, and
    NumPy's singular values.
    """
    plain = build(family)
    ids = torch.randint(2, VOCABULARY, (2, TOKENS), generator=torch.Generator().manual_seed(5))
    found = dict.fromkeys(("loads", "NLL", "filter", "attention", "folder"), "no")
    why: dict[str, str] = {}
    with TemporaryDirectory() as folder:
        plain.save_pretrained(folder)
        plain = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
        found["folder"] = _tried(lambda: _folder_is_right(folder, plain), why, family, folder)
        try:
            model = ss.load(folder)
        except ss.InputError as error:
            return found | {"refused": _plainly(str(error), family, folder)}
        found["loads"] = "yes"
        windows = ss.Windows.of_ids(ids, model)
        found["NLL"] = found["filter"] = _tried(lambda: _nll_is_right(model, plain, ids), why, family, folder)
        found["attention"] = _tried(lambda: _attention_is_right(model, plain, windows), why, family, folder)
        for kind in SITES:
            layer = model.attention_layers[0] if model.attention_layers else 0
            site = ss.Site(kind, layer, 0 if kind == "head" else None)
            try:
                site.check(model)
            except ss.InputError as error:
                reason = str(error).partition(", since ")[2].rpartition(": choose")[0]
                why[reason] = f"{why[reason]}, `{kind}`" if reason in why else f"no site `{kind}`"
        if len(model.attention_layers) < model.layers:
            layers = ", ".join(map(str, model.attention_layers))
            why[f"measured in the layers that have attention (here {layers} of {model.layers})"] = "attention"
    return found | {"refused": "; ".join(f"{what}: {reason}" for reason, what in why.items())}


def _tried(check: Callable[[], bool], why: dict[str, str], family: str, folder: str) -> str:
    try:
        return "yes" if check() else "**wrong**"
    except ss.InputError as error:
        why[_plainly(str(error), family, folder)] = "refused"
        return "no"


def _plainly(message: str, family: str, folder: str) -> str:
    return message.replace(folder, family).replace("|", "\\|")


def _folder_is_right(folder: str, plain: Any) -> bool:
    weight = plain.get_output_embeddings().weight.detach().double().numpy()
    values = torch.linalg.svdvals(torch.from_numpy(weight))
    return torch.allclose(ss.read_spectrum(folder, use_cache=False).values.double(), values, rtol=1e-5)


def _nll_is_right(model: ss.LanguageModel, plain: Any, ids: torch.Tensor) -> bool:
    """Compare the NLL, without and with a filter at the exit of layer 0, with the loss of transformers."""
    dark = ss.read_spectrum(model, use_cache=False).dark(0.25)
    effect = ss.evaluate(model, ss.Windows.of_ids(ids, model), {ss.Site("exit", 0): ss.remove(dark)})
    rest = torch.eye(D) - (dark.basis @ dark.basis.T).float()
    twin = copy.deepcopy(plain)

    def change(_: Any, __: Any, output: Any) -> Any:
        return (output[0] @ rest, *output[1:]) if isinstance(output, tuple) else output @ rest

    def loss() -> float:
        return float(twin(input_ids=ids, labels=ids, use_cache=False).loss)

    with torch.no_grad():
        base = loss()
        with twin.get_submodule(model.layout.layers)[0].register_forward_hook(change):
            filtered = loss()
    return abs(effect.baseline_nll - base) < 1e-5 and abs(effect.nll - filtered) < 1e-5


def _attention_is_right(model: ss.LanguageModel, plain: Any, windows: ss.Windows) -> bool:
    """Compare the attention to the first token with eager maps, in every head of every attention layer."""
    table = ss.attention_by_head(model, windows, length=TOKENS)
    got = torch.tensor(table.groupby(["layer", "head"])["attention"].mean().to_numpy()).view(-1, HEADS)
    ids = torch.tensor([list(window) for window in windows.rows])
    maps = eager_maps(plain, ids)
    if len(maps) > len(got):  # maps of layers that are no softmax
        maps = [maps[layer] for layer in model.attention_layers]
    truth = torch.stack([each[:, :, :, 0].mean((0, 2)).double() for each in maps])
    return torch.allclose(got, truth, atol=1e-6)


def eager_maps(plain: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """Return the attention maps of plain transformers by which values are averaged.

    Where eager maps leave out the share of a learned sink, that share is read off what W_O receives, which is
    less by it than the map times the values.
    """
    sinks = [part for part in plain.modules() if getattr(part, "sinks", None) is not None]
    sinks = [part for part in sinks if hasattr(part, "v_proj")]
    seen: list[torch.Tensor] = []
    handles = [
        handle
        for part in sinks
        for handle in (
            part.v_proj.register_forward_hook(lambda _, __, values: seen.append(values)),
            part.o_proj.register_forward_pre_hook(lambda _, given: seen.append(given[0])),
        )
    ]
    with torch.no_grad():
        maps = plain(input_ids=ids, output_attentions=True, use_cache=False).attentions
    for handle in handles:
        handle.remove()
    maps = [each for each in maps if each is not None]
    for part, values, mixed in zip(sinks, seen[::2], seen[1::2], strict=True):
        each = maps[part.layer_idx]
        if bool((each.sum(-1) < 1 - 1e-4).any()):
            continue
        heads = each.shape[1]
        mixed = mixed.unflatten(-1, (heads, -1)).transpose(1, 2)
        values = values.unflatten(-1, (-1, mixed.shape[-1])).transpose(1, 2)
        whole = each @ values.repeat_interleave(heads // values.shape[1], dim=1)
        maps[part.layer_idx] = each * (mixed * whole).sum(-1, True) / whole.square().sum(-1, True)
    return maps


def counted(family: str) -> str:
    """Return the line of the second table for one family, measured now."""
    plain = build(family)
    model = ss.load(plain)
    ids = torch.randint(2, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(5))
    windows, calls, last = ss.Windows.of_ids(ids, model), list[ss.attention.AttentionCall](), model.layers - 1
    traits = model.layout.traits
    before = "a gate" if traits.gated else "something else" if "written" in traits.lacking else "nothing"
    with torch.no_grad(), ss.attention.attending(model, calls.append):
        plain(ids, use_cache=False)
    logit = "yes" if any(call.sinks is not None for call in calls) else "no"
    cells = [family, before, logit]
    try:
        mixture = mixture_of(model, last)
        shared = "" if mixture is None or mixture.shared is None else ", one shared"
        cells.append("plain" if mixture is None else f"experts{shared}")
    except ss.InputError:
        cells.append("experts")
    for measure in (
        lambda: ss.head_use(model, windows),
        lambda: contributions(model, windows, 0, last, torch.ones(D, dtype=torch.float64), None),
    ):
        try:
            measure()
            cells.append("yes")
        except ss.InputError:
            cells.append("refused")
    return f"| {' | '.join(cells)} |"


COUNTED = (
    *("Qwen3-Next", "Qwen 3.5", "Qwen 3.5 MoE", "AfMoE", "Laguna"),
    *("gpt-oss", "MiMo-V2-Flash", "Granite, sliding windows"),
    *("Mixtral", "Qwen 3 MoE", "Llama 4", "BitNet", "MiniMax"),
)
"""The families of the second table."""


def page(rows: dict[str, dict[str, str]], second: list[str]) -> str:
    """Return the page from measured rows, and from the lines of its second table."""
    lines = [
        f"| {name} | " + " | ".join(cells[key] for key in COLUMNS) + " |" for name, cells in rows.items()
    ]
    return INTRODUCTION + "\n".join(lines) + "\n" + SECOND + "\n".join(second) + "\n"


def line(family: str) -> str:
    """Return the line of the page for one family, measured now."""
    return page({family: row(family)}, []).partition(SECOND)[0].splitlines()[-1]


COLUMNS = ("loads", "NLL", "filter", "attention", "folder", "refused")

INTRODUCTION = """# Families

Made by `python docs/generate_families.py` (`make families`), which builds a tiny random model of each family
and compares every number with plain transformers.

- *loads*: `load` finds all modules by itself.
- *NLL* and *filter*: the loss, without and with a filter at the exit of a layer, is that of transformers to
  1e-5.
- *attention*: the attention to a token in every head is that of transformers' eager maps (less the share of a
  learned sink, where these leave it out).
- *folder*: `read_spectrum` of the folder gives the singular values of the unembedding.
- *refused*: what the family does not have, and why.

A family that is not in the table is examined in the same way when it is loaded: a short pass shows whether
its residual stream, logits, projections and heads are what their names say, and what is not is refused when
it is used.

| family | loads | NLL | filter | attention | folder | refused |
|---|---|---|---|---|---|---|
"""

SECOND = """
## Gates, learned logits and experts

What acts besides queries, keys, values and a plain MLP, and whether it is counted
([what that means](using-sinks.md#gates-learned-logits-and-experts)).

- *before W_O*: what the output of the heads passes before W_O reads it.
- *logit*: whether some layers have a learned logit that takes a share of the attention and has no value.
- *heads*: `head_use`, `no_op_circuits` and `ss.sinks.head_removal` count both, or refuse the family.
- *neurons*: `spike_writers` counts the neurons of the last layer's MLP, or refuses it.

| family | before W_O | logit | MLP | heads | neurons |
|---|---|---|---|---|---|
"""


def main() -> None:
    """Measure all families and write the page."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = {family: row(family) for family in FAMILIES}
        made = PAGE.with_suffix(".part")  # CI makes the site from these pages at the same time
        made.write_text(page(rows, [counted(family) for family in COUNTED]))
        made.replace(PAGE)


if __name__ == "__main__":
    main()
