"""Attribution patching by band: the cost of removing each band at each exit, to first order."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from spectral_sinks.data.texts import Windows
from spectral_sinks.errors import InputError
from spectral_sinks.interventions.sites import Site
from spectral_sinks.interventions.tracing import trace
from spectral_sinks.measure.memory import batches
from spectral_sinks.measure.nll.scoring import chunk, predicted, predictions
from spectral_sinks.models.language import LanguageModel
from spectral_sinks.models.masked_lm import masked_ids
from spectral_sinks.spectra.spectrum import Spectrum
from spectral_sinks.stats import document_means


def first_order(
    model: LanguageModel,
    windows: Windows,
    spectrum: Spectrum,
    layers: Sequence[int] | None = None,
    *,
    batch_size: int | None = None,
) -> pd.DataFrame:
    """Estimate the change of NLL for each band and exit, to first order around the untouched model.

    The estimate is `-sum_t g_t P_b x_t`, with x the residual at the exit and g the gradient of the mean NLL
    there. One forward and one backward pass per batch serve all layers and bands. The estimate for a filter
    that removes several bands is the sum over the bands. It is exact for a vanishing part of a band. Removing
    a whole band is far from that limit: use the estimate to rank candidates, and measure the selected ones
    with `evaluate_all`.

    Args:
        model: a language model whose weights are in this process.
        windows: the text.
        spectrum: the spectrum whose bands are removed.
        layers: the exits; all layers by default.
        batch_size: windows in a pass; None finds it by memory.

    Returns:
        One row per `layer` and `band` with its `estimate`, nats per token, mean over documents.

    Raises:
        InputError: for a spectrum of another width and layers that the model does not have.

    Source: attribution patching, Nanda (2023) and Syed et al. (2023).

    """
    if spectrum.d != model.d:
        raise InputError(f"a spectrum of width {spectrum.d} for a model of width {model.d}")
    exits = [Site("exit", layer) for layer in (range(model.layers) if layers is None else layers)]
    entry = Site("embedding")
    vectors = spectrum.vectors.to(model.device, torch.promote_types(model.dtype, torch.float32))
    sizes = np.diff(spectrum.edges).tolist()
    estimates = np.zeros((len(windows), len(exits), spectrum.count))
    tokens = np.zeros(len(windows))
    for indices, ids in batches(model, windows, batch_size):
        ids = ids.to(model.device)

        def readout(final: Tensor, read: dict[Site, Tensor], _: list[Tensor], ids: Tensor = ids) -> Tensor:
            states = [read[site] for site in exits]
            gradients = torch.autograd.grad(final, states, _gradient(model, final, ids))
            with torch.no_grad():
                return torch.stack([_by_band(g, x) for g, x in zip(gradients, states, strict=True)], 1)

        def _by_band(g: Tensor, x: Tensor) -> Tensor:
            products = (g.to(vectors.dtype) @ vectors) * (x.to(vectors.dtype) @ vectors)
            return torch.stack([-part.sum((1, 2)) for part in products.split(sizes, dim=-1)], -1).cpu()

        products = trace(
            model,
            ids if model.causal else masked_ids(model, ids),
            {entry: lambda x: x.detach().requires_grad_()},  # whether or not the weights want gradients
            exits,
            readout=readout,
            gradients=True,
        )
        estimates[indices] = products.double().numpy()
        tokens[indices] = predicted(model, ids.shape[1])
    mean = document_means(estimates, windows.document, tokens)[1].mean(0)  # [layers, bands]
    return pd.DataFrame(
        [
            {"layer": site.layer, "band": band + 1, "estimate": mean[index, band]}
            for index, site in enumerate(exits)
            for band in range(spectrum.count)
        ]
    )


def _gradient(
    model: LanguageModel, final: Float[Tensor, "batch tokens d"], ids: Int[Tensor, "batch tokens"]
) -> Float[Tensor, "batch tokens d"]:
    """Gradient of each window's mean NLL by the output of the final norm, one chunk of logits at a time."""
    final = final.detach().requires_grad_()
    rows, targets = predictions(model, final, ids)
    step = chunk(model, final.device)
    parts: list[Tensor] = []
    for start in range(0, len(rows), step):
        part = rows[start : start + step].detach().requires_grad_()
        loss = cross_entropy(model.unembed(part), targets[start : start + step], reduction="sum")
        parts.append(torch.autograd.grad(loss / predicted(model, ids.shape[1]), part)[0])
    return torch.autograd.grad(rows, final, torch.cat(parts))[0]
