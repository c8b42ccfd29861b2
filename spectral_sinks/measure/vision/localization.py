"""Find one object of an image from the features of its patches: LOST, and DINO-seg as its baseline."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from spectral_sinks.errors import InputError

CANDIDATES = 100
"""Number of patches of lowest degree among which the seed is expanded. (Siméoni et al. 2021)"""

MASS = 0.6
"""Share of [CLS]'s attention that DINO-seg keeps. (Caron et al. 2021)"""


@dataclass(frozen=True, eq=False)
class Discovery:
    """The location of one object in an image, in patches."""

    mask: Bool[NDArray[np.bool_], "rows columns"]
    """The patches of the object, connected by their sides; none if the seed does not belong to them."""
    seed: tuple[int, int]
    """Row and column of the patch from which the object was found."""
    degree: Int[NDArray[np.int64], "rows columns"] | None = None
    """Number of other patches with which each patch correlates positively (LOST)."""

    @property
    def found(self) -> bool:
        """Whether the object is some of the patches and not all."""
        return bool(self.mask.any() and not self.mask.all())

    @property
    def box(self) -> tuple[int, int, int, int] | None:
        """Left, top, right and bottom edge of the mask, counted in patches; None for an empty mask."""
        if not self.mask.any():
            return None
        (top, bottom), (left, right) = (np.flatnonzero(self.mask.any(axis))[[0, -1]] for axis in (1, 0))
        return int(left), int(top), int(right) + 1, int(bottom) + 1

    def in_pixels(
        self, patch_size: int, read: tuple[int, int], shown: tuple[int, int] | None = None
    ) -> Float[NDArray[np.float64], "4"]:
        """Return the box as x0, y0, x1, y1 in pixels; NaN for an empty mask.

        `read` is the height and width of the model's input. `shown` is the height and width of the picture,
        which was resized to it as a whole.
        """
        if self.box is None:
            return np.full(4, np.nan)
        across, down = (to / of for to, of in zip(reversed(shown or read), reversed(read), strict=True))
        return np.array(self.box) * patch_size * np.array([across, down, across, down])


def lost(
    features: Float[Tensor, "rows columns d"] | NDArray[Any],
    *,
    bias: float = 0.0,
    candidates: int = CANDIDATES,
) -> Discovery:
    """Find the object by LOST: what correlates with the patch that correlates with the fewest others.

    The seed is the patch of lowest degree, the first in case of a tie. It is expanded by those of the
    `candidates` patches of lowest degree that correlate positively with it. The object is the connected
    patches around the seed whose correlations with the expanded seed have a positive sum. `bias` is added to
    every correlation, for features that are not centred (Darcet et al. 2024, section 3.3, who do not state a
    number). If all patches correlate positively, the object is the whole image, and `found` is False.

    Raises InputError for another shape, no patches, NaN or Inf, and no candidates. (Siméoni et al. 2021,
    section 3; strictly positive as in their code, where the paper has >= 0)
    """
    x = torch.as_tensor(features)
    if candidates < 1:
        raise InputError(f"{candidates} candidates: give at least 1")
    return expand(correlations(x, bias), (x.shape[0], x.shape[1]), candidates)


def correlations(
    features: Float[Tensor, "rows columns d"], bias: float = 0.0
) -> Float[NDArray[np.float64], "patches patches"]:
    """Return the inner products of patches, row by row, plus `bias`. Raises InputError as `lost` does."""
    x = features.detach().cpu().double()
    if x.ndim != 3 or not x.numel():
        raise InputError(f"features of shape {tuple(x.shape)}: expected [rows, columns, d]")
    if not torch.isfinite(x).all():
        raise InputError("the features hold NaN or Inf")
    flat = x.flatten(0, 1)
    return (flat @ flat.T + bias).numpy()


def expand(
    correlation: Float[NDArray[np.float64], "patches patches"],
    grid: tuple[int, int],
    candidates: int = CANDIDATES,
) -> Discovery:
    """Find the object by LOST from the correlations of patches, row by row in a grid of rows and columns."""
    positive = correlation > 0
    degree = positive.sum(1) - positive.diagonal()
    order = np.argsort(degree, kind="stable")
    seed, near = order[0], order[:candidates]
    expanded = near[positive[seed, near]]
    alike = correlation[expanded].sum(0) > 0
    parts, _ = ndimage.label(alike.reshape(grid))
    row, column = divmod(int(seed), grid[1])
    part = parts[row, column]
    return Discovery((parts == part) & (part > 0), (row, column), degree.reshape(grid))


def dino_seg(attention: Float[Tensor, "rows columns"] | NDArray[Any], *, mass: float = MASS) -> Discovery:
    """Find the object by DINO-seg: the largest connected part of the patches that hold most of the attention.

    It keeps the fewest patches that together hold the share `mass` of what [CLS] gives to patches. Of
    connected parts of equal size it takes the first. The seed is the patch of the part with the most
    attention.

    Raises InputError for another shape, no attention, negative or not finite values, and a share outside 0 to
    1. (Caron et al. 2021; as the baseline of Siméoni et al. 2021, section 4)
    """
    weights = torch.as_tensor(attention).detach().cpu().double().numpy()
    if weights.ndim != 2 or not np.isfinite(weights).all() or (weights < 0).any() or not weights.sum() > 0:
        raise InputError(
            f"attention of shape {weights.shape}: expected [rows, columns], none negative and some positive"
        )
    if not 0 < mass <= 1:
        raise InputError(f"mass {mass}: expected a share above 0 and up to 1")
    falling = np.argsort(-weights, axis=None, kind="stable")
    held = np.cumsum(weights.flat[falling]) / weights.sum()
    kept = np.zeros(weights.size, dtype=bool)
    kept[falling[: np.searchsorted(held, mass * (1 - 1e-12)) + 1]] = True
    parts, _ = ndimage.label(kept.reshape(weights.shape))
    mask = parts == np.bincount(parts.flat)[1:].argmax() + 1
    seed = np.where(mask, weights, -1).argmax()
    return Discovery(mask, divmod(int(seed), weights.shape[1]))
