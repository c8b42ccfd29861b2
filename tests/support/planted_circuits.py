"""No-op and broadcast circuits made by hand in several architectures, and their randomised twins."""

import copy
from typing import Any

import torch
import transformers
from torch import Tensor

import spectral_sinks as ss
from spectral_sinks.models.weights import attention_weights

D, HEADS, SIZE, VOCABULARY, CONTEXT = 64, 4, 16, 80, 48
LAYER, HEAD, SLOW = 1, 2, SIZE // 2 - 1
"""Where the circuit is; SLOW is the pair of dimensions that rotations hardly turn."""

MARK, ALWAYS, MARKED = 3, 5, 7
"""Channel that the marked token alone carries, channel that all tokens carry, and the marked token."""

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": D,
    "num_hidden_layers": 3,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "head_dim": SIZE,
    "intermediate_size": 48,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
ROPE = {"rope_type": "default", "rope_theta": 1e9}
CONFIGS: dict[str, Any] = {
    "llama": ("LlamaConfig", SIZES | {"rope_parameters": ROPE}),
    "llama grouped": ("LlamaConfig", SIZES | {"rope_parameters": ROPE, "num_key_value_heads": 2}),
    "qwen2": ("Qwen2Config", SIZES | {"rope_parameters": ROPE}),
    "qwen3": ("Qwen3Config", SIZES | {"rope_parameters": ROPE}),
    "gemma2": ("Gemma2Config", SIZES | {"rope_parameters": ROPE, "query_pre_attn_scalar": SIZE}),
    "gemma3": (
        "Gemma3TextConfig",
        SIZES
        | {"query_pre_attn_scalar": SIZE, "layer_types": ["full_attention"] * 3}
        | {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    ),
    "gpt2": (
        "GPT2Config",
        {"vocab_size": VOCABULARY, "n_embd": D, "n_layer": 3, "n_head": HEADS, "n_positions": CONTEXT}
        | {"bos_token_id": 0, "eos_token_id": 0},
    ),
    "gpt_neox": (
        "GPTNeoXConfig",
        SIZES | {"rope_parameters": ROPE | {"partial_rotary_factor": 1.0}, "use_parallel_residual": False},
    ),
    "phi3": ("Phi3Config", SIZES | {"rope_parameters": ROPE}),
}
FAMILIES = tuple(CONFIGS)

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LINEAR = {"layer_types": ["full_attention"] * 3, "linear_num_value_heads": 4, "linear_num_key_heads": 2} | {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
WHOLE = ROPE | {"partial_rotary_factor": 1.0}
MORE: dict[str, Any] = {
    "qwen3_next": (
        "Qwen3NextConfig",
        SIZES | EXPERTS | LINEAR | {"rope_parameters": WHOLE, "shared_expert_intermediate_size": 16},
    ),
    "qwen3_5": ("Qwen3_5TextConfig", SIZES | LINEAR | {"rope_parameters": WHOLE}),
    "afmoe": (
        "AfmoeConfig",
        SIZES | EXPERTS | {"rope_parameters": ROPE, "layer_types": ["full_attention"] * 3},
    ),
    "gpt_oss": (
        "GptOssConfig",
        SIZES
        | {"rope_parameters": ROPE, "num_local_experts": 4, "num_experts_per_tok": 2}
        | {"layer_types": ["full_attention"] * 3},
    ),
    "mixtral": (
        "MixtralConfig",
        SIZES | {"rope_parameters": ROPE, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "qwen3_moe": ("Qwen3MoeConfig", SIZES | EXPERTS | {"rope_parameters": ROPE}),
}
GATED = ("qwen3_next", "qwen3_5", "afmoe")
"""Families with a gate between attention and W_O."""


def gaussian(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def channel(place: int) -> Tensor:
    return torch.nn.functional.one_hot(torch.tensor(place), D).float()


def parts(model: ss.LanguageModel, layer: int, head: int) -> dict[str, Tensor]:
    """Find the rows of q, k, v and o of one head, as views of the model's own weights."""
    shared = head * model.key_heads // HEADS
    units = {"q": head, "o": head, "k": shared, "v": shared}
    found = {w.part: w.rows for w in attention_weights(model, layer) if w.unit == units[w.part]}
    if model.layout.fused == "gates":
        block = model.module.get_submodule(f"{model.layout.layers}.{layer}")
        weight = block.get_submodule(model.layout.queries).weight.detach()
        found |= dict(zip(("q", "gate"), weight.view(HEADS, 2, SIZE, D)[head], strict=True))
    if model.layout.fused == "heads":
        block = model.module.get_submodule(f"{model.layout.layers}.{layer}")
        weight = block.get_submodule(model.layout.queries).weight.detach()
        found |= dict(zip("qkv", weight.view(HEADS, 3, SIZE, D)[head], strict=True))
    return found


def made(family: str, kind: str = "no-op", place: int = 0) -> tuple[ss.LanguageModel, ss.Windows]:
    """One head whose query always asks for a channel that one token alone carries.

    Its value writes nothing (`no-op`), or one direction strongly (`broadcast`). All other weights are small
    and random. Four windows of 40 tokens have the marked token at `place` and nowhere else.
    """
    name, sizes = (CONFIGS | MORE)[family]
    config = getattr(transformers, name)(**sizes)
    module: Any = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for index, (path, parameter) in enumerate(module.named_parameters()):
            if parameter.ndim > 1:
                parameter.copy_(0.01 * gaussian(*parameter.shape, seed=100 + index))
            elif path.endswith("bias"):
                parameter.zero_()
            elif family == "afmoe" and "layers" in path and "post_" in path:
                parameter.fill_(0.01)  # the gain of what attention and MLP add
        words = gaussian(VOCABULARY, D, seed=1)
        words[:, [MARK, ALWAYS]] = 0
        words[MARKED] = 12 * channel(MARK)
        words += 4 * channel(ALWAYS)
        module.get_input_embeddings().weight.copy_(words)
        slow = torch.zeros(SIZE)
        slow[SLOW] = 1.0
        other = torch.zeros(SIZE)
        other[SIZE - 2] = 1.0
        model = ss.load(module)
        rows = parts(model, LAYER, HEAD)
        rows["q"].copy_(0.25 * slow.outer(channel(ALWAYS)))
        rows["k"].copy_(4 * slow.outer(channel(MARK)) + other.outer(channel(ALWAYS)))
        value = 0.5 * gaussian(SIZE, D, seed=2)
        value[:, [MARK, ALWAYS]] = 0
        value[value != 0] -= value.sum(1, keepdim=True).expand(-1, D - 2).flatten() / (D - 2)  # for LayerNorm
        if kind == "broadcast":
            value = value + 4 * gaussian(SIZE, 1, seed=3) * channel(MARK)
        rows["v"].copy_(value)
        rows["o"].copy_(0.1 * gaussian(SIZE, D, seed=4))
    ids = torch.randint(8, VOCABULARY, (4, 40), generator=torch.Generator().manual_seed(5))
    ids[:, place] = MARKED
    return model, ss.Windows.of_ids(ids, model)


def twin(model: ss.LanguageModel) -> ss.LanguageModel:
    """The same spectra in random directions: each matrix but the embeddings reads a turned input."""
    module: Any = copy.deepcopy(model.module)
    words = {id(module.get_input_embeddings().weight), id(module.get_output_embeddings().weight)}
    with torch.no_grad():
        for index, (path, parameter) in enumerate(module.named_parameters()):
            if parameter.ndim == 2 and id(parameter) not in words:
                transposed = model.family == "gpt2" and "wpe" not in path
                weight = parameter.T if transposed else parameter
                turn = torch.linalg.qr(gaussian(*[weight.shape[1]] * 2, seed=1000 + index)).Q
                parameter.copy_((weight @ turn).T if transposed else weight @ turn)
    return ss.load(module)
