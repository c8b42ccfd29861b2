"""Controls for a filter other than `rnd`, which is the control of equal rank.

They remove the same energy, put the same coefficients on other directions, restore the norm, remove random
directions of a larger subspace, or go through the whole computation without a change.
"""

# torch is typed only in part:
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from spectral_sinks.errors import InputError
from spectral_sinks.spectra.edits import Edit
from spectral_sinks.spectra.filters import Filter, Zero
from spectral_sinks.spectra.subspace import Subspace, random_subspace

SWAP_SEED_OFFSET = 2**32
"""Added to a seed, so that a direction swap and `random_subspace` draw different numbers from one seed."""

ENERGY_TOLERANCE = 0.01
"""Relative error of the removed energy up to which a subspace counts as matched."""


def energy_matched(observed: Subspace, x: Float[Tensor, "*tokens d"], seed: int = 0) -> Subspace:
    """Return a random subspace that removes the same share of the energy of `x` as `observed`, at any rank.

    The share is `removed_energy_share`: the share of each token's energy, mean over the tokens of `x`, which
    are any reference residuals. Haar-random directions are added until their number comes nearest to the
    share. Then one of them, the last if possible, is rotated towards another random direction until the share
    is met. So all directions but one are those of a uniform draw. Usually one rotation suffices; a share far
    below that of any random direction takes several.

    Raises InputError for residuals of another width, all zero or not finite, and where no rotation comes
    within 1 % of the share.
    """
    if x.shape[-1] != observed.d:
        raise InputError(f"{observed.name!r} is of width {observed.d}, the residuals of width {x.shape[-1]}")
    rows = x.detach().cpu().double().reshape(-1, observed.d)
    norms = rows.norm(dim=-1, keepdim=True)
    if not torch.isfinite(norms).all() or not norms.any():
        raise InputError("the residuals to match energy on are all zero or not finite")
    rows = (rows / norms)[norms[:, 0] > 0]
    target = float(observed.to("cpu", torch.float64).project(rows).square().sum(-1).mean())
    name = f"energy of {observed.name} (seed {seed})"
    if min(observed.rank, observed.d - observed.rank) == 0:
        return random_subspace(observed.d, observed.rank, seed).named(name)

    generator = torch.Generator().manual_seed(seed)
    normal = torch.empty(observed.d, 0, dtype=torch.float64)
    while True:
        more = min(observed.d, max(2 * normal.shape[1], 2 * observed.rank + 16)) - normal.shape[1]
        drawn = torch.randn(observed.d, more, generator=generator, dtype=torch.float64)
        normal = torch.cat([normal, drawn], dim=1)
        basis = _matched(torch.linalg.qr(normal).Q, rows, target)
        reached = float((rows @ basis).square().sum(-1).mean())
        if abs(reached - target) <= ENERGY_TOLERANCE * target:
            return Subspace(basis, name)
        if normal.shape[1] == observed.d:
            break
    raise InputError(
        f"no subspace of rank {basis.shape[1]} made of these draws takes {target:.4g} of the energy of the "
        f"{len(rows)} residuals (nearest {reached:.4g}): compare at equal rank with rnd"
    )


def _matched(columns: Float[Tensor, "d k"], rows: Float[Tensor, "n d"], target: float) -> Tensor:
    """Return as many columns as come nearest to the target, rotated until they meet it or nothing helps."""
    coordinates = rows @ columns
    moments = coordinates.T @ coordinates / len(rows)
    shares = moments.diagonal().cumsum(0)
    rank = min(int((shares - target).abs().argmin()) + 1, columns.shape[1] - 1)
    for _ in range(4 * columns.shape[1]):
        missing = target - float(moments.diagonal()[:rank].sum())
        if abs(missing) <= 1e-9 * target:
            break
        own, partner, angle = _turn(moments, rank, missing)
        pair, (cos, sin) = [own, partner], (torch.cos(angle), torch.sin(angle))
        turn = torch.stack([torch.stack([cos, -sin]), torch.stack([sin, cos])])
        columns[:, pair] = columns[:, pair] @ turn
        moments[:, pair] = moments[:, pair] @ turn
        moments[pair] = turn.T @ moments[pair]
    return columns[:, :rank].clone()


