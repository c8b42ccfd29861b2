"""QK detectors: which modes of a head's scores find the sink, and whether its queries always ask for it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from spectral_sinks.data.pixels import Pixels
from spectral_sinks.measure.attention.by_position import Inputs
from spectral_sinks.measure.attention.capture import (
    Observer,
    Position,
    at_sink,
    readers,
    show_attention,
    sink_positions,
)
from spectral_sinks.measure.circuits.heads import Found, per_document
from spectral_sinks.measure.results import Result
from spectral_sinks.models.attention_capture import AttentionCall
from spectral_sinks.models.base import Transformer
from spectral_sinks.models.rotary import arranged, key_turns, unturned_keys
from spectral_sinks.models.vision import VisionModel
from spectral_sinks.remote.client import remotely
from spectral_sinks.spectra.qk_modes import Modes, random_parts
from spectral_sinks.stats import Estimate

KEPT = 2
"""Number of modes of a head that are followed: those that carry most of the sink's margin."""

HALF = 0.5
"""Share of the margin that defines how many modes a head needs [ours]."""

DRAWS = 20
"""Number of random bases that each head's modes are compared with."""

QUANTITIES = ("margin", "top_one", "top_two", "always_on", "rival")


@dataclass(frozen=True, eq=False, repr=False)
class Detectors(Result):
    """The modes of every head that carry its sink's margin, and how they act on each document."""

    sinks: Int[Tensor, "windows"]
    """The sink's position in each window."""
    turns: Float[Tensor, "layers size size"]
    """The effect of the sink's position (in the first window) on a key, `key @ turn`."""
    found: Found
    """The values by window from which `table` is made."""
    documents: Sequence[int]
    """The document of each window."""
    modes: list[Modes]
    """By layer: the leading modes of each head, `[heads, size, 2]`."""
    ranks: Tensor
    """`[layers, heads, 2]`: rank of the leading modes among all modes by strength, from 1."""
    needed: Int[Tensor, "layers heads"]
    """How many modes, the leading ones first, carry half of the margin; 0 where there is no margin."""
    controls: Tensor
    """`[layers, heads, draws, 2]`: shares of the margin in the leading one and two members of random
    bases."""
    query_sides: list[Tensor]
    """By layer, `[heads, tokens, 2]`: the query sides of the leading modes in the first longest window; empty
    in a layer without softmax attention."""
    key_sides: list[Tensor]
    """The key sides in the same window, with every key at the sink's position. The product of both sides is
    in nats."""
    shown: int
    """The sink's position in that window."""

    def digest(self) -> pd.DataFrame:
        """Return the means of `summary` without their intervals, which take long for many heads."""
        return self.table.groupby(["layer", "head"], as_index=False)[list(QUANTITIES)].mean()

    @cached_property
    def table(self) -> pd.DataFrame:
        """One row per document, layer and head: `margin`, `top_one`, `top_two`, `always_on` and `rival`."""
        return per_document(self.found, self.documents, QUANTITIES)

    def summary(self) -> pd.DataFrame:
        """Return one row per layer and head: the means over documents of `table`, with `_low` and `_high`."""
        rows: list[dict[str, Any]] = []
        for (layer, head), part in self.table.groupby(["layer", "head"]):
            row: dict[str, Any] = {"layer": layer, "head": head}
            for name in QUANTITIES:
                row |= Estimate.of(part[name].dropna()).columns(name)
            rows.append(row)
        return pd.DataFrame(rows)

    def record(self) -> dict[str, Any]:
        """Return the rows of `summary` as a dictionary that JSON can hold."""
        return {"heads": self.summary().to_dict("records")}


