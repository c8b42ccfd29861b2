"""What each head does with its sink: nothing, a broadcast, or neither."""

from collections.abc import Sequence
from typing import Literal

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from spectral_sinks.measure.attention.by_position import Inputs
from spectral_sinks.measure.attention.capture import (
    Position,
    readers,
    show_attention,
    sink_positions,
    to_sink,
)
from spectral_sinks.models.attention_capture import AttentionCall
from spectral_sinks.models.base import Transformer
from spectral_sinks.models.weights import head_weights
from spectral_sinks.remote.client import remotely

NO_OP = 0.2
"""Value ratio up to which a sink writes nothing (Fesser et al. 2026) [published]."""

BROADCAST = 0.5
"""Value ratio from which a sink may broadcast (Fesser et al. 2026) [published]."""

STABLE_RANK = 1.5
"""Stable rank of the written update up to which a sink may broadcast (Fesser et al. 2026) [published]."""

ON_SINK = 0.5
"""Attention that a query puts on the sink in a sink event, at least (Fesser et al. 2026) [published]."""

QUERIES = 0.9
"""Share of the queries that do so in a sink event, at least (Fesser et al. 2026) [published]."""

Use = Literal["active", "no-op", "broadcast", "neither"]

Found = list[tuple[list[int], int, Tensor]]
"""Results of an observer. Each entry holds the windows of the batch, the layer, and values `[windows, heads,
columns]`."""

QUANTITIES = (
    "attention",
    "weighted",
    "queries_on_sink",
    "value_ratio",
    "stable_rank",
    "to_sink_logit",
    "gate",
)


def head_use(
    model: Transformer, windows: Inputs, position: Position = 0, *, batch_size: int | None = None
) -> pd.DataFrame:
    """Measure what each head does with a sink at `position`, by document.

    The means are over the document's windows, and over the queries that may see the sink, without the sink's
    own query. A head is dormant on a document if the sink event holds there: at least 0.9 of the queries put
    at least 0.5 of their attention on the sink. Otherwise it is active. What the sink of a dormant head
    writes is a "no-op" (value ratio <= 0.2), a "broadcast" (value ratio >= 0.5 and stable rank <= 1.5), or
    "neither" (Fesser et al. 2026). The gain of a norm after attention (Gemma, OLMo 2) counts as part of W_O.
    A `tokens x tokens` map exists only for one block of queries at a time.

    Where a gate multiplies what a head mixes (Qwen3-Next, AfMoE), a value writes `W_O (g_i * v_j)` to query
    i, with the gate g_i of that query. `weighted`, `value_ratio` and `stable_rank` then count it, and the
    value ratio is that of means over these queries. A learned logit without a value (gpt-oss) takes its share
    of each row, so that the weights on tokens sum to less than 1, and writes nothing. Layers without softmax
    attention have no rows.

    Args:
        model: a language model or an image encoder.
        windows: windows of text, or images.
        position: the position of the sink, or one for each window. For images it may also be a kind of token:
            "cls", "reg1" and so on, or "patch" for the patch of each image to which any one head gives the
            most.
        batch_size: windows in a pass.

    Returns:
        One row per `document`, `layer` and `head`. The columns are `attention`, the mean weight A on the
        sink; `weighted`, the sink's share of the norm-weighted attention `sum_i ||A[i,j] W_O v_j||`
        (Kobayashi et al. 2020); `queries_on_sink`, the share of queries that put at least 0.5 on the sink;
        `value_ratio`, `||W_O v_s|| / mean_j ||W_O v_j||`; `stable_rank`, `||.||_F^2 / ||.||_2^2` of what the
        head writes to these queries; `to_sink_logit`, the mean weight on a learned logit, which is attention
        to no token (0 without one); `gate`, the mean of the gate over these queries and the head's channels
        (1 without one); `dormant`; and `use`, which is "active", "no-op", "broadcast" or "neither".

    Raises:
        InputError: as `sink_positions` does; and for a model in which W_O reads something else than what its
            heads mix, times a gate.

    """
    return use_table(_seen(model, windows, position, batch_size), windows.document)


@remotely
def _seen(model: Transformer, windows: Inputs, position: Position, batch_size: int | None) -> Found:
    use = HeadUse(model, sink_positions(model, windows, position, batch_size))
    show_attention(model, windows, [use], batch_size=batch_size)
    return use.found


