"""Filters: the blocked subspace, the fill that takes its place, and the tokens on which the filter acts.

A filter is a frozen value and a function of a tensor `[..., length, d]`. So it works alone, in a PyTorch
hook, in any nnsight trace, and at the sites of this package. A custom filter is any function of a tensor.
"""

# torch is typed only in part:
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from spectral_sinks.errors import InputError
from spectral_sinks.spectra.cache import fingerprint
from spectral_sinks.spectra.edits import Edit, energy_share, own_address
from spectral_sinks.spectra.spectrum import Spectrum
from spectral_sinks.spectra.subspace import Subspace, intersection, random_subspace

Fill = Callable[[Tensor, Subspace], Tensor]
"""A function of the removed component `[..., length, d]` and the blocked subspace; returns a replacement.

The results of a sweep are stored under an address that names the fill: a fill needs a string attribute
`address` that changes whenever its results do.
"""


@dataclass(frozen=True, init=False)
class At:
    """The tokens at some positions, counted from 0."""

    positions: tuple[int, ...]

    def __init__(self, *positions: int) -> None:
        if not positions or min(positions) < 0:
            raise InputError(f"positions {positions}: give at least one, counted from 0, as in At(4)")
        object.__setattr__(self, "positions", tuple(sorted(set(positions))))


Tokens = Literal["all", "first", "all-but-first"] | At | Tensor | Collection[int]
"""Which tokens are filtered: by position, by a mask `[tokens]` or `[batch, tokens]`, or by token id."""

PsiReading = Literal["u-e", "e-u", "intersection"]


@dataclass(frozen=True)
class Zero:
    """Zero ablation: the removed component is not replaced, as in a projection out of the subspace."""

    @property
    def address(self) -> str:
        return type(self).__name__.lower()

    def __call__(self, removed: Tensor, blocked: Subspace) -> Tensor:
        return torch.zeros_like(removed)


@dataclass(frozen=True, eq=False)
class Mean:
    """Mean ablation: the removed component is replaced by its mean at the position over documents."""

    reference: Float[Tensor, "*tokens d"]
    """Mean residual by position; `[d]` for one mean at every position."""
    source: str = ""
    """What determines the mean, for its address: each machine rounds the numbers differently."""

    @property
    def address(self) -> str:
        return f"mean {self.source}" if self.source else fingerprint(self.reference, None, "mean")

    def __call__(self, removed: Tensor, blocked: Subspace) -> Tensor:
        mean = self.reference.to(removed.device, removed.dtype)
        if mean.ndim == 2 and mean.shape[0] < removed.shape[-2]:
            raise InputError(
                f"the mean was taken over {mean.shape[0]} positions, the text has {removed.shape[-2]}"
            )
        mean = mean if mean.ndim == 1 else mean[: removed.shape[-2]]
        return blocked.project(mean).expand_as(removed)


@dataclass(frozen=True)
class Swap:
    """Resample ablation: the removed component is replaced by that of another document of the batch.

    Row i receives the same position of row i - 1. Measurements give it groups of up to 16 windows of one
    length, in the order of the windows, whatever their batch size. If all documents begin with the same
    token, position 0 does not change.
    (Cancedda 2024, Fig. 10)
    """

    @property
    def address(self) -> str:
        return type(self).__name__.lower()

    def __call__(self, removed: Tensor, blocked: Subspace) -> Tensor:
        if removed.ndim < 3 or removed.shape[0] < 2:
            raise InputError(
                f"fill 'swap' takes another document of the batch: needs [batch >= 2, tokens, d], "
                f"got shape {tuple(removed.shape)}"
            )
        return removed.roll(1, dims=0)


@dataclass(frozen=True)
class Noise:
    """Noise: the removed component is replaced by a random direction of the subspace with the same norm.

    One direction is drawn for each position and used in every document, so the results do not depend on how
    documents are batched. Several seeds show the effect of the draw.
    """

    seed: int = 0

    @property
    def address(self) -> str:
        return f"noise {self.seed}"

    def __call__(self, removed: Tensor, blocked: Subspace) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        drawn = torch.randn(removed.shape[-2:], generator=generator, dtype=removed.dtype).to(removed.device)
        noise = blocked.project(drawn)
        length = noise.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(noise.dtype).tiny)
        return noise * (removed.norm(dim=-1, keepdim=True) / length)


