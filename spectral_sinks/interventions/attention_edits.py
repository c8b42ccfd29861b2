"""Attention edits, which are active inside `with attending(model, edit):` around any measurement.

An edit is an immutable object. It changes the keys, values or mask from which attention is computed, in some
layers and heads, by default in all. Edits can be nested, and the inner one acts on the result of the outer
one. To edit the residual stream instead (the norm or variance of a token, massive activations), use a
`Filter` at a `Site`: `scale`, `amplify`, `channels`.
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
    """Attention knockout of a key: no other token attends to it.

    The token still attends to itself, so no row is empty. With `renormalise=False` the weight is dropped
    after the softmax and the other weights stay as they were. `since` restricts the knockout to queries from
    that position on.
    """

    renormalise: bool = field(default=True, kw_only=True)
    since: int = field(default=0, kw_only=True)

    def changed(self, call: AttentionCall) -> AttentionCall:
        query, key = call.query_positions[:, None], call.key_positions
        keys = self.chosen_keys(call)[:, None, None]
        since = self.since + call.openings[:, None, None]
        hidden = keys & (query != key) & (query >= since)
        if self.heads is not None:
            hidden = hidden & self.acting(call)
        if self.renormalise:
            return replace(call, mask=call.visible() & ~hidden)
        return replace(call, kept=~hidden if call.kept is None else call.kept & ~hidden)


@dataclass(frozen=True, eq=False)
class Restrict(AtToken):
    """The token attends only to itself, as the first token of a text does.

    Source: Li et al. 2026, arXiv 2605.06611.
    """

    def changed(self, call: AttentionCall) -> AttentionCall:
        query, key = call.query_positions, call.key_positions
        hidden = self.chosen(call)[:, query][:, None, :, None] & (query[:, None] != key)
        if self.heads is not None:
            hidden = hidden & self.acting(call)
        return replace(call, mask=call.visible() & ~hidden)


@dataclass(frozen=True, eq=False)
class SetValue(AtToken):
    """The value of the token is replaced for every query, including its own, by zero or by `value`.

    `value` has shape `[layers, key_heads, size]`, or a shape that broadcasts to it. `mean_values` computes
    the mean over documents. Where all documents open with the same token, its value is the same in all
    documents, so a replacement by the value from another document changes nothing.
    """

    value: Float[Tensor, "..."] | float = 0.0

    def check(self, model: LanguageModel) -> None:
        """Raise InputError also for a value whose shape does not fit the model."""
        super().check(model)
        check_shape("value", self.value, model)

    def changed(self, call: AttentionCall) -> AttentionCall:
        new = of_layer(self.value, call)
        keys = self.chosen_keys(call)
        return replace(call, value=self.placed(call.value, new, keys, call))


@dataclass(frozen=True, eq=False)
class CopyKey(AtToken):
    """The key and value of the token are replaced by those of an earlier token, with its position encoding.

    The residual of the token does not change. Occurrences of a token id before `source` stay as they are.
    InputError is raised where the cache no longer holds `source`.
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
        positions = call.key_positions
        source = self.source + call.openings
        found = positions == source  # [#batch, keys]
        if not found.any(1).all():
            raise InputError(f"position {self.source} is not among the keys of layer {call.layer}")
        rows = torch.arange(len(call.key), device=positions.device)
        at = found.int().argmax(1).expand(len(rows))
        keys = self.chosen_keys(call) & (positions >= source)
        key, value = (
            self.placed(old, old[rows, :, at][:, :, None], keys, call) for old in (call.key, call.value)
        )
        return replace(call, key=key, value=value)


@dataclass(frozen=True, eq=False)
class Streaming(AttentionEdit):
    """Each token attends to the first `first` tokens and to the `recent` tokens up to itself.

    The mask shows each query what the cache of StreamingLLM would contain. Every token keeps its position in
    the text, so texts cannot be longer than the context. StreamingLLM itself counts positions within its
    cache. `first=0` is window attention. `first` can also be a collection of positions, such as `{4}`, which
    serves as a control.

    Source: Xiao et al. 2024.
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
        place = key - call.openings  # [#batch, keys], in the text
        if isinstance(self.first, int):
            stays = place < self.first
        else:
            stays = torch.isin(place, torch.tensor(sorted(self.first), dtype=key.dtype, device=key.device))
        visible = stays[:, None, None] | (query - key < self.recent)
        if self.heads is not None:
            visible = visible | ~self.acting(call)
        return replace(call, mask=call.visible() & visible)
