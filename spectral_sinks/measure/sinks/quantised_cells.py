"""What is quantised and what is spared: the quantisers of a report, with their random controls."""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from spectral_sinks.interventions.sites import Site
from spectral_sinks.spectra.fake_quantiser import FakeQuantiser, Granularity

Spared = Literal["nothing", "sink tokens", "massive channels", "both", "random tokens", "random channels"]
"""What keeps its exact values."""

RANDOM: tuple[Spared, ...] = ("random tokens", "random channels")


class QuantisedCell(NamedTuple):
    """A kind of quantisation and what is spared in it."""

    bits: int
    per: Granularity
    spared: Spared
    draw: int
    """The draw of a random choice; -1 where nothing is drawn."""


Cells = dict[QuantisedCell, dict[Site, FakeQuantiser]]


def random_tokens(
    mask: Bool[Tensor, "windows longest"], lengths: Sequence[int], draw: int
) -> Bool[Tensor, "windows longest"]:
    """Return as many other tokens of each window as are marked in it, or all others if these are fewer."""
    rng, found = np.random.default_rng(draw), torch.zeros_like(mask)
    for row, own, length in zip(found, mask, lengths, strict=True):
        others = (~own[:length]).nonzero()[:, 0].numpy()
        row[rng.choice(others, min(int(own.sum()), len(others)), replace=False)] = True
    return found


def random_channels(rng: np.random.Generator, massive: Sequence[int], d: int) -> list[int]:
    """Return as many other channels as are massive."""
    others = np.setdiff1d(np.arange(d), massive)
    return rng.choice(others, min(len(massive), len(others)), replace=False).tolist()


def activation_cells(
    quantisers: Sequence[FakeQuantiser],
    mask: Bool[Tensor, "windows longest"],
    channels: Mapping[Site, list[int]],
    lengths: Sequence[int],
    d: int,
    draws: int,
) -> Cells:
    """Return the quantiser at each site, by kind of quantisation and what is spared."""
    nothing: dict[Site, list[int]] = {site: [] for site in channels}
    spared: dict[tuple[Spared, int], tuple[Tensor | None, Mapping[Site, list[int]]]] = {
        ("nothing", -1): (None, nothing),
        ("sink tokens", -1): (mask, nothing),
    }
    for draw in range(draws):
        spared["random tokens", draw] = (random_tokens(mask, lengths, draw), nothing)
    if any(channels.values()):
        spared["massive channels", -1] = (None, channels)
        for draw in range(draws):
            rng = np.random.default_rng(draw)
            other = {site: random_channels(rng, own, d) for site, own in channels.items()}
            spared["random channels", draw] = (None, other)
        spared["both", -1] = (mask, channels)
    return {
        QuantisedCell(each.bits, each.per, kind, draw): {
            site: each.sparing(tokens, own[site]) for site in channels
        }
        for each in quantisers
        for (kind, draw), (tokens, own) in spared.items()
    }


def weight_cells(
    quantisers: Sequence[FakeQuantiser], massive: Sequence[int], d: int, draws: int
) -> dict[QuantisedCell, FakeQuantiser]:
    """Return the quantisers of a matrix, by kind of quantisation and which of its columns are spared."""
    spared: dict[tuple[Spared, int], Sequence[int]] = {("nothing", -1): ()}
    if massive:
        spared["massive channels", -1] = massive
        for draw in range(draws):
            spared["random channels", draw] = random_channels(np.random.default_rng(draw), massive, d)
    return {
        QuantisedCell(each.bits, each.per, kind, draw): each.sparing(channels=own)
        for each in quantisers
        for (kind, draw), own in spared.items()
    }
