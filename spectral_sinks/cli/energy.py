"""The command `energy`: the share of each band in the residual stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Group
from rich.text import Text

import spectral_sinks as ss
from spectral_sinks.cli.options import Running, ran, why
from spectral_sinks.cli.output import show, table
from spectral_sinks.spectra.conventions import suffixes

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Energy(Running):
    """Measure the share of each band in the residuals of BOS and of other tokens, by layer."""


def run_energy(options: Energy) -> None:
    model, windows, spectra = options.prepare(beside=True)
    deciding, first = spectra[0].convention, "bos" if windows.opens_with_bos else "first"
    shares = ss.energy(model, windows, spectra, batch_size=options.batch_size)
    keys = ["site", "layer", "position_class"]
    mean = shares.groupby([*keys, "band", "convention"], sort=False, as_index=False)[["share", "norm"]].mean()
    by = {name: part.drop(columns="convention") for name, part in mean.groupby("convention", sort=False)}
    found = {
        "model": model.name,
        "matrix": spectra[0].matrix,
        "convention": deciding,
        "conventions": [spectrum.convention for spectrum in spectra],
        "documents": windows.record["documents"],
        "first_token_ids": windows.first_token_ids,
        **{f"rows{end}": by[name].to_dict("records") for name, end in suffixes(by).items()},
        **ran(model),
    }
    # the share of the last band, with a column for each convention
    last = mean[mean["band"] == spectra[0].count].set_index([*keys, "convention"])["share"]
    dark = last.unstack("convention")[list(by)]
    rows: list[tuple[str, ...]] = []
    for place, part in by[deciding].groupby(keys, sort=False):
        site, layer, kind = place
        by_band = part["share"].to_numpy()
        cells = (by_band[0], by_band[1:-1].sum(), *dark.loc[place])
        label = "embedding" if site == "embedding" else f"exit {layer}"
        rows.append((label, str(kind), f"{part['norm'].mean():.4g}", *(f"{c:.4f}" for c in cells)))
    bands = ("band 1", "other bands", *(f"band {spectra[0].count} (dark), {name}" for name in by))
    title = f"Energy share by band of the {deciding} {spectra[0].matrix}, {model.name}"
    made = table(title, ("site", "tokens", "mean of median norms", *bands), rows)
    show(options.json, found, Group(made, *_disagreement(dark.xs(first, level="position_class"), spectra)))


def _disagreement(dark: pd.DataFrame, spectra: list[ss.Spectrum]) -> list[Text]:
    """Return a sentence on the sites where conventions put the first token on two sides of chance."""
    chance = spectra[0].dark().rank / spectra[0].d
    above = (dark > chance).to_numpy()
    sites = int((above.any(1) & ~above.all(1)).sum())
    if not sites:
        return []
    return [
        Text(
            f"At {sites} of {len(dark)} sites the share of the first token in the dark band is above chance "
            f"({chance:.3f}) under one convention and below it under another {why(dark.columns)}."
        )
    ]
