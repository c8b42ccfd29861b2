"""Which positions and which tokens are sinks: the rule, and the places that it finds."""

from collections import Counter
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool
from numpy.typing import NDArray

from spectral_sinks.measure.attention.by_position import PositionAttention

SHARE, FEWEST = 0.5, 0.25
"""Documents in which a sink is one: of those that have it, and of all, as shares [ours]."""

RULE = (
    "a position is a sink of a text if at least one head gives it more than epsilon (alpha_k), and at "
    "least half of the queries come at or after it. Listed: positions that are sinks in half of the "
    "documents; and tokens that, elsewhere, are sinks in half of the documents that hold them, in three "
    "and a quarter of all at least. dark: of the residual that its strongest layer reads, it keeps more "
    "energy in the dark band than in any random subspace of that rank, and more than the other tokens do, "
    "with the whole interval"
)
"""The rule of `find_sinks`; all of it [ours] but alpha_k and epsilon."""


class Place(NamedTuple):
    """Where a sink is, before anything is measured."""

    position: int | None
    token: int | None
    """None at a position that holds different tokens."""
    held: Counter[int]
    """Tokens there, and in how many windows."""
    member: Bool[NDArray[np.bool_], "windows tokens"]


def above(
    attention: PositionAttention, epsilon: float
) -> Bool[NDArray[np.bool_], "windows layers heads tokens"]:
    """Where a head gives a position more than epsilon, among positions with half of the queries."""
    return (attention.alpha > epsilon) & _counted(attention)[:, None, None]


def _counted(attention: PositionAttention) -> Bool[NDArray[np.bool_], "windows tokens"]:
    return (attention.ids >= 0) & (attention.queries >= attention.lengths[:, None] / 2)


def places_of(attention: PositionAttention, epsilon: float) -> list[Place]:
    """The positions and tokens that are sinks by `RULE`."""
    ids = attention.ids
    drawn: NDArray[np.bool_] = np.any(above(attention, epsilon), axis=(1, 2))
    positions = np.flatnonzero(in_documents(attention, drawn).mean(0) >= SHARE)
    found: list[Place] = []
    for position in positions:
        member = np.zeros_like(drawn)
        member[:, position] = ids[:, position] >= 0
        held = Counter(ids[member].tolist())
        found.append(Place(int(position), next(iter(held)) if len(held) == 1 else None, held, member))
    elsewhere = _counted(attention)
    elsewhere[:, positions] = False
    for token in np.unique(ids[drawn & elsewhere]).tolist():
        member = (ids == token) & elsewhere
        holding = in_documents(attention, member.any(1))
        sinks = in_documents(attention, (drawn & member).any(1))
        if sinks.sum() >= max(3, FEWEST * len(sinks), SHARE * holding.sum()):
            found.append(Place(None, token, Counter({token: int(member.any(1).sum())}), member))
    return found


def in_documents(
    attention: PositionAttention, values: Bool[NDArray[np.bool_], "windows *rest"]
) -> NDArray[np.bool_]:
    """Whether something is so in any window of each document."""
    return attention.by_document(values.astype(float)) > 0
