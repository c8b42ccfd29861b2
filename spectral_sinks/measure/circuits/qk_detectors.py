"""QK detectors: which modes of a head's scores find the sink, and whether its queries always ask for it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from spectral_sinks.data.pixels import Pixels
from spectral_sinks.measure.attention.by_position import Inputs
from spectral_sinks.measure.attention.capture import Position, at_sink, observe, readers, sink_positions
from spectral_sinks.measure.circuits.heads import Found, per_document
from spectral_sinks.models.attention_capture import AttentionCall
from spectral_sinks.models.base import Transformer
from spectral_sinks.models.rotary import arranged, key_turns, unturned_keys
from spectral_sinks.remote.client import remotely
from spectral_sinks.spectra.qk_modes import Modes, random_parts

KEPT = 2
"""Modes of a head that are followed: those that carry most of the sink's margin."""

HALF = 0.5
"""Share of the margin by which the modes that a head needs are counted [ours]."""

DRAWS = 20
"""Random bases beside each head's modes."""

QUANTITIES = ("margin", "top_one", "top_two", "always_on", "rival")


@dataclass(frozen=True, eq=False)
class Detectors:
    """The modes of every head that carry its sink's margin, and how they act on each document."""

    sinks: Int[Tensor, "windows"]
    """The sink's position in each window."""
    turns: Float[Tensor, "layers size size"]
    """What the sink's position (in the first window) makes of a key, `key @ turn`."""
    found: Found
    """What `table` is made of, by window."""
    documents: Sequence[int]
    """Document of each window."""
    modes: list[Modes]
    """By layer: the leading modes of each head, `[heads, size, 2]`."""
    ranks: Tensor
    """`[layers, heads, 2]`: place of the leading modes among all by strength, from 1."""
    needed: Int[Tensor, "layers heads"]
    """How many modes, leading ones first, carry half of the margin; 0 where there is no margin."""
    controls: Tensor
    """`[layers, heads, draws, 2]`: shares of the margin in the leading one and two of random bases."""
    query_sides: list[Tensor]
    """By layer, `[heads, tokens, 2]`: the leading modes on the queries of the first longest window."""
    key_sides: list[Tensor]
    """The same on its keys, placed where the sink is. The product of both sides is in nats."""
    shown: int
    """The sink's position in that window."""

    @cached_property
    def table(self) -> pd.DataFrame:
        """A row per document, layer and head: `margin`, `top_one`, `top_two`, `always_on`, `rival`."""
        return per_document(self.found, self.documents, QUANTITIES)


@remotely
def detectors(
    model: Transformer, windows: Inputs, position: Position = 0, *, batch_size: int = 16
) -> Detectors:
    """Modes of each head's query-key form on its real queries and keys, and what they give to the sink.

    The form is that of each query at its real distance from the sink, `q_i R_(i-s) k`: queries and keys as
    the softmax meets them (biases, norms of queries and keys, shared key heads and scaling included, before
    a cap and before what is added to scores), but with every key turned as if it stood at the sink's
    position, so that a mode tells tokens from one another and not places. Its modes (see `Modes`) come from
    the second moments of the queries that may see the sink and of these keys minus the mean of the window's
    other keys (a softmax ignores what all keys share), over all windows: one set of modes per head. Where the
    sink's position differs between windows (see `head_use`), queries and keys are turned together so that
    each window's sink stands where the first one's does, which changes no score.

    The sink's *margin* at a query is its score minus the mean score of the other keys that the query may
    see, at their real positions [ours]. It is the exact sum of the modes' parts; modes are ordered by their
    part of its mean. The windows of a document then give `margin` in nats; `top_one` and `top_two`, the share
    of it in the leading one and two modes (parts may cancel, so a share may exceed 1, and means nothing
    without a margin); and of the leading mode `always_on`, the share of its query side's mean square that is
    its squared mean (1: the same at every query), and `rival`, its largest key side on another key over that
    on the sink (0: the sink alone). Two passes. The published recipe takes the SVD of `W_Q^T W_K`, which has
    neither biases nor norms; the data stand for them here [ours]. Raises InputError as `head_use` does.
    """
    sinks = sink_positions(model, windows, position, batch_size)
    with unturned_keys(model) as unturned:
        placed = Placed.of(model, windows, sinks, unturned)
        moments = Moments(model, placed)
        observe(model, windows, [moments], batch_size=batch_size)
        margins = Margins(placed, *moments.leading())
        observe(model, windows, [margins], batch_size=batch_size)
    return margins.detectors(windows, moments)


