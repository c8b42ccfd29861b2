"""Register neurons of an image encoder: the MLP neurons that make its outlier patches."""

from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from spectral_sinks.data.pixels import Pixels
from spectral_sinks.errors import InputError
from spectral_sinks.interventions.silencing import neuron_activations
from spectral_sinks.interventions.tracing import trace
from spectral_sinks.measure.memory import batches
from spectral_sinks.measure.residual.mlp_neurons import ranked_neurons
from spectral_sinks.measure.vision.outlier_tokens import Outliers, outliers
from spectral_sinks.models.vision import VisionModel

DINOV2_LARGE: dict[str, Any] = {"layer": -2, "cutoff": 150.0, "top_layer": 17, "count": 50}
"""The published setting of `register_neurons` for DINOv2-L (Jiang et al. 2025)."""


def register_neurons(
    model: VisionModel,
    pixels: Pixels,
    *,
    layer: int = -2,
    cutoff: float | None = None,
    top_layer: int | None = None,
    count: int = 50,
    measured: Outliers | None = None,
    batch_size: int | None = None,
) -> pd.DataFrame:
    """Find the MLP neurons that make outlier patches, the strongest first.

    Outliers are the patches whose norm exceeds `cutoff` at the exit of `layer`. Neurons are the inputs of the
    MLP's last matrix, in the layers up to `top_layer`. They are ranked by their mean magnitude at outliers,
    over the outliers of an image and then over images. `DINOV2_LARGE` has the published setting (cut-off 150,
    layer -2, layers up to 17, 50 neurons). In the published code, [CLS] counts as well where its norm is
    high; here it does not.

    Args:
        model: an image encoder.
        pixels: the images.
        layer: the layer at whose exit outliers are found; counted from the end where negative.
        cutoff: the norm above which a patch is an outlier. By default it is that of `outliers`: z above 10,
            and twice the median of the layer.
        top_layer: the last layer whose neurons count. By default it is the first at whose exit at least half
            of these patches are outliers already, by the same rule there [ours].
        count: number of neurons.
        measured: the outliers of the same model and pixels, if known; their norms are not measured again.
        batch_size: images in a pass.

    Returns:
        One row per neuron: `layer`, `neuron`, `activation` (its mean magnitude at outliers) and `elsewhere`
        (its mean magnitude at the other patches of these images). The cut-off, the layers and the number of
        outliers are in `attrs`.

    Raises:
        InputError: for layers that the model does not have, and where no patch is an outlier.

    Source: Jiang et al. 2025.

    """
    if not -model.layers <= layer < model.layers or count < 1:
        raise InputError(f"layer {layer}, {count} neurons: {model.name} has layers 0 to {model.layers - 1}")
    rule = "robust" if cutoff is None else cutoff
    known = outliers(model, pixels, rule=rule, measured=measured, batch_size=batch_size)
    norms, member, cut = known.patches[:, 1:], known.member[:, 1:], known.cutoff[1:][layer]
    marked = member[:, layer]
    if not marked.any():
        raise InputError(
            f"no outlier patch in {len(norms)} images at layer {layer % model.layers}: the largest norm is "
            f"{np.nanmax(norms[:, layer]):.4g}, the cut-off {cut:.4g}; give more or larger images, "
            "another layer, or a cut-off"
        )
    # Share of the outliers that are outliers at each exit already, `[layers]`
    share = np.moveaxis(member, 1, 2)[marked].mean(0)
    top = int(np.argmax(share >= 0.5)) if top_layer is None else top_layer
    if not 0 <= top < model.layers:
        raise InputError(f"top layer {top}: {model.name} has layers 0 to {model.layers - 1}")
    start, images = len(model.prefix), np.flatnonzero(marked.any(1))
    # Sums over images of the mean magnitude at outliers and elsewhere, `[2, neurons]` by layer
    sums: dict[int, Tensor] = {}
    here = torch.zeros(0)

    def add(at: int, act: Float[Tensor, "batch tokens neurons"]) -> None:
        size = act[:, start:].abs().double()
        marks = torch.stack([here, ~here]).double().to(size.device)
        means = torch.einsum("kbp,bpn->kbn", marks, size) / marks.sum(2, keepdim=True).clamp(min=1)
        sums[at] = sums.get(at, 0) + means.cpu()[:, here.any(1)].sum(1)

    with neuron_activations(model, range(top + 1), add):
        for places, batch in batches(model, pixels, batch_size):
            rows, columns = model.grid(batch)
            here = torch.from_numpy(marked[places, : rows * columns])
            if here.any():
                trace(model, batch.to(model.device), {}, readout=lambda *_: None, last=top)
    means = {at: (both / len(images)).numpy() for at, both in sums.items()}
    found = ranked_neurons(
        {at: {"activation": both[0], "elsewhere": both[1]} for at, both in means.items()}, "activation", count
    )
    found.attrs = {"outliers": int(marked.sum()), "images": len(images), "cutoff": float(cut)}
    found.attrs |= {"layer": layer % model.layers, "top_layer": top}
    return found
