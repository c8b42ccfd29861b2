"""Fast attention that also returns the attention maps of the first tokens.

The kernels behind torch's `scaled_dot_product_attention` return no attention weights, and eager attention
keeps whole `tokens x tokens` maps. Attention received is defined over the first tokens only. So this
implementation runs the kernel and, separately, computes the maps of those tokens. It computes them from the
queries and keys that the kernel receives, with positions, grouped heads and masks. It is registered with
transformers under `OPENING`, for every model that supports `sdpa`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

if TYPE_CHECKING:
    from spectral_sinks.models.base import Transformer

OPENING = "sdpa_opening"
"""Name of the implementation in this module."""

BLOCKWISE, WHOLE = "blockwise", "blockwise_whole"
"""Names of the implementations of `attending`: the first returns the maps of the first tokens, the second
whole maps.
"""

TOKENS = 64
"""Number of first tokens whose maps are returned.

Attention received is averaged over these queries, since it falls with length (Gu et al. 2025).
"""


def opening_attention(
    module: nn.Module,
    query: Float[Tensor, "batch heads tokens size"],
    key: Float[Tensor, "batch key_heads keys size"],
    value: Float[Tensor, "batch key_heads keys value_size"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Float[Tensor, "batch tokens heads value_size"], Float[Tensor, "batch heads opening opening"]]:
    """Return the output of the kernel, and the attention weights among the first `TOKENS` tokens.

    The signature is that of an attention implementation of transformers.
    """
    output, _ = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout, scaling, is_causal, **options
    )
    count = min(TOKENS, query.shape[2], key.shape[2])
    query, key = query[:, :, :count], key[:, :, :count]
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if attention_mask is not None:
        mask = attention_mask[..., :count, :count]
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    elif getattr(module, "is_causal", True) if is_causal is None else is_causal:
        later = torch.ones(count, count, dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, -torch.inf)
    return output, scores.softmax(-1, dtype=torch.float32)


def is_softmax(implementation: str) -> bool:
    """Test whether an attention implementation is known to compute a softmax.

    Those of transformers and of this package are. Any other implementation registered with transformers may
    compute anything.
    """
    known = ("eager", "sdpa", "flex_attention", OPENING, BLOCKWISE, WHOLE)
    return "flash" in implementation or implementation.removeprefix("paged|") in known


@contextmanager
def whole_maps(model: "Transformer") -> Iterator[None]:
    """Let a trace inside the block read whole attention maps.

    The model is switched to eager attention, or to the whole-map version of `attending` if that is active or
    eager attention returns other maps than it uses. A model with an attention implementation of its own keeps
    it.
    """
    before = model.config._attn_implementation
    whole = WHOLE if before == BLOCKWISE or not model.layout.traits.eager_maps else "eager"
    changes = before not in (whole, WHOLE) and model.own_attention is None
    if changes:
        model.module.set_attn_implementation(whole)
    try:
        yield
    finally:
        if changes:
            model.module.set_attn_implementation(before)


AttentionInterface.register(OPENING, opening_attention)
AttentionMaskInterface.register(OPENING, sdpa_mask)
