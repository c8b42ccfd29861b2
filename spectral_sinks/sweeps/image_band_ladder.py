"""The ladder on images: the output of an encoder against bands kept or removed, and random subspaces."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from spectral_sinks.data.pixels import Pixels
from spectral_sinks.errors import renamed_argument
from spectral_sinks.interventions.sites import Site
from spectral_sinks.interventions.tracing import trace
from spectral_sinks.measure.memory import batches
from spectral_sinks.measure.vision.image_effects import evaluate_images
from spectral_sinks.models.vision import VisionModel
from spectral_sinks.spectra.controls import energy_matched
from spectral_sinks.spectra.filters import Filter, phi, remove, rnd
from spectral_sinks.spectra.spectrum import Spectrum
from spectral_sinks.spectra.subspace import Subspace
from spectral_sinks.stats import null_rank

QUANTITIES = (
    *("kl", "accuracy", "probe_accuracy", "cls_cosine", "registers_cosine", "patches_cosine"),
    *("cls_nearest", "patches_nearest"),
)
"""The columns of `evaluate_images` that a ladder reports, if they are measured."""


@renamed_argument("given", "pixels")
def image_ladder(
    model: VisionModel,
    pixels: Pixels,
    site: Site,
    spectrum: Spectrum,
    *,
    labels: Sequence[int] | Int[Tensor, "images"] | None = None,
    probe: Literal["cls", "patches"] | None = None,
    draws: int = 20,
    batch_size: int | None = None,
) -> pd.DataFrame:
    """Evaluate an image encoder with bands 1 to k kept, with each band removed, and without the tail.

    The filters are "keep" and "remove" with their `band`; "dark", which removes the last band; and, if the
    matrix has a null space, "read" and "unread", which remove all directions that the matrix reads, and all
    that it does not read.

    Args:
        model: an image encoder.
        pixels: the images.
        site: the site at which all filters act.
        spectrum: the spectrum whose bands are kept or removed.
        labels: the labels, as `evaluate_images` takes them.
        probe: the features of the linear probe, as `evaluate_images` takes them.
        draws: number of random subspaces of the same rank, and of the same energy at the site, with which
            "dark", "read" and "unread" are compared.
        batch_size: images in a pass.

    Returns:
        One row per `filter` and `quantity`. `rank` and `removed_energy_share` describe the removed part;
        `mean`, `low` and `high` are the quantity with its 95 % interval over `n` images. `rank_mean`,
        `rank_least` and `rank_most` are over the draws of equal rank, and `rank_as_bad` is the number of
        draws that do at least as much harm. The columns `energy_...` are the same for equal energy. They are
        NaN for other filters.

    Raises:
        InputError: if no random subspace removes that energy.

    Source: Cancedda 2024, section 4.

    """
    # the filters, and random subspaces of the rank and of the energy of each tail
    named = tails(spectrum)
    cells: dict[tuple[str, int], dict[Site, Filter]] = {}
    for band in range(1, spectrum.count + 1):
        cells["keep", band] = {site: phi(spectrum, 1, band)}
        cells["remove", band] = {site: remove(spectrum.band(band))}
    cells |= {(name, 0): {site: remove(part)} for name, part in named.items()}
    seen = residuals(model, pixels, site, batch_size)
    for name, part in named.items():
        for seed in range(draws):
            cells[f"{name} rank", seed] = {site: rnd(model.d, part.rank, seed)}
            cells[f"{name} energy", seed] = {site: remove(energy_matched(part, seen, seed))}
    keyed = {f"{name}|{place}": edits for (name, place), edits in cells.items()}
    effects = evaluate_images(model, pixels, keyed, labels=labels, probe=probe, batch_size=batch_size)
    # one table per filter, with the controls as further columns
    rows: list[pd.DataFrame] = []
    for name, band in cells:
        if name not in ("keep", "remove", *named):
            continue
        effect = effects[f"{name}|{band}"]
        table = effect.summary([each for each in QUANTITIES if each in effect.table]).drop(
            columns=["name", "site"]
        )
        energy = float(effect.table["removed_energy_share"].mean())
        table = table.assign(filter=name, band=band or np.nan, removed_energy_share=energy)
        for control in ("rank", "energy") if name in named else ():
            drawn = [effects[f"{name} {control}|{seed}"].table for seed in range(draws)]
            table = table.join(table.apply(_beside, axis=1, drawn=drawn).add_prefix(f"{control}_"))
        rows.append(table)
    table = pd.concat(rows, ignore_index=True)
    table.insert(0, "layer", site.layer)
    table.insert(0, "site", site.kind)
    first = ["site", "layer", "filter", "band", "rank", "removed_energy_share", "quantity"]
    return table[first + [name for name in table.columns if name not in first]]


def residuals(
    model: VisionModel, pixels: Pixels, site: Site, batch_size: int | None
) -> Float[Tensor, "tokens d"]:
    """Return the residuals of all tokens of some images at a site."""
    parts = [
        trace(
            model,
            batch.to(model.device),
            {},
            [site],
            readout=lambda _, read, __: read[site].cpu(),
            last=site.layer,
        )
        for _, batch in batches(model, pixels, batch_size)
    ]
    return torch.cat(parts).flatten(0, 1)


def tails(spectrum: Spectrum) -> dict[str, Subspace]:
    """Return the last band as "dark", and, if the matrix has a null space, "read" and "unread"."""
    if spectrum.rank == spectrum.d:
        return {"dark": spectrum.dark()}
    read = spectrum.directions(0, spectrum.rank, "read")
    return {"dark": spectrum.dark(), "read": read, "unread": spectrum.null()}


def _beside(row: pd.Series, drawn: list[pd.DataFrame]) -> pd.Series:
    """Return the same quantity under random subspaces."""
    means = [float(rows[row["quantity"]].mean()) for rows in drawn]
    sign = 1 if row["quantity"] == "kl" else -1  # only KL grows with damage
    worse = null_rank(sign * row["mean"], [sign * mean for mean in means])
    return pd.Series({"mean": np.mean(means), "least": min(means), "most": max(means), "as_bad": worse})
