"""Passes over windows in which attention is looked at, layer by layer, and nothing of it is kept."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool
from torch import Tensor

from spectral_sinks.errors import InputError
from spectral_sinks.interventions.tracing import trace
from spectral_sinks.models.attending import AttentionCall, attending
from spectral_sinks.models.language import LanguageModel
from spectral_sinks.texts import Windows

Observer = Callable[[AttentionCall, list[int]], None]
"""Sees one layer's attention on a batch, and which windows the batch holds."""


def observe(
    model: LanguageModel, windows: Windows, observers: Sequence[Observer], *, batch_size: int = 16
) -> None:
    """Run the windows through the untouched model and show each layer's attention to the observers."""
    for places, ids in windows.batches(batch_size):

        def look(call: AttentionCall, places: list[int] = places) -> None:
            for observer in observers:
                observer(call, places)

        with attending(model, look):
            trace(model, ids.to(model.device), {}, readout=lambda final, *_: final[:1, :1, :1])


def check_position(model: LanguageModel, windows: Windows, position: int) -> None:
    """Raise InputError for a position that some window has not, or that no other token can attend to."""
    shortest = min(len(row) for row in windows.rows)
    last = shortest - 2 if getattr(model, "causal", True) else shortest - 1
    if not (0 <= position <= last):
        raise InputError(
            f"position {position}: the shortest window has {shortest} tokens, and a position that others can "
            f"attend to in it is one of 0 to {last}"
        )


def readers(call: AttentionCall, rows: slice, position: int) -> Bool[Tensor, "batch heads rows"]:
    """Which of some queries may attend to a position and to another; its own query is left out."""
    sees = call.visible(rows)
    index = torch.arange(call.query.shape[2], device=sees.device)[rows]
    able = sees[..., position] & (index != position) & (sees.sum(-1) > 1)
    return able.expand(*call.query.shape[:2], -1)