@remotely
def detectors(
    model: Transformer, windows: Inputs, position: Position = 0, *, batch_size: int | None = None
) -> Detectors:
    """Find the modes of each head's query-key form, and their contributions to the score of the sink.

    The form is that of each query at its real distance from the sink, `q_i R_(i-s) k`. Queries and keys are
    taken as they enter the softmax, with biases, norms of queries and keys, shared key heads and scaling, but
    before a cap and before anything is added to the scores. Every key is rotated as if it stood at the sink's
    position, so that a mode distinguishes tokens and not positions. The modes (see `Modes`) come from second
    moments over all windows, one set of modes per head: those of the queries that may see the sink, and those
    of these keys minus the mean of the window's other keys, since a softmax ignores what all keys share.
    Where the sink's position differs between windows (see `head_use`), queries and keys are rotated together
    so that each window's sink stands where the first one's does. This does not change any score.

    The sink's *margin* at a query is its score minus the mean score of the other keys that the query may see,
    at their real positions [ours]. It is exactly the sum of the parts of the modes, and modes are ordered by
    their part of its mean.

    The published recipe takes the SVD of `W_Q^T W_K`, which contains neither biases nor norms. Here the data
    replace them [ours]. There are two passes over the windows.

    Args:
        model: a language model or an image encoder.
        windows: windows of text, or images.
        position: the position of the sink, as in `head_use`.
        batch_size: windows in a pass.

    Returns:
        The detectors. For each document, layer and head, their `table` holds `margin` in nats; `top_one` and
        `top_two`, the share of the margin in the leading one and two modes (parts may cancel, so a share may
        exceed 1, and it means nothing without a margin); `always_on`, the squared mean of the leading mode's
        query side as a share of its mean square (1: the same at every query); and `rival`, the largest key
        side of the leading mode on another key over that on the sink (0: the sink alone).

    Raises:
        InputError: as `head_use` does.

    """
    return detectors_of(model, windows, [sink_positions(model, windows, position, batch_size)], batch_size)[0]


def detectors_of(
    model: Transformer,
    windows: Inputs,
    sinks: Sequence[Int[Tensor, "windows"]],
    batch_size: int | None,
    observers: Sequence[Observer] = (),
) -> list[Detectors]:
    """Find the detectors of several sinks in the same two passes.

    Args:
        model: a language model or an image encoder.
        windows: windows of text, or images.
        sinks: for each sink, its position in each window.
        batch_size: windows in a pass.
        observers: see the attention of the first pass as well.

    """
    with unturned_keys(model) as unturned:
        # The first pass gives the moments and thus the modes, the second the parts of the modes
        placed = [Placed.of(model, windows, each, unturned) for each in sinks]
        moments = [Moments(model, each) for each in placed]
        show_attention(model, windows, [*observers, *moments], batch_size=batch_size)
        margins = [Margins(at, *found.leading()) for at, found in zip(placed, moments, strict=True)]
        show_attention(model, windows, margins, batch_size=batch_size)
    return [margin.detectors(windows, moment) for margin, moment in zip(margins, moments, strict=True)]


