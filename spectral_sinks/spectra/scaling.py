"""Tokens scaled and channels singled out: filters of what makes a sink's residual stand out."""

# torch is typed only in part:
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spectral_sinks.errors import InputError
from spectral_sinks.spectra.filters import Filter, Tokens
from spectral_sinks.spectra.subspace import Subspace


@dataclass(frozen=True)
class Scaled:
    """What is removed comes back times a factor."""

    factor: float

    def __call__(self, removed: Tensor, blocked: Subspace) -> Tensor:
        return removed * self.factor

    @property
    def address(self) -> str:
        return f"scaled {self.factor!r}"


@dataclass(frozen=True)
class Amplified:
    """What is removed comes back with its deviations from its mean over channels times a factor."""

    factor: float

    def __call__(self, removed: Tensor, blocked: Subspace) -> Tensor:
        mean = removed.mean(-1, keepdim=True)
        return removed + (self.factor - 1) * (removed - mean)

    @property
    def address(self) -> str:
        return f"amplified {self.factor!r}"


@dataclass(frozen=True)
class Copied:
    """What is removed comes back as that of one position of the same text, which should be an earlier one."""

    source: int

    def __call__(self, removed: Tensor, blocked: Subspace) -> Tensor:
        if not 0 <= self.source < removed.shape[-2]:
            raise InputError(f"position {self.source}: the text has {removed.shape[-2]} tokens here")
        return removed[..., self.source : self.source + 1, :].expand_as(removed)

    @property
    def copies_from(self) -> int:
        return self.source

    @property
    def address(self) -> str:
        return f"copied from {self.source}"


def scale(d: int, factor: float, tokens: Tokens = "all") -> Filter:
    """Multiply residuals of width d: the norm alone changes. Factor 1 changes no bit.

    The negative control of a designated sink: a norm before attention or MLP takes it out again.
    """
    return Filter(_whole(d, factor), None, Scaled(factor), tokens, f"scale {factor:g}")


def amplify(d: int, factor: float, tokens: Tokens = "all") -> Filter:
    """Multiply the deviations of a residual from its mean over channels: its variance by `factor` squared.

    At the site `attention` of an early layer it does to a token what averaging over values spares the first
    one. Factor 1 changes no bit. (Li et al. 2026, arXiv 2605.06611; site and factor are ours)
    """
    return Filter(_whole(d, factor), None, Amplified(factor), tokens, f"amplify {factor:g}")


def carry(d: int, source: int, tokens: Tokens) -> Filter:
    """Put the residual of one position in the place of others'; a part of it: `remove(part, Copied(0))`."""
    return Filter(_whole(d), None, Copied(source), tokens, f"residual of position {source}")


def channels(d: int, chosen: Sequence[int]) -> Subspace:
    """The span of some channels of the residual stream, where massive activations live.

    `remove(channels(d, ...), Mean(reference), At(0))` fixes them to their mean, which Sun et al. (2024) found
    harmless; with the fill `Zero`, fatal. `massive_channels` finds them. Raises InputError for channels that
    are not there.
    """
    wrong = [i for i in chosen if not 0 <= i < d]
    if wrong or not chosen or len(set(chosen)) < len(chosen):
        raise InputError(f"channels {list(chosen)}: expected different ones, 0 to {d - 1}")
    basis = torch.eye(d, dtype=torch.float64)[:, list(chosen)]
    return Subspace(basis, f"channels {','.join(map(str, chosen))}")


def _whole(d: int, factor: float = 1.0) -> Subspace:
    if not 0 <= factor < float("inf"):
        raise InputError(f"factor {factor}: expected a finite number, 0 or more")
    return Subspace(torch.empty(d, 0, dtype=torch.float64), "all", complemented=True)
