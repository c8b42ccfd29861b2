"""The effect of rounding on a spectrum: how far noise of its size turns the dark band."""

# torch is typed only in part:
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from spectral_sinks.spectra.spectrum import BLOCK_ROWS, Spectrum


@dataclass(frozen=True)
class RoundingNoise:
    """What noise of the size of a rounding does to the dark band of a spectrum."""

    size: float
    """Root mean square of the noise in one entry of the matrix as the convention reads it."""
    norm: float
    """Largest singular value of noise of that size in a matrix of that shape, `size (sqrt(rows) + sqrt(d))`.
    No singular value of the matrix moves by more (Weyl)."""
    smallest: float
    """Smallest singular value of the matrix."""
    rotated: float
    """Share of the dark band that the noise turns out of it: 1 minus the mean squared cosine of the principal
    angles between the dark bands with and without the noise."""
    largest_angle: float
    """Largest of these angles, in degrees."""


def rounding_noise(
    weight: Float[Tensor, "rows d"],
    step: Float[Tensor, "rows d"],
    spectrum: Spectrum,
    *,
    gain: Float[Tensor, "d"] | None = None,
    centre_residual: bool = False,
    seed: int = 0,
) -> RoundingNoise:
    """Add noise of the size of a rounding to a matrix, and compare its dark band with that of the matrix.

    Rounding to multiples of a step makes an error between minus and plus half a step. The noise is drawn
    uniformly from there, one draw for each entry.

    Args:
        weight: the matrix as it is stored.
        step: the step of the rounding of each entry.
        spectrum: the spectrum of the matrix.
        gain: the gain of the norm before the matrix, unless the convention of the spectrum is `raw`.
        centre_residual: whether the norm removes the mean over channels, as for `Spectrum.from_matrix`.
        seed: the seed of the draw.

    Raises:
        InputError: as `Spectrum.from_matrix` does.

    """
    generator = torch.Generator().manual_seed(seed)
    noisy = weight.detach().float().clone()
    total = 0.0
    for block, steps in zip(noisy.split(BLOCK_ROWS), step.split(BLOCK_ROWS), strict=True):
        noise = (torch.rand(block.shape, generator=generator) - 0.5) * steps
        block += noise
        total += float((noise if gain is None else noise * gain).square().sum(dtype=torch.float64))
    turned = Spectrum.from_matrix(
        noisy,
        name=spectrum.matrix,
        convention=spectrum.convention,
        gain=gain,
        centre_residual=centre_residual,
        bands=spectrum.count,
        use_cache=False,
    )
    before, after = spectrum.dark().orthonormal().double(), turned.dark().orthonormal().double()
    # sines of the principal angles, since cosines of small angles are all 1
    sines = torch.linalg.svdvals(before - after @ (after.T @ before)).clamp(max=1.0)
    size = (total / weight.numel()) ** 0.5
    rows, d = weight.shape
    return RoundingNoise(
        size=size,
        norm=size * (rows**0.5 + d**0.5),
        smallest=float(spectrum.values[-1]),
        rotated=float(sines.square().mean()),
        largest_angle=float(sines.max().asin().rad2deg()),
    )