@dataclass(frozen=True, eq=False)
class Filter(Edit):
    """Remove the component of the residual in `blocked` and put `fill` in its place.

    With `through`, the filter removes `P_blocked P_through x`, the double projection of Psi. Tokens that are
    not selected stay the same bit for bit.
    """

    blocked: Subspace
    through: Subspace | None = None
    fill: Fill = field(default_factory=Zero)
    tokens: Tokens = "all"
    name: str = ""

    def __post_init__(self) -> None:
        if self.through is not None and self.through.d != self.blocked.d:
            raise InputError(f"{self.blocked!r} and {self.through!r} differ in width")
        if isinstance(self.tokens, str) and self.tokens not in ("all", "first", "all-but-first"):
            raise InputError(
                f"tokens {self.tokens!r}: choose 'all', 'first', 'all-but-first', a mask or token ids"
            )
        if not self.name:
            object.__setattr__(self, "name", f"remove {self.blocked.name}")

    @property
    def rank(self) -> int:
        """Number of directions removed: the rank of the operator, an upper bound for Psi."""
        return min(self.blocked.rank, self.through.rank if self.through is not None else self.blocked.d)

    @property
    def per_window(self) -> bool:
        return isinstance(self.fill, Zero | Mean | Noise)

    @property
    def swaps(self) -> bool:
        return isinstance(self.fill, Swap)

    @property
    def positions(self) -> frozenset[int] | None:
        if isinstance(self.tokens, At):
            return frozenset(self.tokens.positions)
        return frozenset({0}) if isinstance(self.tokens, str) and self.tokens == "first" else None

    @property
    def copies_from(self) -> int:
        return int(getattr(self.fill, "copies_from", -1))

    @property
    def token_ids(self) -> Collection[int]:
        return () if isinstance(self.tokens, str | At | Tensor) else self.tokens

    @property
    def labels(self) -> tuple[str, str]:
        fill = "zero" if isinstance(self.fill, Zero) else type(self.fill).__name__.lower()
        return fill, self.tokens if isinstance(self.tokens, str) else "some"

    @property
    def user_function(self) -> Fill:
        return self.fill

    @property
    def address(self) -> list[Any]:
        """The blocked subspace, `through`, the fill and the tokens, each by what determines its numbers."""
        if isinstance(self.tokens, str):
            tokens: object = self.tokens
        elif isinstance(self.tokens, At):
            tokens = f"positions {self.tokens.positions}"
        elif isinstance(self.tokens, Tensor):
            tokens = fingerprint(self.tokens, None, "mask")
        else:
            tokens = sorted(set(map(int, self.tokens)))
        through = None if self.through is None else self.through.address
        return [self.blocked.address, through, own_address(self.fill), tokens]

    def apply(
        self, x: Float[Tensor, "*batch length d"], ids: Int[Tensor, "*batch length"] | None = None
    ) -> Float[Tensor, "*batch length d"]:
        return self(x, ids)

    def apply_and_measure(
        self,
        x: Float[Tensor, "batch length d"],
        ids: Int[Tensor, "batch length"],
        remover: Any = None,
    ) -> tuple[Float[Tensor, "batch length d"], Float[Tensor, "batch"]]:
        selected = self.selected(x, ids)
        removed = self.removed(x) if remover is None else remover.removed(self)  # [batch, length, d]
        out = x if self.rank == 0 else self.replaced(x, removed, ids)
        return out, energy_share(removed, x, selected)

    def acts_on_first(self, first_ids: Collection[int]) -> bool:
        if isinstance(self.tokens, str):
            return self.tokens != "all-but-first"
        if isinstance(self.tokens, At):
            return 0 in self.tokens.positions
        if isinstance(self.tokens, Tensor):
            return bool(self.tokens[..., 0].any())
        return not set(self.tokens).isdisjoint(first_ids)

    def for_windows(self, rows: Sequence[int], total: int) -> "Filter":
        if not isinstance(self.tokens, Tensor) or self.tokens.ndim != 2:
            return self
        if self.tokens.shape[0] != total:
            raise InputError(f"a mask of {self.tokens.shape[0]} rows for {total} windows or images")
        return replace(self, tokens=self.tokens[list(rows)])

    def at_position(self, position: int) -> "Filter":
        return self.at(At(position))

    def within(self, past: int, count: int) -> "Filter | None":
        tokens = self.tokens
        if isinstance(tokens, At):
            here = [position - past for position in tokens.positions if past <= position < past + count]
            if not here:
                return None
            tokens = At(*here)
        elif isinstance(tokens, Tensor):
            tokens = tokens[..., past : past + count]
        elif isinstance(tokens, str) and past:
            if tokens == "first":
                return None
            tokens = "all"
        if past and (isinstance(self.fill, Noise) or self.copies_from >= 0):
            raise InputError(
                f"{self.name!r}: noise by position and a copy from another position need the whole text, and "
                f"this pass begins after its first {past} tokens"
            )
        mean = self.fill.reference if isinstance(self.fill, Mean) else None
        edit = self
        if mean is not None and mean.ndim == 2:
            if len(mean) < past + count:
                raise InputError(
                    f"the mean was taken over {len(mean)} positions, and {past + count} are read"
                )
            edit = self.filled(Mean(mean[past : past + count]))
        return edit.at(tokens)

    def check_width(self, d: int, site: object, model: str) -> None:
        if self.blocked.d != d:
            raise InputError(
                f"{self.name!r} at {site} filters a residual stream of width {self.blocked.d}, "
                f"{model} has width {d}"
            )
        if isinstance(self.fill, Mean) and self.fill.reference.shape[-1] != d:
            raise InputError(f"a mean of width {self.fill.reference.shape[-1]} for a model of width {d}")

    def check_continuation(self, length: int) -> None:
        if isinstance(self.tokens, Tensor) or isinstance(self.fill, Noise | Swap):
            raise InputError(
                f"{self.name!r}: a mask, noise by position and a swap with another text are not defined for "
                "tokens still to be generated"
            )
        if self.copies_from >= 0 and self.positions is None:
            raise InputError(
                f"{self.name!r} copies from position {self.copies_from} to tokens still to be generated, "
                "whose passes do not contain it: select tokens of the prompt, with At"
            )
        mean = self.fill.reference if isinstance(self.fill, Mean) else torch.empty(0)
        if mean.ndim == 2 and len(mean) < length - 1:
            raise InputError(f"{self.name!r} has a mean of {len(mean)} positions, {length - 1} are read")

    def __call__(
        self, x: Float[Tensor, "*batch tokens d"], ids: Int[Tensor, "*batch tokens"] | None = None
    ) -> Float[Tensor, "*batch tokens d"]:
        """Filter a residual stream; `ids` are the token ids, which only a selection by token id needs.

        The computation is in float32 at least, and the result has the dtype of x. Raises InputError where the
        widths differ, where ids are needed and missing, and where a mask does not fit.
        """
        if x.ndim < 2:
            raise InputError(f"a filter takes [..., tokens, d], got shape {tuple(x.shape)}")
        if x.shape[-1] != self.blocked.d:
            self.blocked.project(x)  # raises with the widths
        if self.rank == 0:
            return x
        if isinstance(self.fill, Zero) and self.through is None:
            return self._at_selected(self.blocked.reject(x), x, ids)
        return self.replaced(x, self.removed(x), ids)

    def removed(self, x: Float[Tensor, "*batch tokens d"]) -> Float[Tensor, "*batch tokens d"]:
        """Return the component that is removed, at every token, in float32 at least."""
        precise = x.to(torch.promote_types(x.dtype, torch.float32))
        return self.blocked.project(precise if self.through is None else self.through.project(precise))

    def replaced(
        self,
        x: Float[Tensor, "*batch tokens d"],
        removed: Float[Tensor, "*batch tokens d"],
        ids: Int[Tensor, "*batch tokens"] | None = None,
    ) -> Float[Tensor, "*batch tokens d"]:
        """Replace the component `removed` of x by the fill, at the selected tokens."""
        out = x.to(removed.dtype) - removed
        if not isinstance(self.fill, Zero):
            out = out + self.fill(removed.clone(), self.blocked)  # a user's fill may write into its argument
        return self._at_selected(out.to(x.dtype), x, ids)

    def _at_selected(self, out: Tensor, x: Tensor, ids: Tensor | None) -> Tensor:
        selected = self.selected(x, ids)
        return out if selected is None else torch.where(selected.unsqueeze(-1), out, x)

    def selected(self, x: Tensor, ids: Tensor | None) -> Bool[Tensor, "..."] | None:
        """Return a broadcastable mask of the filtered tokens of `x [..., length, d]`; None for all."""
        count = x.shape[-2]
        if isinstance(self.tokens, str):
            if self.tokens == "all":
                return None
            first = torch.arange(count, device=x.device) == 0
            return first if self.tokens == "first" else ~first
        if isinstance(self.tokens, At):
            if self.tokens.positions[-1] >= count:
                raise InputError(f"position {self.tokens.positions[-1]}: the text has {count} tokens")
            return torch.isin(torch.arange(count), torch.tensor(self.tokens.positions)).to(x.device)
        if isinstance(self.tokens, Tensor):
            if self.tokens.dtype != torch.bool or not _fits(self.tokens, x):
                raise InputError(
                    f"a mask of shape {tuple(self.tokens.shape)} and dtype {self.tokens.dtype} "
                    f"does not select from {tuple(x.shape[:-1])}: expected bool [tokens] or [batch, tokens]"
                )
            return self.tokens.to(x.device)
        if ids is None:
            raise InputError("a filter that selects by token id needs the ids: filter(x, ids)")
        if not _fits(ids, x):
            raise InputError(f"ids of shape {tuple(ids.shape)} for tokens of shape {tuple(x.shape[:-1])}")
        return torch.isin(ids.to(x.device), torch.tensor(sorted(self.tokens), device=x.device))

    def at(self, tokens: Tokens) -> "Filter":
        """The same filter at other tokens."""
        return replace(self, tokens=tokens)

    def filled(self, fill: Fill) -> "Filter":
        """The same filter with another fill."""
        return replace(self, fill=fill)

    def complement(self) -> "Filter":
        """Return the filter that removes what this one keeps.

        Raises InputError for a filter with `through`.
        """
        if self.through is not None:
            raise InputError("a double projection has no complementary filter")
        return replace(self, blocked=self.blocked.complement(), name=f"complement of {self.name}")

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "Filter":
        """The same filter with its bases on another device or in another dtype."""
        through = None if self.through is None else self.through.to(device, dtype)
        return replace(self, blocked=self.blocked.to(device, dtype), through=through)

    def __repr__(self) -> str:
        where = self.tokens if isinstance(self.tokens, str) else "some"
        return f"Filter({self.name!r}, rank {self.rank} of {self.blocked.d}, {self.fill}, {where} tokens)"


