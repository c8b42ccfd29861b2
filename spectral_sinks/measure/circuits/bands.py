"""The link between a head's circuit and the dark tail: what the head reads and writes, by band."""

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import stats
from torch import Tensor

from spectral_sinks.interventions.sites import Site
from spectral_sinks.interventions.tracing import trace
from spectral_sinks.measure.attention.by_position import Inputs
from spectral_sinks.measure.attention.capture import at_sink
from spectral_sinks.measure.circuits.heads import Found
from spectral_sinks.measure.circuits.qk_detectors import Detectors
from spectral_sinks.measure.memory import batches
from spectral_sinks.models.attention_capture import AttentionCall
from spectral_sinks.models.base import Transformer
from spectral_sinks.models.rotary import key_gain
from spectral_sinks.models.weights import attention_weights, head_weights
from spectral_sinks.spectra.spectrum import Spectrum


class SinkValues:
    """An observer that records in which bands the sink's value writes, by window."""

    def __init__(self, model: Transformer, spectrum: Spectrum, sinks: Int[Tensor, "windows"]) -> None:
        self.model, self.spectrum, self.sinks = model, spectrum, sinks
        self.found: Found = []

    def __call__(self, call: AttentionCall, places: list[int]) -> None:
        # W_O of each head, with the gain of a norm after it
        writes = [w.folded() for w in head_weights(self.model, call.layer)]
        value = at_sink(call.value, self.sinks[places]).repeat_interleave(call.groups, dim=1)
        written = torch.einsum("bhs,hsd->bhd", value.double(), torch.stack(writes).to(value.device).double())
        self.found.append((places, call.layer, self.spectrum.shares(written).cpu()))


def key_directions(model: Transformer, found: Detectors) -> Float[Tensor, "layers heads d"]:
    """Return the direction of the residual that each head's leading mode reads at the sink, float64."""
    # The key side of a mode, taken back through the positions, the gain of the key norm, and W_K
    directions: list[Tensor] = []
    for layer, modes in enumerate(found.modes):
        reads = [w.folded().double().cpu() for w in attention_weights(model, layer) if w.part == "k"]
        groups = model.heads // len(reads)
        side = torch.einsum("st,ht->hs", found.turns[layer], modes.key[..., 0])
        gain = key_gain(model, layer).double()
        side = side * gain.repeat_interleave(model.heads // len(gain), dim=0)
        directions.append(
            torch.einsum("hs,hsd->hd", side, torch.stack(reads).repeat_interleave(groups, dim=0))
        )
    return torch.stack(directions)


def readings(
    model: Transformer,
    windows: Inputs,
    spectrum: Spectrum,
    directions: Float[Tensor, "layers heads d"],
    sinks: Int[Tensor, "windows"],
    batch_size: int | None,
) -> tuple[Found, Found]:
    """Split what each head's leading mode reads at the sink by band, and likewise the energy of the residual.

    Args:
        model: a language model or an image encoder.
        windows: windows of text, or images.
        spectrum: the spectrum whose bands are used.
        directions: the direction of the residual that each head reads.
        sinks: the sink's position in each window.
        batch_size: windows in a pass.

    Returns:
        The share of each band in `x_s . direction`, where x_s is the residual at the sink that the layer
        reads, and the share of each band in the energy of x_s.

    """
    sites = [Site("embedding"), *(Site("exit", layer) for layer in range(model.layers - 1))]
    basis = spectrum.vectors.double()
    sizes = np.diff(spectrum.edges).tolist()
    read: Found = []
    energy: Found = []
    for places, ids in batches(model, windows, batch_size):
        at = sinks[places]

        def readout(
            final: Tensor, read: dict[Site, Tensor], weights: list[Tensor], at: Tensor = at
        ) -> list[Tensor]:
            return [at_sink(read[site][:, None], at)[:, 0].double().cpu() for site in sites]

        residuals = trace(model, ids.to(model.device), {}, sites, readout=readout)
        for layer, x in enumerate(residuals):
            products = (x @ basis)[:, None] * (directions[layer] @ basis)
            # Sum the products over the directions of each band, [batch, heads, bands]
            parts = torch.stack([part.sum(-1) for part in products.split(sizes, dim=-1)], dim=-1)
            read.append((places, layer, parts / parts.sum(-1, keepdim=True)))
            energy.append((places, layer, spectrum.shares(x)[:, None]))
    return read, energy


def random_shares(spectrum: Spectrum) -> list[tuple[float, float, float]]:
    """Return the share of each band in a random direction: the mean r/d, and the interval of 95 % of draws.

    The shares follow a beta distribution.
    """
    ranks = np.diff(spectrum.edges)
    law = [stats.beta(r / 2, (spectrum.d - r) / 2) for r in ranks]
    return [(float(b.mean()), float(b.ppf(0.025)), float(b.ppf(0.975))) for b in law]
