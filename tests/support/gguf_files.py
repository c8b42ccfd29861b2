"""Small GGUF files, written by the gguf package as llama.cpp's converter writes them."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

NORMAL, CONTROL = 1, 3
NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""GGUF's names for the modules of a layer."""


def byte_vocabulary() -> list[str]:
    """Three special tokens, one token for each byte as a byte-level vocabulary spells it, and two merges."""
    return ["<unk>", "<s>", "</s>", *bytes_to_unicode().values(), "ab", "12"]


def small_llama(**sizes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        **{
            "vocab_size": len(byte_vocabulary()),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
            "max_position_embeddings": 128,
            **sizes,
        }
    )
    return _spread(LlamaForCausalLM(config))


def small_gemma3() -> Gemma3ForCausalLM:
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=len(byte_vocabulary()),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        query_pre_attn_scalar=256,  # GGUF has no field for it, and transformers takes its default
        max_position_embeddings=128,
        sliding_window=16,
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    )
    return _spread(Gemma3ForCausalLM(config))


def _spread(model: Any) -> Any:
    """Give the norms gains that differ, so that a forgotten gain shows."""
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model.eval()


def write_gguf(
    path: Path,
    model: LlamaForCausalLM | Gemma3ForCausalLM,
    *,
    stored: GGMLQuantizationType = GGMLQuantizationType.F32,
    architecture: str | None = None,
    **metadata: Any,
) -> Path:
    """Write a model to a GGUF file, with a byte-level tokenizer.

    Args:
        path: the file.
        model: a Llama or a Gemma 3.
        stored: the type in which matrices are stored; norms are F32.
        architecture: another architecture to name in the header.
        metadata: fields of the tokenizer, such as `add_bos_token=False` or `pre="smollm"`, and `split_count`.

    """
    config = model.config
    gemma = "gemma" in config.model_type
    writer = GGUFWriter(path, architecture or ("gemma3" if gemma else "llama"))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if gemma:
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        writer.add_rope_freq_base(1e6)
        writer.add_sliding_window(config.sliding_window)
    else:
        writer.add_rope_dimension_count(config.head_dim)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if (parts := metadata.pop("split_count", None)) is not None:
        writer.add_uint16("split.count", parts)
    _add_tokenizer(writer, config.vocab_size, metadata)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = weight.float().numpy()
        if "norm" in name and gemma:
            values = values + 1
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if part in name and not gemma:  # llama.cpp interleaves the halves of a rotation
                rows = values.reshape(heads, 2, -1, values.shape[1])
                values = rows.swapaxes(1, 2).reshape(values.shape)
        kind = GGMLQuantizationType.F32 if values.ndim == 1 else stored
        writer.add_tensor(
            _name(name, gemma),
            gguf.quantize(np.ascontiguousarray(values, dtype=np.float32), kind),
            raw_dtype=kind,
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer: GGUFWriter, size: int, metadata: dict[str, Any]) -> None:
    tokens = byte_vocabulary()[:size]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(metadata.pop("pre", "gpt-2"))
    writer.add_token_list(tokens)
    writer.add_token_types([CONTROL] * 3 + [NORMAL] * (len(tokens) - 3))
    writer.add_array("tokenizer.ggml.merges", ["a b", "1 2"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, value in metadata.items():
        writer.add_bool(f"tokenizer.ggml.{name}", value)


def _name(name: str, gemma: bool) -> str:
    fixed = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in fixed:
        return fixed[name]
    _, _, layer, rest = name.split(".", 3)
    part = rest.removesuffix(".weight")
    own = "post_attention_norm" if gemma and part == "post_attention_layernorm" else NAMES[part]
    return f"blk.{layer}.{own}.weight"
