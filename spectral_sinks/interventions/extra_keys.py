"""What stands beside the tokens, for attention to go to: a key, a logit, tokens before the text."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from spectral_sinks.errors import InputError
from spectral_sinks.interventions.attention_base import AttentionEdit, check_shape, of_layer, row
from spectral_sinks.models.attention_capture import AttentionCall
from spectral_sinks.models.language import LanguageModel


@dataclass(frozen=True, eq=False)
class KeyBias(AttentionEdit):
    """One more key that every query sees, and its value: `[layers, key_heads, size]`, or what broadcasts.

    The weights of the tokens then sum to less than 1. Both may require gradients. The key is compared as it
    stands: queries that rotate with their position see it as a key at position 0. (Gu et al. 2025)
    """

    key: Float[Tensor, "..."] | float
    value: Float[Tensor, "..."] | float = 0.0

    def __post_init__(self) -> None:
        if self.heads is not None:
            raise InputError("a key bias acts in every head of its layers: choose layers, not heads")

    def check(self, model: LanguageModel) -> None:
        """Raise InputError also for a key or value of another shape."""
        super().check(model)
        check_shape("key", self.key, model)
        check_shape("value", self.value, model)

    def changed(self, call: AttentionCall) -> AttentionCall:
        key, value = (_by_query_head(of_layer(given, call), call) for given in (self.key, self.value))
        if call.extra_key is not None and call.extra_value is not None:
            key, value = torch.cat([call.extra_key, key], 2), torch.cat([call.extra_value, value], 2)
        return replace(call, extra_key=key, extra_value=value)


@dataclass(frozen=True, eq=False)
class SinkLogit(AttentionEdit):
    """A logit in each head's softmax that has no key and no value, as in gpt-oss: rows sum to less than 1.

    A number, `[heads]`, or `[layers, heads]`; it may require gradients. Logit 0 is softmax-off-by-one,
    `exp(x) / (1 + sum exp)`. Beside a logit that the model has learned it counts as a second one.
    """

    logit: Float[Tensor, "..."] | float = 0.0

    def check(self, model: LanguageModel) -> None:
        """Raise InputError also for logits of another shape."""
        super().check(model)
        shape = tuple(getattr(self.logit, "shape", ()))
        if shape not in ((), (model.heads,), (1, model.heads), (model.layers, model.heads)):
            raise InputError(
                f"sink logits of shape {shape}: expected a number, [heads] = ({model.heads},), or "
                f"[layers, heads] = ({model.layers}, {model.heads})"
            )

    def changed(self, call: AttentionCall) -> AttentionCall:
        logit = torch.as_tensor(self.logit, device=call.query.device)
        logit = row(logit, call.layer) if logit.ndim == 2 else logit
        dtype = torch.promote_types(call.query.dtype, torch.float32)
        logit = logit.to(dtype).expand(call.query.shape[1])
        logit = logit.masked_fill(~self.acting(call).flatten(), -torch.inf)
        if call.sinks is not None:
            logit = torch.logaddexp(call.sinks.to(dtype), logit)
        return replace(call, sinks=logit)


@dataclass(frozen=True)
class Prefix:
    """Tokens put before every text, as the sink tokens of StreamingLLM; `compare` scores the text alone.

    The text's own positions move up by their number. (Xiao et al. 2024)
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


def _by_query_head(given: Tensor, call: AttentionCall) -> Float[Tensor, "1 heads 1 size"]:
    """A key or value, or a number, for each query head."""
    heads, size = call.query.shape[1], call.query.shape[3]
    full = given.to(call.query).expand(1, given.shape[1] if given.ndim else 1, 1, size)
    return full.repeat_interleave(heads // full.shape[1], dim=1)
