"""Pairs of subspaces of one residual stream: near and far directions, union, and the level of chance."""

# torch is typed only in part:
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import torch

from spectral_sinks.errors import InputError
from spectral_sinks.spectra.spectrum import Spectrum
from spectral_sinks.spectra.subspace import Subspace

APART = 1e-6
"""Sine of the principal angle under which a direction of one subspace counts as lying in the other."""


def nearest(a: Subspace, b: Subspace, rank: int) -> Subspace:
    """Return the `rank` directions of `a` that make the smallest principal angles with `b`."""
    return _ordered(a, b, 0, rank, f"{rank} of {a.name} nearest to {b.name}")


def farthest(a: Subspace, b: Subspace, rank: int) -> Subspace:
    """Return the `rank` directions of `a` that make the largest principal angles with `b`."""
    return _ordered(a, b, a.rank - rank, a.rank, f"{rank} of {a.name} farthest from {b.name}")


def outside(a: Subspace, b: Subspace) -> Subspace:
    """Return the part of the union of both that is orthogonal to `b`.

    Its rank is the rank of `a` less the number of its directions that lie in `b`, to an angle of 1e-6.
    """
    _same_width(a, b)
    basis = a.orthonormal().double()
    other = b.orthonormal().double()
    left, sines, _ = torch.linalg.svd(basis - other @ (other.T @ basis), full_matrices=False)
    return Subspace(left[:, sines > APART], f"{a.name} outside {b.name}")


def union(a: Subspace, b: Subspace) -> Subspace:
    """Return the span of both, which may come from different spectra."""
    both = torch.cat([b.orthonormal().double(), outside(a, b).basis], dim=1)
    return Subspace(both, f"{a.name} ∪ {b.name}")


def share_deviation(d: int, rank: int, effective_rank: float) -> float:
    """Return the standard deviation, over random (Haar) subspaces, of the share of a matrix's energy in them.

    The mean is `rank / d`. With `G = W^T W / |W|^2` the share is `tr(P G)`, whose variance is
    `2 r (d - r) (d tr G^2 - 1) / (d^2 (d - 1) (d + 2))`; `effective_rank` is `1 / tr G^2`, between 1 and d.
    """
    if d < 2 or not 0 <= rank <= d or not 1 - 1e-6 <= effective_rank <= d * (1 + 1e-6):
        raise InputError(f"rank {rank} and effective rank {effective_rank:g} in width {d}: expected 1 to {d}")
    spread = 2 * rank * (d - rank) * (d / effective_rank - 1)
    return max(0.0, spread / (d**2 * (d - 1) * (d + 2))) ** 0.5


def random_spectrum(d: int, count: int = 20, seed: int = 0) -> Spectrum:
    """Return a random (Haar) basis cut into bands: the control for an order of the residual stream."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q
    values = torch.arange(d, 0, -1, dtype=torch.float64)
    return Spectrum(vectors, values, f"random basis (seed {seed})", count=count)


def _ordered(a: Subspace, b: Subspace, start: int, stop: int, name: str) -> Subspace:
    _same_width(a, b)
    if not 0 <= stop - start <= a.rank:
        raise InputError(f"{stop - start} directions of {a!r}: expected 0 to {a.rank}")
    basis = a.orthonormal().double()
    left, _, _ = torch.linalg.svd(basis.T @ b.orthonormal().double(), full_matrices=True)
    return Subspace(basis @ left[:, start:stop], name)


def _same_width(a: Subspace, b: Subspace) -> None:
    if a.d != b.d:
        raise InputError(f"subspaces of width {a.d} and {b.d} do not belong to one residual stream")
