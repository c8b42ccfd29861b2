"""Attention bars: tokens that receive much attention, evenly, from all later ones (Cancedda 2024, 7)."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from spectral_sinks.data.texts import Windows
from spectral_sinks.errors import InputError
from spectral_sinks.interventions.sites import Site
from spectral_sinks.interventions.tracing import trace
from spectral_sinks.measure.memory import batches
from spectral_sinks.models.attention_sdpa import whole_maps
from spectral_sinks.models.language import LanguageModel
from spectral_sinks.spectra.subspace import Subspace

TAIL, OF = 4, 33
"""Number of last tokens that are not candidates, and the text length in the paper, about 33 tokens. Too few
queries follow the last tokens."""


def later_attention(
    weights: Float[Tensor, "batch heads tokens tokens"],
) -> Float[Tensor, "batch tokens 2"]:
    """Return the mean and variance of the attention to each key over the queries strictly after it.

    Attention is averaged over heads first. Queries whose sliding window excludes the key count as 0. The last
    token has NaN, since no query follows it.
    """
    attention = weights.double().mean(1).tril(-1)
    count = attention.shape[-1] - 1 - torch.arange(attention.shape[-1], device=attention.device)
    mean = attention.sum(1) / count
    later = torch.ones_like(attention[0]).tril(-1)
    variance = ((attention - mean.nan_to_num()[:, None]).square() * later).sum(1) / count
    return torch.stack([mean, variance], dim=-1)


def received(
    model: LanguageModel,
    windows: Windows,
    subspaces: Mapping[str, Subspace],
    *,
    batch_size: int | None = None,
) -> pd.DataFrame:
    """Measure the attention that every token receives from later ones, and where its residual lies.

    Every layer is measured. All later queries count, so whole attention maps are read, one layer at a time.
    The model is switched to eager attention for this pass and back.

    Args:
        model: a language model.
        windows: the text.
        subspaces: subspaces of the residual stream, by name.
        batch_size: windows in a pass.

    Returns:
        One row per `document`, `window`, `layer` and `position`. The columns are the `token` id; `attention`,
        the mean over later queries and heads; `variance`, over later queries, of the mean over heads; `norm`
        of the residual that enters the layer, from which its keys are computed; and for each subspace the
        ratio `|P x| / |x|` of that residual (by chance about `sqrt(r / d)`).

    Raises:
        InputError: for a subspace of another width.

    """
    for subspace in subspaces.values():
        if subspace.d != model.d:
            raise InputError(f"a subspace of width {subspace.d} for {model.name} of width {model.d}")
    ranks = [subspace.rank for subspace in subspaces.values()]
    bases = torch.cat([subspace.orthonormal().float() for subspace in subspaces.values()], dim=1)
    sites = [Site("embedding"), *(Site("exit", layer) for layer in range(model.layers - 1))]

    def ratios(x: Tensor) -> Tensor:
        """Return the norm, and the share of it inside each subspace, `[batch, tokens, 1 + subspaces]`."""
        squares = (x.float() @ bases.to(x.device)).square()
        inside = torch.stack([part.sum(-1) for part in squares.split(ranks, dim=-1)], dim=-1).sqrt()
        norm = x.float().norm(dim=-1, keepdim=True)
        return torch.cat([norm, inside / norm], dim=-1).double().cpu()

    tables: list[pd.DataFrame] = []
    with whole_maps(model):
        for places, ids in batches(model, windows, batch_size):
            attention, places_in = trace(
                model,
                ids.to(model.device),
                {},
                dict.fromkeys(sites, ratios),
                readout=lambda final, read, weights: (
                    torch.stack([layer.cpu() for layer in weights], 1),
                    torch.stack([read[site] for site in sites], 1),
                ),
                attention=later_attention,
            )
            shape = attention.shape[:3]
            window, layer, position = (axis.ravel() for axis in np.indices(shape))
            table = {
                "document": np.asarray([windows.document[place] for place in places])[window],
                "window": np.asarray(places)[window],
                "layer": layer,
                "position": position,
                "token": ids.numpy()[window, position],
            }
            values = torch.cat([attention, places_in], dim=-1).flatten(0, 2).numpy()
            names = ("attention", "variance", "norm", *subspaces)
            tables.append(pd.DataFrame(table | dict(zip(names, values.T, strict=True))))
    return pd.concat(tables, ignore_index=True)


def candidates(table: pd.DataFrame, model: LanguageModel) -> pd.DataFrame:
    """Return the rows of `received` that may be bars, after the exclusions of the paper.

    It excludes layers before the sink forms (before the first in which position 0 receives at least half of
    its maximum over layers [ours]), position 0 and every other BOS, and the last 4 of 33 tokens, or the same
    share of longer windows [ours]. Raises InputError where no row is left.
    """
    mass = table[table["position"] == 0].groupby("layer")["attention"].mean()
    first = int(mass.index[mass >= mass.max() / 2].min())
    length = table.groupby("window")["position"].transform("max") + 1
    tail = (length * TAIL // OF).clip(lower=TAIL)
    text = (table["position"] > 0) & (table["position"] < length - tail)
    if model.bos is not None:
        text &= table["token"] != model.bos
    kept = table[text & (table["layer"] >= first)].reset_index(drop=True)
    if kept.empty:
        raise InputError(f"no token is left: give windows of more than {TAIL + 2} tokens")
    return kept


def mark_bars(table: pd.DataFrame, most: float = 0.1, even: float = 0.5) -> pd.Series:
    """Mark the candidates that are bars, by quantiles of attention and variance in each layer.

    A bar is among the share `most` of a layer with the highest attention, and among the share `even` of these
    with the lowest variance. The absolute thresholds of the paper (0.018 and 0.01) hold for its texts of
    about 33 tokens. Both quantities fall with length, so quantiles replace them, and the share of bars is
    `most x even`. Raises InputError for shares outside 0 to 1.
    """
    if not (0 < most < 1 and 0 < even <= 1):
        raise InputError(f"quantiles {most} and {even}: expected shares between 0 and 1")
    high = table["attention"] > table.groupby("layer")["attention"].transform("quantile", 1 - most)
    variance = table["variance"].where(high)
    return high & (variance <= variance.groupby(table["layer"]).transform("quantile", even))


def strata(table: pd.DataFrame, places: int = 16, counts: int = 5) -> pd.Series:
    """Return a stratum number for each row: tokens of one layer that are similar in position and frequency.

    Positions are cut evenly into `places` groups, and the first of these by powers of two, since attention
    received changes fast at the beginning and again towards the end. The frequency of a token is its count
    among the rows of its layer. It is cut into `counts` groups by quantile.
    """
    even = table["position"] * places // (table["position"].max() + 1)
    position = even + np.log2(table["position"]).astype(int) / 100
    frequency = table.groupby(["layer", "token"])["token"].transform("size")
    level = frequency.groupby(table["layer"]).rank(pct=True).mul(counts).clip(upper=counts - 1e-9)
    return table.groupby([table["layer"], position, level.astype(int)]).ngroup()


def matched(table: pd.DataFrame, marked: pd.Series, column: str) -> pd.DataFrame:
    """Return the marked rows with a `control`: the mean of the column over unmarked rows of the same stratum.

    Marked rows whose stratum has no other row are left out.
    """
    stratum = strata(table)
    others = table[~marked].groupby(stratum[~marked])[column].mean()
    found = table[marked].assign(control=stratum[marked].map(others))
    return found.dropna(subset=["control"])
