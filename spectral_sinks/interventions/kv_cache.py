"""A cache of keys and values of bounded size, for any pass that takes a cache of transformers.

Each layer keeps its first entries and, of the others, the most recent ones, those that received most
attention, or random ones. Keys can have the positions of their text or be counted anew within the cache, and
keys and values can be stored as integers.
"""

from collections.abc import Collection, Iterable
from dataclasses import replace
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from spectral_sinks.errors import InputError
from spectral_sinks.interventions.kv_layer import CacheRule, Evict, KVLayer, Positions, unseen
from spectral_sinks.interventions.kv_storage import Bits, Grouping
from spectral_sinks.models.attention_capture import AttentionCall
from spectral_sinks.models.language import LanguageModel
from spectral_sinks.models.rotary import Rotation, biased_by_distance, rotations


class KVCache(Cache):
    """A cache of bounded size, which takes the place of transformers' in a pass or in `generate`.

    After each pass every layer keeps the first `first` entries, the `recent` latest ones and, with
    "attention" or "random", others of those between, until there are `size`. The tokens of a pass, the
    *block*, see all entries that were held before it and each other causally. With blocks of one token this
    is StreamingLLM (Xiao et al. 2023) for "window" and H2O (Zhang et al. 2023) for "attention"; a prompt that
    is read at once is seen whole, and then cut. "random" is the control of "attention", and `first=0` is the
    control of "window".

    With `positions="cache"` keys are turned in each pass as if the entries and the block stood at positions
    0, 1, 2, ... in their order. With "text" they keep the positions of the text.

    With `bits`, keys and values are stored as packed integers between the smallest and the largest value of a
    group, as in KIVI (Liu et al. 2024): keys by channel in groups of `group` tokens, or by token; values by
    token. The tokens of a block see each other as they are. With `positions="cache"`, what is rounded is the
    key before its rotation by position; in half precision, turning it back and forth rounds it as well, which
    `positions="text"` avoids.

    Layers with a sliding window of their own (Gemma 3) keep it, and nothing else is done to them.

    "attention" needs the attention weights of every pass. The cache reads them as an attention hook, for any
    implementation of attention: run the passes inside `with ss.attending(model, cache):`. A batch must not be
    padded, since padding would be among the first entries.

    Attention edits, such as `MaskKey`, choose keys by their positions in the text, whichever entries a window
    has dropped. With "attention" and "random" each head drops others, and such an edit is refused. Assisted
    generation is refused, since it takes tokens back.

    Args:
        model: a causal language model.
        size: number of entries of each layer and head; None for no limit.
        first: number of first entries that always stay; or the positions in the text of as many others that
            stay in their place from when they have been read, which is another control of "window".
        evict: what is dropped: "window" drops the oldest, "attention" those that received least attention
            from all queries so far, summed over the query heads of a key head, and "random" random ones.
        recent: number of latest entries that always stay. It is all that `first` leaves of `size` for
            "window", and by default half of `size`, or what `first` leaves of it, for the others.
        positions: "cache" or "text".
        bits: 8, 4 or 2; None stores keys and values as they are.
        keys_by: "channel" or "token": which numbers of the keys share a smallest value and a step.
        group: number of tokens in a group by channel.
        exact_first: whether the first `first` entries are stored as they are although the others are not.
        seed: of "random".

    Raises:
        InputError: for an encoder, a model on a server, a model that has no layer of full attention or caches
            something else than keys and values, arguments that contradict each other, and positions that
            cannot be counted in the cache.

    """

    def __init__(
        self,
        model: LanguageModel,
        size: int | None = None,
        *,
        first: int | Collection[int] = 4,
        evict: Evict = "window",
        recent: int | None = None,
        positions: Positions = "cache",
        bits: Bits | None = None,
        keys_by: Grouping = "channel",
        group: int = 32,
        exact_first: bool = True,
        seed: int = 0,
    ) -> None:
        given: Any = first
        chosen: tuple[int, ...] | None = None if isinstance(given, Integral) else tuple(sorted(set(given)))
        if chosen and chosen[0] < 0:
            raise InputError(f"position {chosen[0]}: positions count from 0 at the beginning of the text")
        first = int(given) if chosen is None else len(chosen)
        room = (size or 0) - first
        usual = room if evict == "window" else max(1, min(room, (size or 0) // 2))
        if evict == "window" and size is not None and recent not in (None, room):
            raise InputError(
                f"recent={recent}: a window of {size} entries that keeps the first {first} has the latest "
                f"{room}; leave `recent` out, or choose another `evict`"
            )
        recent = usual if recent is None else recent
        self.rule = CacheRule(
            size, first, evict, recent, positions, bits, keys_by, group, exact_first, seed, chosen
        )
        if not model.causal or model.remote is not None:
            kind = "is an encoder" if not model.causal else "runs on a server"
            raise InputError(f"{model.name} {kind}: a KVCache needs a causal language model in this process")
        self.rule.check(model)
        if size is not None and biased_by_distance(model):
            raise InputError(
                f"{model.name} ({model.family}) biases attention by distances within the cache, which change "
                "when entries are dropped: use size=None"
            )
        usual_layers = DynamicCache(config=model.config).layers
        kinds = {type(layer) for layer in usual_layers}
        if len(usual_layers) != model.layers or not kinds <= {DynamicLayer, DynamicSlidingWindowLayer}:
            names = ", ".join(sorted(kind.__name__ for kind in kinds))
            raise InputError(
                f"{model.name} ({model.family}) caches {names} for {len(usual_layers)} of {model.layers} "
                "layers, and a KVCache holds the keys and values of every layer: use the model's own cache"
            )
        if DynamicLayer not in kinds:
            raise InputError(
                f"every layer of {model.name} ({model.family}) has a sliding window of its own, so its cache "
                "is bounded already: choose a model with layers of full attention"
            )
        turns: list[Rotation | None] = [None] * model.layers
        if positions == "cache" and (size is not None or bits is not None):
            turns = rotations(model)
            if not any(turns):
                raise InputError(
                    f"{model.name} ({model.family}) has no rotary positions, so its keys cannot be counted "
                    "anew within the cache: use positions='text'"
                )
        super().__init__(
            layers=[
                KVLayer(self.rule, index, turns[index]) if type(layer) is DynamicLayer else layer
                for index, layer in enumerate(usual_layers)
            ]
        )
        self.model = model
        hooks = model.module._forward_pre_hooks.values()
        if _check_pass not in hooks:
            model.module.register_forward_pre_hook(_check_pass, with_kwargs=True)

    @property
    def bounded(self) -> list[KVLayer]:
        """The layers to which the rule applies."""
        return [layer for layer in self.layers if isinstance(layer, KVLayer)]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that the cache holds, with the counts by which it chooses what to drop."""
        return held_bytes(self)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return the keys and values that a layer attends to, and keep what the rule keeps.

        Raises InputError if the rule needs attention weights and the cache is not among the attention hooks.
        """
        if layer_idx and getattr(self.layers[layer_idx - 1], "awaiting", False):
            raise unseen()
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def activate_past_recording(self) -> None:
        """Refuse assisted generation, which takes tokens back; raises InputError."""
        raise InputError(
            "assisted generation takes rejected tokens back, and a KVCache cannot, since what it has dropped "
            "or rounded since is gone: generate without an assistant, or with another cache"
        )

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse to go back, before any layer has changed; raises InputError."""
        self.bounded[0].crop(tokens_to_remove)
        super().crop(tokens_to_remove)

    def check(self, model: Any) -> None:
        """Raise InputError for another model than that of the cache."""
        if model.module is not self.model.module:
            raise InputError(f"the cache was made for {self.model.name}: make one for {model.name}")

    def __call__(self, call: AttentionCall) -> AttentionCall | None:
        """Let a layer's attention weights be counted: the cache is an attention hook."""
        layer = self.layers[call.layer]
        if not isinstance(layer, KVLayer) or not layer.awaiting or layer.watched:
            return None
        layer.watched = True  # blocks may be nested, as around `cached_nll`, which opens one itself
        return replace(call, observers=(*call.observers, layer.observer(call)))


def held_bytes(cache: Cache | Iterable[Any]) -> int:
    """Return the bytes of the keys and values of a cache, and of whatever else it stores for each entry.

    Some of its layers alone can be given as well.
    """
    found: list[Tensor] = []
    for layer in cache.layers if isinstance(cache, Cache) else cache:
        if isinstance(layer, KVLayer):
            found += layer.tensors
        else:
            own = (getattr(layer, name, None) for name in ("keys", "values"))
            found += [x for x in own if isinstance(x, Tensor)]
    return sum(x.numel() * x.element_size() for x in found)


def _check_pass(module: nn.Module, given: Any, named: dict[str, Any]) -> None:
    """Raise InputError for a pass whose mask or positions do not fit what a `KVCache` holds."""
    cache = named.get("past_key_values")
    if not isinstance(cache, KVCache):
        return
    mask, positions = named.get("attention_mask"), named.get("position_ids")
    if isinstance(mask, Tensor) and mask.ndim == 2 and not bool(mask.all()):
        raise InputError(
            "the batch is padded, and a KVCache would keep the padding as its first entries: give it texts "
            "of one length, or one text at a time"
        )
    if isinstance(mask, dict) or (isinstance(mask, Tensor) and mask.ndim > 2):
        raise InputError(
            "the attention mask numbers keys by their positions, and a KVCache holds others: leave it out, "
            "and every token sees what the cache holds"
        )
    read = next(
        (x for x in (*given, named.get("input_ids"), named.get("inputs_embeds")) if x is not None), None
    )
    rows = cache.bounded[0].stored_values.shape[0]
    if rows and isinstance(read, Tensor) and len(read) != rows:
        raise InputError(
            f"the KVCache holds {rows} texts, and this pass has {len(read)}: make a new cache, or call its "
            "reset() to begin again"
        )
    counted = any(layer.rotation is not None for layer in cache.bounded)
    if counted and isinstance(positions, Tensor) and positions.ndim == 2:
        seen = cache.get_seq_length()
        if not (positions == torch.arange(seen, seen + positions.shape[1], device=positions.device)).all():
            raise InputError(
                f"the positions of this pass do not continue the {seen} tokens that the KVCache has read: "
                "leave out `position_ids`, or use positions='text'"
            )
