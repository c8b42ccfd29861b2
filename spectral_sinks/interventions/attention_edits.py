"""Sinks moved: frozen values that change what attention computes from, for `with attending(model, move):`.

They go around any measurement. Several nest, the inner one acting on what the outer one made; each acts in
chosen layers and heads, in all by default. What lies in the residual stream instead (the norm or variance of
a token, massive activations) is moved by a `Filter` at a `Site`: `scale`, `amplify`, `channels`.
"""

from collections.abc import Collection
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from spectral_sinks.errors import InputError
from spectral_sinks.interventions.attention_base import AttentionEdit, AtToken, check_shape, of_layer
from spectral_sinks.models.attention_capture import AttentionCall
from spectral_sinks.models.language import LanguageModel


@dataclass(frozen=True, eq=False)
class MaskKey(AtToken):
    """The key's column is masked: no other token sees it; itself it still sees, so no row is empty.

    Not `renormalise`: its weight is dropped after the softmax and the others stay as they were. `since`: only
    for queries from that position on.
    """

    renormalise: bool = field(default=True, kw_only=True)
    since: int = field(default=0, kw_only=True)

    def changed(self, call: AttentionCall) -> AttentionCall:
        query, key = call.query_positions[:, None], call.key_positions
        keys = self.chosen(call)[:, key][:, None, None]
        hidden = keys & (query != key) & (query >= self.since)
        if self.heads is not None:
            hidden = hidden & self.acting(call)
        if self.renormalise:
            return replace(call, mask=call.visible() & ~hidden)
        return replace(call, kept=~hidden if call.kept is None else call.kept & ~hidden)


@dataclass(frozen=True, eq=False)
class Restrict(AtToken):
    """The token attends to itself alone, as the first one does: it becomes a sink after the fact.

    (Li et al. 2026, arXiv 2605.06611)
    """

    def changed(self, call: AttentionCall) -> AttentionCall:
        query, key = call.query_positions, call.key_positions
        hidden = self.chosen(call)[:, query][:, None, :, None] & (query[:, None] != key)
        if self.heads is not None:
            hidden = hidden & self.acting(call)
        return replace(call, mask=call.visible() & ~hidden)


@dataclass(frozen=True, eq=False)
class SetValue(AtToken):
    """The token's value is replaced, for every query and for itself: by zero, or by a value given.

    `value` has shape `[layers, key_heads, size]`, or what broadcasts to it; `mean_values` makes the mean over
    documents and, from windows of one document, that document's own. Where documents open with one token, its
    value is the same in all, and replacing it by another document's is an exact no-op.
    """

    value: Float[Tensor, "..."] | float = 0.0

    def check(self, model: LanguageModel) -> None:
        """Raise InputError also for a value of another shape."""
        super().check(model)
        check_shape("value", self.value, model)

    def changed(self, call: AttentionCall) -> AttentionCall:
        new = of_layer(self.value, call)
        keys = self.chosen(call)[:, call.key_positions]
        return replace(call, value=self.placed(call.value, new, keys, call))


@dataclass(frozen=True, eq=False)
class CopyKey(AtToken):
    """The token is seen with key and value of an earlier one, position included; its residual stays its own.

    Occurrences before `source` stay as they are. Raises InputError where the cache has let go of `source`.
    """

    source: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.source < 0 or (self.position is not None and self.position < self.source):
            raise InputError(
                f"key and value of position {self.source} for position {self.position}: a token can take "
                "those of an earlier one only, since no query before it may see them"
            )

    def changed(self, call: AttentionCall) -> AttentionCall:
        at = self.source - int(call.key_positions[0])
        if not 0 <= at < call.key.shape[2]:
            raise InputError(f"position {self.source} is not among the keys of layer {call.layer}")
        keys = self.chosen(call)[:, call.key_positions] & (call.key_positions >= self.source)
        key, value = (self.placed(old, old[:, :, at : at + 1], keys, call) for old in (call.key, call.value))
        return replace(call, key=key, value=value)


@dataclass(frozen=True, eq=False)
class Streaming(AttentionEdit):
    """Each token sees the first `first` tokens, or positions given, and the `recent` ones up to itself.

    What StreamingLLM's cache holds, as a mask: every token keeps the position it has in the text, where
    StreamingLLM counts positions within its cache, so texts beyond the context are not for this. `first` 0 is
    window attention; other positions, such as `{4}`, are the control. (Xiao et al. 2024)
    """

    first: int | Collection[int]
    recent: int

    def __post_init__(self) -> None:
        if (self.first if isinstance(self.first, int) else min(self.first, default=0)) < 0 or self.recent < 1:
            raise InputError(
                f"the first {self.first} and the most recent {self.recent} tokens: expected at least 0 and 1 "
                "(a token sees itself)"
            )

    def changed(self, call: AttentionCall) -> AttentionCall:
        query, key = call.query_positions[:, None], call.key_positions
        if isinstance(self.first, int):
            stays = key < self.first
        else:
            stays = torch.isin(key, torch.tensor(sorted(self.first), dtype=key.dtype, device=key.device))
        seen = (stays | (query - key < self.recent))[None, None]
        if self.heads is not None:
            seen = seen | ~self.acting(call)
        return replace(call, mask=call.visible() & seen)
