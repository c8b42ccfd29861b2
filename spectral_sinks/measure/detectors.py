"""QK detectors: which modes of a head's scores find the sink, and whether its queries always ask for it."""

from dataclasses import dataclass, field

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from spectral_sinks.measure.circuits import per_document
from spectral_sinks.measure.observing import check_position, observe, readers
from spectral_sinks.models.attending import AttentionCall
from spectral_sinks.models.language import LanguageModel
from spectral_sinks.models.positions import arranged, key_turns, unturned_keys
from spectral_sinks.spectra.modes import Modes, random_parts
from spectral_sinks.texts import Windows

KEPT = 2
"""Modes of a head that are followed: those that carry most of the sink's margin."""

DRAWS = 20
"""Random bases beside each head's modes."""

QUANTITIES = ("margin", "top_one", "top_two", "always_on", "rival")


@dataclass(frozen=True, eq=False)
class Detectors:
    """The modes of every head that carry its sink's margin, and how they act on each document."""

    position: int
    turns: Float[Tensor, "layers size size"]
    """What the sink's position makes of a key, `key @ turn`."""
    table: pd.DataFrame
    """A row per document, layer and head: `margin`, `top_one`, `top_two`, `always_on`, `rival`."""
    modes: list[Modes]
    """By layer: the leading modes of each head, `[heads, size, 2]`."""
    ranks: Tensor
    """`[layers, heads, 2]`: place of the leading modes among all by strength, from 1."""
    controls: Tensor
    """`[layers, heads, draws, 2]`: shares of the margin in the leading one and two of random bases."""
    query_sides: list[Tensor]
    """By layer, `[heads, tokens, 2]`: the leading modes on the queries of the first longest window."""
    key_sides: list[Tensor]
    """The same on its keys, placed where the sink is. The product of both sides is in nats."""


def detectors(
    model: LanguageModel, windows: Windows, position: int = 0, *, batch_size: int = 16
) -> Detectors:
    """Modes of each head's query-key form on its real queries and keys, and what they give to the sink.

    The form is that of each query at its real distance from the sink, `q_i R_(i-s) k`: queries and keys as
    the softmax meets them (biases, norms of queries and keys, shared key heads and scaling included, before
    a cap and before what is added to scores), but with every key turned as if it stood at the sink's
    position, so that a mode tells tokens from one another and not places. Its modes (see `Modes`) come from
    the second moments of the queries that may see the sink and of these keys minus the mean of the window's
    other keys (a softmax ignores what all keys share), over all windows: one set of modes per head.

    The sink's *margin* at a query is its score minus the mean score of the other keys that the query may
    see, at their real positions [ours]. It is the exact sum of the modes' parts; modes are ordered by their
    part of its mean. The windows of a document then give `margin` in nats; `top_one` and `top_two`, the share
    of it in the leading one and two modes (parts may cancel, so a share may exceed 1, and means nothing
    without a margin); and of the leading mode `always_on`, the share of its query side's mean square that is
    its squared mean (1: the same at every query), and `rival`, its largest key side on another key over that
    on the sink (0: the sink alone). Two passes. The published recipe takes the SVD of `W_Q^T W_K`, which has
    neither biases nor norms; the data stand for them here [ours]. Raises InputError for a position that no
    other token can attend to.
    """
    check_position(model, windows, position)
    with unturned_keys(model) as unturned:
        placed = Placed(key_turns(model, position), unturned, position)
        moments = Moments(model, placed)
        observe(model, windows, [moments], batch_size=batch_size)
        margins = Margins(placed, *moments.leading())
        observe(model, windows, [margins], batch_size=batch_size)
    return margins.detectors(windows, moments)


@dataclass(frozen=True, eq=False)
class Placed:
    """The keys of a pass as if each stood at the sink's position."""

    turns: Float[Tensor, "layers size size"]
    unturned: dict[int, Tensor]
    position: int

    def keys(self, call: AttentionCall) -> Float[Tensor, "batch heads keys size"]:
        """By query head, minus the mean of all but the sink's; float64."""
        key = arranged(self.unturned[call.layer], call).repeat_interleave(call.groups, dim=1).double()
        key = key @ self.turns[call.layer].to(key.device)
        others = (key.sum(2, keepdim=True) - key[:, :, self.position, None]) / (key.shape[2] - 1)
        return key - others


