"""Keys or values of the entries of a cache, stored as they are or as integers of 8, 4 or 2 bits."""

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

Bits = Literal[8, 4, 2]

Grouping = Literal["channel", "token"]
"""Which numbers share a smallest value and a step: those of one channel in consecutive tokens, or all those
of one token."""


def quantised(
    x: Float[Tensor, "... tokens size"], bits: int, by: Grouping
) -> tuple[UInt8[Tensor, "... tokens size"], Tensor, Tensor]:
    """Round to integers between the smallest and the largest value of each group.

    Returns the integers, the smallest values and the steps; `integers * step + smallest` is at most about
    half a step away from `x`, if it is computed in float32. A group is one channel of all `tokens`, or one
    token.
    """
    dim = -2 if by == "channel" else -1
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    # in half precision the quotients alone would be wrong by a step, and the step is rounded as it is stored
    wide = torch.promote_types(x.dtype, torch.float32)
    step = ((high.to(wide) - low) / (2**bits - 1)).to(x.dtype).clamp_min(torch.finfo(x.dtype).tiny)
    codes = ((x.to(wide) - low) / step).round().clamp(0, 2**bits - 1)
    return codes.to(torch.uint8), low, step


def pack_codes(codes: UInt8[Tensor, "... size"], bits: int) -> UInt8[Tensor, "... bytes"]:
    """Put 8 / bits integers into each byte, the first in the lowest bits."""
    count = 8 // bits
    parts = codes.unflatten(-1, (-1, count))
    shifts = torch.arange(count, dtype=torch.uint8, device=codes.device) * bits
    return (parts << shifts).sum(-1, dtype=torch.uint8)


