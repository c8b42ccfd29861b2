"""What quantisation breaks, and what is saved by keeping sink tokens or massive channels exact."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from spectral_sinks.data.texts import Windows
from spectral_sinks.errors import InputError
from spectral_sinks.interventions.sites import Site
from spectral_sinks.interventions.tracing import trace
from spectral_sinks.measure.memory import batches
from spectral_sinks.measure.nll.effects import evaluate_all
from spectral_sinks.measure.residual.band_energy import residual_sites
from spectral_sinks.measure.residual.matrix_spectrum import by_convention
from spectral_sinks.measure.residual.quantised_unembedding import Unembeddings
from spectral_sinks.measure.results import Result
from spectral_sinks.measure.sinks.quantised_cells import (
    RANDOM,
    Cells,
    QuantisedCell,
    activation_cells,
    weight_cells,
)
from spectral_sinks.measure.sinks.sink_rules import By, SinkRule, sink_mask
from spectral_sinks.models.language import LanguageModel
from spectral_sinks.models.masked_lm import masked_ids
from spectral_sinks.spectra.fake_quantiser import FakeQuantiser, Granularity
from spectral_sinks.spectra.spectrum import Spectrum
from spectral_sinks.stats import Estimate

KEY = ["what", "bits", "per", "spared"]
"""The columns that name a row of the summary."""

COLUMNS = ["document", *KEY, "draw", "error", "nll", "delta_nll"]


@dataclass(frozen=True, eq=False, repr=False)
class QuantisationReport(Result):
    """The error and the cost of fake quantisation, with parts of it spared."""

    model: str
    sites: tuple[Site, ...]
    """The sites at which the residual stream is quantised, all at once."""
    sink_tokens: float
    """Share of the tokens that are marked as sinks."""
    channels: dict[str, list[int]]
    """The massive channels at each site, which are spared there; and under "unembedding" those that are
    spared in its weights."""
    table: pd.DataFrame
    """One row per document and kind of quantisation: `what` is quantised ("activations" or "unembedding"), to
    how many `bits`, with one step `per` tensor or token, what is `spared`, and the `draw` of a random choice
    (-1 where nothing is drawn). `error` is the squared error over the squared length: of a token's residual
    in the untouched model, mean over tokens and sites; or of all weights. `nll`, `delta_nll`, in nats per
    token."""
    errors: pd.DataFrame
    """Where the error of the activations lies: one row per site, kind of quantisation and class of `tokens`
    ("sinks" or "others"), over all windows. `error` is the mean over tokens as in `table`, and `share` the
    part of the site's squared error that the class holds. Spared tokens have no error."""
    alone: pd.DataFrame
    """`delta_nll` with its interval, by kind of quantisation, with only one site quantised; empty without
    such sites."""
    angles: pd.DataFrame
    """What quantised unembedding weights do to bands of the spectrum, by `convention`, `band` ("dark" and
    "first"), kind of quantisation, what is spared, and `draw`. The columns are the `rank` of the band; the
    `largest_angle` between the bands before and after, in degrees; the share of the band that is `rotated`
    out of itself, the mean squared sine of the principal angles; and that share for a `random` subspace of
    the same rank."""

    def summary(self) -> pd.DataFrame:
        """Return one row per kind of quantisation and what is spared: `error` and `delta_nll`.

        Each has its 95 % interval over documents under `_low` and `_high`. For random choices, the value is
        the mean over draws, and `_least` and `_most` are the range over draws.
        """
        rows: list[dict[str, Any]] = []
        for key, part in self.table.groupby(KEY, sort=False):
            row: dict[str, Any] = dict(zip(KEY, key, strict=True))
            for name in ("error", "delta_nll"):
                drawn = part.groupby("draw")[name].mean() if row["spared"] in RANDOM else None
                row |= Estimate.of(part.groupby("document")[name].mean(), drawn).all_columns(name)
            rows.append(row)
        return pd.DataFrame(rows)

    def by_site(self) -> pd.DataFrame:
        """Return one row per site and kind of quantisation with nothing spared.

        The columns are `error_sinks`, `error_others`, the `sink_share` of the squared error, and, where it
        was measured, `delta_nll` of the site alone with its interval. Errors are NaN at sites that were
        quantised alone only.
        """
        plain = self.errors[self.errors["spared"] == "nothing"]
        keys = ["bits", "per", "site"]
        wide = plain.pivot_table(index=keys, columns="tokens", values=["error", "share"], sort=False)
        found = pd.DataFrame(
            {
                "error_sinks": wide["error", "sinks"],
                "error_others": wide["error", "others"],
                "sink_share": wide["share", "sinks"],
            }
        ).reset_index()
        if self.alone.empty:
            return found
        only = self.alone[~self.alone["site"].isin(found["site"])]
        return pd.concat([found.merge(self.alone, on=keys, how="left"), only], ignore_index=True)

    def record(self) -> dict[str, Any]:
        """Return the summary, the sites and the angles as a dictionary that JSON can hold."""
        return {
            "model": self.model,
            "sites": list(map(str, self.sites)),
            "sink_tokens": self.sink_tokens,
            "channels": self.channels,
            "rows": self.summary().to_dict("records"),
            "by_site": self.by_site().to_dict("records"),
            "angles": self.angles.to_dict("records"),
        }


