"""Subspaces of the residual stream: orthonormal bases, projections and combinations."""

# torch is typed only in part:
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from spectral_sinks.errors import InputError
from spectral_sinks.spectra.cache import fingerprint

MOST_DRAWS = 10_000
"""Largest number of random subspaces that are compared with one subspace."""

DRAWN_BYTES = 4 * 2**30
"""Memory that random subspaces may take."""


@dataclass(frozen=True, eq=False)
class Subspace:
    """The span of an orthonormal `d x k` basis, or (`complemented`) its orthogonal complement.

    The thinner of the two bases is stored, never a `d x d` projector.
    """

    basis: Float[Tensor, "d k"]
    name: str = "subspace"
    complemented: bool = False
    members: Bool[Tensor, "d"] | None = None
    """Which singular directions of a spectrum span it; None for a subspace of no spectrum."""
    spectrum: tuple[str, Float[Tensor, "d d"]] | None = None
    """Fingerprint and right singular vectors of the spectrum that `members` refers to."""
    source: str = ""
    """What determines the basis, such as a seed; the basis itself is rounded differently on each machine."""

    def __post_init__(self) -> None:
        if self.basis.ndim != 2 or self.basis.shape[1] > self.basis.shape[0]:
            raise InputError(f"a basis of shape {tuple(self.basis.shape)}: expected d x k with k <= d")
        gram = self.basis.double().T @ self.basis.double()
        error = (gram - torch.eye(self.basis.shape[1], dtype=gram.dtype, device=gram.device)).abs()
        if error.numel() and not error.max() < 1e-2:  # loose: a bfloat16 copy of a basis passes
            raise InputError(f"the basis of {self.name!r} is not orthonormal (error {error.max():.2g})")

    @classmethod
    def of_members(
        cls, vectors: Float[Tensor, "d d"], members: Bool[Tensor, "d"], name: str, fingerprint: str
    ) -> "Subspace":
        """The span of the marked columns of a spectrum's right singular vectors."""
        thick = int(members.sum()) > members.numel() // 2
        basis = vectors[:, ~members if thick else members]
        return cls(basis, name, thick, members, (fingerprint, vectors))

    @classmethod
    def spanning(cls, columns: Float[Tensor, "d k"], name: str = "subspace") -> "Subspace":
        """The span of any linearly independent columns; raises InputError if they are not."""
        if columns.ndim != 2:
            raise InputError(f"columns of shape {tuple(columns.shape)} for {name!r}: expected d x k")
        q, r = torch.linalg.qr(columns.double())
        fresh = r.diagonal().abs() > 1e-10 * r.norm(dim=0)[: r.shape[0]]  # against the columns before it
        if columns.shape[1] > columns.shape[0] or not fresh.all():
            raise InputError(f"the columns given for {name!r} are not linearly independent")
        return cls(q, name)

    @property
    def d(self) -> int:
        return self.basis.shape[0]

    @property
    def rank(self) -> int:
        """Dimension of the subspace."""
        stored = self.basis.shape[1]
        return self.d - stored if self.complemented else stored

    @property
    def address(self) -> str:
        """What identifies the subspace: its source, its members in a spectrum, or the basis itself."""
        if self.source:
            return f"{self.source}, complemented: {self.complemented}"
        if self.members is not None and self.spectrum is not None and self.spectrum[0]:
            return fingerprint(self.members, None, f"members of {self.spectrum[0]}")
        return fingerprint(self.basis, None, f"basis, complemented: {self.complemented}")

    def project(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """The component of each vector inside the subspace, in the dtype of x (at least float32 inside)."""
        precise, stored = self._stored_part(x)
        return (precise - stored if self.complemented else stored).to(x.dtype)

    def reject(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """The component of each vector orthogonal to the subspace; `project + reject` is x."""
        precise, stored = self._stored_part(x)
        return (stored if self.complemented else precise - stored).to(x.dtype)

    def share(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        """Share of the energy (squared norm) of each vector inside the subspace; r/d for a random one."""
        precise, stored = self.coordinates(x, self.basis)
        # Coordinates have the energy of what they stand for; a difference of energies would lose digits
        inside = self.project(precise) if self.complemented else stored
        return inside.square().sum(-1) / precise.square().sum(-1)

    def complement(self) -> "Subspace":
        """Return the orthogonal complement."""
        members = None if self.members is None else ~self.members
        return replace(self, complemented=not self.complemented, members=members, name=f"all but {self.name}")

    def named(self, name: str) -> "Subspace":
        return replace(self, name=name)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "Subspace":
        """The same subspace with its basis on another device or in another dtype."""
        return replace(self, basis=self.basis.to(device, dtype))

    def orthonormal(self) -> Float[Tensor, "d r"]:
        """An orthonormal basis of the subspace itself, whichever basis is stored."""
        if not self.complemented:
            return self.basis
        if self.members is not None and self.spectrum is not None:
            return self.spectrum[1][:, self.members]
        return torch.linalg.qr(self.basis.double(), mode="complete").Q[:, self.basis.shape[1] :]

    def __or__(self, other: "Subspace") -> "Subspace":
        """Span of both: exact, for subspaces of one spectrum."""
        a, b = self._pair(other)
        return self._combined(a | b, f"{self.name} | {other.name}")

    def __and__(self, other: "Subspace") -> "Subspace":
        """Intersection: exact, for subspaces of one spectrum; otherwise see `intersection`."""
        a, b = self._pair(other)
        return self._combined(a & b, f"{self.name} & {other.name}")

    def __sub__(self, other: "Subspace") -> "Subspace":
        """The directions of this subspace that the other lacks: exact, for subspaces of one spectrum."""
        a, b = self._pair(other)
        return self._combined(a & ~b, f"{self.name} - {other.name}")

    def _stored_part(self, x: Tensor) -> tuple[Tensor, Tensor]:
        precise, stored = self.coordinates(x, self.basis)
        return precise, stored @ self.basis.to(precise.device, precise.dtype).T

    def coordinates(self, x: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
        """Return the vectors in float32 at least, and their coordinates in a basis of the same width."""
        if x.shape[-1] != self.d:
            raise InputError(
                f"{self.name!r} is a subspace of a residual stream of width {self.d}, "
                f"got vectors of width {x.shape[-1]}: make it from a spectrum of the same model"
            )
        precise = x.to(torch.promote_types(x.dtype, torch.float32))
        return precise, precise @ basis.to(precise.device, precise.dtype)

    def _pair(self, other: "Subspace") -> tuple[Tensor, Tensor]:
        ours, theirs = self.spectrum, other.spectrum
        if self.members is None or other.members is None or ours is None or theirs is None:
            same = False
        else:
            same = ours[1] is theirs[1] or (ours[0] != "" and ours[0] == theirs[0])
        if not same or self.members is None or other.members is None:
            raise InputError(
                f"{self.name!r} and {other.name!r} are not subspaces of one spectrum, so |, & and - have no "
                "exact meaning; use intersection(a, b) or principal_cosines(a, b)"
            )
        return self.members, other.members

    def _combined(self, members: Tensor, name: str) -> "Subspace":
        assert self.spectrum is not None
        return Subspace.of_members(self.spectrum[1], members, name, self.spectrum[0])

    def __repr__(self) -> str:
        return f"Subspace({self.name!r}, rank {self.rank} of {self.d})"


def random_subspace(d: int, rank: int, seed: int = 0) -> Subspace:
    """Draw a subspace of the given rank uniformly (Haar), in float64: the control of equal rank.

    The thinner of the subspace and its complement is drawn, so it takes at most `d x d/2` numbers. Raises
    InputError for a rank outside 0 to d.
    """
    if not 0 <= rank <= d:
        raise InputError(f"a random subspace of rank {rank}: expected 0 to {d}")
    thick = rank > d // 2
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(d, d - rank if thick else rank, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(normal).Q
    return Subspace(basis, f"random {rank} (seed {seed})", thick, source=f"random {d} {rank} {seed}")


def random_subspaces(d: int, rank: int, count: int, *, least: int = 0) -> list[Subspace]:
    """Draw a number of random subspaces, with the seeds 0, 1, ...

    Raises InputError for fewer than `least`, for more than `MOST_DRAWS`, and for more than fit into
    `DRAWN_BYTES`.
    """
    fit = DRAWN_BYTES // max(8 * d * min(rank, d - rank), 1)
    if not least <= count <= min(MOST_DRAWS, fit):
        most = min(MOST_DRAWS, fit)
        raise InputError(f"{count} random subspaces of rank {rank} in {d} dimensions: give {least} to {most}")
    return [random_subspace(d, rank, seed) for seed in range(count)]


def shares(spaces: Sequence[Subspace], x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch spaces"]:
    """Return `Subspace.share` in each of some subspaces, from one product with all of their bases."""
    plain = [space for space in spaces if not space.complemented]
    if not plain:
        found = [space.share(x) for space in spaces]
        return torch.stack(found, dim=-1) if found else x.new_zeros(*x.shape[:-1], 0)
    joined = torch.cat([space.basis.to(x.device) for space in plain], dim=1)
    precise, coordinates = plain[0].coordinates(x, joined)
    energy = precise.square().sum(-1)
    parts = coordinates.square().split([space.rank for space in plain], dim=-1)
    inside = iter([part.sum(-1) / energy for part in parts])
    return torch.stack([s.share(x) if s.complemented else next(inside) for s in spaces], dim=-1)


def principal_cosines(a: Subspace, b: Subspace) -> Float[Tensor, "min_rank"]:
    """Cosines of the principal angles between two subspaces of one residual stream, largest first."""
    if a.d != b.d:
        raise InputError(f"subspaces of width {a.d} and {b.d} do not belong to one residual stream")
    return torch.linalg.svdvals(a.orthonormal().double().T @ b.orthonormal().double()).clamp(max=1.0)


def intersection(a: Subspace, b: Subspace, cosine: float = 0.5**0.5) -> Subspace:
    """Return the directions of `a` that also lie in `b`, up to a principal angle.

    Two subspaces in floating-point numbers rarely intersect exactly. The result is spanned by the bisectors
    of the principal vectors whose cosine is at least `cosine` (45 degrees by default [ours]). Raises
    InputError for subspaces of different widths.
    """
    if a.d != b.d:
        raise InputError(f"subspaces of width {a.d} and {b.d} do not belong to one residual stream")
    left, right = a.orthonormal().double(), b.orthonormal().double()
    u, s, vh = torch.linalg.svd(left.T @ right, full_matrices=False)
    near = s >= cosine
    bisectors = left @ u[:, near] + right @ vh.T[:, near]
    return Subspace(bisectors / bisectors.norm(dim=0), f"{a.name} ∩ {b.name}")
