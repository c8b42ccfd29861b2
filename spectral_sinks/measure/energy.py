"""Where the residual stream keeps its energy: norm and band shares of the first token and the rest."""

from collections.abc import Sequence

import pandas as pd
import torch
from torch import Tensor

from spectral_sinks.errors import InputError
from spectral_sinks.interventions.sites import Site
from spectral_sinks.interventions.tracing import trace
from spectral_sinks.models.language import LanguageModel
from spectral_sinks.models.stream import Stream
from spectral_sinks.spectra.spectrum import Spectrum
from spectral_sinks.texts import Windows


def residual_sites(model: Stream) -> list[Site]:
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
    "first" where windows do not open with BOS), "other", and "sep" where an encoder's windows end with it;
    `band`, from 1; `share` of energy, mean over tokens; `norm`, the median norm of the class. A random
    direction has share r/d in r of d directions. Raises InputError for a spectrum of another width.
    (Cancedda 2024, section 5)
    """
    if spectrum.d != model.d:
        raise InputError(f"a spectrum of width {spectrum.d} for {model.name} of width {model.d}")
    sites = residual_sites(model) if sites is None else list(sites)
    last = -1 if windows.record.get("closes_with_sep") else None
    classes = {"bos" if windows.opens_with_bos else "first": slice(0, 1), "other": slice(1, last)}
    if last is not None:
        classes["sep"] = slice(last, None)
    rows: list[dict[str, object]] = []
    for places, ids in windows.batches(batch_size):

        def readout(
            final: Tensor, read: dict[Site, Tensor], weights: list[Tensor]
        ) -> dict[Site, tuple[Tensor, Tensor]]:
            spans = list(classes.values())
            return {s: (_shares(spectrum, x, spans).cpu(), _norms(x, spans).cpu()) for s, x in read.items()}

        reduced = trace(model, ids.to(model.device), {}, sites, readout=readout)
        for site, (shares, norms) in reduced.items():
            for row, place in enumerate(places):
                for which, name in enumerate(classes):
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


def _shares(spectrum: Spectrum, x: Tensor, spans: list[slice]) -> Tensor:
    """`batch x classes x bands`: the mean shares of each class of tokens."""
    shares = spectrum.shares(x)
    return torch.stack([shares[:, span].mean(1) for span in spans], dim=1)


def _norms(x: Tensor, spans: list[slice]) -> Tensor:
    """`batch x classes`: the median norm of each class of tokens."""
    norms = x.float().norm(dim=-1)
    return torch.stack([norms[:, span].median(dim=1).values for span in spans], dim=1)
