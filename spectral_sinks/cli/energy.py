"""The command `energy`: the share of each band in the residual stream."""

from __future__ import annotations

from dataclasses import dataclass

import spectral_sinks as ss
from spectral_sinks.cli.options import Running, ran
from spectral_sinks.cli.output import show, table


@dataclass(frozen=True)
class Energy(Running):
    """Measure the share of each band in the residuals of BOS and of other tokens, by layer."""


def run_energy(options: Energy) -> None:
    model, windows, spectrum = options.prepare()
    shares = ss.energy(model, windows, spectrum, batch_size=options.batch_size)
    mean = shares.groupby(["site", "layer", "position_class", "band"], sort=False, as_index=False)[
        ["share", "norm"]
    ].mean()
    found = {
        "model": model.name,
        "convention": spectrum.convention,
        "documents": windows.record["documents"],
        "first_token_ids": windows.first_token_ids,
        "rows": mean.to_dict("records"),
        **ran(model),
    }
    rows: list[tuple[str, ...]] = []
    for (site, layer, kind), part in mean.groupby(["site", "layer", "position_class"], sort=False):
        by_band = part["share"].to_numpy()
        cells = (by_band[0], by_band[1:-1].sum(), by_band[-1])
        label = "embedding" if site == "embedding" else f"exit {layer}"
        rows.append((label, str(kind), f"{part['norm'].mean():.4g}", *(f"{c:.4f}" for c in cells)))
    columns = ("site", "tokens", "median norm", "band 1", "other bands", f"band {spectrum.count} (dark)")
    show(options.json, found, table(f"Energy share by band, {model.name}", columns, rows))
