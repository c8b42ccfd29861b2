"""Edits: what acts on the residual stream at one site."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from spectral_sinks.errors import InputError

S = TypeVar("S")

EditFunction = Callable[[Tensor], Tensor]
"""A function of the residual `[batch, length, d]` at a site that returns the residual that replaces it."""


class Edit(ABC):
    """What acts on the residual stream at one site: a filter, or a function of a tensor.

    The answers given here are those for a function about which nothing is known. A subclass overrides the
    ones that it can answer better.
    """

    name: str

    @abstractmethod
    def apply(
        self, x: Float[Tensor, "*batch length d"], ids: Int[Tensor, "*batch length"] | None = None
    ) -> Float[Tensor, "*batch length d"]:
        """Return the edited residual; `ids` are the token ids, which some filters need."""

    @property
    @abstractmethod
    def address(self) -> Any:
        """A JSON value that identifies the edit. Raises InputError for a function that has no address."""

    @property
    def rank(self) -> int | None:
        """Number of directions removed; None for a function."""
        return None

    @property
    def per_window(self) -> bool:
        """Whether the edit of one window is known not to depend on the other windows of the batch."""
        return False

    @property
    def swaps(self) -> bool:
        """Whether the edit mixes windows of a batch, which are then grouped whatever the batch size is."""
        return False

    @property
    def positions(self) -> frozenset[int] | None:
        """The positions that the edit acts on; None where they are unknown or not fixed."""
        return None

    @property
    def copies_from(self) -> int:
        """The position that the edit copies from; -1 where it copies nothing."""
        return -1

    @property
    def token_ids(self) -> Collection[int]:
        """The token ids that the edit selects; empty where it selects tokens in another way."""
        return ()

    @property
    def labels(self) -> tuple[str, str] | None:
        """The fill and the selected tokens, as words of a table; None for a function."""
        return None

    @property
    def user_function(self) -> Any:
        """The part of the edit that a user may have written, and that may therefore fail to pickle."""
        return self

    def at_position(self, position: int) -> "Edit":
        """Return the same edit at one position; a function stays as it is."""
        return self

    def for_windows(self, rows: Sequence[int], total: int) -> "Edit":
        """Return the edit for some windows out of `total`: a mask with a row per window is cut to them.

        Raises InputError for a mask that does not have `total` rows.
        """
        return self

    def within(self, past: int, count: int) -> "Edit | None":
        """Return what the edit does to `count` tokens that follow the first `past` of a text; None for
        nothing.

        Raises InputError for an edit that needs the tokens before them.
        """
        return self

    def acts_on_first(self, first_ids: Collection[int]) -> bool:
        """Whether the edit acts on position 0 of some window; `first_ids` are the tokens that stand there."""
        return True

    def check_width(self, d: int, site: object, model: str) -> None:
        """Raise InputError for an edit of a residual stream of another width than `d`."""
        return

    def check_continuation(self, length: int) -> None:
        """Raise InputError for an edit that is not defined for the tokens of a text still to be generated."""
        return

    def apply_and_measure(
        self,
        x: Float[Tensor, "batch length d"],
        ids: Int[Tensor, "batch length"],
        remover: Any = None,
    ) -> tuple[Float[Tensor, "batch length d"], Float[Tensor, "batch"]]:
        """Return the edited residual and the share of energy removed.

        The share is the mean over the tokens that the edit acts on, by window. `remover` is an object whose
        `removed(filter)` returns what a filter removes from `x`; only filters use it.
        """
        out = self.apply(x.clone(), ids)  # a user's function may write into its argument
        lost = (x - out).to(torch.promote_types(x.dtype, torch.float32))
        return out, energy_share(lost, x)


def energy_share(
    removed: Float[Tensor, "batch length d"],
    x: Float[Tensor, "batch length d"],
    selected: Tensor | None = None,
) -> Float[Tensor, "batch"]:
    """Share of the energy of `x` that was removed, mean over the selected tokens, by window, on the CPU."""
    lost = removed.square().sum(-1)  # [batch, length]
    energy = x.to(lost.dtype).square().sum(-1)  # [batch, length]
    share = lost / energy.clamp_min(torch.finfo(lost.dtype).tiny)
    weight = torch.ones_like(share) if selected is None else selected.expand_as(share).to(share.dtype)
    return ((share * weight).sum(-1) / weight.sum(-1).clamp_min(1)).cpu()


@dataclass(frozen=True, eq=False)
class FunctionEdit(Edit):
    """A plain function of a tensor as an edit. `as_edit` makes it."""

    function: EditFunction
    name: str = "custom"

    @property
    def address(self) -> str:
        return own_address(self.function)

    @property
    def user_function(self) -> EditFunction:
        return self.function

    def apply(self, x: Tensor, ids: Tensor | None = None) -> Tensor:
        return self.function(x)


def as_edit(edit: Edit | EditFunction) -> Edit:
    """Return an edit as it is, and wrap a plain function under its attribute `name`, if it has one."""
    return edit if isinstance(edit, Edit) else FunctionEdit(edit, getattr(edit, "name", "custom"))


def as_edits(interventions: Mapping[S, Edit | EditFunction]) -> dict[S, Edit]:
    """Return the interventions with every plain function wrapped."""
    return {site: as_edit(edit) for site, edit in interventions.items()}


def own_address(function: Any) -> str:
    """Return the attribute `address` of a function or a fill. Raises InputError where there is none."""
    address = getattr(function, "address", None)
    if not isinstance(address, str):
        name = getattr(function, "__name__", type(function).__name__)
        raise InputError(
            f"{name} has no content address, so its results cannot be stored: give it an attribute "
            "`address`, a string that changes whenever its results do"
        )
    return address
