"""The base classes of attention edits: their layers, heads, and the position or token they act on."""

from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool
from torch import Tensor

from spectral_sinks.errors import InputError
from spectral_sinks.models.attention_capture import AttentionCall
from spectral_sinks.models.language import LanguageModel


@dataclass(frozen=True, eq=False)
class AttentionEdit:
    """An attention edit in some layers and heads, by default in all. A subclass defines `changed`."""

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
        """Return the edited call."""
        raise NotImplementedError

    def acting(self, call: AttentionCall) -> Bool[Tensor, "1 heads 1 1"]:
        """Return a mask of the heads in which the edit acts."""
        heads = torch.arange(call.query.shape[1], device=call.query.device)
        chosen = torch.ones_like(heads, dtype=torch.bool)
        if self.heads is not None:
            chosen = torch.isin(heads, torch.tensor(sorted(self.heads), device=heads.device))
        return chosen.view(1, -1, 1, 1)

    def placed(self, old: Tensor, new: Tensor, keys: Tensor, call: AttentionCall) -> Tensor:
        """Return the keys or values `old`, replaced by `new` at some tokens and in the heads that act.

        Where only some heads act, the result has one entry per query head.
        """
        if self.heads is not None and old.shape[1] < call.query.shape[1]:
            old = old.repeat_interleave(call.query.shape[1] // old.shape[1], dim=1)
        if new.ndim == 4 and 1 < new.shape[1] < old.shape[1]:
            new = new.repeat_interleave(old.shape[1] // new.shape[1], dim=1)
        where = keys[:, None, :, None]
        if self.heads is not None:
            where = where & self.acting(call)
        return torch.where(where, new.to(old), old)


@dataclass(frozen=True, eq=False)
class AtToken(AttentionEdit):
    """An edit at one position, counted from 0, or at every occurrence of a token id.

    Exactly one of the two is given. A text that is padded on the left begins after the padding.
    """

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
        """Return a mask of the tokens that are edited, over the text so far.

        Raises InputError for a position beyond the text so far, and where token ids are needed but unknown.
        """
        length = call.past + call.query.shape[2]
        if self.position is not None:
            shortest = length if call.starts is None else length - int(call.starts.max())
            if self.position >= shortest:
                raise InputError(
                    f"position {self.position}: the text has {shortest} tokens, 0 to {shortest - 1}"
                )
            return torch.arange(length, device=call.query.device) == self.position + call.openings
        if call.ids is None:
            raise InputError(
                f"{type(self).__name__}(token={self.token}) needs the token ids of the whole text: this pass "
                "was given embeddings, or continues from a cache that was filled outside the block"
            )
        return call.ids.to(call.query.device) == self.token

    def chosen_keys(self, call: AttentionCall) -> Bool[Tensor, "#batch keys"]:
        """Return a mask of the keys of the tokens that are edited, some of which a cache may have dropped.

        Raises InputError as `chosen` does, and where a cache holds the keys of other tokens in each head.
        """
        return self.chosen(call)[:, call.key_positions]


def of_layer(values: Tensor | float, call: AttentionCall) -> Tensor:
    """Return the keys or values of one layer as `[1, key_heads, 1, size]`; a number stays a number."""
    tensor = torch.as_tensor(values, device=call.key.device)
    return values_of_layer(tensor, call.layer)[None, :, None] if tensor.ndim else tensor


def values_of_layer(values: Tensor, layer: int) -> Tensor:
    """Return one layer of `[layers, ...]`, where a single layer is used for all.

    Raises InputError for a layer without values.
    """
    if len(values) != 1 and layer >= len(values):
        raise InputError(f"layer {layer}: values for {len(values)} layers were given")
    return values[0 if len(values) == 1 else layer]


def check_shape(name: str, values: Tensor | float, model: LanguageModel) -> None:
    """Raise InputError for keys or values whose shape does not fit the model."""
    shape = tuple(getattr(values, "shape", ()))
    size = model.value_size if name == "value" else model.head_size
    wanted = (model.layers, model.key_heads, size)
    if shape and (len(shape) != 3 or any(a not in (1, b) for a, b in zip(shape, wanted, strict=True))):
        raise InputError(
            f"a {name} of shape {shape}: expected a number or [layers, key_heads, size] = {wanted}, "
            "or 1 where all are the same"
        )
