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
    at_sink,
    observe,
    readers,
    sink_positions,
    to_sink,
)
from spectral_sinks.models.attention_capture import AttentionCall
from spectral_sinks.models.base import Transformer
from spectral_sinks.models.weights import attention_weights
from spectral_sinks.remote.client import remotely

NO_OP = 0.2
"""Sink value ratio up to which a sink writes nothing (Fesser et al. 2026) [published]."""

BROADCAST = 0.5
"""Sink value ratio from which a sink may broadcast (Fesser et al. 2026) [published]."""

STABLE_RANK = 1.5
"""Stable rank of the written update up to which a sink may broadcast (Fesser et al. 2026) [published]."""

ON_SINK = 0.5
"""Attention that a query of a sink event puts on the sink (Fesser et al. 2026) [published]."""

QUERIES = 0.9
"""Share of queries that must do so in a sink event (Fesser et al. 2026) [published]."""

Use = Literal["active", "no-op", "broadcast", "neither"]

Found = list[tuple[list[int], int, Tensor]]
"""Of each batch and layer: which windows it holds, the layer, and `[windows, heads, columns]`."""

QUANTITIES = ("attention", "weighted", "queries_on_sink", "value_ratio", "stable_rank")


def head_use(
    model: Transformer, windows: Inputs, position: Position = 0, *, batch_size: int = 16
) -> pd.DataFrame:
    """What each head does with a sink at `position`: one row per `document`, `layer` and `head`.

    A position may be given for each window; of images also the kind of token that is the sink: "cls", "reg1",
    or "patch", in each image the patch to which any one head gives most.

    Over the queries that may see the sink, its own left out, means over the document's windows of:
    `attention`, the mean weight A on the sink; `weighted`, its share of the norm-weighted attention
    `sum_i ||A[i,j] W_O v_j||` (Kobayashi et al. 2020); `queries_on_sink`, the share of queries that put at
    least 0.5 on it; `value_ratio`, `||W_O v_s|| / mean_j ||W_O v_j||`; `stable_rank` of what the head writes
    to these queries, `||.||_F^2 / ||.||_2^2`. A head is `dormant` on a document where the sink event holds
    (0.9 of its queries put 0.5 on the sink), else active. `use` says what a dormant head's sink writes: a
    "no-op" (ratio <= 0.2), a "broadcast" (>= 0.5, stable rank <= 1.5) or "neither" (Fesser et al. 2026).
    A norm after attention (Gemma, OLMo 2) is part of W_O by its gain. No map of tokens x tokens outlives a
    block of queries. Raises InputError as `sink_positions` does.
    """
    return use_table(_seen(model, windows, position, batch_size), windows.document)


@remotely
def _seen(model: Transformer, windows: Inputs, position: Position, batch_size: int) -> Found:
    use = HeadUse(model, sink_positions(model, windows, position, batch_size))
    observe(model, windows, [use], batch_size=batch_size)
    return use.found


class HeadUse:
    """The observer behind `head_use`, whose table is made of what it `found`."""

    def __init__(self, model: Transformer, sinks: Int[Tensor, "windows"]) -> None:
        self.sinks = sinks
        self.writes = [written_norms(model, layer) for layer in range(model.layers)]
        self.found: Found = []

    def __call__(self, call: AttentionCall, places: list[int]) -> None:
        at = self.sinks[places]
        value = call.value.repeat_interleave(call.groups, dim=1)
        write = self.writes[call.layer].to(value.device)
        norms = (value.double() @ write).norm(dim=-1)
        batch, heads, _, size = value.shape
        count, attention, queries, sink, total = norms.new_zeros(5, batch, heads)
        moment = norms.new_zeros(batch, heads, size, size)
        for rows in call.blocks():
            able = readers(call, rows, at)
            weights = call.weights(rows) * able[..., None]
            on = to_sink(weights, at).double()
            count += able.sum(-1)
            attention += on.sum(-1)
            queries += (on >= ON_SINK).sum(-1)
            sink += on.sum(-1) * at_sink(norms, at)
            total += (weights.sum(2).double() * norms).sum(-1)
            mixed = (weights.to(value.dtype) @ value).double()
            moment += mixed.mT @ mixed
        energies = torch.linalg.eigvalsh(write.mT @ moment @ write)
        found = {
            "attention": attention / count,
            "weighted": sink / total,
            "queries_on_sink": queries / count,
            "value_ratio": at_sink(norms, at) / norms.mean(-1),
            "stable_rank": energies.sum(-1) / energies[..., -1],
        }
        self.found.append((places, call.layer, torch.stack([found[q] for q in QUANTITIES], -1).cpu()))


def use_table(found: Found, documents: Sequence[int]) -> pd.DataFrame:
    """The table of `head_use`."""
    table = per_document(found, documents, QUANTITIES)
    table["dormant"] = table["queries_on_sink"] >= QUERIES
    table["use"] = [
        use_of(*row)
        for row in table[["dormant", "value_ratio", "stable_rank"]].itertuples(index=False, name=None)
    ]
    return table


def use_of(dormant: bool, value_ratio: float, stable_rank: float) -> Use:
    """What a head does with its sink on one input, by the calibrated rules (Fesser et al. 2026)."""
    if not dormant:
        return "active"
    if value_ratio <= NO_OP:
        return "no-op"
    return "broadcast" if value_ratio >= BROADCAST and stable_rank <= STABLE_RANK else "neither"


def written_norms(model: Transformer, layer: int) -> Float[Tensor, "heads size rank"]:
    """A small matrix per head with `||v @ M|| = ||v W_O||`, from the QR decomposition of W_O; float64."""
    writes = [w.folded().double() for w in attention_weights(model, layer) if w.part == "o"]
    return torch.stack([torch.linalg.qr(write.T).R.T for write in writes])


def per_document(found: Found, documents: Sequence[int], columns: tuple[str, ...]) -> pd.DataFrame:
    """Rows by document, layer and head from `[windows, heads, columns]` of each layer and batch."""
    rows: list[pd.DataFrame] = []
    for places, layer, values in found:
        index = pd.MultiIndex.from_product(
            [[documents[place] for place in places], [layer], range(values.shape[1])],
            names=["document", "layer", "head"],
        )
        rows.append(pd.DataFrame(values.flatten(0, 1).numpy(), index, list(columns)).reset_index())
    return pd.concat(rows).groupby(["document", "layer", "head"], as_index=False).mean()
