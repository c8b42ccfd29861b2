"""Attention computed in blocks of queries, with hooks that read or change its inputs.

Fused kernels return no attention weights, and eager attention holds a `tokens x tokens` map for every head.
The implementation in this module computes the weights of one block of queries at a time. It passes the
queries, keys and values of each layer to hooks, which read or replace them. The hooks see them as the softmax
does: after positional encoding and the norms of queries and keys, together with the scaling, caps, masks and
learned sinks. The implementation is registered with transformers under `BLOCKWISE`. `attending` switches it
on for a block of code, around any measurement.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import StaticLayer
from transformers.generation.utils import GenerationMixin
from transformers.masking_utils import sdpa_mask

from spectral_sinks.errors import InputError
from spectral_sinks.models.attention_sdpa import BLOCKWISE, TOKENS, WHOLE

if TYPE_CHECKING:
    from spectral_sinks.models.base import Transformer

WEIGHTS = 2**20
"""Number of attention weights held at once: 4 MB in float32."""

HOOKS = "_spectral_hooks"
"""Attribute of an attention module that stores its hooks."""

REORDER = "_reorder_cache"
"""What a beam search of transformers calls, if the model has it, where it reorders the rows of a batch."""


@dataclass(frozen=True)
class AttentionCall:
    """The inputs of one layer's attention; `dataclasses.replace` makes a changed copy."""

    layer: int
    query: Float[Tensor, "batch heads queries size"]
    key: Float[Tensor, "batch key_heads keys size"]
    value: Float[Tensor, "batch value_heads keys value_size"]
    scaling: float
    """Factor on the dot products of queries and keys."""
    causal: bool
    """Whether a query cannot see later keys; used where there is no mask."""
    mask: Tensor | None = None
    """True where a query may see a key, `[#batch, #heads, #queries, keys]`; None where `causal` alone
    decides.
    """
    bias: Float[Tensor, "... queries keys"] | None = None
    """Added to the scores, as relative positions are."""
    cap: float | None = None
    """Soft cap: scores become `cap tanh(score / cap)` (Gemma 2)."""
    sinks: Float[Tensor, "heads"] | None = None
    """A learned logit in the softmax of each head that has no value (gpt-oss), so rows sum to less than 1."""
    options: dict[str, Any] = field(default_factory=dict[str, Any])
    """Any other arguments that the model passed."""
    ids: Int[Tensor, "batch tokens"] | None = None
    """Token ids from the beginning of the text to the last query; None where they are not known.

    They follow the rows of a batch that `generate` reorders in a beam search.
    """
    past: int = 0
    """Number of tokens before the first query, whose keys come from a cache."""
    places: Int[Tensor, "#batch #key_heads keys"] | None = None
    """Positions in the text of the keys, where a cache has dropped some; None where none is missing between
    the first and the last."""
    recounted: int = 0
    """By how many positions queries are turned beyond what their place among the keys says. It is 0 unless a
    cache counts the positions of its keys anew, and has dropped some."""
    starts: Int[Tensor, "batch"] | None = None
    """Number of padding tokens before each text, in a batch that is padded on the left; None for no padding
    there. The positions of queries and keys count this padding."""
    kept: Bool[Tensor, "... queries keys"] | None = None
    """False where a weight is dropped after the softmax, so that rows sum to less than 1."""
    extra_key: Float[Tensor, "#batch extra_heads extra size"] | None = None
    """Keys in addition to those of the tokens, which every query sees; `weights` returns no columns for them.
    """
    extra_value: Float[Tensor, "#batch extra_heads extra value_size"] | None = None
    gate: Float[Tensor, "batch heads queries value_size"] | None = None
    """The factor by which the model multiplies the output before W_O reads it (Qwen3-Next). Only functions
    that see the call once W_O is about to read know it; None where it is not known, or not there."""
    observers: tuple["WeightObserver", ...] = ()
    """Functions that receive each block of weights while the output is computed from it."""

    @property
    def groups(self) -> int:
        """Number of query heads per key head."""
        return self.query.shape[1] // self.key.shape[1]

    @property
    def query_positions(self) -> Int[Tensor, "queries"]:
        """Positions of the queries in the text, counted from 0; padding on the left counts as text."""
        return self.past + torch.arange(self.query.shape[2], device=self.query.device)

    @property
    def key_positions(self) -> Int[Tensor, "keys"]:
        """Positions of the keys in the text; a cache may have dropped others.

        Raises InputError where each row or head of a cache holds the keys of other tokens.
        """
        if self.places is not None:
            if self.places.shape[:2] != (1, 1):
                raise InputError(
                    f"the cache holds keys of other tokens in each head of layer {self.layer}, so a key "
                    "cannot be chosen by its position in the text: use a cache with evict='window'"
                )
            return self.places[0, 0].to(self.query.device)
        gone = max(0, self.past + self.query.shape[2] - self.key.shape[2])
        return gone + torch.arange(self.key.shape[2], device=self.query.device)

    @property
    def openings(self) -> Int[Tensor, "#batch 1"]:
        """The position at which each text begins, which is 0 without padding on the left."""
        if self.starts is None:
            return torch.zeros(1, 1, dtype=torch.long, device=self.query.device)
        return self.starts.to(self.query.device)[:, None]

    def visible(self, rows: slice = slice(None)) -> Bool[Tensor, "#batch #heads rows keys"]:
        """Return which keys the queries in `rows` may see."""
        queries, keys = self.query.shape[2], self.key.shape[2]
        places = torch.arange(queries, device=self.query.device)[rows, None] + keys - queries
        if self.mask is not None:
            mask = self.mask.expand(*self.mask.shape[:-2], queries, keys)
            return mask[..., rows, :]
        seen = torch.arange(keys, device=self.query.device) <= places
        return (seen if self.causal else torch.ones_like(seen))[None, None]

    def scores(self, rows: slice = slice(None)) -> Float[Tensor, "batch heads rows keys"]:
        """Return the scores of the queries in `rows` with all keys: scaled, capped and biased dot products.

        The score of a key that a query cannot see is -inf.
        """
        return self._scores(rows, self.key.shape[2])

    def _scores(self, rows: slice, keys: int) -> Float[Tensor, "batch heads rows keys"]:
        """Return the scores with the first `keys` keys."""
        scores = self._products(self.key[:, :, :keys], rows)
        if self.bias is not None:
            scores = scores + self.bias[..., rows, :keys]
        if self.mask is not None:
            return scores.masked_fill_(~self.visible(rows)[..., :keys], -torch.inf)
        if self.causal:  # the keys before the first of these queries are seen by all of them
            first = max(0, range(self.query.shape[2])[rows].start + self.key.shape[2] - self.query.shape[2])
            scores[..., first:].masked_fill_(~self.visible(rows)[..., first:keys], -torch.inf)
        return scores

    def _products(self, key: Tensor, rows: slice) -> Float[Tensor, "batch heads rows columns"]:
        batch, heads, _, size = self.query.shape
        query = self.query[:, :, rows]
        # Query heads that share a key head are rows of one product, so that its keys are not copied
        together = query.reshape(batch, key.shape[1], -1, size) @ key.transpose(2, 3)
        scores = together.mul_(self.scaling).view(batch, heads, -1, key.shape[2])
        return scores if self.cap is None else self.cap * torch.tanh(scores / self.cap)

    def _by_query_head(self, keys: Tensor) -> Float[Tensor, "batch heads columns size"]:
        """Repeat the keys or values of each key head for the query heads that share it."""
        return keys.repeat_interleave(self.query.shape[1] // keys.shape[1], dim=1)

    def weights(self, rows: slice = slice(None)) -> Float[Tensor, "batch heads rows keys"]:
        """Return the attention weights of the queries in `rows`, in float32 at least; zeros for a query that
        sees nothing.
        """
        keys = self.key.shape[2]
        return self._shared(rows, keys)[..., :keys]

    def _shared(self, rows: slice, keys: int) -> Float[Tensor, "batch heads rows columns"]:
        """Return the softmax over the first `keys` keys, the extra keys and the learned sink, in this order
        of columns.

        The queries in `rows` see no further keys.
        """
        columns = [self._scores(rows, keys)]
        if self.extra_key is not None:
            columns.append(self._products(self.extra_key, rows))
        columns = [part.to(torch.promote_types(part.dtype, torch.float32)) for part in columns]
        if self.sinks is not None:
            sinks = self.sinks.to(columns[0].dtype).view(1, -1, 1, 1)
            columns.append(sinks.expand(*columns[0].shape[:-1], 1))
        weights = torch.cat(columns, dim=-1) if columns[1:] else columns[0]
        weights = weights.softmax(-1)
        if self.mask is not None or self.bias is not None or self.key.shape[2] < self.query.shape[2]:
            weights = weights.nan_to_num(0.0)  # a query may see nothing
        if self.kept is None:
            return weights
        return torch.cat([weights[..., :keys] * self.kept[..., rows, :keys], weights[..., keys:]], dim=-1)

    def blocks(self) -> Iterator[slice]:
        """Return slices of the queries, each small enough that its weights fit into `WEIGHTS`."""
        batch, heads, queries, _ = self.query.shape
        step = max(1, WEIGHTS // (batch * heads * self.key.shape[2]))
        return (slice(start, min(start + step, queries)) for start in range(0, queries, step))

    def _in_sight(self, rows: slice) -> int:
        """Return a number of first keys beyond which the queries in `rows` see none."""
        keys = self.key.shape[2]
        if self.mask is not None or not self.causal:
            return keys
        return max(1, rows.stop + keys - self.query.shape[2])

    def output(self) -> Float[Tensor, "batch queries heads size"]:
        """Return the values averaged with the attention weights, which the observers receive in blocks."""
        batch, heads, queries, _ = self.query.shape
        value = self.value
        mixed = value.new_empty(batch, heads, queries, value.shape[-1])
        for rows in self.blocks():
            keys = self._in_sight(rows)
            weights = self._shared(rows, keys)
            for observe in self.observers:
                observe(rows, weights[..., :keys])
            part = self._averaged(weights[..., :keys], value[:, :, :keys])
            if self.extra_value is not None:
                extra = self.extra_value
                part = part + self._averaged(weights[..., keys : keys + extra.shape[2]], extra)
            mixed[:, :, rows] = part
        return mixed.transpose(1, 2).contiguous()

    def _averaged(self, weights: Tensor, value: Tensor) -> Float[Tensor, "batch heads rows size"]:
        """Return weighted sums of the values of the key head that each query head reads."""
        batch, heads, rows, keys = weights.shape
        together = weights.to(value.dtype).reshape(batch, value.shape[1], -1, keys)
        return (together @ value).view(batch, heads, rows, value.shape[-1])


WeightObserver = Callable[[slice, Tensor], None]
"""A function that receives a block of queries, as a slice, and their attention weights `[batch, heads, rows,
keys]`. Keys that none of them sees may be left out at the end."""

AttentionHook = Callable[[AttentionCall], AttentionCall | None]
"""A function that receives the inputs of one layer's attention, and returns changed inputs or None."""


@contextmanager
def attending(model: "Transformer", look: AttentionHook) -> Iterator[None]:
    """Call an attention hook in every attention layer, at each forward pass inside the block.

    The hook `look` is called with an `AttentionCall`, in the order of the layers. If it returns an
    `AttentionCall`, the layer computes from that one instead. If `look` has a method `check(model)`, that is
    called first. Blocks can be nested: the inner hook receives what the outer hook returned. The outputs
    agree with those of the model's own attention up to rounding.

    For a remote model, `look` is sent with every job of the block and runs on the server. Whatever it
    collects stays on the server, so a hook that collects is refused. Use `remotely` instead, which sends a
    function that collects and returns.

    Raises InputError for a model that does not run its attention through transformers' interface, for a model
    with an attention implementation of its own (which may not be a softmax), and for a model whose weights
    are in another process than the code sent to it.
    """
    if not callable(look):
        raise InputError(f"{look!r} is not a function of an AttentionCall, such as MaskKey(0)")
    if callable(check := getattr(look, "check", None)):
        check(model)
    if model.remote is not None:
        with model.remote.under(look):
            yield
        return
    model.require_weights("`attending`")
    module: Any = model.module
    if not module._can_set_attn_implementation():
        raise InputError(
            f"{model.name}: {type(module).__name__} does not run its attention through transformers' "
            "attention interface, so its queries and keys cannot be seen"
        )
    if model.own_attention is not None:
        raise InputError(
            f"{model.name} runs {model.own_attention!r} attention, an implementation of its own that may be "
            "no softmax, and this would put a softmax in its place; the weights that it returns are read by "
            "find_sinks, attention_by_position and attention_by_head"
        )
    if "attending" in model.layout.traits.lacking:
        raise InputError(
            f"the queries and keys of {model.name} ({model.family}) cannot be seen, since "
            f"{model.layout.traits.lacking['attending']}"
        )
    before = model.config._attn_implementation
    text = _Text()
    watching = module.register_forward_pre_hook(text.read, with_kwargs=True)
    hooked: list[nn.Module] = []
    outer: dict[nn.Module, Any] = {}
    generating = [part for part in module.modules() if isinstance(part, GenerationMixin)]
    reorder = [getattr(part, REORDER, _reorder_cache) for part in generating]
    for layer in model.attention_layers:
        block = module.get_submodule(f"{model.layout.layers}.{layer}")
        for part in block.get_submodule(model.layout.attention).modules():
            if HOOKS in part.__dict__:
                outer[part] = part.__dict__[HOOKS]
            hooks = outer[part][1] if part in outer else ()
            part.__dict__[HOOKS] = (layer, (*hooks, look), text)
            hooked.append(part)
    try:
        for part, inner in zip(generating, reorder, strict=True):
            part.__dict__[REORDER] = text.following(inner)
        if before not in (BLOCKWISE, WHOLE):
            module.set_attn_implementation(BLOCKWISE)
        yield
    finally:
        if before not in (BLOCKWISE, WHOLE):
            module.set_attn_implementation(before)
        watching.remove()
        for part, inner in zip(generating, reorder, strict=True):
            if inner is _reorder_cache:
                part.__dict__.pop(REORDER)
            else:
                part.__dict__[REORDER] = inner
        for part in hooked:
            part.__dict__.pop(HOOKS)
            if part in outer:
                part.__dict__[HOOKS] = outer[part]


def _reorder_cache(cache: Any, beams: Tensor) -> Any:
    cache.reorder_cache(beams)
    return cache


def can_attend(model: "Transformer") -> bool:
    """Whether a model runs its attention through transformers' interface, where `attending` looks."""
    return model.module._can_set_attn_implementation() and "attending" not in model.layout.traits.lacking


class _Text:
    """The token ids and the cache length of the current pass, for the hooks of a block.

    The ids of a pass that continues a cached one are appended to the ids of that pass.
    """

    def __init__(self) -> None:
        self.ids: Tensor | None = None
        self.past = 0
        self.cache: Any = None
        self.starts: Tensor | None = None

    def cached(self, layer: int) -> Any:
        """Return the cache of a layer, or None."""
        layers = getattr(self.cache, "layers", ())
        return layers[layer] if 0 <= layer < len(layers) else None

    def used(self, layer: int, queries: int) -> int | None:
        """Return how many keys belong to tokens, if the cache of a layer has places for later ones."""
        return self.past + queries if isinstance(self.cached(layer), StaticLayer) else None

    def held(self, layer: int) -> Any:
        """Return the places in the text of a layer's keys, and by how many positions its cache counts them
        nearer to the queries; None and 0 if the cache has dropped none of them.
        """
        return getattr(self.cached(layer), "shown", (None, 0))

    def following(self, reorder: Callable[[Any, Tensor], Any]) -> Callable[[Any, Tensor], Any]:
        """Return a function that reorders a cache, and the ids with it."""

        def reordered(cache: Any, beams: Tensor) -> Any:
            if self.ids is not None:
                self.ids = self.ids.index_select(0, beams.to(self.ids.device))
            return reorder(cache, beams)

        return reordered

    def padding(self, mask: Any) -> Tensor | None:
        """Return the number of padding tokens before each text, by the mask of this pass or of those before.

        In a beam search the beams of one prompt have the same padding.
        """
        if not isinstance(mask, Tensor) or mask.ndim != 2:  # a mask of queries and keys, from a static cache
            return self.starts if self.past else None
        return None if bool(mask[:, 0].all()) else (mask != 0).int().argmax(1)

    def read(self, module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        ids: Tensor | None = named.get("input_ids", given[0] if given else None)
        if ids is not None and ids.ndim != 2:  # pixels
            ids = None
        self.cache = cache = named.get("past_key_values")
        self.past = 0 if cache is None else int(cache.get_seq_length())
        second = given[1] if len(given) > 1 and ids is not None else None
        self.starts = self.padding(named.get("attention_mask", second))
        if self.past and ids is not None:
            before = self.ids
            known = before is not None and before.shape == (len(ids), self.past)
            ids = torch.cat([before.to(ids.device), ids], dim=1) if before is not None and known else None
        self.ids = ids


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **options: Any,
) -> AttentionCall:
    layer, hooks, text = module.__dict__.get(HOOKS, (-1, (), _Text()))
    used = text.used(layer, query.shape[2])
    if used is not None and used < key.shape[2]:
        key, value = key[:, :, :used], value[:, :, :used]
        if attention_mask is not None:
            attention_mask = attention_mask[..., :used]
    boolean = attention_mask is not None and attention_mask.dtype == torch.bool
    call = AttentionCall(
        layer,
        query,
        key,
        value,
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        getattr(module, "is_causal", True) if is_causal is None else is_causal,
        attention_mask if boolean else None,
        position_bias if boolean or attention_mask is None else attention_mask,
        softcap,
        s_aux,
        options,
        text.ids,
        text.past,
        *text.held(layer),
        starts=text.starts,
    )
    for look in hooks:
        call = look(call) or call
    return call


def _blockwise(*given: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """Return the output, and the attention weights among the first `TOKENS` tokens."""
    call = _attention(*given, **options)
    batch, heads, queries, _ = call.query.shape
    rows, keys = min(TOKENS, queries), min(TOKENS, call.key.shape[2])
    kind = torch.promote_types(call.query.dtype, torch.float32)
    opening = call.query.new_zeros(batch, heads, rows, keys, dtype=kind)

    def keep(block: slice, weights: Tensor) -> None:
        if block.start < rows:
            part = weights[:, :, : rows - block.start, :keys]
            opening[:, :, block.start : block.start + part.shape[2], : part.shape[3]] = part

    return replace(call, observers=(*call.observers, keep)).output(), opening


def _whole(*given: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """Return the output, and all attention weights."""
    call = _attention(*given, **options)
    return call.output(), call.weights()


for _name, _implementation in ((BLOCKWISE, _blockwise), (WHOLE, _whole)):
    AttentionInterface.register(_name, _implementation)
    AttentionMaskInterface.register(_name, sdpa_mask)