def unpack_codes(held: UInt8[Tensor, "... bytes"], bits: int) -> UInt8[Tensor, "... size"]:
    """Return the integers that `pack_codes` put into bytes."""
    shifts = torch.arange(8 // bits, dtype=torch.uint8, device=held.device) * bits
    return ((held[..., None] >> shifts) & (2**bits - 1)).flatten(-2)


def taken(x: Tensor, index: Int[Tensor, "batch heads kept"]) -> Tensor:
    """Return some entries of `[batch, heads, entries, ...]`, others in each row and head."""
    if x.ndim > 3:
        index = index[..., None].expand(*index.shape, x.shape[3])
    return x.gather(2, index)


class Storage:
    """Keys or values `[batch, heads, entries, size]` of a layer's cache, in the order of the text.

    With `bits`, entries are stored as packed integers with a smallest value and a step for each group, which
    have the dtype of the input. The first `exact` entries stay as they are. So do the latest ones with
    groups by channel, until there are `group` of them; this is KIVI's rule (Liu et al. 2024).

    Args:
        bits: bits of the integers; None stores everything as it is.
        by: what shares a smallest value and a step.
        group: number of tokens in a group by channel.
        exact: number of first entries that stay as they are.

    """

    def __init__(
        self, bits: int | None = None, by: Grouping = "token", group: int = 32, exact: int = 0
    ) -> None:
        self.bits, self.by, self.group, self.exact = bits, by, group, exact
        self.empty()

    def empty(self) -> None:
        """Forget all entries."""
        self.first: Tensor | None = None
        """The first entries as they are."""
        self.last: Tensor | None = None
        """The latest entries as they are."""
        self.codes: Tensor | None = None
        """Packed integers of the entries between, `[batch, heads, entries, bytes]`."""
        self.low: Tensor | None = None
        """Smallest values, `[batch, heads, entries, 1]` or `[batch, heads, groups, size]`."""
        self.step: Tensor | None = None
        """Steps, in the shape of `low`."""
        self.groups: Tensor | None = None
        """The group of each entry, `[batch, heads, entries]`, for groups by channel."""

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors that are held."""
        return [x for x in vars(self).values() if isinstance(x, Tensor)]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Rows, heads and entries; zeros before the first entry."""
        if self.last is None:
            return 0, 0, 0
        count = sum(0 if x is None else x.shape[2] for x in (self.first, self.codes, self.last))
        return self.last.shape[0], self.last.shape[1], count

    def append(self, new: Float[Tensor, "batch heads new size"]) -> None:
        """Add entries after the others."""
        if self.first is None or self.last is None:
            self.first = self.last = new[:, :, :0].clone()
        room = max(0, self.exact - self.first.shape[2]) if self.bits else 0
        if room:
            self.first = torch.cat([self.first, new[:, :, :room]], dim=2)
            new = new[:, :, room:]
        last = torch.cat([self.last, new], dim=2)
        width = self.group if self.by == "channel" else 1
        ready = last.shape[2] // width * width if self.bits else 0
        if ready:
            self._quantise(last[:, :, :ready])
            last = last[:, :, ready:].clone()  # a view would hold on to what is now stored as integers
        self.last = last

    def _quantise(self, x: Float[Tensor, "batch heads new size"]) -> None:
        assert self.bits is not None
        batch, heads, count, _ = x.shape
        if self.by == "channel":
            codes, low, step = quantised(x.unflatten(2, (-1, self.group)), self.bits, "channel")
            codes, low, step = codes.flatten(2, 3), low.flatten(2, 3), step.flatten(2, 3)
            before = 0 if self.low is None else self.low.shape[2]
            groups = before + torch.arange(count, dtype=torch.int32, device=x.device) // self.group
            self.groups = longer(self.groups, groups.expand(batch, heads, -1))
        else:
            codes, low, step = quantised(x, self.bits, "token")
        self.codes = longer(self.codes, pack_codes(codes, self.bits))
        self.low, self.step = longer(self.low, low), longer(self.step, step)

    def read(self) -> Float[Tensor, "batch heads entries size"] | None:
        """Return all entries, those stored as integers with their rounding; None before the first."""
        if self.first is None or self.last is None:
            return None
        if self.codes is None or self.low is None or self.step is None or self.bits is None:
            return torch.cat([self.first, self.last], dim=2)
        low, step = self.low, self.step
        if self.groups is not None:
            low, step = (taken(x, self.groups.long()) for x in (low, step))
        wide = torch.promote_types(low.dtype, torch.float32)
        middle = (unpack_codes(self.codes, self.bits).to(wide) * step + low).to(low.dtype)
        return torch.cat([self.first, middle, self.last], dim=2)

    def keep(self, index: Int[Tensor, "batch heads kept"]) -> None:
        """Keep some entries, others in each row and head, and drop the rest.

        The first and the latest ones that are held as they are must be among them if any are integers.
        """
        assert self.first is not None and self.last is not None
        if self.codes is None:
            whole = torch.cat([self.first, self.last], dim=2)
            held = taken(whole, index)
            first = self.first.shape[2]
            self.first, self.last = held[:, :, :first].clone(), held[:, :, first:].clone()
            return
        start, stop = self.first.shape[2], index.shape[2] - self.last.shape[2]
        index = index[:, :, start:stop] - start
        self.codes = taken(self.codes, index)
        if self.groups is None:
            self._regroup(lambda x: taken(x, index))
            return
        used, groups = taken(self.groups, index).unique(return_inverse=True)
        self.groups = groups.to(torch.int32)
        self._regroup(lambda x: x[:, :, used.long()])

    def _regroup(self, function: Callable[[Tensor], Tensor]) -> None:
        assert self.low is not None and self.step is not None
        self.low, self.step = function(self.low), function(self.step)

    def change(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor by what a function of it returns, such as other rows of the batch."""
        for name, x in list(vars(self).items()):
            if isinstance(x, Tensor):
                setattr(self, name, function(x))


def longer(before: Tensor | None, new: Tensor) -> Tensor:
    """Return a tensor of its own with new entries after the others."""
    return new.clone() if before is None else torch.cat([before, new], dim=2)
