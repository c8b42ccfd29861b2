"""Attention by hand: a loop over heads and queries in float64, in which a rule may change each row."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

import spectral_sinks as ss

NAME = "by_hand"


@dataclass
class Row:
    """One query of one head."""

    layer: int
    head: int
    window: int
    at: int
    """Position of the query."""
    query: Tensor
    keys: Tensor
    values: Tensor
    seen: Tensor
    """Which keys it may see."""
    logit: float | None
    """Of the learned sink."""
    extra: list[tuple[Tensor, Tensor]]
    """Keys and values beyond those of the tokens."""
    dropped: set[int]
    """Keys whose weight is dropped after the softmax."""


Rule = Callable[[Row], None]


class _State:
    rule: Rule | None = None


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    dtype = query.dtype
    query, key, value = query.double(), key.double(), value.double()
    batch, heads, count, size = query.shape
    scaling = size**-0.5 if scaling is None else scaling
    out = torch.zeros(batch, count, heads, value.shape[-1], dtype=query.dtype)
    maps = torch.zeros(batch, heads, count, key.shape[2], dtype=query.dtype)
    for b in range(batch):
        for h in range(heads):
            shared = h * key.shape[1] // heads
            for i in range(count):
                row = Row(
                    module.layer_idx,
                    h,
                    b,
                    i,
                    query[b, h, i],
                    key[b, shared].clone(),
                    value[b, shared].clone(),
                    attention_mask[b % len(attention_mask), 0, i] == 0,
                    None if s_aux is None else float(s_aux[h]),
                    [],
                    set(),
                )
                if _State.rule is not None:
                    _State.rule(row)
                everything = torch.cat([row.keys, *(k[None] for k, _ in row.extra)])
                scores = everything @ row.query * scaling
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                seen = torch.cat([row.seen, torch.ones(len(row.extra), dtype=torch.bool)])
                powers = torch.where(seen, scores.exp(), 0.0)
                total = powers.sum() + (0.0 if row.logit is None else torch.tensor(row.logit).double().exp())
                weights = powers / total
                for j in row.dropped:
                    weights[j] = 0.0
                maps[b, h, i] = weights[: key.shape[2]]
                out[b, i, h] = weights @ torch.cat([row.values, *(v[None] for _, v in row.extra)])
    return out.to(dtype), maps


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, eager_mask)


def run(model: ss.LanguageModel, ids: Tensor, rule: Rule | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Logits and attention maps of a pass in which every row of attention follows the rule."""
    before = model.config._attn_implementation
    model.module.set_attn_implementation(NAME)
    _State.rule = rule
    try:
        with torch.no_grad():
            out = model.module(ids, use_cache=False, output_attentions=True)
    finally:
        _State.rule = None
        model.module.set_attn_implementation(before)
    return out.logits, out.attentions