class Moments:
    """Second moments of queries and keys of each head, and of queries with what their margin is against."""

    def __init__(self, model: LanguageModel, placed: Placed) -> None:
        self.placed = placed
        shape = (3, model.layers, model.heads, model.head_size, model.head_size)
        self.queries, self.keys, self.cross = torch.zeros(shape, dtype=torch.float64)

    def __call__(self, call: AttentionCall, places: list[int]) -> None:
        position, placed = self.placed.position, self.placed.keys(call)
        query, key = precise(call)
        moment, cross = torch.zeros(2, *query.shape[:2], *[query.shape[-1]] * 2, dtype=torch.float64)
        count = torch.zeros(query.shape[:2], dtype=torch.float64)
        for rows in call.blocks():
            able = readers(call, rows, position)
            asking = query[:, :, rows] * able[..., None]
            against = key[:, :, position, None] - others_mean(call, rows, position, key)
            moment += (asking.mT @ asking).cpu()
            cross += (asking.mT @ against).cpu()
            count += able.sum(-1).cpu()
        seen = count.clamp_min(1)[..., None, None]
        self.queries[call.layer] += (moment / seen).sum(0)
        self.cross[call.layer] += (cross / seen).sum(0)
        self.keys[call.layer] += (placed.mT @ placed / placed.shape[2]).sum(0).cpu()

    def leading(self) -> tuple[list[Modes], Tensor]:
        """Of each layer's heads the modes with the largest parts of the margin, and their ranks."""
        kept: list[Modes] = []
        ranks: list[Tensor] = []
        for queries, keys, cross in zip(self.queries, self.keys, self.cross, strict=True):
            modes = Modes.of(queries, keys)
            order = modes.parts(cross).argsort(-1, descending=True)[..., :KEPT]
            kept.append(modes.take(order))
            ranks.append(order + 1)
        return kept, torch.stack(ranks)

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
    found: list[tuple[list[int], int, Tensor]] = field(default_factory=list)
    sides: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __call__(self, call: AttentionCall, places: list[int]) -> None:
        position = self.placed.position
        query, key = precise(call)
        modes = self.modes[call.layer]
        root = modes.strength.sqrt()[:, None].to(query.device)
        asked = query @ modes.query.to(query.device) * root
        reads = modes.key.to(key.device) * root
        held, placed = key @ reads, self.placed.keys(call) @ reads
        total, count = query.new_zeros(2, *query.shape[:2])
        parts, first, second = query.new_zeros(3, *query.shape[:2], asked.shape[-1])
        for rows in call.blocks():
            able = readers(call, rows, position)[..., None]
            against = key[:, :, position, None] - others_mean(call, rows, position, key)
            gap = held[:, :, position, None] - others_mean(call, rows, position, held)
            here = asked[:, :, rows]
            total += (query[:, :, rows] * against * able).sum((-2, -1))
            parts += (here * gap * able).sum(-2)
            first += (here * able).sum(-2)
            second += (here.square() * able).sum(-2)
            count += able.sum((-2, -1))
        mean, square = first / count[..., None], second / count[..., None]
        sink = placed[:, :, position].clone()
        signed = placed * sink.sign()[:, :, None]
        signed[:, :, position] = 0
        share = parts.cumsum(-1) / total[..., None]
        values = (
            total / count,
            share[..., 0],
            share[..., -1],
            (mean.square() / square)[..., 0],
            (signed.amax(2) / sink.abs())[..., 0],
        )
        self.found.append((places, call.layer, torch.stack(values, -1).cpu()))
        self.sides.setdefault(call.layer, (asked[0].cpu(), placed[0].cpu()))

    def detectors(self, windows: Windows, moments: Moments) -> Detectors:
        """Everything in one."""
        sides = [self.sides[layer] for layer in sorted(self.sides)]
        return Detectors(
            self.placed.position,
            self.placed.turns,
            per_document(self.found, windows, QUANTITIES),
            self.modes,
            self.ranks,
            moments.controls(),
            [query for query, _ in sides],
            [key for _, key in sides],
        )


def precise(call: AttentionCall) -> tuple[Float[Tensor, "b h queries size"], Float[Tensor, "b h keys size"]]:
    """Queries times the factor of the scores, and keys by query head, float64."""
    return call.query.double() * call.scaling, call.key.repeat_interleave(call.groups, dim=1).double()


def others_mean(
    call: AttentionCall, rows: slice, position: int, x: Float[Tensor, "batch heads keys width"]
) -> Float[Tensor, "batch heads rows width"]:
    """For each of some queries the mean over the keys that it may see, but for the one at `position`."""
    seen = call.visible(rows).clone()
    seen[..., position] = False
    return seen.to(x.dtype) @ x / seen.sum(-1, keepdim=True).clamp_min(1)
