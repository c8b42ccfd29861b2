"""The rule that decides which positions and tokens are sinks, and the search for them."""

from collections import Counter
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int
from numpy.typing import NDArray
from torch import Tensor

from spectral_sinks.errors import InputError
from spectral_sinks.measure.attention.by_position import PositionAttention

SHARE, FEWEST = 0.5, 0.25
"""Shares of documents that make a sink [ours]. The first is a share of all documents for a position, and of
the documents that contain it for a token. The second is the share of all documents that a token needs in
addition."""

RULE = (
    "a position is a sink of a text if at least one head gives it more than epsilon (alpha_k), and at "
    "least half of the queries come at or after it. A position is listed if it is a sink in half of the "
    "documents. A token is listed if, at other positions, it is a sink in half of the documents that "
    "contain it, in at least three documents, and in at least a quarter of all. dark: in the residual that "
    "the layer with the strongest sink reads, the sink keeps more energy in the dark tail than in any random "
    "subspace of that rank, and more than the other tokens do, and the whole interval lies above"
)
"""The rule of `find_sinks`. All of it is [ours] except alpha_k and epsilon."""


class Place(NamedTuple):
    """The location of a sink before anything is measured there."""

    position: int | None
    token: int | None
    """None for a position that holds different tokens."""
    held: Counter[int]
    """The tokens there, each with its number of windows."""
    member: Bool[NDArray[np.bool_], "windows tokens"]


def above(
    attention: PositionAttention, epsilon: float
) -> Bool[NDArray[np.bool_], "windows layers heads tokens"]:
    """Return where a head gives a position more than epsilon.

    Only positions with half of the queries at or after them count.
    """
    return (attention.alpha > epsilon) & counted(attention)[:, None, None]


def counted(attention: PositionAttention) -> Bool[NDArray[np.bool_], "windows tokens"]:
    """Return the positions that have at least half of the queries at or after them."""
    return (attention.ids >= 0) & (attention.queries >= attention.lengths[:, None] / 2)


def places_of(attention: PositionAttention, epsilon: float) -> list[Place]:
    """Return the positions and tokens that are sinks by `RULE`."""
    ids = attention.ids
    drawn: NDArray[np.bool_] = np.any(above(attention, epsilon), axis=(1, 2))
    positions = np.flatnonzero(in_documents(attention, drawn).mean(0) >= SHARE)
    found: list[Place] = []
    for position in positions:
        member = np.zeros_like(drawn)
        member[:, position] = ids[:, position] >= 0
        held = Counter(ids[member].tolist())
        found.append(Place(int(position), next(iter(held)) if len(held) == 1 else None, held, member))
    # Tokens count only at positions that are not listed themselves
    elsewhere = counted(attention)
    elsewhere[:, positions] = False
    for token in np.unique(ids[drawn & elsewhere]).tolist():
        member = (ids == token) & elsewhere
        holding = in_documents(attention, member.any(1))
        sinks = in_documents(attention, (drawn & member).any(1))
        if sinks.sum() >= max(fewest(len(sinks)), SHARE * holding.sum()):
            found.append(Place(None, token, Counter({token: int(member.any(1).sum())}), member))
    return found


def eligible(
    ids: Int[NDArray[np.int64], "windows tokens"], document: Sequence[int]
) -> Bool[NDArray[np.bool_], "windows tokens"]:
    """Return the tokens of causal windows of one length that can be listed as sinks, whatever attention is.

    They occur in as many documents as the rule asks for, at positions with half of the queries at or after
    them.
    """
    found = np.zeros(ids.shape, dtype=np.bool_)
    found[:, : (ids.shape[1] + 2) // 2] = True
    owners = np.asarray(document)
    held = {(token, owner) for row, owner in zip(ids, owners, strict=True) for token in set(row[found[0]])}
    by_token = Counter(token for token, _ in held)
    least = fewest(len(np.unique(owners)))
    return found & np.isin(ids, [token for token, count in by_token.items() if count >= least])


def fewest(documents: int) -> float:
    """Return the number of documents, of some, in which a token is a sink at least if it is listed."""
    return max(3, FEWEST * documents)


def in_documents(
    attention: PositionAttention, values: Bool[NDArray[np.bool_], "windows *rest"]
) -> NDArray[np.bool_]:
    """Return whether something holds in any window of each document."""
    return attention.by_document(values.astype(float)) > 0


def marked(
    ids: Int[Tensor, "batch tokens"], positions: Collection[int], tokens: Collection[int]
) -> Bool[Tensor, "batch tokens"]:
    """Mark some positions, and some token ids wherever they occur.

    Raises InputError for ids that are no batch of texts of one length.
    """
    ids = as_batch(ids)
    found = torch.isin(ids, torch.tensor(sorted(tokens), dtype=torch.long, device=ids.device))
    here = [position for position in positions if position < ids.shape[1]]
    found[:, here] = True
    return found


def as_batch(ids: object) -> Int[Tensor, "batch tokens"]:
    """Return token ids as a tensor of integers of 64 bits, also those in lists or in an array.

    Raises InputError for ids that are no batch of texts of one length.
    """
    try:
        found = torch.as_tensor(ids)
    except (TypeError, ValueError) as error:
        raise InputError(
            "the token ids are no batch of texts of one length: give [batch, tokens], and texts of other "
            "lengths one by one"
        ) from error
    if found.ndim != 2 or found.is_floating_point():
        raise InputError(
            f"token ids of shape {tuple(found.shape)} and dtype {found.dtype}: give integers [batch, tokens]"
        )
    return found.long()
