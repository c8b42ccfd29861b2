"""Many filters on one residual: the projection of each is computed from that of the previous one."""

# torch is typed only in part:
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from spectral_sinks.spectra.filters import Filter


class Nested:
    """The components of one residual that many filters remove.

    Between two filters that block directions of the same spectrum, only the directions in which they differ
    are projected. So each further band of a ladder costs one band. Rounding errors add up over a ladder, by
    about 1e-7 for each filter.
    """

    def __init__(self, x: Float[Tensor, "*batch tokens d"]) -> None:
        self.x = x.to(torch.promote_types(x.dtype, torch.float32))
        self._last: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    def removed(self, edit: Filter) -> Float[Tensor, "*batch tokens d"]:
        """Return `edit.removed(x)`, up to rounding."""
        block = edit.blocked
        if edit.through is not None or block.members is None or block.spectrum is None:
            return edit.removed(self.x)
        fingerprint, vectors = block.spectrum
        key = fingerprint or str(id(vectors))
        last = self._last.get(key)
        changed = block.members if last is None else block.members ^ last[1]
        if last is None or int(changed.sum()) >= min(block.rank, block.d - block.rank):
            removed = edit.removed(self.x)
        else:
            removed = last[2] + self._part(vectors, changed & block.members)
            removed = removed - self._part(vectors, changed & last[1])
        self._last[key] = (vectors, block.members, removed)  # holding the vectors keeps their id unique
        return removed

    def _part(self, vectors: Float[Tensor, "d d"], members: Bool[Tensor, "d"]) -> Tensor | float:
        if not members.any():
            return 0.0
        basis = vectors[:, members].to(self.x.device, self.x.dtype)
        return (self.x @ basis) @ basis.T
