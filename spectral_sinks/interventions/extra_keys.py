"""Additional targets of attention: a key with a value, a logit, or tokens before the text."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from spectral_sinks.errors import InputError
from spectral_sinks.interventions.attention_base import AttentionEdit, check_shape, of_layer, values_of_layer
from spectral_sinks.models.attention_capture import AttentionCall
from spectral_sinks.models.language import LanguageModel


@dataclass(frozen=True, eq=False)
class KeyBias(AttentionEdit):
    """An additional key with its value, which every query can attend to.

    Both have shape `[layers, key_heads, size]`, or a shape that broadcasts to it, and may require gradients.
    The weights of the tokens then sum to less than 1. The key is not rotated, so rotary queries treat it as a
    key at position 0. A cache that drops keys and counts positions anew is refused.

    Source: Gu et al. 2025.
    """

    key: Float[Tensor, "..."] | float
    value: Float[Tensor, "..."] | float = 0.0

    def __post_init__(self) -> None:
        if self.heads is not None:
            raise InputError("a key bias acts in every head of its layers: choose layers, not heads")

    def check(self, model: LanguageModel) -> None:
        """Raise InputError also for a key or value whose shape does not fit the model."""
        super().check(model)
        check_shape("key", self.key, model)
        check_shape("value", self.value, model)

    def changed(self, call: AttentionCall) -> AttentionCall:
        if call.recounted:
            raise InputError(
                f"a key bias stands at position 0, and the cache counts positions from its first entry, "
                f"{call.recounted} further on: use a cache with positions='text'"
            )
        key = _by_query_head(of_layer(self.key, call), call, call.key.shape[-1])
        value = _by_query_head(of_layer(self.value, call), call, call.value.shape[-1])
        if call.extra_key is not None and call.extra_value is not None:
            key, value = torch.cat([call.extra_key, key], 2), torch.cat([call.extra_value, value], 2)
        return replace(call, extra_key=key, extra_value=value)


@dataclass(frozen=True, eq=False)
class SinkLogit(AttentionEdit):
    """An additional logit in the softmax of each head, without a key or a value, as in gpt-oss.

    The weights of the tokens then sum to less than 1. The logit is a number, `[heads]` or `[layers, heads]`,
    and may require gradients. Logit 0 gives softmax-off-by-one, `exp(x) / (1 + sum exp)`. If the model has
    learned such a logit, it stays, and this one is added as a second one.
    """

    logit: Float[Tensor, "..."] | float = 0.0

    def check(self, model: LanguageModel) -> None:
        """Raise InputError also for logits whose shape does not fit the model."""
        super().check(model)
        shape = tuple(getattr(self.logit, "shape", ()))
        if shape not in ((), (model.heads,), (1, model.heads), (model.layers, model.heads)):
            raise InputError(
                f"sink logits of shape {shape}: expected a number, [heads] = ({model.heads},), or "
                f"[layers, heads] = ({model.layers}, {model.heads})"
            )

    def changed(self, call: AttentionCall) -> AttentionCall:
        logit = torch.as_tensor(self.logit, device=call.query.device)
        logit = values_of_layer(logit, call.layer) if logit.ndim == 2 else logit
        dtype = torch.promote_types(call.query.dtype, torch.float32)
        logit = logit.to(dtype).expand(call.query.shape[1])
        logit = logit.masked_fill(~self.acting(call).flatten(), -torch.inf)
        if call.sinks is not None:
            logit = torch.logaddexp(call.sinks.to(dtype), logit)
        return replace(call, sinks=logit)


@dataclass(frozen=True)
class Prefix:
    """Tokens that are put before every text, such as the sink tokens of StreamingLLM.

    The positions of the text increase by the number of these tokens. `compare` scores only the text.

    Source: Xiao et al. 2024.
    """

    ids: tuple[int, ...]

    def check(self, model: LanguageModel) -> None:
        """Raise InputError for ids outside the vocabulary."""
        for i in self.ids:
            if not 0 <= i < model.vocabulary:
                raise InputError(f"token id {i} lies outside the vocabulary of {model.vocabulary}")

    def __call__(self, ids: Int[Tensor, "batch tokens"]) -> Int[Tensor, "batch longer"]:
        before = torch.tensor(self.ids, dtype=ids.dtype, device=ids.device)
        return torch.cat([before.expand(len(ids), -1), ids], dim=1)


def _by_query_head(values: Tensor, call: AttentionCall, size: int) -> Float[Tensor, "1 heads 1 size"]:
    """Expand a key, a value or a number to the query heads."""
    heads = call.query.shape[1]
    full = values.to(call.query).expand(1, values.shape[1] if values.ndim else 1, 1, size)
    return full.repeat_interleave(heads // full.shape[1], dim=1)
