"""The spectrum of a reading matrix: the residual stream ordered by how strongly the matrix reads it."""

# torch is typed only in part:
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import math
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import get_args

import torch
from jaxtyping import Float
from torch import Tensor

from spectral_sinks.errors import InputError, SpectralWarning
from spectral_sinks.spectra import cache
from spectral_sinks.spectra.conventions import Convention
from spectral_sinks.spectra.subspace import Subspace, random_subspace
from spectral_sinks.spectra.svd import right_singular

DEGENERATE = 1e-6
"""Relative gap of singular values under which a band edge is reported as ill defined [ours]."""

BLOCK_ROWS = 1024
"""Rows of the matrix that are held in float64 at once."""


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Right singular vectors of a `rows x d` matrix, strongest first, in equal bands.

    With `W = U S V^T`, column i of `vectors` (`V`, `d x d`, float64) is the direction of the residual
    stream that the matrix reads with strength `values[i]`. Band 1 holds the largest singular values,
    the last band is the dark tail (Cancedda 2024, section 2). Signs and the order within equal
    singular values carry no meaning: only subspaces are compared.
    """

    vectors: Float[Tensor, "d d"]
    values: Float[Tensor, "d"]
    matrix: str = "matrix"
    """Which matrix was read, for reports."""
    convention: Convention = "raw"
    tied: bool = False
    """Whether the model reads and writes tokens with one and the same matrix."""
    fingerprint: str = ""
    """Hash of the weights and the convention."""
    count: int = 20
    """Number of bands."""
    reads_through: str = ""
    """Modules between the residual stream and the matrix, other than one norm; "" for none."""

    def __post_init__(self) -> None:
        if not 1 <= self.count <= self.d:
            raise InputError(f"{self.count} bands of {self.d} directions: give 1 to {self.d} bands")
        name = self.matrix if self.convention == "raw" else f"{self.convention} {self.matrix}"
        arbitrary: list[str] = []
        for edge in self.edges[1:-1]:
            above, below = self.values[edge - 1], self.values[edge]
            if edge <= self.rank and above - below <= max(DEGENERATE * above, self._rounding):
                arbitrary.append(f"after direction {edge} ({above:.9g} and {below:.9g})")
        if arbitrary:
            warnings.warn(
                f"band edges of the {name} spectrum fall between nearly equal singular values: "
                f"{', '.join(arbitrary)} of {self.d}; which direction lies on which side of them is "
                "arbitrary; another number of bands moves the edges",
                SpectralWarning,
                stacklevel=3,
            )
        if within := [band for band, edge in enumerate(self.edges[:-1]) if edge > self.rank]:
            warnings.warn(
                f"band edges of the {name} spectrum fall into its null space (rank {self.rank} of "
                f"{self.d}): bands {within[0]} to {self.count} divide what is not read at all at arbitrary "
                "positions; null() is all of it",
                SpectralWarning,
                stacklevel=3,
            )

    @classmethod
    def from_matrix(
        cls,
        weight: Float[Tensor, "rows d"],
        *,
        name: str = "matrix",
        convention: Convention = "raw",
        gain: Float[Tensor, "d"] | None = None,
        centre_residual: bool = False,
        tied: bool = False,
        reads_through: str = "",
        bands: int = 20,
        use_cache: bool = True,
    ) -> "Spectrum":
        """Decompose a matrix whose rows read the residual stream, in float64 for any dtype.

        The matrix is read in blocks of rows on its own device, so the memory beyond it is four `d x d` and a
        few blocks. The tail is as accurate as the head; `svd.right_singular` gives the error by condition
        number. The result is on the CPU.

        Args:
            weight: the matrix.
            name: its name, for reports.
            convention: `raw` is the matrix itself; `folded` multiplies the columns by `gain`; `centred` also
                subtracts the mean over the rows, which a softmax ignores.
            gain: the gain of the norm before the matrix.
            centre_residual: whether `centred` also removes the mean of the residual over channels, as a
                LayerNorm before the matrix does.
            tied: whether the model reads and writes tokens with this matrix.
            reads_through: modules between the residual stream and the matrix, other than one norm.
            bands: number of bands.
            use_cache: whether the result is cached on disk under a hash of the inputs.

        Raises:
            InputError: for a matrix that is not 2-d, is empty or holds NaN or Inf, for an unknown convention,
                and for `folded` or `centred` without a gain of width d.

        """
        if convention not in get_args(Convention):
            raise InputError(f"convention {convention!r}: choose from {', '.join(get_args(Convention))}")
        if weight.ndim != 2 or 0 in weight.shape:
            raise InputError(f"{name} has shape {tuple(weight.shape)}, expected rows x d")
        if not torch.stack(torch.aminmax(weight.detach())).isfinite().all():  # without a large mask
            bad = int((~torch.isfinite(weight)).sum())
            raise InputError(f"{name} holds {bad} NaN or Inf of {weight.numel()} values: check the weights")
        if convention != "raw" and (gain is None or gain.shape != weight.shape[1:]):
            given = "none" if gain is None else f"shape {tuple(gain.shape)}"
            raise InputError(
                f"convention {convention!r} folds the final norm's gain into {name}, "
                f"expected a gain of width {weight.shape[1]}, got {given}; use convention 'raw'"
            )
        if gain is not None and not torch.isfinite(gain).all():
            raise InputError(f"the gain for {name} holds NaN or Inf: check the weights of the final norm")
        folded = gain if convention != "raw" else None
        centre = centre_residual and convention == "centred"
        fingerprint = cache.fingerprint(weight, folded, f"{convention}-{centre}")
        stored = cache.find(fingerprint) if use_cache else None
        if stored is None:
            stored = _decompose(weight, folded, convention == "centred", centre)
            if use_cache:
                cache.store(fingerprint, *stored)
        values, vectors = stored
        return cls(vectors, values, name, convention, tied, fingerprint, bands, reads_through)

    @property
    def d(self) -> int:
        return self.values.shape[0]

    @property
    def _rounding(self) -> float:
        """The rounding error of a singular value that is zero."""
        return self.d * torch.finfo(torch.float64).eps * float(self.values[0])

    @cached_property
    def rank(self) -> int:
        """Number of directions that the matrix reads at all: singular values above rounding, `d eps s_1`."""
        return int((self.values > self._rounding).sum())

    @cached_property
    def edges(self) -> tuple[int, ...]:
        """Band j holds directions `edges[j - 1]` up to, not including, `edges[j]`."""
        return tuple(round(self.d * j / self.count) for j in range(self.count + 1))

    def with_bands(self, count: int) -> "Spectrum":
        """Return the same decomposition with another number of bands."""
        return Spectrum(
            self.vectors,
            self.values,
            self.matrix,
            self.convention,
            self.tied,
            self.fingerprint,
            count,
            self.reads_through,
        )

    def directions(self, start: int, stop: int, name: str) -> Subspace:
        """Singular directions `start` up to, not including, `stop`, counted from 0."""
        members = torch.zeros(self.d, dtype=torch.bool)
        members[start:stop] = True
        return Subspace.of_members(self.vectors, members, name, self.fingerprint)

    def band(self, j: int) -> Subspace:
        """Band j, counted from 1."""
        return self.bands(j, j)

    def bands(self, j: int, k: int) -> Subspace:
        """Bands j to k, both included (the range of Phi_{u,j:k}). Raises InputError outside 1..count."""
        if not 1 <= j <= k <= self.count:
            raise InputError(f"bands {j} to {k}: the spectrum has bands 1 to {self.count}")
        name = f"band {j}" if j == k else f"bands {j}-{k}"
        return self.directions(self.edges[j - 1], self.edges[k], name)

    def head(self, fraction: float) -> Subspace:
        """The strongest `fraction` of the directions."""
        return self.middle(0.0, fraction, name=f"head {fraction:g}")

    def middle(self, start: float, stop: float, name: str = "") -> Subspace:
        """The directions between two fractions of the spectrum, 0 the strongest and 1 the darkest."""
        if not 0 <= start < stop <= 1:
            raise InputError(
                f"{name or 'middle'}: fractions {start:g} to {stop:g}, expected 0 <= start < stop <= 1"
            )
        first, last = round(start * self.d), round(stop * self.d)
        if first == last:
            raise InputError(f"{name or 'middle'}: that share of {self.d} directions rounds to none")
        return self.directions(first, last, name or f"middle {start:g}-{stop:g}")

    def dark(self, fraction: float | None = None) -> Subspace:
        """The weakest `fraction` of the directions; the last band where none is given (U-dark, E-dark)."""
        if fraction is None:
            return self.directions(self.edges[-2], self.d, "dark")
        return self.middle(1 - fraction, 1.0, name=f"dark {fraction:g}")

    def null(self) -> Subspace:
        """The directions that the matrix does not read at all; empty where its rank is d."""
        return self.directions(self.rank, self.d, "null space")

    def subspace(self, spec: str, seed: int = 0) -> Subspace:
        """Read a band specification such as `1-8,20`, `dark`, `dark:0.1`, `head:0.4`, `middle:0.4-0.9`,
        `null`, `all`, `none` or `random:13` (a random subspace of rank 13, drawn from `seed`).
        """
        if match := re.fullmatch(r"random:(\d{1,9})", spec.strip()):
            return random_subspace(self.d, int(match[1]), seed)
        parts = [self._part(part.strip(), spec) for part in spec.split(",")]
        joined = parts[0]
        for part in parts[1:]:
            joined = joined | part
        return joined.named(spec)

    def _part(self, part: str, spec: str) -> Subspace:
        number = r"(\d*\.?\d+)"
        if match := re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", part):
            return self.bands(int(match[1]), int(match[2] or match[1]))
        if match := re.fullmatch(f"(head|dark):{number}", part):
            return (self.head if match[1] == "head" else self.dark)(float(match[2]))
        if match := re.fullmatch(f"middle:{number}-{number}", part):
            return self.middle(float(match[1]), float(match[2]))
        if part in ("dark", "null", "all", "none"):
            return {
                "dark": self.dark,
                "null": self.null,
                "all": lambda: self.directions(0, self.d, "all"),
                "none": lambda: self.directions(0, 0, "none"),
            }[part]()
        raise InputError(
            f"{part!r} in {spec!r} is not a band specification: use bands (1-8,20), dark, dark:0.1, "
            "head:0.4, middle:0.4-0.9, null, all, none, or random:13 alone"
        )

    def shares(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch bands"]:
        """Share of the energy (squared norm) of each vector in each band; a row sums to 1."""
        if x.shape[-1] != self.d:
            raise InputError(f"vectors of width {x.shape[-1]} on a spectrum of width {self.d}")
        precise = torch.promote_types(x.dtype, torch.float32)
        squares = (x.to(precise) @ self.vectors.to(x.device, precise)).square()
        sizes = [b - a for a, b in zip(self.edges, self.edges[1:], strict=False)]
        by_band = torch.stack([part.sum(-1) for part in squares.split(sizes, dim=-1)], dim=-1)
        return by_band / by_band.sum(-1, keepdim=True)

    def __iter__(self) -> Iterator[Subspace]:
        return (self.band(j) for j in range(1, self.count + 1))

    def __repr__(self) -> str:
        tied = ", tied" if self.tied else ""
        tied += f", reads through {self.reads_through}" if self.reads_through else ""
        return (
            f"Spectrum({self.matrix}, {self.convention}{tied}, d={self.d}, "
            f"{'' if self.rank == self.d else f'rank {self.rank}, '}{self.count} bands, "
            f"singular values {self.values[0]:.4g} to {self.values[-1]:.4g})"
        )


def _decompose(
    weight: Float[Tensor, "rows d"], gain: Float[Tensor, "d"] | None, centre: bool, centre_residual: bool
) -> tuple[Float[Tensor, "d"], Float[Tensor, "d d"]]:
    """Singular values and right singular vectors in float64, computed on the weight's device."""
    rows, d = weight.shape
    device = weight.device if weight.is_cuda else torch.device("cpu")
    unit = 1.0  # the squares of narrower dtypes are within the range of float64
    if weight.dtype == torch.float64:
        exponent = math.frexp(max(abs(float(end)) for end in torch.aminmax(weight.detach())))[1]
        unit = 2.0 ** (exponent - 1)  # dividing by a power of two rounds nothing
    factor = None if gain is None else gain.detach().to(device, torch.float64)

    def plain() -> Iterator[Float[Tensor, "block d"]]:
        buffer = torch.empty(min(rows, BLOCK_ROWS), d, dtype=torch.float64, device=device)
        for part in weight.detach().split(BLOCK_ROWS):
            block = buffer[: len(part)].copy_(part)
            yield block if unit == 1 else block.div_(unit)

    zero = torch.zeros(d, dtype=torch.float64, device=device)
    mean = sum((block.sum(0) for block in plain()), zero) / rows if centre else zero

    def read() -> Iterator[Float[Tensor, "block d"]]:
        for block in plain():
            if centre:
                block -= mean
            if factor is not None:
                block *= factor
            if centre_residual:
                block -= block.mean(1, keepdim=True)
            yield block

    values, vectors = right_singular(read, d, device)
    values[rows:] = 0  # what a matrix of lower rank leaves there is rounding
    return (values * unit).cpu(), vectors.cpu().contiguous()
