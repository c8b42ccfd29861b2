"""The dark share of a sink under one convention, and where two conventions disagree on what is dark."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from spectral_sinks.data.texts import Windows
from spectral_sinks.interventions.sites import Site
from spectral_sinks.interventions.tracing import trace
from spectral_sinks.measure.memory import batches
from spectral_sinks.models.language import LanguageModel
from spectral_sinks.spectra.conventions import disagreement, suffixes
from spectral_sinks.spectra.subspace import Subspace
from spectral_sinks.stats import Estimate


@dataclass(frozen=True)
class DarkShare:
    """The share of a sink's residual energy in the dark tail under one convention."""

    share: Estimate
    """Dark share of the sink, with the range over random subspaces of the same rank."""
    others: Estimate
    """Dark share of the tokens that are not sinks."""

    @property
    def dark(self) -> bool | None:
        """Whether the dark tail carries the sink, by the rule of `find_sinks`.

        None without intervals, and without random subspaces.
        """
        if np.isnan([self.share.low, self.share.most, self.others.high]).any():
            return None
        return self.share.low > max(self.share.most, self.others.high)

    def row(self, suffix: str = "") -> dict[str, Any]:
        """Return the columns `dark_share`, `other_dark_share` and `dark` of a table, with their ranges."""
        return (
            self.share.all_columns(f"dark_share{suffix}")
            | self.others.all_columns(f"other_dark_share{suffix}")
            | {f"dark{suffix}": self.dark}
        )

    def record(self, suffix: str = "") -> dict[str, Any]:
        """Return the same numbers as a dictionary that JSON can hold."""
        return (
            as_json(f"dark_share{suffix}", self.share)
            | {f"random_dark_share{suffix}": [self.share.least, self.share.most]}
            | as_json(f"other_dark_share{suffix}", self.others)
            | {f"dark{suffix}": self.dark}
        )


def row_of(conventions: Mapping[str, DarkShare]) -> dict[str, Any]:
    """Return the columns of several conventions, whose names end as in `dark_share_folded`."""
    found: dict[str, Any] = {}
    for name, suffix in suffixes(conventions).items():
        found |= conventions[name].row(suffix)
    return found


def record_of(conventions: Mapping[str, DarkShare]) -> dict[str, Any]:
    """Return the numbers of several conventions as a dictionary that JSON can hold."""
    found: dict[str, Any] = {}
    for name, suffix in suffixes(conventions).items():
        found |= conventions[name].record(suffix)
    return found


def disagreement_on(conventions: Mapping[str, DarkShare]) -> str:
    """Return where conventions disagree on what is dark; those without an interval say nothing."""
    said = {name: share.dark for name, share in conventions.items()}
    words = {True: "dark", False: "not dark"}
    return disagreement({name: words[dark] for name, dark in said.items() if dark is not None})


def as_json(name: str, value: Estimate) -> dict[str, Any]:
    """Return a mean under `name` and its interval under `NAME_interval`."""
    return {name: value.value, f"{name}_interval": [value.low, value.high]}


def carrier_shares(
    model: LanguageModel,
    windows: Windows,
    site: Site,
    darks: Mapping[str, Subspace],
    randoms: Sequence[Subspace],
    batch_size: int | None = None,
) -> dict[str, DarkShare]:
    """Return the dark shares of position 0 and of the other tokens, by convention.

    Args:
        model: a language model.
        windows: the text.
        site: the site of the residuals.
        darks: the dark tail under each convention.
        randoms: the random subspaces.
        batch_size: windows in a pass.

    """
    named = dict(darks) | {f"random {seed}": drawn for seed, drawn in enumerate(randoms)}
    columns = [*(("first", name) for name in named), *(("others", name) for name in darks)]
    tables: list[pd.DataFrame] = []
    for places, ids in batches(model, windows, batch_size):

        def readout(final: Tensor, read: dict[Site, Tensor], weights: list[Tensor]) -> Tensor:
            x = read[site]
            first = [space.share(x[:, 0]) for space in named.values()]
            others = [dark.share(x[:, 1:]).mean(1) for dark in darks.values()]
            return torch.stack([*first, *others], dim=1).cpu()

        found = trace(model, ids.to(model.device), {}, [site], readout=readout, last=site.layer)
        index = pd.Index([windows.document[place] for place in places], name="document")
        tables.append(pd.DataFrame(found.double().numpy(), index, pd.MultiIndex.from_tuples(columns)))
    table = pd.concat(tables).groupby("document").mean()
    drawn = table["first"].drop(columns=list(darks)).mean()
    return {
        name: DarkShare(Estimate.of(table["first", name], drawn), Estimate.of(table["others", name]))
        for name in darks
    }
