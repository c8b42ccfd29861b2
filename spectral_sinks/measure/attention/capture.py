"""Passes over windows that show each layer's attention to observers and keep nothing of it."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from spectral_sinks.data.pixels import Pixels
from spectral_sinks.data.texts import Windows
from spectral_sinks.errors import InputError
from spectral_sinks.interventions.tracing import trace
from spectral_sinks.measure.attention.by_position import Inputs, attention_by_position, check_inputs
from spectral_sinks.measure.memory import batches
from spectral_sinks.models.attention_capture import AttentionCall, attending
from spectral_sinks.models.base import Transformer
from spectral_sinks.models.gates import attending_gates
from spectral_sinks.models.language import LanguageModel
from spectral_sinks.models.vision import VisionModel

Observer = Callable[[AttentionCall, list[int]], None]
"""A function that receives one layer's attention on a batch, and the indices of the batch's windows."""

Position = int | str | Sequence[int]
"""The location of the sink: one position, one for each window, a token of text such as "[SEP]", which stands
where it occurs first, or the name of a token of an image encoder."""


def show_attention(
    model: Transformer, windows: Inputs, observers: Sequence[Observer], *, batch_size: int | None = None
) -> None:
    """Run the windows through the untouched model, and show each layer's attention to the observers.

    If the model has gates between attention and W_O, the observers see the gate as well.
    """
    showing = attending_gates if model.layout.traits.gated else attending
    for places, ids in batches(model, windows, batch_size):

        def look(call: AttentionCall, places: list[int] = places) -> None:
            for observer in observers:
                observer(call, places)

        with showing(model, look):
            trace(model, ids.to(model.device), {}, readout=lambda final, *_: final[:1, :1, :1])


def sink_positions(
    model: Transformer, windows: Inputs, position: Position, batch_size: int | None = None
) -> Int[Tensor, "windows"]:
    """Return the sink's position in each window.

    For text, a name is a token, such as "[SEP]" or "<0x0A>": the sink is its first occurrence in each window.
    Names such as "cls" and "reg1" are tokens in the prefix of an image encoder. "patch" is, in each image,
    the patch to which any one head gives the most (the largest alpha_k of a patch over layers and heads).

    Raises InputError for a position that some window does not have or that no other token can attend to, for
    a number of positions other than the number of windows, and for a name that the model does not know.
    """
    check_inputs(model, windows)
    if isinstance(position, str) and isinstance(windows, Pixels):
        return _named(cast(VisionModel, model), windows, position, batch_size)
    given: Any = (
        _first_places(cast(LanguageModel, model), cast(Windows, windows), position)
        if isinstance(position, str)
        else position
    )
    found = torch.as_tensor(given)
    if found.is_floating_point() or found.ndim > 1:
        raise InputError(f"position {position}: expected a whole number, or one for each window")
    if found.ndim and len(found) != len(windows):
        raise InputError(f"{len(found)} positions for {len(windows)} windows: give one, or one for each")
    lengths = torch.tensor(windows.lengths)
    last = lengths - 2 if getattr(model, "causal", True) else lengths - 1
    outside = (found < 0) | (found > last)
    if outside.any():
        place = int(outside.int().argmax() if found.ndim else lengths.argmin())
        which = "the shortest window" if found.ndim == 0 else f"window {place}"
        raise InputError(
            f"position {int(found.expand(len(lengths))[place])}: {which} has {int(lengths[place])} tokens, "
            f"and a position that others can attend to in it is one of 0 to {int(last[place])}"
        )
    return found.expand(len(windows)).clone()


def _first_places(model: LanguageModel, windows: Windows, token: str) -> list[int]:
    """Return where a token of text occurs first in each window."""
    if model.tokenizer is None:
        raise InputError(f"position {token!r}: {model.name} has no tokenizer, so give a number from 0")
    number = model.tokenizer.get_vocab().get(token)
    if number is None:
        raise InputError(
            f"position {token!r}: no token of {model.name} is called that; give one as its vocabulary spells "
            "it, such as [SEP], or a number from 0"
        )
    found: list[int] = []
    for place, row in enumerate(windows.rows):
        here = (row == number).nonzero().flatten()
        if not len(here):
            raise InputError(f"position {token!r}: window {place} does not hold that token")
        found.append(int(here[0]))
    return found


def _named(model: VisionModel, pixels: Pixels, name: str, batch_size: int | None) -> Int[Tensor, "images"]:
    if name in model.prefix:
        return torch.full((len(pixels),), model.prefix.index(name))
    if name != "patch":
        raise InputError(f"position {name!r}: {model.name} has {', '.join((*model.prefix, 'patch'))}")
    first = len(model.prefix)
    alpha = attention_by_position(model, pixels, batch_size=batch_size).alpha[..., first:]
    return first + torch.as_tensor(np.nan_to_num(alpha, nan=-1.0).max((1, 2)).argmax(-1))


def at_sink(
    x: Shaped[Tensor, "batch heads keys *rest"], at: Int[Tensor, "batch"]
) -> Shaped[Tensor, "batch heads *rest"]:
    """Return the entries at each window's sink."""
    return x[torch.arange(len(at), device=x.device), :, at.to(x.device)]


def to_sink(
    x: Shaped[Tensor, "#batch heads rows keys"], at: Int[Tensor, "batch"]
) -> Shaped[Tensor, "batch heads rows"]:
    """Return the column of each window's sink."""
    return at_sink(x.expand(len(at), -1, -1, -1).transpose(2, 3), at)


def readers(call: AttentionCall, rows: slice, at: Int[Tensor, "batch"]) -> Bool[Tensor, "batch heads rows"]:
    """Return which queries may attend to the sink and to another token, without the sink's own query."""
    sees = call.visible(rows)
    index = torch.arange(call.query.shape[2], device=sees.device)[rows]
    own = index == at.to(sees.device)[:, None, None]
    able = to_sink(sees, at) & ~own & (sees.sum(-1) > 1)
    return able.expand(*call.query.shape[:2], -1)