class HeadUse:
    """The observer behind `head_use`. Its results are in `found`."""

    def __init__(self, model: Transformer, sinks: Int[Tensor, "windows"]) -> None:
        self.sinks = sinks
        self.writes = {layer: written_norms(model, layer) for layer in model.attention_layers}
        self.found: Found = []

    def __call__(self, call: AttentionCall, places: list[int]) -> None:
        at = self.sinks[places]
        value = call.value.repeat_interleave(call.groups, dim=1)
        write = self.writes[call.layer].to(value.device)
        batch, heads, _, size = value.shape
        # Norm of what each value writes, [batch, heads, 1, tokens]; with a gate, it depends on the query
        norms = written_to(value, write, None)
        count, attention, queries, sink, total = norms.new_zeros(5, batch, heads)
        held, usual, nowhere, passed = norms.new_zeros(4, batch, heads)
        moment = norms.new_zeros(batch, heads, size, size)
        # Accumulate over the queries that may see the sink, one block at a time
        for rows in call.blocks():
            able = readers(call, rows, at)
            weights = call.weights(rows) * able[..., None]
            mixed = (weights.to(value.dtype) @ value).double()
            if call.gate is not None:
                gate = call.gate[:, :, rows].double()
                norms, mixed = written_to(value, write, gate), mixed * gate
                passed += (gate.mean(-1) * able).sum(-1)
            on = to_sink(weights, at).double()
            count += able.sum(-1)
            attention += on.sum(-1)
            queries += (on >= ON_SINK).sum(-1)
            nowhere += (able.double() - weights.double().sum(-1)).sum(-1)
            held += (to_sink(norms, at) * able).sum(-1)
            usual += (norms.mean(-1) * able).sum(-1)
            sink += (on * to_sink(norms, at)).sum(-1)
            total += (weights.double() * norms).sum((-2, -1))
            moment += mixed.mT @ mixed  # sum of y y^T over the head's outputs y before W_O
        # Squared singular values of what the head writes, in ascending order
        energies = torch.linalg.eigvalsh(write.mT @ moment @ write)
        found = {
            "attention": attention / count,
            "weighted": sink / total,
            "queries_on_sink": queries / count,
            "value_ratio": held / usual,
            "stable_rank": energies.sum(-1) / energies[..., -1],
            "to_sink_logit": nowhere / count if call.sinks is not None else torch.zeros_like(nowhere),
            "gate": passed / count if call.gate is not None else torch.ones_like(passed),
        }
        self.found.append((places, call.layer, torch.stack([found[q] for q in QUANTITIES], -1).cpu()))


def written_to(
    value: Float[Tensor, "batch heads tokens size"],
    write: Float[Tensor, "heads size rank"],
    gate: Float[Tensor, "batch heads rows size"] | None,
) -> Float[Tensor, "batch heads rows_or_one tokens"]:
    """Return the norm of what each value writes to each of some queries, through their gates; float64.

    Without a gate it is the same for all queries. `write` is a matrix of `written_norms`.
    """
    value = value.double()
    if gate is None:
        return (value @ write).norm(dim=-1)[:, :, None]
    return torch.stack([(value * row[:, :, None] @ write).norm(dim=-1) for row in gate.unbind(2)], dim=2)


def use_table(found: Found, documents: Sequence[int]) -> pd.DataFrame:
    """Return the table of `head_use`."""
    table = per_document(found, documents, QUANTITIES)
    table["dormant"] = table["queries_on_sink"] >= QUERIES
    table["use"] = [
        use_of(*row)
        for row in table[["dormant", "value_ratio", "stable_rank"]].itertuples(index=False, name=None)
    ]
    return table


def use_of(dormant: bool, value_ratio: float, stable_rank: float) -> Use:
    """Return what a head does with its sink on one document, by the published rules (Fesser et al. 2026)."""
    if not dormant:
        return "active"
    if value_ratio <= NO_OP:
        return "no-op"
    return "broadcast" if value_ratio >= BROADCAST and stable_rank <= STABLE_RANK else "neither"


def written_norms(model: Transformer, layer: int) -> Float[Tensor, "heads size rank"]:
    """Return a small matrix M for each head with `||v @ M|| = ||v W_O||`, float64.

    It comes from the QR decomposition of W_O.
    """
    writes = [w.folded().double() for w in head_weights(model, layer)]
    return torch.stack([torch.linalg.qr(write.T).R.T for write in writes])


def per_document(found: Found, documents: Sequence[int], columns: tuple[str, ...]) -> pd.DataFrame:
    """Return rows by document, layer and head, from the values of each layer and batch."""
    rows: list[pd.DataFrame] = []
    for places, layer, values in found:
        index = pd.MultiIndex.from_product(
            [[documents[place] for place in places], [layer], range(values.shape[1])],
            names=["document", "layer", "head"],
        )
        rows.append(pd.DataFrame(values.flatten(0, 1).numpy(), index, list(columns)).reset_index())
    return pd.concat(rows).groupby(["document", "layer", "head"], as_index=False).mean()