def _turn(moments: Float[Tensor, "k k"], rank: int, missing: float) -> tuple[int, int, Tensor]:
    """Choose one of the first directions, a further one, and the smallest angle of rotation that suffices.

    In the plane of directions i and j the energy at angle t is `mean + radius cos(2 t - phase)`. The last
    direction is preferred, and the first partner. Where no pair suffices, the nearest one is returned.
    """
    energies = moments.diagonal()
    own, other = energies[:rank, None].flip(0), energies[None, rank:]
    cross = moments[:rank, rank:].flip(0)
    mean, half = (own + other) / 2, (own - other) / 2
    radius = torch.hypot(half, cross)
    off = own + missing - mean
    short = (off.abs() - radius).clamp_min(0)
    row, column = divmod(int(short.argmin()), short.shape[1])
    phase = torch.atan2(cross[row, column], half[row, column])
    tiny = torch.finfo(radius.dtype).tiny
    swing = torch.arccos((off[row, column] / radius[row, column].clamp_min(tiny)).clamp(-1, 1))
    angles = torch.stack([phase + swing, phase - swing]) / 2
    angles = torch.remainder(angles + torch.pi / 2, torch.pi) - torch.pi / 2
    return rank - 1 - row, rank + column, angles[angles.abs().argmin()]


def random_within(outer: Subspace, rank: int, seed: int = 0) -> Subspace:
    """Draw a subspace of the given rank uniformly inside another. Raises InputError beyond its rank."""
    if not 0 <= rank <= outer.rank:
        raise InputError(f"a random subspace of rank {rank} inside {outer.name!r} of rank {outer.rank}")
    inner = random_subspace(outer.rank, rank, seed).orthonormal()
    return Subspace(
        outer.orthonormal().cpu().double() @ inner, f"random {rank} in {outer.name} (seed {seed})"
    )


@dataclass(frozen=True)
class DirectionSwap:
    """The fill that keeps the coefficients of what was removed and changes the directions.

    A fixed isometry, drawn from the seed, maps the blocked subspace to one that is orthogonal to it. So the
    removed components keep their norms and the angles between them. The isometry does not depend on the
    stored basis of the blocked subspace. Raises InputError where the blocked subspace has more than half of
    all directions, since no orthogonal subspace of its rank exists then.
    """

    seed: int = 0

    @property
    def address(self) -> str:
        return f"direction swap {self.seed}"

    def __call__(self, removed: Tensor, blocked: Subspace) -> Tensor:
        if 2 * blocked.rank > blocked.d:
            raise InputError(
                f"fill 'direction swap' needs as many directions beside {blocked.name!r} as in it, and its "
                f"rank is {blocked.rank} of {blocked.d}"
            )
        basis = blocked.orthonormal().cpu().double()
        generator = torch.Generator().manual_seed(self.seed + SWAP_SEED_OFFSET)
        target, source = torch.randn(2, *basis.shape, generator=generator, dtype=torch.float64)
        target = target - basis @ (basis.T @ target)
        u, _, vh = torch.linalg.svd(target @ (source.T @ basis), full_matrices=False)  # nearest isometry
        source, goal = (part.to(removed.device, removed.dtype) for part in (basis, u @ vh))
        return (removed @ source) @ goal.T


@dataclass(frozen=True)
class NoOp:
    """The fill that puts back what was removed: the whole computation, with no change beyond rounding."""

    @property
    def address(self) -> str:
        return "no-op"

    def __call__(self, removed: Tensor, blocked: Subspace) -> Tensor:
        return removed


@dataclass(frozen=True, eq=False)
class NormRestored(Edit):
    """A filter after which each token is scaled back to the norm that it had before.

    It is a function of a tensor `[..., length, d]`. A token of which nothing is left stays zero. Raises
    InputError for a filter whose fill is not `Zero`, or that selects tokens by a mask or by id.
    """

    filter: Filter
    name: str = field(init=False)

    def __post_init__(self) -> None:
        if not isinstance(self.filter.fill, Zero) or not isinstance(self.filter.tokens, str):
            raise InputError(
                f"{self.filter!r}: the norm is restored after a removal (fill Zero) at 'all', 'first' or "
                "'all-but-first' tokens"
            )
        object.__setattr__(self, "name", f"{self.filter.name}, norm restored")

    @property
    def address(self) -> list[Any]:
        return ["norm restored", self.filter.address]

    def within(self, past: int, count: int) -> "NormRestored | None":
        inner = self.filter.within(past, count)
        return None if inner is None else NormRestored(inner)

    def apply(self, x: Tensor, ids: Tensor | None = None) -> Tensor:
        return self(x)

    def __call__(self, x: Float[Tensor, "*batch tokens d"]) -> Float[Tensor, "*batch tokens d"]:
        precise = torch.promote_types(x.dtype, torch.float32)
        left = self.filter(x.to(precise))
        before, after = x.to(precise).norm(dim=-1, keepdim=True), left.norm(dim=-1, keepdim=True)
        scaled = left * (before / after.clamp_min(torch.finfo(precise).tiny))
        selected = self.filter.selected(x, None)
        out = scaled.to(x.dtype)
        return out if selected is None else torch.where(selected.unsqueeze(-1), out, x)
