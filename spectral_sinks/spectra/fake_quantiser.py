"""Fake quantisation: rounding to as few values as an integer of some bits has, in floating point."""

# torch is typed only in part:
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from spectral_sinks.errors import InputError
from spectral_sinks.spectra.cache import fingerprint
from spectral_sinks.spectra.edits import Edit

Granularity = Literal["tensor", "token"]
"""What shares one step: the residual of a whole text at a site, or that of one token."""

BITS = (2, 24)
"""Fewest and most bits: one bit has no positive value, and float32 holds 24."""


@dataclass(frozen=True, eq=False)
class FakeQuantiser(Edit):
    """Round each value of a residual stream to a multiple of a step, as integers of a few bits would hold it.

    Rounding is symmetric, and the step is set by the largest magnitude: `step = max |x| / (2^(bits-1) - 1)`,
    over the whole text ("tensor") or over each token ("token"). Spared tokens and channels keep their values
    bit for bit, and do not count for the step. For a matrix `[rows, d]`, a token is a row.

    Sources: Dettmers et al. 2022 (outlier channels kept exact); Son et al. 2024 (sink tokens kept exact).
    """

    bits: int
    per: Granularity = "tensor"
    tokens: Bool[Tensor, "*windows tokens"] | None = None
    """The tokens that are spared: one mask for all windows, or one row for each."""
    channels: tuple[int, ...] = ()
    """The channels that are spared."""
    name: str = ""

    def __post_init__(self) -> None:
        low, high = BITS
        if not low <= self.bits <= high:
            raise InputError(f"{self.bits} bits: give {low} to {high}")
        if self.per not in get_args(Granularity):
            raise InputError(f"one step per {self.per!r}: choose from {', '.join(get_args(Granularity))}")
        if self.tokens is not None and self.tokens.dtype != torch.bool:
            raise InputError(f"a mask of dtype {self.tokens.dtype}: give bool, True for a token to spare")
        if not self.name:
            object.__setattr__(self, "name", f"int{self.bits} per {self.per}")

    @property
    def per_window(self) -> bool:
        return True

    @property
    def address(self) -> list[Any]:
        mask = None if self.tokens is None else fingerprint(self.tokens, None, "mask")
        return ["fake quantiser", self.bits, self.per, mask, sorted(self.channels)]

    def apply(
        self, x: Float[Tensor, "*batch length d"], ids: Int[Tensor, "*batch length"] | None = None
    ) -> Float[Tensor, "*batch length d"]:
        return self(x)

    def __call__(self, x: Float[Tensor, "*batch tokens d"]) -> Float[Tensor, "*batch tokens d"]:
        """Round a residual stream, in float32 at least, and return it in the dtype of x.

        Raises InputError for a mask or for channels that do not fit x.
        """
        precise = x.to(torch.promote_types(x.dtype, torch.float32))
        spared = self.spared(x)
        counted = precise if spared is None else precise.masked_fill(spared, 0)
        step = self.step(counted)
        rounded = ((counted / step).round_() * step).to(x.dtype)
        return rounded if spared is None else torch.where(spared, x, rounded)

    def step(self, x: Float[Tensor, "*batch tokens d"]) -> Float[Tensor, "*batch tokens_or_1 1"]:
        """Return the step of the rounding, at least the smallest positive number."""
        over = (-2, -1) if self.per == "tensor" else -1
        largest = torch.maximum(x.amax(over, keepdim=True), -x.amin(over, keepdim=True))
        return (largest / (2 ** (self.bits - 1) - 1)).clamp_min(torch.finfo(x.dtype).tiny)

    def spared(self, x: Float[Tensor, "*batch tokens d"]) -> Bool[Tensor, "..."] | None:
        """Return a broadcastable mask of the values of x that are kept; None for none."""
        kept: Tensor | None = None
        if self.channels:
            self.check_width(x.shape[-1], "this tensor", "it")
            kept = torch.zeros(x.shape[-1], dtype=torch.bool, device=x.device)
            kept[list(self.channels)] = True
        if self.tokens is None:
            return kept
        mask = self.tokens[..., : x.shape[-2]].to(x.device)  # windows may be shorter than the longest
        if mask.shape[-1] != x.shape[-2] or (mask.ndim > 1 and mask.shape != x.shape[:-1]):
            raise InputError(f"a mask of shape {tuple(self.tokens.shape)} does not fit {tuple(x.shape)}")
        return mask[..., None] if kept is None else mask[..., None] | kept

    def sparing(
        self,
        tokens: Bool[Tensor, "*windows tokens"] | None = None,
        channels: Sequence[int] = (),
    ) -> "FakeQuantiser":
        """The same quantiser with other tokens and channels spared."""
        return replace(self, tokens=tokens, channels=tuple(channels))

    def for_windows(self, rows: Sequence[int], total: int) -> "FakeQuantiser":
        if self.tokens is None or self.tokens.ndim != 2:
            return self
        if self.tokens.shape[0] != total:
            raise InputError(f"a mask of {self.tokens.shape[0]} rows for {total} windows")
        return replace(self, tokens=self.tokens[list(rows)])

    def within(self, past: int, count: int) -> "FakeQuantiser":
        if past and self.per == "tensor":
            raise InputError(
                f"{self.name!r}: a step for a whole text needs all of its tokens, and this pass begins after "
                f"its first {past}: give one step per token"
            )
        return self if self.tokens is None else self.sparing(self.tokens[..., past:], self.channels)

    def check_width(self, d: int, site: object, model: str) -> None:
        if wrong := [channel for channel in self.channels if not 0 <= channel < d]:
            raise InputError(f"channel {wrong[0]} at {site}: {model} has 0 to {d - 1}")

    def check_continuation(self, length: int) -> None:
        if self.per == "tensor" or self.tokens is not None:
            raise InputError(
                f"{self.name!r}: a step for a whole text and a mask are not defined for tokens still to be "
                "generated; give one step per token"
            )
