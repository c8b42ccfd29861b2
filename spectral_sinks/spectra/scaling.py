"""Filters that scale, amplify or copy the residual of a token, and subspaces of single channels."""

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
    """The fill that puts back what was removed, multiplied by a factor."""

    factor: float

    def __call__(self, removed: Tensor, blocked: Subspace) -> Tensor:
        return removed * self.factor

    @property
    def address(self) -> str:
        return f"scaled {self.factor!r}"


@dataclass(frozen=True)
class Amplified:
    """The fill that puts back what was removed, its deviations from the mean over channels multiplied."""

    factor: float

    def __call__(self, removed: Tensor, blocked: Subspace) -> Tensor:
        mean = removed.mean(-1, keepdim=True)
        return removed + (self.factor - 1) * (removed - mean)

    @property
    def address(self) -> str:
        return f"amplified {self.factor!r}"


@dataclass(frozen=True)
class Copied:
    """The fill that takes what was removed at one position of the same text, usually an earlier one."""

    source: int

    def __call__(self, removed: Tensor, blocked: Subspace) -> Tensor:
        if not 0 <= self.source < removed.shape[-2]:
            raise InputError(f"position {self.source}: the text has {removed.shape[-2]} tokens")
        return removed[..., self.source : self.source + 1, :].expand_as(removed)

    @property
    def copies_from(self) -> int:
        return self.source

    @property
    def address(self) -> str:
        return f"copied from {self.source}"


def scale(d: int, factor: float, tokens: Tokens = "all") -> Filter:
    """Return the filter that multiplies residuals of width d by a factor. Factor 1 changes no bit.

    It is the negative control of a designated sink, since the norm before attention and MLP undoes it.
    """
    return Filter(_whole(d, factor), None, Scaled(factor), tokens, f"scale {factor:g}")


def amplify(d: int, factor: float, tokens: Tokens = "all") -> Filter:
    """Return the filter that multiplies the deviations of a residual from its mean over channels.

    The variance over channels grows by `factor` squared; factor 1 changes no bit. At the site `attention` of
    an early layer this reverses the averaging over values, from which only the first token is exempt.
    (Li et al. 2026, arXiv 2605.06611; site and factor are ours)
    """
    return Filter(_whole(d, factor), None, Amplified(factor), tokens, f"amplify {factor:g}")


def carry(d: int, source: int, tokens: Tokens) -> Filter:
    """Return the filter that copies the residual of one position to others.

    To copy only the part in a subspace, use `remove(subspace, Copied(source))`.
    """
    return Filter(_whole(d), None, Copied(source), tokens, f"residual of position {source}")


def channels(d: int, chosen: Sequence[int]) -> Subspace:
    """Return the span of some channels of the residual stream, such as those of massive activations.

    `remove(channels(d, ...), Mean(reference), At(0))` sets them to their mean, which does no harm, while the
    fill `Zero` destroys the model (Sun et al. 2024). `massive_channels` finds the channels. Raises InputError
    for channels that do not exist.
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
