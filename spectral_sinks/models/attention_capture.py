"""Attention in blocks of queries, of which everything can be seen and changed.

Kernels show no attention weights, and eager attention holds `tokens x tokens` of every head. This
implementation hands each layer's queries, keys and values, as the softmax meets them (positions, norms of
queries and keys, scaling, caps, masks and learned sinks included), to functions that look at them or put
others in their place, and computes the weights of a block of queries at a time. Registered with transformers
under `BLOCKWISE`; `attending` puts it in place for the length of a block of code, around any measurement.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from spectral_sinks.errors import InputError
from spectral_sinks.models.attention_sdpa import BLOCKWISE, TOKENS, WHOLE

if TYPE_CHECKING:
    from spectral_sinks.models.base import Transformer

WEIGHTS = 2**20
"""Attention weights held at once: 4 MB in float32."""

HOOKS = "_spectral_hooks"
"""Attribute of an attention module under which its hooks are kept."""


@dataclass(frozen=True)
class AttentionCall:
    """What one layer's attention computes from; `dataclasses.replace` makes another."""

    layer: int
    query: Float[Tensor, "batch heads queries size"]
    key: Float[Tensor, "batch key_heads keys size"]
    value: Float[Tensor, "batch key_heads keys size"]
    scaling: float
    """Factor of the products of queries and keys."""
    causal: bool
    """Whether a query sees no later key, where there is no mask."""
    mask: Tensor | None = None
    """True where a query may see a key, `[#batch, #heads, #queries, keys]`; None for all that it can."""
    bias: Float[Tensor, "*batch queries keys"] | None = None
    """Added to the scores (relative positions)."""
    cap: float | None = None
    """Scores are `cap tanh(score / cap)` (Gemma 2)."""
    sinks: Float[Tensor, "heads"] | None = None
    """Learned logit in each head's softmax that has no value (gpt-oss): rows sum to less than 1."""
    options: dict[str, Any] = field(default_factory=dict[str, Any])
    """What else the model passed on."""
    ids: Int[Tensor, "batch tokens"] | None = None
    """Token ids from the beginning of the text to the last query; None where they are not known.
    The reordering of rows by a beam search is not followed."""
    past: int = 0
    """Tokens before the first query: those whose keys come from a cache."""
    kept: Bool[Tensor, "*batch queries keys"] | None = None
    """False where a weight is dropped after the softmax: rows then sum to less than 1."""
    extra_key: Float[Tensor, "#batch extra_heads extra size"] | None = None
    """Keys beyond those of the tokens, which every query sees; the weights of the tokens leave them out."""
    extra_value: Float[Tensor, "#batch extra_heads extra size"] | None = None

    @property
    def groups(self) -> int:
        """Query heads per key head."""
        return self.query.shape[1] // self.key.shape[1]

    @property
    def query_positions(self) -> Int[Tensor, "queries"]:
        """Positions of the queries in the text, counted from 0."""
        return self.past + torch.arange(self.query.shape[2], device=self.query.device)

    @property
    def key_positions(self) -> Int[Tensor, "keys"]:
        """Positions of the keys: a cache may have let go of the first ones."""
        gone = max(0, self.past + self.query.shape[2] - self.key.shape[2])
        return gone + torch.arange(self.key.shape[2], device=self.query.device)

    def visible(self, rows: slice = slice(None)) -> Bool[Tensor, "#batch #heads rows keys"]:
        """Which keys some queries may see."""
        queries, keys = self.query.shape[2], self.key.shape[2]
        places = torch.arange(queries, device=self.query.device)[rows, None] + keys - queries
        if self.mask is not None:
            mask = self.mask.expand(*self.mask.shape[:-2], queries, keys)
            return mask[..., rows, :]
        seen = torch.arange(keys, device=self.query.device) <= places
        return (seen if self.causal else torch.ones_like(seen))[None, None]

    def scores(self, rows: slice = slice(None)) -> Float[Tensor, "batch heads rows keys"]:
        """Scaled, capped and biased products of some queries with all keys; -inf where they are not seen."""
        scores = self._products(self.key, rows)
        if self.bias is not None:
            scores = scores + self.bias[..., rows, :]
        return scores.masked_fill(~self.visible(rows), -torch.inf)

    def _products(self, key: Tensor, rows: slice) -> Float[Tensor, "batch heads rows columns"]:
        scores = self.query[:, :, rows] @ self._by_query_head(key).transpose(2, 3) * self.scaling
        return scores if self.cap is None else self.cap * torch.tanh(scores / self.cap)

    def _by_query_head(self, keys: Tensor) -> Float[Tensor, "batch heads columns size"]:
        """Keys or values of key heads, repeated for the query heads that share them."""
        return keys.repeat_interleave(self.query.shape[1] // keys.shape[1], dim=1)

    def weights(self, rows: slice = slice(None)) -> Float[Tensor, "batch heads rows keys"]:
        """Attention weights of some queries, float32 at least; a query that sees nothing has zeros."""
        return self._shared(rows)[..., : self.key.shape[2]]

    def _shared(self, rows: slice) -> Float[Tensor, "batch heads rows columns"]:
        """How the softmax shares itself out: to the keys, the extra keys, and the learned sink."""
        columns = [self.scores(rows)]
        if self.extra_key is not None:
            columns.append(self._products(self.extra_key, rows))
        columns = [part.to(torch.promote_types(part.dtype, torch.float32)) for part in columns]
        if self.sinks is not None:
            sinks = self.sinks.to(columns[0].dtype).view(1, -1, 1, 1)
            columns.append(sinks.expand(*columns[0].shape[:-1], 1))
        weights = torch.cat(columns, dim=-1) if columns[1:] else columns[0]
        weights = weights.softmax(-1).nan_to_num(0.0)
        if self.kept is None:
            return weights
        keys = weights[..., : self.key.shape[2]] * self.kept[..., rows, :]
        return torch.cat([keys, weights[..., self.key.shape[2] :]], dim=-1)

    def blocks(self) -> Iterator[slice]:
        """The queries in blocks whose weights fit into `WEIGHTS`."""
        batch, heads, queries, _ = self.query.shape
        step = max(1, WEIGHTS // (batch * heads * self.key.shape[2]))
        return (slice(start, min(start + step, queries)) for start in range(0, queries, step))

    def output(self) -> Float[Tensor, "batch queries heads size"]:
        """Values mixed by the weights."""
        value = self._by_query_head(self.value)
        if self.extra_value is not None:
            extra = self._by_query_head(self.extra_value).expand(len(value), -1, -1, -1)
            value = torch.cat([value, extra], dim=2)
        columns = slice(0, value.shape[2])
        mixed = value.new_empty(*self.query.shape[:3], value.shape[-1])
        for rows in self.blocks():
            mixed[:, :, rows] = self._shared(rows)[..., columns].to(value.dtype) @ value
        return mixed.transpose(1, 2).contiguous()


AttentionHook = Callable[[AttentionCall], AttentionCall | None]
"""Sees what a layer's attention computes from, and may return what it shall compute from instead."""


@contextmanager
def attending(model: "Transformer", look: AttentionHook) -> Iterator[None]:
    """Inside the block, every attention layer of the model is shown to `look` at each pass, in order.

    What `look` returns takes the place of the call. Blocks nest: the inner one sees what the outer one made.
    Outputs agree with the model's own attention to rounding. Where `look` has a method `check(model)`, that
    is asked first. With a model that is elsewhere, `look` goes along with every job of the block and acts
    there; what it collects stays there, so such a look is refused: `remotely` sends a function that collects
    and returns. Raises InputError for a model that does not run its attention through transformers'
    interface, for one with an attention implementation of its own, which may be no softmax, and for one
    whose weights are in another process than the code that it is sent.
    """
    if not callable(look):
        raise InputError(f"{look!r} is no function of an AttentionCall, such as MaskKey(0)")
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
    before = model.config._attn_implementation
    text = _Text()
    watching = module.register_forward_pre_hook(text.read, with_kwargs=True)
    hooked: list[nn.Module] = []
    outer: dict[nn.Module, Any] = {}
    for layer in range(model.layers):
        block = module.get_submodule(f"{model.layout.layers}.{layer}")
        for part in block.get_submodule(model.layout.attention).modules():
            if HOOKS in part.__dict__:
                outer[part] = part.__dict__[HOOKS]
            looks = outer[part][1] if part in outer else ()
            part.__dict__[HOOKS] = (layer, (*looks, look), text)
            hooked.append(part)
    try:
        if before not in (BLOCKWISE, WHOLE):
            module.set_attn_implementation(BLOCKWISE)
        yield
    finally:
        if before not in (BLOCKWISE, WHOLE):
            module.set_attn_implementation(before)
        watching.remove()
        for part in hooked:
            part.__dict__.pop(HOOKS)
            if part in outer:
                part.__dict__[HOOKS] = outer[part]


class _Text:
    """What the passes inside a block read: the ids so far, where each goes on from the one before."""

    def __init__(self) -> None:
        self.ids: Tensor | None = None
        self.past = 0

    def read(self, module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        ids: Tensor | None = named.get("input_ids", given[0] if given else None)
        if ids is not None and ids.ndim != 2:  # pixels
            ids = None
        cache = named.get("past_key_values")
        self.past = 0 if cache is None else int(cache.get_seq_length())
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
    layer, looks, text = module.__dict__.get(HOOKS, (-1, (), _Text()))
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
    )
    for look in looks:
        call = look(call) or call
    return call


def _blockwise(*given: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """Output, and the weights among the first `TOKENS` tokens."""
    call = _attention(*given, **options)
    return call.output(), call.weights(slice(0, TOKENS))[..., :TOKENS].clone()


def _whole(*given: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """Output, and all weights."""
    call = _attention(*given, **options)
    return call.output(), call.weights()


for _name, _implementation in ((BLOCKWISE, _blockwise), (WHOLE, _whole)):
    AttentionInterface.register(_name, _implementation)
    AttentionMaskInterface.register(_name, sdpa_mask)
