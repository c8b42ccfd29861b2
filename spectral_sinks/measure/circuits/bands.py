"""The link between a head's circuit and the dark tail: what the head reads and writes, by band."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import stats
from torch import Tensor

from spectral_sinks.interventions.sites import Site
from spectral_sinks.interventions.tracing import deepest, trace
from spectral_sinks.measure.attention.by_position import Inputs
from spectral_sinks.measure.attention.capture import at_sink, readers
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
        at = self.sinks[places]
        writes = [w.folded() for w in head_weights(self.model, call.layer)]
        value = at_sink(call.value, at).repeat_interleave(call.groups, dim=1).double()
        write = torch.stack(writes).to(value.device).double()
        if call.gate is None:
            shares = self.spectrum.shares(torch.einsum("bhs,hsd->bhd", value, write))
        else:
            # The energy that the value writes to each query that may see the sink, through the query's gate
            able = readers(call, slice(None), at).double()
            energy = value.new_zeros(*value.shape[:2], self.spectrum.count)
            for gate, seen in zip(call.gate.double().unbind(2), able.unbind(2), strict=True):
                written = torch.einsum("bhs,hsd->bhd", gate * value, write)
                whole = (written.square().sum(-1) * seen)[..., None]
                energy += (self.spectrum.shares(written) * whole).nan_to_num(0.0)
            shares = energy / energy.sum(-1, keepdim=True)
        self.found.append((places, call.layer, shares.cpu()))


def key_directions(model: Transformer, found: Detectors) -> Float[Tensor, "layers heads d"]:
    """Return the direction of the residual that each head's leading mode reads at the sink, float64.

    It is NaN in a layer without softmax attention.
    """
    # The key side of a mode, taken back through the positions, the gain of the key norm, and W_K
    directions = torch.full((model.layers, model.heads, model.d), torch.nan, dtype=torch.float64)
    for layer in model.attention_layers:
        modes = found.modes[layer]
        reads = [w.folded().double().cpu() for w in attention_weights(model, layer) if w.part == "k"]
        groups = model.heads // len(reads)
        side = torch.einsum("st,ht->hs", found.turns[layer], modes.key[..., 0])
        gain = key_gain(model, layer).double()
        side = side * gain.repeat_interleave(model.heads // len(gain), dim=0)
        read = torch.stack(reads).repeat_interleave(groups, dim=0)
        directions[layer] = torch.einsum("hs,hsd->hd", side, read)
    return directions


def readings(
    model: Transformer,
    windows: Inputs,
    spectrum: Spectrum,
    directions: Sequence[Float[Tensor, "layers heads d"]],
    sinks: Sequence[Int[Tensor, "windows"]],
    batch_size: int | None,
) -> list[tuple[Found, Found]]:
    """Split what each head's leading mode reads at a sink by band, and likewise the energy of the residual.

    Several sinks share one pass.

    Args:
        model: a language model or an image encoder.
        windows: windows of text, or images.
        spectrum: the spectrum whose bands are used.
        directions: for each sink, the direction of the residual that each head reads.
        sinks: for each sink, its position in each window.
        batch_size: windows in a pass.

    Returns:
        For each sink, the share of each band in `x_s . direction`, where x_s is the residual at the sink that
        the layer reads, and the share of each band in the energy of x_s.

    """
    sites = [Site("embedding"), *(Site("exit", layer) for layer in range(model.layers - 1))]
    basis = spectrum.vectors.double()
    sizes = np.diff(spectrum.edges).tolist()
    found: list[tuple[Found, Found]] = [([], []) for _ in sinks]
    for places, ids in batches(model, windows, batch_size):
        at = [each[places] for each in sinks]

        def at_sinks(x: Tensor, at: list[Tensor] = at) -> list[Tensor]:
            return [at_sink(x[:, None], each)[:, 0].double().cpu() for each in at]

        residuals = trace(
            model,
            ids.to(model.device),
            {},
            dict.fromkeys(sites, at_sinks),
            readout=lambda final, read, weights: read,
            last=deepest(sites),
        )
        for index, ((read, energy), direction) in enumerate(zip(found, directions, strict=True)):
            for layer in model.attention_layers:
                x = residuals[sites[layer]][index]
                products = (x @ basis)[:, None] * (direction[layer] @ basis)
                # Sum the products over the directions of each band, [batch, heads, bands]
                parts = torch.stack([part.sum(-1) for part in products.split(sizes, dim=-1)], dim=-1)
                read.append((places, layer, parts / parts.sum(-1, keepdim=True)))
                energy.append((places, layer, spectrum.shares(x)[:, None]))
    return found


def random_shares(spectrum: Spectrum) -> list[tuple[float, float, float]]:
    """Return the share of each band in a random direction: the mean r/d, and the interval of 95 % of draws.

    The shares follow a beta distribution.
    """
    ranks = np.diff(spectrum.edges)
    law = [stats.beta(r / 2, (spectrum.d - r) / 2) for r in ranks]
    return [(float(b.mean()), float(b.ppf(0.025)), float(b.ppf(0.975))) for b in law]
