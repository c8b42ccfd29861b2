"""Attention received by one position: the mass of a sink."""

from collections.abc import Sequence

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from spectral_sinks.data.pixels import Pixels
from spectral_sinks.data.texts import Windows
from spectral_sinks.errors import InputError, renamed_argument
from spectral_sinks.interventions.tracing import trace
from spectral_sinks.measure.memory import batches
from spectral_sinks.models.attention_sdpa import OPENING, TOKENS
from spectral_sinks.models.base import Transformer

EPSILON = 0.3
"""Attention received above which a head has a sink (Gu et al. 2025)."""


def attention_received(
    weights: Sequence[Float[Tensor, "batch heads tokens tokens"]],
    position: int = 0,
    length: int | None = None,
    *,
    causal: bool = True,
) -> Float[Tensor, "batch layers heads"]:
    """Return alpha_k, the attention received by a position, by layer and head.

    alpha_k is the mean over queries i >= k, among the first `length` (64) tokens, of A[i, k]. The first
    query's attention to itself, which is 1 for position 0, counts: uniform causal attention gives 0.0741 at
    64 tokens. Where attention is not causal, a row is normalised over the whole window, so the mean is over
    all queries of the window.

    Args:
        weights: attention weights of each layer.
        position: the position k; -1 is the last token of an encoder's window ([SEP]).
        length: number of first tokens, 64 by default; the length of the window where attention is not causal.
        causal: whether attention is causal.

    Raises:
        InputError: for a window shorter than `length`, or of another length where attention is not causal.

    Source: Gu et al. 2025, 3.1.

    """
    if not causal:
        if length is not None and any(layer.shape[-1] != length for layer in weights):
            raise InputError(
                f"attention received over {length} tokens: a token of an encoder attends to its whole "
                "window, so cut windows of that length"
            )
        return torch.stack([layer[..., position].float().mean(-1) for layer in weights], dim=1)
    length = TOKENS if length is None else length
    if any(layer.shape[-1] < length for layer in weights):
        raise InputError(f"attention received is taken over {length} tokens, the window is shorter")
    return torch.stack([layer[:, :, position:length, position].float().mean(-1) for layer in weights], dim=1)


def from_others(
    model: Transformer, weights: Float[Tensor, "batch heads queries keys"]
) -> Float[Tensor, "batch heads queries keys"]:
    """Return attention weights, without the diagonal if they do not come from a softmax.

    Without a softmax a weight has no limit and takes nothing from the others. A first token, which sees only
    itself, may then give itself any weight, and that is not a sink.
    """
    if model.own_attention is None:
        return weights
    return weights - weights.diagonal(dim1=-2, dim2=-1).diag_embed()


def uniform_attention(position: int = 0, length: int = TOKENS, *, causal: bool = True) -> float:
    """Return alpha_k for uniform attention; 1 / length where attention is not causal."""
    if not causal:
        return 1 / length
    return sum(1 / (i + 1) for i in range(position, length)) / (length - position)


def sink_rate(received: Float[Tensor, "batch layers heads"], epsilon: float = EPSILON) -> float:
    """Return Sink^eps_k, the share of (text, layer, head) with attention received above `epsilon`."""
    return float((received > epsilon).float().mean())


@renamed_argument("tokens", "length")
def attention_by_head(
    model: Transformer,
    windows: Windows | Pixels,
    position: int = 0,
    *,
    length: int | None = None,
    batch_size: int | None = None,
) -> pd.DataFrame:
    """Measure the attention received by one position in every head, by document.

    An encoder reads whole windows as they are, without masked tokens. If a model has an attention
    implementation of its own, which may not be a softmax, the position's attention to itself is left out.

    Args:
        model: a language model or an image encoder.
        windows: windows of text, or images.
        position: the position.
        length: number of first tokens, 64 by default; an encoder's whole windows.
        batch_size: windows in a pass.

    Returns:
        One row per `document`, `layer` and `head` with its `attention`, mean over the document's windows.
        Layers without softmax attention have no rows.

    Raises:
        InputError: where attention weights cannot be read; for a window shorter than `length` (of another
            length, for an encoder); and for more than 64 tokens under "sdpa_opening".

    """
    if model.config._attn_implementation == OPENING and length is not None and length > TOKENS:
        raise InputError(
            f"attention received is taken over {length} tokens, and {OPENING!r} keeps the maps of only "
            f"the first {TOKENS}: load the model with attention='eager'"
        )
    model.require_equal_heads()
    rows: list[pd.DataFrame] = []
    for places, ids in batches(model, windows, batch_size):
        received = trace(
            model,
            ids.to(model.device),
            {},
            readout=lambda final, read, weights: attention_received(
                [from_others(model, layer) for layer in weights], position, length, causal=model.causal
            ).cpu(),
            attention=True,
        )
        index = pd.MultiIndex.from_product(
            [[windows.document[place] for place in places], model.attention_layers, range(model.heads)],
            names=["document", "layer", "head"],
        )
        rows.append(
            pd.DataFrame({"attention": received.flatten().double().numpy()}, index=index).reset_index()
        )
    return pd.concat(rows).groupby(["document", "layer", "head"], as_index=False).mean()
