"""Steering and ablation directions: what share of them is the sink's, and the direction without that."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor

from spectral_sinks.errors import InputError
from spectral_sinks.interventions.sites import Site
from spectral_sinks.measure.results import Result
from spectral_sinks.measure.sinks.sink_rules import SinkRule
from spectral_sinks.spectra.scaling import channels
from spectral_sinks.spectra.subspace import Subspace

LEFT = 1e-6
"""Share of its energy that a direction must keep, so that what is left is more than rounding [ours]."""


@dataclass(frozen=True, eq=False, repr=False)
class CleanDirection(Result):
    """A direction without the parts of the residual stream that carry the sink."""

    vector: Float[Tensor, "d"]
    """What is left, in the dtype of the input (float32 for integers); shorter than the input by what was
    taken out."""
    table: pd.DataFrame
    """One row per part: `part`, its `rank`, the `share` of the direction's energy in it, the share `random`
    of a random direction (r/d) with the interval of 95 % of draws, `random_low` to `random_high`, and whether
    it was `removed`. The row "removed" is all that was taken out: parts overlap, so their shares do not add
    up to it."""
    model: str
    site: str

    @property
    def share(self) -> float:
        """Share of the direction's energy that was taken out."""
        return float(self.table.set_index("part").loc["removed", "share"])

    def summary(self) -> pd.DataFrame:
        """Return the table of parts."""
        return self.table

    def record(self) -> dict[str, Any]:
        """Return the table as a dictionary that JSON can hold."""
        return {"model": self.model, "site": self.site, "parts": self.table.to_dict("records")}


def clean(
    vector: Float[Tensor, "d"],
    rule: SinkRule,
    *,
    site: Site | None = None,
    remove: Collection[str] | None = None,
) -> CleanDirection:
    """Measure how much of a direction is the sink's, and return the direction without that.

    A direction that is a difference of means contains the sink if the sink token is in the means and differs,
    however little, between them: its norm is many times that of other tokens. The parts are "carrier", the
    mean residual of sink tokens at the site; "channels", its massive channels; and "dark folded", "dark raw"
    and so on, the dark band under each convention that the rule holds.

    Args:
        vector: the direction, of any length.
        rule: what was learned about the sinks of the model.
        site: the embedding or the exit where the direction acts; by default the rule's own site.
        remove: the parts that are taken out; by default all of them.

    Returns:
        The clean direction, and a table of all parts.

    Raises:
        InputError: for a vector of another width, of zeros, or with values that are not finite; for unknown
            parts; and if nothing would be left.

    Sources: Cancedda 2024 (dark band); Sun et al. 2024 (massive channels).

    """
    if vector.ndim != 1 or len(vector) != rule.d:
        raise InputError(
            f"a vector of shape {tuple(vector.shape)}: the rule of {rule.model} is for vectors of width "
            f"{rule.d}"
        )
    if not vector.is_floating_point():
        vector = vector.float()  # a part of it is no vector of integers
    precise = vector.detach().double().cpu()
    if not precise.isfinite().all() or not precise.any():
        raise InputError("the vector is zero or not finite, so it has no direction")
    parts = parts_of(rule, site)
    remove = [remove] if isinstance(remove, str) else remove
    chosen = list(parts) if remove is None else list(dict.fromkeys(remove))
    if unknown := [name for name in chosen if name not in parts]:
        raise InputError(f"no part is called {unknown[0]!r}: choose from {', '.join(parts)}")
    together = span_of([parts[name] for name in chosen], rule.d)
    left = together.reject(precise)
    if not chosen or together.rank == rule.d or left.norm() ** 2 <= LEFT * precise.norm() ** 2:
        raise InputError(
            f"{', '.join(chosen) or 'no part'} removed leaves "
            f"{'the vector as it is' if not chosen else 'nothing of it'}: choose other parts"
        )
    rows = [_row(name, space, precise, name in chosen) for name, space in parts.items()]
    table = pd.DataFrame([*rows, _row("removed", together, precise, True)])
    where = str(rule.site if site is None else site)
    return CleanDirection(left.to(vector), table, rule.model, where)


def parts_of(rule: SinkRule, site: Site | None = None) -> dict[str, Subspace]:
    """Return the parts of the residual stream that carry the sink at a site, by name.

    The massive channels are left out where there are none.
    """
    parts = {"carrier": Subspace.spanning(rule.carrier(site)[:, None], "carrier")}
    if massive := rule.channels(site):
        parts["channels"] = channels(rule.d, massive)
    return parts | {f"dark {name}": space for name, space in rule.spaces.items()}


def span_of(spaces: list[Subspace], d: int) -> Subspace:
    """Return the span of several subspaces, which may overlap."""
    columns = [space.orthonormal().double() for space in spaces]
    u, s, _ = torch.linalg.svd(torch.cat([torch.zeros(d, 1, dtype=torch.float64), *columns], 1))
    return Subspace(u[:, : int((s > 1e-4).sum())], "removed")


def _row(name: str, space: Subspace, vector: Tensor, removed: bool) -> dict[str, Any]:
    law = stats.beta(space.rank / 2, max(space.d - space.rank, 1) / 2)
    return {
        "part": name,
        "rank": space.rank,
        "share": float(space.share(vector)),
        "random": space.rank / space.d,
        "random_low": float(law.ppf(0.025)),
        "random_high": float(law.ppf(0.975)),
        "removed": removed,
    }
