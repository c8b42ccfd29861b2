"""Where the residual stream keeps its energy: norm and band shares of the first token and the rest."""

from collections.abc import Sequence

import pandas as pd
import torch
from torch import Tensor

from spectral_sinks.errors import InputError
from spectral_sinks.interventions.sites import Site
from spectral_sinks.interventions.tracing import trace
from spectral_sinks.models.language import LanguageModel
from spectral_sinks.spectra.spectrum import Spectrum
from spectral_sinks.texts import Windows


def residual_sites(model: LanguageModel) -> list[Site]:
    """The residual stream at the embedding and at every exit."""
    return [Site("embedding"), *(Site("exit", layer) for layer in range(model.layers))]


def energy(
    model: LanguageModel,
    windows: Windows,
    spectrum: Spectrum,
    sites: Sequence[Site] | None = None,
    *,
    batch_size: int = 16,
) -> pd.DataFrame:
    """Share of each band in the residuals at some sites, by document and class of token.

    Columns: `document`; `site` (its kind) and `layer` (-1 for the embedding); `position_class`, "bos" (or
    "first" where windows do not open with BOS) and "other"; `band`, from 1; `share` of energy, mean over
    tokens; `norm`, the median norm of the class. A random direction has share r/d in r of d directions.
    Raises InputError for a spectrum of another width. (Cancedda 2024, section 5)
    """
    if spectrum.d != model.d:
        raise InputError(f"a spectrum of width {spectrum.d} for {model.name} of width {model.d}")
    sites = residual_sites(model) if sites is None else list(sites)
    first = "bos" if windows.opens_with_bos else "first"
    rows: list[dict[str, object]] = []
    for places, ids in windows.batches(batch_size):

        def readout(
            final: Tensor, read: dict[Site, Tensor], weights: list[Tensor]
        ) -> dict[Site, tuple[Tensor, Tensor]]:
            return {s: (_shares(spectrum, x).cpu(), _norms(x).cpu()) for s, x in read.items()}

        reduced = trace(model, ids.to(model.device), {}, sites, readout=readout)
        for site, (shares, norms) in reduced.items():
            for row, place in enumerate(places):
                for which, name in enumerate((first, "other")):
                    for band, share in enumerate(shares[row, which].tolist(), start=1):
                        rows.append(
                            {
                                "document": windows.document[place],
                                "site": site.kind,
                                "layer": -1 if site.kind == "embedding" else site.layer,
                                "position_class": name,
                                "band": band,
                                "share": share,
                                "norm": float(norms[row, which]),
                            }
                        )
    keys = ["document", "site", "layer", "position_class", "band"]
    return pd.DataFrame(rows).groupby(keys, sort=False, as_index=False).mean()


def _shares(spectrum: Spectrum, x: Tensor) -> Tensor:
    """`batch x 2 x bands`: the first token's shares, and the mean of the others'."""
    shares = spectrum.shares(x)
    return torch.stack([shares[:, 0], shares[:, 1:].mean(1)], dim=1)


def _norms(x: Tensor) -> Tensor:
    """`batch x 2`: the first token's norm, and the median of the others'."""
    norms = x.float().norm(dim=-1)
    return torch.stack([norms[:, 0], norms[:, 1:].median(dim=1).values], dim=1)