@dataclass(frozen=True, eq=False)
class Placed:
    """The keys of a pass as if each stood at the sink's position (in the first window)."""

    turns: Float[Tensor, "layers size size"]
    unturned: dict[int, Tensor]
    sinks: Int[Tensor, "windows"]
    moves: Float[Tensor, "positions layers size size"] | None = None
    """The map of keys from each sink's position to the first window's, `key @ move`; None if it changes
    nothing."""
    which: Int[Tensor, "windows"] | None = None
    """The index in `moves` of each window."""

    @classmethod
    def of(
        cls, model: Transformer, windows: Inputs, sinks: Int[Tensor, "windows"], unturned: dict[int, Tensor]
    ) -> "Placed":
        """Read from one pass how the model's positions act on keys.

        Raises InputError for images of several shapes, where an encoder rotates keys.
        """
        distinct, which = sinks.unique(return_inverse=True)
        if isinstance(model, VisionModel) and not model.rotates_keys:
            unit = torch.eye(model.head_size, dtype=torch.float64)
            return cls(unit.expand(model.layers, -1, -1), unturned, sinks)
        if isinstance(windows, Pixels):
            windows.require_one_shape()
        every = key_turns(model, distinct.tolist(), windows[0] if isinstance(windows, Pixels) else None)
        turns = every[which[0]]
        if torch.equal(every, turns.expand_as(every)):
            return cls(turns, unturned, sinks)
        return cls(turns, unturned, sinks, torch.linalg.solve(every, turns.expand_as(every)), which)

    def keys(self, call: AttentionCall, places: list[int]) -> Float[Tensor, "batch heads keys size"]:
        """Return the keys by query head, minus the mean of all keys but the sink's; float64."""
        key = arranged(self.unturned[call.layer], call).repeat_interleave(call.groups, dim=1).double()
        key = key @ self.turns[call.layer].to(key.device)
        sink = at_sink(key, self.sinks[places])[:, :, None]
        return key - (key.sum(2, keepdim=True) - sink) / (key.shape[2] - 1)

    def sides(self, call: AttentionCall, places: list[int]) -> tuple[Tensor, Tensor]:
        """Return queries and keys as `precise` does, rotated to the first window's sink."""
        query, key = precise(call)
        if self.moves is None or self.which is None:
            return query, key
        move = self.moves[self.which[places], call.layer, None].to(key.device)
        return query @ torch.linalg.inv(move).mT, key @ move


class Moments:
    """Second moments of each head's queries and keys.

    `cross` is the moment of the queries with the key differences of their margin. Each is a mean over windows
    of the means within a window.
    """

    def __init__(self, model: Transformer, placed: Placed) -> None:
        self.placed = placed
        shape = (3, model.layers, model.heads, model.head_size, model.head_size)
        self.queries, self.keys, self.cross = torch.zeros(shape, dtype=torch.float64)

    def __call__(self, call: AttentionCall, places: list[int]) -> None:
        at, placed = self.placed.sinks[places], self.placed.keys(call, places)
        query, key = self.placed.sides(call, places)
        moment, cross = torch.zeros(2, *query.shape[:2], *[query.shape[-1]] * 2, dtype=torch.float64)
        count = torch.zeros(query.shape[:2], dtype=torch.float64)
        for rows in call.blocks():
            able = readers(call, rows, at)
            asking = query[:, :, rows] * able[..., None]
            against = at_sink(key, at)[:, :, None] - others_mean(call, rows, at, key)
            moment += (asking.mT @ asking).cpu()
            cross += (asking.mT @ against).cpu()
            count += able.sum(-1).cpu()
        seen = count.clamp_min(1)[..., None, None] * len(self.placed.sinks)
        self.queries[call.layer] += (moment / seen).sum(0)
        self.cross[call.layer] += (cross / seen).sum(0)
        self.keys[call.layer] += (placed.mT @ placed / placed.shape[2]).sum(0).cpu() / len(self.placed.sinks)

    def leading(self) -> tuple[list[Modes], Tensor, Tensor]:
        """Return each head's modes with the largest parts of the margin, their ranks, and `needed`."""
        kept: list[Modes] = []
        ranks: list[Tensor] = []
        needed: list[Tensor] = []
        for queries, keys, cross in zip(self.queries, self.keys, self.cross, strict=True):
            modes = Modes.of(queries, keys)
            parts = modes.parts(cross)
            order = parts.argsort(-1, descending=True)[..., :KEPT]
            kept.append(modes.take(order))
            ranks.append(order + 1)
            carried = parts.sort(-1, descending=True).values.cumsum(-1)
            margin = carried[..., -1:]
            needed.append(torch.where(margin[..., 0] > 0, (carried < HALF * margin).sum(-1) + 1, 0))
        return kept, torch.stack(ranks), torch.stack(needed)

    def controls(self) -> Float[Tensor, "layers heads draws two"]:
        """Return the shares of the margin in the leading one and two members of random bases."""
        whole = self.cross.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None]
        drawn: list[Tensor] = []
        for seed in range(DRAWS):
            parts = random_parts(self.queries, self.cross, seed)
            drawn.append(parts.sort(-1, descending=True).values[..., :KEPT].cumsum(-1) / whole)
        return torch.stack(drawn, dim=2)