@dataclass(frozen=True, eq=False)
class Placed:
    """The keys of a pass as if each stood at the sink's position (in the first window)."""

    turns: Float[Tensor, "layers size size"]
    unturned: dict[int, Tensor]
    sinks: Int[Tensor, "windows"]
    moves: Float[Tensor, "positions layers size size"] | None = None
    """From a window's sink to the place of the first one's, `key @ move`; None if all are there."""
    which: Int[Tensor, "windows"] | None = None
    """The move of each window."""

    @classmethod
    def of(
        cls, model: Transformer, windows: Inputs, sinks: Int[Tensor, "windows"], unturned: dict[int, Tensor]
    ) -> "Placed":
        """With what the model's positions do to keys, read from a pass."""
        distinct, which = sinks.unique(return_inverse=True)
        every = key_turns(model, distinct.tolist(), windows[0] if isinstance(windows, Pixels) else None)
        turns = every[which[0]]
        if torch.equal(every, turns.expand_as(every)):
            return cls(turns, unturned, sinks)
        return cls(turns, unturned, sinks, torch.linalg.solve(every, turns.expand_as(every)), which)

    def keys(self, call: AttentionCall, places: list[int]) -> Float[Tensor, "batch heads keys size"]:
        """By query head, minus the mean of all but the sink's; float64."""
        key = arranged(self.unturned[call.layer], call).repeat_interleave(call.groups, dim=1).double()
        key = key @ self.turns[call.layer].to(key.device)
        sink = at_sink(key, self.sinks[places])[:, :, None]
        return key - (key.sum(2, keepdim=True) - sink) / (key.shape[2] - 1)

    def sides(self, call: AttentionCall, places: list[int]) -> tuple[Tensor, Tensor]:
        """Queries and keys as in `precise`, turned together to the first window's sink."""
        query, key = precise(call)
        if self.moves is None or self.which is None:
            return query, key
        move = self.moves[self.which[places], call.layer, None].to(key.device)
        return query @ torch.linalg.inv(move).mT, key @ move


class Moments:
    """Second moments of queries and keys of each head, and of queries with what their margin is against.

    Means over windows, of the means within each.
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
        """Of each head the modes with the largest parts of the margin, their ranks, how many carry half."""
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
        """Shares of the margin in the leading one and two members of random bases."""
        whole = self.cross.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None]
        drawn: list[Tensor] = []
        for seed in range(DRAWS):
            parts = random_parts(self.queries, self.cross, seed)
            drawn.append(parts.sort(-1, descending=True).values[..., :KEPT].cumsum(-1) / whole)
        return torch.stack(drawn, dim=2)


@dataclass(eq=False)
class Margins:
    """What the leading modes give to the sink on each document."""

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
        root = modes.strength.sqrt()[:, None].to(query.device)
        asked = query @ modes.query.to(query.device) * root
        reads = modes.key.to(key.device) * root
        held, placed = key @ reads, self.placed.keys(call, places) @ reads
        total, count = query.new_zeros(2, *query.shape[:2])
        parts, first, second = query.new_zeros(3, *query.shape[:2], asked.shape[-1])
        for rows in call.blocks():
            able = readers(call, rows, at)[..., None]
            against = at_sink(key, at)[:, :, None] - others_mean(call, rows, at, key)
            gap = at_sink(held, at)[:, :, None] - others_mean(call, rows, at, held)
            here = asked[:, :, rows]
            total += (query[:, :, rows] * against * able).sum((-2, -1))
            parts += (here * gap * able).sum(-2)
            first += (here * able).sum(-2)
            second += (here.square() * able).sum(-2)
            count += able.sum((-2, -1))
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
        """Everything in one."""
        sides = [self.sides[layer] for layer in sorted(self.sides)]
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
    """Queries times the factor of the scores, and keys by query head, float64."""
    return call.query.double() * call.scaling, call.key.repeat_interleave(call.groups, dim=1).double()


def others_mean(
    call: AttentionCall, rows: slice, at: Int[Tensor, "batch"], x: Float[Tensor, "batch heads keys width"]
) -> Float[Tensor, "batch heads rows width"]:
    """For each of some queries the mean over the keys that it may see, but for the sink."""
    seen = call.visible(rows).expand(len(at), -1, -1, -1).clone()
    seen[torch.arange(len(at)), :, :, at] = False
    return seen.to(x.dtype) @ x / seen.sum(-1, keepdim=True).clamp_min(1)
