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
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from spectral_sinks.errors import InputError
from spectral_sinks.models.opening import BLOCKWISE, TOKENS, WHOLE

if TYPE_CHECKING:
    from spectral_sinks.models.language import LanguageModel

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

    @property
    def groups(self) -> int:
        """Query heads per key head."""
        return self.query.shape[1] // self.key.shape[1]

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
        key = self.key.repeat_interleave(self.groups, dim=1)
        scores = self.query[:, :, rows] @ key.transpose(2, 3) * self.scaling
        if self.cap is not None:
            scores = self.cap * torch.tanh(scores / self.cap)
        if self.bias is not None:
            scores = scores + self.bias[..., rows, :]
        return scores.masked_fill(~self.visible(rows), -torch.inf)

    def weights(self, rows: slice = slice(None)) -> Float[Tensor, "batch heads rows keys"]:
        """Attention weights of some queries, float32; a query that sees nothing has zeros."""
        scores = self.scores(rows).float()
        if self.sinks is not None:
            sinks = self.sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
            return torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1]
        return scores.softmax(-1).nan_to_num(0.0)

    def blocks(self) -> Iterator[slice]:
        """The queries in blocks whose weights fit into `WEIGHTS`."""
        batch, heads, queries, _ = self.query.shape
        step = max(1, WEIGHTS // (batch * heads * self.key.shape[2]))
        return (slice(start, min(start + step, queries)) for start in range(0, queries, step))

    def output(self) -> Float[Tensor, "batch queries heads size"]:
        """Values mixed by the weights."""
        value = self.value.repeat_interleave(self.groups, dim=1)
        mixed = value.new_empty(*self.query.shape[:3], value.shape[-1])
        for rows in self.blocks():
            mixed[:, :, rows] = self.weights(rows).to(value.dtype) @ value
        return mixed.transpose(1, 2).contiguous()


Look = Callable[[AttentionCall], AttentionCall | None]
"""Sees what a layer's attention computes from, and may return what it shall compute from instead."""


@contextmanager
def attending(model: "LanguageModel", look: Look) -> Iterator[None]:
    """Inside the block, every attention layer of the model is shown to `look` at each pass, in order.

    What `look` returns takes the place of the call. Blocks nest: the inner one sees what the outer one made.
    Outputs agree with the model's own attention to rounding. Raises InputError for a model that does not
    run its attention through transformers' interface.
    """
    module: Any = model.module
    if not module._can_set_attn_implementation():
        raise InputError(
            f"{model.name}: {type(module).__name__} does not run its attention through transformers' "
            "attention interface, so its queries and keys cannot be seen"
        )
    before = model.config._attn_implementation
    hooked: list[nn.Module] = []
    for layer in range(model.layers):
        block = module.get_submodule(f"{model.layout.layers}.{layer}")
        for part in block.get_submodule(model.layout.attention).modules():
            part.__dict__[HOOKS] = (layer, (*part.__dict__.get(HOOKS, (layer, ()))[1], look))
            hooked.append(part)
    try:
        if before not in (BLOCKWISE, WHOLE):
            module.set_attn_implementation(BLOCKWISE)
        yield
    finally:
        if before not in (BLOCKWISE, WHOLE):
            module.set_attn_implementation(before)
        for part in hooked:
            layer, looks = part.__dict__.pop(HOOKS)
            if looks[:-1]:
                part.__dict__[HOOKS] = (layer, looks[:-1])


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
    layer, looks = module.__dict__.get(HOOKS, (-1, ()))
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