def _fits(mask: Tensor, x: Tensor) -> bool:
    """Whether a mask covers each token of `x [..., length, d]`, and no others."""
    sizes = list(zip(reversed(mask.shape), reversed(x.shape[:-1]), strict=False))
    return 1 <= mask.ndim < x.ndim and mask.shape[-1] == x.shape[-2] and all(a in (1, b) for a, b in sizes)


def remove(subspace: Subspace, fill: Fill | None = None, tokens: Tokens = "all") -> Filter:
    """Block a subspace."""
    return Filter(subspace, None, fill or Zero(), tokens, f"remove {subspace.name}")


def keep(subspace: Subspace, fill: Fill | None = None, tokens: Tokens = "all") -> Filter:
    """Block all but a subspace."""
    return Filter(subspace.complement(), None, fill or Zero(), tokens, f"keep {subspace.name}")


def phi(spectrum: Spectrum, j: int, k: int) -> Filter:
    """Phi_{j:k}: keep bands j to k (Cancedda 2024, section 4). Phi over all bands changes no bit."""
    return replace(keep(spectrum.bands(j, k)), name=f"Phi {j}:{k}")


def psi(u: Spectrum, e: Spectrum, j: int, reading: PsiReading = "u-e") -> Filter:
    """Psi: keep bands 1 to j, and remove only what lies in the tails of both spectra.

    Let `P_u` and `P_e` project on bands j + 1 onwards of the unembedding and the embedding. The reading `u-e`
    is `x - P_u P_e x`, `e-u` is `x - P_e P_u x`, and `intersection` is `x - P_{E∩U} x`. The text of the paper
    admits all of them, so results name the reading. (Cancedda 2024, section 4)
    """
    if reading not in get_args(PsiReading):
        raise InputError(f"reading {reading!r} of Psi: choose from {', '.join(get_args(PsiReading))}")
    if not 0 <= j <= u.count or u.count != e.count:
        raise InputError(
            f"Psi keeps bands 1 to {j} of {u.count} and {e.count}: expected equal numbers, 0 to all"
        )
    if j == u.count:
        return replace(remove(u.subspace("none")), name=f"Psi {j} ({reading})")
    tail_u, tail_e = u.bands(j + 1, u.count), e.bands(j + 1, e.count)
    name = f"Psi {j} ({reading})"
    if reading == "u-e":
        return Filter(tail_u, tail_e, name=name)
    if reading == "e-u":
        return Filter(tail_e, tail_u, name=name)
    return Filter(intersection(tail_e, tail_u), name=name)


def omega(spectrum: Spectrum, j: int) -> Filter:
    """Omega_j = Phi_{1:j} + Phi_{last}: keep the head and the dark tail, delete the middle."""
    kept = spectrum.bands(1, j) | spectrum.band(spectrum.count)
    return replace(keep(kept), name=f"Omega {j}")


def rnd(d: int, rank: int, seed: int = 0) -> Filter:
    """Rnd: remove a random subspace of the given rank, the control for a filter of that rank."""
    return replace(remove(random_subspace(d, rank, seed)), name=f"Rnd {rank} (seed {seed})")
