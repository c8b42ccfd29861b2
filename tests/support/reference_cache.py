"""A Llama with a cache of bounded size in float64, one row and one head at a time, with plain loops."""

from typing import Any

import torch
from torch import Tensor


def rotated(x: Tensor, places: Tensor, base: float = 10000.0) -> Tensor:
    """Turn rows `[tokens, size]` by their places, as the paper on rotary positions has it."""
    half = x.shape[-1] // 2
    angles = places[:, None].double() * base ** (-torch.arange(half).double() / half)
    a, b = x[:, :half], x[:, half:]
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], dim=1)


def normed(x: Tensor, norm: Any) -> Tensor:
    """RMSNorm."""
    return x / (x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon).sqrt() * norm.weight.double()


def linear(x: Tensor, part: Any) -> Tensor:
    return x @ part.weight.double().T


@torch.no_grad()
def bounded_llama(
    module: Any,
    ids: Tensor,
    size: int,
    *,
    first: int,
    recent: int,
    block: int,
    positions: str = "cache",
) -> tuple[Tensor, list[list[list[int]]]]:
    """Return the logits `[tokens, vocabulary]` of one text, and the places kept by layer and key head.

    After a block each key head keeps the first entries, the recent ones and those of the others that
    received most attention so far.
    """
    config = module.config
    heads, key_heads, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    held = [[[] for _ in range(key_heads)] for _ in module.model.layers]
    logits: list[Tensor] = []
    for start in range(0, len(ids), block):
        part = ids[start : start + block]
        x = module.model.embed_tokens.weight.double()[part]
        for layer, entries in zip(module.model.layers, held, strict=True):
            attention = layer.self_attn
            read = normed(x, layer.input_layernorm)
            queries, keys, values = (
                linear(read, projection).unflatten(1, (-1, width))
                for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            mixed = torch.zeros(len(part), heads, width, dtype=torch.float64)
            for own in range(key_heads):
                before = len(entries[own])
                for token in range(len(part)):
                    place = start + token
                    entries[own].append([place, keys[token, own], values[token, own], 0.0])
                text = torch.tensor([entry[0] for entry in entries[own]])
                places = text if positions == "text" else torch.arange(len(text))
                k = rotated(torch.stack([entry[1] for entry in entries[own]]), places)
                v = torch.stack([entry[2] for entry in entries[own]])
                shared = heads // key_heads
                for head in range(own * shared, (own + 1) * shared):
                    q = rotated(queries[:, head], places[before:])
                    scores = q @ k.T * width**-0.5
                    weights = scores.masked_fill(torch.ones_like(scores).triu(before + 1) > 0, -torch.inf)
                    weights = weights.softmax(1)
                    mixed[:, head] = weights @ v
                    for entry, weight in zip(entries[own], weights.sum(0).tolist(), strict=True):
                        entry[3] += weight
                while len(entries[own]) > size:
                    middle = entries[own][first : len(entries[own]) - recent]
                    del entries[own][first + min(range(len(middle)), key=lambda at: middle[at][3])]
            x = x + linear(mixed.flatten(1), attention.o_proj)
            read = normed(x, layer.post_attention_layernorm)
            gate = torch.nn.functional.silu(linear(read, layer.mlp.gate_proj))
            x = x + linear(gate * linear(read, layer.mlp.up_proj), layer.mlp.down_proj)
        logits.append(linear(normed(x, module.model.norm), module.lm_head))
    return torch.cat(logits), [[[entry[0] for entry in own] for own in layer] for layer in held]