@dataclass(eq=False)
class Margins:
    """The observer that measures what the leading modes contribute to the sink's margin in each window."""

    placed: Placed
    modes: list[Modes]
    ranks: Tensor
    needed: Tensor
    found: Found = field(default_factory=Found)
    sides: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    shown: int = 0
    """The window whose sides are kept."""

    def __call__(self, call: AttentionCall, places: list[int]) -> None:
        at = self.placed.sinks[places]
        query, key = self.placed.sides(call, places)
        modes = self.modes[call.layer]
        # Sides of the leading modes; each side carries the root of the strength, so products are in nats
        root = modes.strength.sqrt()[:, None].to(query.device)
        asked = query @ modes.query.to(query.device) * root
        reads = modes.key.to(key.device) * root
        held, placed = key @ reads, self.placed.keys(call, places) @ reads
        total, count = query.new_zeros(2, *query.shape[:2])
        parts, first, second = query.new_zeros(3, *query.shape[:2], asked.shape[-1])
        for rows in call.blocks():
            able = readers(call, rows, at)[..., None]
            against = at_sink(key, at)[:, :, None] - others_mean(call, rows, at, key)
            # The margin of each query and its parts: the key at the sink minus the mean of the other keys
            gap = at_sink(held, at)[:, :, None] - others_mean(call, rows, at, held)
            here = asked[:, :, rows]
            total += (query[:, :, rows] * against * able).sum((-2, -1))
            parts += (here * gap * able).sum(-2)
            first += (here * able).sum(-2)
            second += (here.square() * able).sum(-2)
            count += able.sum((-2, -1))
        # The moments of the query side, and the largest key side on another key
        mean, square = first / count[..., None], second / count[..., None]
        sink = at_sink(placed, at)
        signed = placed * sink.sign()[:, :, None]
        signed[torch.arange(len(at)), :, at] = 0
        share = parts.cumsum(-1) / total[..., None]
        values = (
            total / count,
            share[..., 0],
            share[..., -1],
            (mean.square() / square)[..., 0],
            (signed.amax(2) / sink.abs())[..., 0],
        )
        self.found.append((places, call.layer, torch.stack(values, -1).cpu()))
        if not self.sides:
            self.shown = places[0]
        self.sides.setdefault(call.layer, (asked[0].cpu(), placed[0].cpu()))

    def detectors(self, windows: Inputs, moments: Moments) -> Detectors:
        """Return the results of all passes."""
        none = (torch.zeros(0), torch.zeros(0))
        sides = [self.sides.get(layer, none) for layer in range(len(self.modes))]
        return Detectors(
            self.placed.sinks,
            self.placed.turns,
            self.found,
            windows.document,
            self.modes,
            self.ranks,
            self.needed,
            moments.controls(),
            [query for query, _ in sides],
            [key for _, key in sides],
            int(self.placed.sinks[self.shown]),
        )


def precise(call: AttentionCall) -> tuple[Float[Tensor, "b h queries size"], Float[Tensor, "b h keys size"]]:
    """Return queries times the scale of the scores, and keys by query head, float64."""
    return call.query.double() * call.scaling, call.key.repeat_interleave(call.groups, dim=1).double()


def others_mean(
    call: AttentionCall, rows: slice, at: Int[Tensor, "batch"], x: Float[Tensor, "batch heads keys width"]
) -> Float[Tensor, "batch heads rows width"]:
    """Return, for each of some queries, the mean over the keys that it may see, without the sink."""
    seen = call.visible(rows).expand(len(at), -1, -1, -1).clone()
    seen[torch.arange(len(at)), :, :, at] = False
    return seen.to(x.dtype) @ x / seen.sum(-1, keepdim=True).clamp_min(1)
