"""Sinks moved: frozen values that change what attention computes from, for `with attending(model, move):`.

They go around any measurement. Several nest, the inner one acting on what the outer one made; each acts in
chosen layers and heads, in all by default. What lies in the residual stream instead (the norm or variance of
a token, massive activations) is moved by a `Filter` at a `Site`: `scale`, `amplify`, `channels`.
"""

from collections.abc import Collection
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from spectral_sinks.errors import InputError
from spectral_sinks.models.attending import AttentionCall
from spectral_sinks.models.language import LanguageModel


@dataclass(frozen=True, eq=False)
class Move:
    """What all moves share: the layers and heads in which they act. A subclass says `changed`."""

    layers: Collection[int] | None = field(default=None, kw_only=True)
    heads: Collection[int] | None = field(default=None, kw_only=True)

    def check(self, model: LanguageModel) -> None:
        """Raise InputError for layers or heads that the model does not have."""
        for name, chosen, count in (
            ("layer", self.layers, model.layers),
            ("head", self.heads, model.heads),
        ):
            for index in chosen or ():
                if not 0 <= index < count:
                    raise InputError(f"{name} {index}: {model.name} has {name}s 0 to {count - 1}")

    def __call__(self, call: AttentionCall) -> AttentionCall | None:
        if self.layers is not None and call.layer not in self.layers:
            return None
        return self.changed(call)

    def changed(self, call: AttentionCall) -> AttentionCall:
        """The call as the move makes it."""
        raise NotImplementedError

    def acting(self, call: AttentionCall) -> Bool[Tensor, "1 heads 1 1"]:
        """The heads in which it acts."""
        heads = torch.arange(call.query.shape[1], device=call.query.device)
        chosen = torch.ones_like(heads, dtype=torch.bool)
        if self.heads is not None:
            chosen = torch.isin(heads, torch.tensor(sorted(self.heads), device=heads.device))
        return chosen.view(1, -1, 1, 1)

    def placed(self, old: Tensor, new: Tensor, keys: Tensor, call: AttentionCall) -> Tensor:
        """Keys or values with those of some tokens replaced, per query head where only some heads act."""
        if self.heads is not None and old.shape[1] < call.query.shape[1]:
            old = old.repeat_interleave(call.query.shape[1] // old.shape[1], dim=1)
        if new.ndim == 4 and 1 < new.shape[1] < old.shape[1]:
            new = new.repeat_interleave(old.shape[1] // new.shape[1], dim=1)
        where = keys[:, None, :, None]
        if self.heads is not None:
            where = where & self.acting(call)
        return torch.where(where, new.to(old), old)


@dataclass(frozen=True, eq=False)
class AtToken(Move):
    """A move of one position, counted from 0, or of every occurrence of a token id: give one of the two."""

    position: int | None = None
    token: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        name = type(self).__name__
        if (self.position is None) == (self.token is None):
            raise InputError(f"{name} needs a position or a token: {name}(0) or {name}(token=5)")
        if self.position is not None and self.position < 0:
            raise InputError(f"position {self.position}: positions count from 0 at the beginning of the text")

    def check(self, model: LanguageModel) -> None:
        """Raise InputError also for a position beyond the context or a token outside the vocabulary."""
        super().check(model)
        if self.token is not None and not 0 <= self.token < model.vocabulary:
            raise InputError(f"token id {self.token} lies outside the vocabulary of {model.vocabulary}")
        if self.position is not None and model.context is not None and self.position >= model.context:
            raise InputError(f"position {self.position}: {model.name} has a context of {model.context}")

    def chosen(self, call: AttentionCall) -> Bool[Tensor, "#batch tokens"]:
        """Which tokens of the text so far it moves. Raises InputError for a position beyond them."""
        length = call.past + call.query.shape[2]
        if self.position is not None:
            if self.position >= length:
                raise InputError(f"position {self.position}: the text has {length} tokens, 0 to {length - 1}")
            return (torch.arange(length, device=call.query.device) == self.position)[None]
        if call.ids is None:
            raise InputError(
                f"{type(self).__name__}(token={self.token}) needs the token ids of the whole text: this pass "
                "was given embeddings, or goes on from a cache that was filled outside the block"
            )
        return call.ids.to(call.query.device) == self.token


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
        _check_shape("value", self.value, model)

    def changed(self, call: AttentionCall) -> AttentionCall:
        new = _of_layer(self.value, call)
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
class KeyBias(Move):
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
        _check_shape("key", self.key, model)
        _check_shape("value", self.value, model)

    def changed(self, call: AttentionCall) -> AttentionCall:
        key, value = (_by_query_head(_of_layer(given, call), call) for given in (self.key, self.value))
        if call.extra_key is not None and call.extra_value is not None:
            key, value = torch.cat([call.extra_key, key], 2), torch.cat([call.extra_value, value], 2)
        return replace(call, extra_key=key, extra_value=value)


@dataclass(frozen=True, eq=False)
class SinkLogit(Move):
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
        logit = _row(logit, call.layer) if logit.ndim == 2 else logit
        dtype = torch.promote_types(call.query.dtype, torch.float32)
        logit = logit.to(dtype).expand(call.query.shape[1])
        logit = logit.masked_fill(~self.acting(call).flatten(), -torch.inf)
        if call.sinks is not None:
            logit = torch.logaddexp(call.sinks.to(dtype), logit)
        return replace(call, sinks=logit)


@dataclass(frozen=True, eq=False)
class Streaming(Move):
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


def _of_layer(given: Tensor | float, call: AttentionCall) -> Tensor:
    """Keys or values of one layer, `[1, key_heads, 1, size]`, from those of all; a number as it is."""
    tensor = torch.as_tensor(given, device=call.key.device)
    return _row(tensor, call.layer)[None, :, None] if tensor.ndim else tensor


def _by_query_head(given: Tensor, call: AttentionCall) -> Float[Tensor, "1 heads 1 size"]:
    """A key or value, or a number, for each query head."""
    heads, size = call.query.shape[1], call.query.shape[3]
    full = given.to(call.query).expand(1, given.shape[1] if given.ndim else 1, 1, size)
    return full.repeat_interleave(heads // full.shape[1], dim=1)


def _row(given: Tensor, layer: int) -> Tensor:
    """One layer of `[layers, ...]`, where 1 stands for all of them."""
    if len(given) != 1 and layer >= len(given):
        raise InputError(f"layer {layer}: values for {len(given)} layers were given")
    return given[0 if len(given) == 1 else layer]


def _check_shape(name: str, given: Tensor | float, model: LanguageModel) -> None:
    """Raise InputError for keys or values of another shape than the model's."""
    shape = tuple(getattr(given, "shape", ()))
    wanted = (model.layers, model.key_heads, model.head_size)
    if shape and (len(shape) != 3 or any(a not in (1, b) for a, b in zip(shape, wanted, strict=True))):
        raise InputError(
            f"a {name} of shape {shape}: expected a number or [layers, key_heads, size] = {wanted}, "
            "or 1 where all are the same"
        )


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