def quantisation_report(
    model: LanguageModel,
    windows: Windows,
    rule: SinkRule,
    spectrum: Spectrum | Sequence[Spectrum],
    *,
    bits: Sequence[int] = (8, 4),
    per: Sequence[Granularity] = get_args(Granularity),
    sites: Sequence[Site] | None = None,
    by: By = "norm",
    draws: int = 5,
    alone: Sequence[Site] = (),
    batch_size: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> QuantisationReport:
    """Quantise the residual stream and the unembedding, and measure what sinks have to do with the damage.

    Activations are the residual stream itself, rounded by a `FakeQuantiser` at all sites of one pass; nothing
    else in the model is quantised. A tensor is the residual of one window at one site. The norm before a
    component makes all tokens equally long, so one step per token before it is one step per token behind it,
    but for the gain; one step per tensor is harder before the norm, where the sink is large. Each kind of
    quantisation is repeated with the sink tokens exact, with the massive channels of each site exact, with
    both, and with as many random tokens of each window and random channels of each site. The weights of the
    unembedding are quantised alone, per tensor and per row, with the massive channels of the rule's own site
    spared, or random ones; and the bands of the quantised matrix are compared with those of the spectra.

    Args:
        model: a language model whose weights are in this process.
        windows: the text.
        rule: what was learned about the sinks of the model: it marks the tokens and names the channels.
        spectrum: the spectrum of the unembedding, or several under different conventions (`read_spectra`).
        bits: the numbers of bits.
        per: what shares one step.
        sites: the embedding and exits that are quantised; by default all of them.
        by: how the rule marks sink tokens, as in `sink_mask`.
        draws: the number of random choices of tokens and of channels.
        alone: the sites that are quantised alone as well, with nothing spared.
        batch_size: windows in a pass.
        progress: is called with the number of passes just done.

    Raises:
        InputError: for bits outside 2 to 24 and unknown kinds of steps; for the rule or the spectrum of
            another model; if the rule marks no token of these windows; for sites outside the residual stream;
            and for a model without a head, on a server, or whose unembedding is stored quantised.

    Sources: Dettmers et al. 2022 (outlier channels); Son et al. 2024, Liu et al. 2024 (sink tokens kept
    exact).

    """
    if model.remote is not None:
        raise InputError(f"{model.name} is on a server, and its unembedding is quantised here: load it here")
    model.require_head("the NLL of a quantised model")
    rule.require(model)
    single: Any = [per]
    steps: Sequence[Granularity] = single if isinstance(per, str) else per
    spectra = list(by_convention(model, spectrum).values())
    if wrong := [each.matrix for each in spectra if each.matrix != "unembedding"]:
        raise InputError(f"the spectrum of {wrong[0]}: give that of the unembedding (read_spectra)")
    quantisers = [FakeQuantiser(b, p) for b in dict.fromkeys(bits) for p in dict.fromkeys(steps)]
    chosen = residual_sites(model) if sites is None else list(dict.fromkeys(sites))
    if not quantisers or not chosen or draws < 0:
        raise InputError(
            f"bits {list(bits)}, steps per {list(steps)}, {len(chosen)} sites and {draws} draws: give at "
            "least one of each of the first three, and 0 draws or more"
        )
    channels = {site: rule.channels(site) for site in (*chosen, *alone)}
    places = [(each, site) for each in quantisers for site in dict.fromkeys(alone)]
    mask = _mask(model, windows, rule, by, batch_size)
    spared = {site: channels[site] for site in chosen}
    cells = activation_cells(quantisers, mask, spared, windows.lengths, model.d, draws)
    errors = _measured(model, windows, cells, mask, chosen, batch_size)
    names = [str(number) for number in range(len(cells) + len(places))]
    effects = evaluate_all(
        model,
        windows,
        dict(zip(names, [*cells.values(), *({site: each} for each, site in places)], strict=True)),
        batch_size=batch_size,
        progress=progress,
    )
    tables = [effect.table for effect in effects.values()]
    costs = _documents(cells, tables, errors, windows)
    head = Unembeddings(model, windows, batch_size)
    weights, angles = _unembedding(head, weight_cells(quantisers, rule.channels(), model.d, draws), spectra)
    return QuantisationReport(
        model.name,
        tuple(chosen),
        float(mask.sum() / sum(windows.lengths)),
        {str(site): own for site, own in spared.items()} | {"unembedding": rule.channels()},
        pd.concat([costs, weights], ignore_index=True),
        _places(cells, errors, chosen),
        _alone(places, tables[len(cells) :]),
        angles,
    )


def _mask(
    model: LanguageModel, windows: Windows, rule: SinkRule, by: By, batch_size: int | None
) -> Bool[Tensor, "windows longest"]:
    """Return the mask of sink tokens. Raises InputError if it is empty."""
    mask = torch.zeros(len(windows), max(windows.lengths), dtype=torch.bool)
    for places, ids in windows.batches(len(windows)):
        mask[places, : ids.shape[1]] = sink_mask(model, ids, rule, by=by, batch_size=batch_size)
    if not mask.any():
        raise InputError(
            f"the rule of {rule.model} marks no token of these windows by {by}, so there is no sink to "
            "spare: give other texts, or mark by another of norm, position, token, place"
        )
    return mask


@dataclass(frozen=True)
class _Errors:
    """Squared errors in the untouched model, by class of token: sinks, and others."""

    relative: Float[NDArray[np.float64], "cells sites windows 2"]
    """Sum over tokens of the squared error over the squared length."""
    squared: Float[NDArray[np.float64], "cells sites windows 2"]
    """Sum over tokens of the squared error."""
    tokens: Float[NDArray[np.float64], "windows 2"]
    """Number of tokens."""


def _measured(
    model: LanguageModel,
    windows: Windows,
    cells: Cells,
    mask: Bool[Tensor, "windows longest"],
    sites: Sequence[Site],
    batch_size: int | None,
) -> _Errors:
    shape = (len(cells), len(sites), len(windows), 2)
    relative, squared, tokens = np.zeros(shape), np.zeros(shape), np.zeros(shape[2:])
    for places, ids in batches(model, windows, batch_size):
        ids = ids.to(model.device)
        sinks = mask[places, : ids.shape[1]]
        classes = torch.stack([sinks, ~sinks], -1).double()  # [batch, length, 2]
        tokens[places] = classes.sum(1).numpy()

        def lost(
            x: Tensor, site: Site, places: list[int] = places, classes: Tensor = classes
        ) -> list[tuple[Tensor, Tensor]]:
            energy = x.double().square().sum(-1).cpu().clamp_min(torch.finfo(torch.float64).tiny)
            found: list[tuple[Tensor, Tensor]] = []
            for cell in cells.values():
                rounded = cell[site].for_windows(places, len(windows))(x)
                each = (rounded.double() - x.double()).square().sum(-1).cpu()
                own, share = (torch.einsum("bt,btc->bc", v, classes) for v in (each, each / energy))
                found.append((own, share))
            return found

        found = trace(
            model,
            ids if model.causal else masked_ids(model, ids),
            {},
            {site: partial(lost, site=site) for site in sites},
            readout=lambda final, read, weights: read,
        )
        for index, site in enumerate(sites):
            for place, (own, share) in enumerate(found[site]):
                squared[place, index, places], relative[place, index, places] = own, share
    return _Errors(relative, squared, tokens)


def _documents(
    cells: Cells, tables: Sequence[pd.DataFrame], errors: _Errors, windows: Windows
) -> pd.DataFrame:
    """Return error and NLL by document."""
    owners = np.asarray(windows.document)
    parts: list[pd.DataFrame] = []
    for cell, relative, table in zip(cells, errors.relative, tables, strict=False):
        own = [owners == document for document in table["document"]]
        error = [float(relative[:, of].sum() / errors.tokens[of].sum()) / len(relative) for of in own]
        part = table[["document", "nll", "delta_nll"]].assign(error=error, what="activations")
        parts.append(part.assign(**cell._asdict()))
    return pd.concat(parts, ignore_index=True)[COLUMNS]


def _places(cells: Cells, errors: _Errors, sites: Sequence[Site]) -> pd.DataFrame:
    """Return where the error lies, by site and class of token."""
    rows: list[dict[str, Any]] = []
    count = errors.tokens.sum(0)
    for cell, squared, relative in zip(cells, errors.squared.sum(2), errors.relative.sum(2), strict=True):
        for site, lost, own in zip(sites, squared, relative, strict=True):
            for place, name in enumerate(("sinks", "others")):
                row = cell._asdict() | {"site": str(site), "tokens": name}
                row["error"] = float(own[place] / count[place]) if count[place] else float("nan")
                rows.append(row | {"share": float(lost[place] / lost.sum()) if lost.any() else 0.0})
    return pd.DataFrame(rows)


def _alone(places: Sequence[tuple[FakeQuantiser, Site]], tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Return the cost of single sites."""
    rows = [
        {"bits": each.bits, "per": each.per, "site": str(site)}
        | Estimate.of(table["delta_nll"]).columns("delta_nll")
        for (each, site), table in zip(places, tables, strict=True)
    ]
    return pd.DataFrame(rows)


def _unembedding(
    head: Unembeddings, cells: dict[QuantisedCell, FakeQuantiser], spectra: Sequence[Spectrum]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the cost of quantised weights by document, and what they do to bands."""
    before, documents = head.nll(), sorted(set(head.windows.document))
    costs: list[pd.DataFrame] = []
    turned: list[pd.DataFrame] = []
    for cell, quantiser in cells.items():
        weight, error = head.quantised(quantiser)
        nll = head.nll(weight)
        part = pd.DataFrame({"document": documents, "nll": nll, "delta_nll": nll - before})
        costs.append(part.assign(error=error, what="unembedding", **cell._asdict())[COLUMNS])
        turned.append(head.angles(weight, spectra).assign(**cell._asdict()))
    return pd.concat(costs, ignore_index=True), pd.concat(turned, ignore_index=True)
