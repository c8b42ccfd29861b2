"""The energy of the residual stream: norm and band shares by class of token."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import pandas as pd
import torch
from jaxtyping import Bool
from torch import Tensor

from spectral_sinks.data.pixels import Pixels
from spectral_sinks.data.texts import Windows
from spectral_sinks.errors import InputError
from spectral_sinks.interventions.sites import Site
from spectral_sinks.interventions.tracing import deepest, trace
from spectral_sinks.measure.memory import batches
from spectral_sinks.measure.residual.matrix_spectrum import by_convention
from spectral_sinks.models.base import Transformer
from spectral_sinks.spectra.spectrum import Spectrum


def residual_sites(model: Transformer) -> list[Site]:
    """Return the sites of the residual stream: the embedding and every exit."""
    return [Site("embedding"), *(Site("exit", layer) for layer in range(model.layers))]


def energy(
    model: Transformer,
    windows: Windows | Pixels,
    spectrum: Spectrum | Sequence[Spectrum],
    sites: Sequence[Site] | None = None,
    *,
    marked: Bool[Tensor, "images tokens"] | None = None,
    batch_size: int | None = None,
) -> pd.DataFrame:
    """Measure the share of each band in the residuals at some sites, by document and class of token.

    The classes of text are "bos" (or "first" where windows do not open with BOS), "other", and "sep" where an
    encoder's windows end with [SEP]. The classes of images are "cls", "distillation", "registers" and
    "patches", as far as there are such tokens.

    Args:
        model: a language model or an image encoder.
        windows: windows of text, or images.
        spectrum: the spectrum whose bands are used, or several conventions of one matrix, as from
            `read_spectra`.
        sites: the sites; by default the embedding and all exits.
        marked: tokens of images, such as outlier tokens, that form the class "marked" and leave their own
            class.
        batch_size: windows in a pass.

    Returns:
        One row per `document`, `site` (its kind), `layer` (-1 for the embedding), `position_class`, `band`
        (from 1) and `convention` of the spectrum. `share` is the share of energy, mean over tokens; `norm` is
        the median norm of the class in a window, mean over the document's windows. A random direction has
        share r/d in r of d directions.

    Raises:
        InputError: for a spectrum of another width, for several spectra that differ in more than their
            convention, and for marks that do not fit the images.

    Source: Cancedda 2024, section 5.

    """
    spectra = by_convention(model, spectrum)
    sites = residual_sites(model) if sites is None else list(sites)
    expected = (len(windows), windows.length)
    if marked is not None and (not isinstance(windows, Pixels) or tuple(marked.shape) != expected):
        raise InputError(f"marks of shape {tuple(marked.shape)}: expected those of images, {expected}")
    # A server receives each basis in a job of its own, since two may be more than it accepts
    jobs = [spectra] if model.remote is None else [{name: each} for name, each in spectra.items()]
    rows: list[dict[str, object]] = []
    for places, ids in batches(model, windows, batch_size):
        # Classes as masks `[batch, tokens]`; marked tokens leave their own class
        classes = _of_images(windows, ids) if isinstance(windows, Pixels) else _of_text(windows, ids)
        if marked is not None:
            here = marked[places]
            classes = {name: mask & ~here for name, mask in classes.items()} | {"marked": here}

        reduced: Reduced = {}
        for part in jobs:
            reads = dict.fromkeys(sites, _reduce(part, classes))
            by_site = trace(
                model,
                ids.to(model.device),
                {},
                reads,
                readout=lambda final, read, weights: read,
                last=deepest(sites),
            )
            reduced |= {name: {site: found[name] for site, found in by_site.items()} for name in part}
        rows += _rows(windows, places, classes, reduced)
    keys = ["document", "site", "layer", "position_class", "band", "convention"]
    return pd.DataFrame(rows).groupby(keys, sort=False, as_index=False).mean()


Reduced = dict[str, dict[Site, tuple[Tensor, Tensor]]]
"""By convention and site: the shares of the classes `[batch, classes, bands]`, and their median norms."""


def _reduce(
    spectra: Mapping[str, Spectrum], classes: dict[str, Tensor]
) -> Callable[[Tensor], dict[str, tuple[Tensor, Tensor]]]:
    """Return a function that reduces a residual to the shares and the norms of each class of tokens."""
    masks = list(classes.values())

    def reduce(x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        norms = _norms(x, masks).cpu()
        return {name: (_shares(spectrum, x, masks).cpu(), norms) for name, spectrum in spectra.items()}

    return reduce


def _rows(
    windows: Windows | Pixels, places: Sequence[int], classes: dict[str, Tensor], reduced: Reduced
) -> Iterator[dict[str, object]]:
    """Give one row per band, for the classes that each window contains."""
    parts = [(name, site, *found) for name, by_site in reduced.items() for site, found in by_site.items()]
    for convention, site, shares, norms in parts:
        for row, place in enumerate(places):
            for which, (name, mask) in enumerate(classes.items()):
                if not mask[row].any():
                    continue
                for band, share in enumerate(shares[row, which].tolist(), start=1):
                    yield {
                        "document": windows.document[place],
                        "site": site.kind,
                        "layer": -1 if site.kind == "embedding" else site.layer,
                        "position_class": name,
                        "band": band,
                        "convention": convention,
                        "share": share,
                        "norm": float(norms[row, which]),
                    }


def _of_text(windows: Windows, ids: Tensor) -> dict[str, Tensor]:
    """Return the classes of the tokens of a batch of windows, as masks `[batch, tokens]`."""
    place = torch.arange(ids.shape[1]).expand(ids.shape)
    last = len(place[0]) - 1 if windows.record.get("closes_with_sep") else len(place[0])
    classes = {
        "bos" if windows.opens_with_bos else "first": place == 0,
        "other": (place > 0) & (place < last),
    }
    return classes | ({"sep": place == last} if last < len(place[0]) else {})


def _of_images(pixels: Pixels, batch: Tensor) -> dict[str, Tensor]:
    """Return the classes of the tokens of a batch of images, as masks `[batch, tokens]`."""
    kinds = pixels.tokens(batch)
    classes: dict[str, Tensor] = {}
    for place, name in enumerate((*pixels.model.prefix, "patches")):
        name = "registers" if place in pixels.model.registers else name
        classes[name] = classes.get(name, torch.zeros_like(kinds, dtype=torch.bool)) | (kinds == place)
    return classes


def _shares(spectrum: Spectrum, x: Tensor, masks: list[Tensor]) -> Tensor:
    """Return the mean shares of each class of tokens, `[batch, classes, bands]`."""
    shares = spectrum.shares(x)
    weights = torch.stack(masks, 1).to(shares.device, shares.dtype)
    return weights @ shares / weights.sum(-1, keepdim=True)


def _norms(x: Tensor, masks: list[Tensor]) -> Tensor:
    """Return the median norm of each class of tokens, `[batch, classes]`."""
    norms = x.float().norm(dim=-1)
    absent = torch.full_like(norms, torch.nan)
    return torch.stack([torch.where(m.to(x.device), norms, absent).nanquantile(0.5, -1) for m in masks], 1)
