"""The features by which patches of an image are compared: projections of a layer, or the residual stream."""

from collections.abc import Iterator
from typing import Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor

from spectral_sinks.data.pixels import Pixels
from spectral_sinks.interventions.sites import Kind, Site
from spectral_sinks.interventions.tracing import Interventions, deepest, trace
from spectral_sinks.measure.memory import batches
from spectral_sinks.models.attention_capture import AttentionCall, attending
from spectral_sinks.models.vision import VisionModel

Features = Literal["keys", "queries", "values", "exit", "attention"]
"""Outputs of a projection (before any rotation), the residual after a layer, or the attention of [CLS]."""


def patch_values(
    model: VisionModel,
    read: Pixels,
    features: Features,
    layer: int,
    edits: Interventions,
    batch_size: int | None,
) -> Iterator[tuple[int, Float[Tensor, "rows columns *d"]]]:
    """Yield the features by which the patches of each image are compared, with the index of the image.

    Args:
        model: an image encoder.
        read: the images.
        features: the kind of features.
        layer: the layer.
        edits: the edit at each site.
        batch_size: images in a pass.

    """
    for places, batch in batches(model, read, batch_size):
        grid = model.grid(batch)
        count = grid[0] * grid[1]
        batch = batch.to(model.device)
        if features == "attention":
            found = _attention(model, batch, layer, edits)[:, -count:]
        else:
            found = _features(model, batch, features, layer, edits)[:, -count:]
        yield from zip(places, found.detach().cpu().unflatten(1, grid), strict=True)


def _features(
    model: VisionModel, batch: Tensor, features: Features, layer: int, edits: Interventions
) -> Float[Tensor, "batch tokens d"]:
    site = Site(cast(Kind, features), layer)
    last = deepest([site, *edits])
    x = trace(model, batch, edits, [site], readout=lambda _, read, __: read[site], last=last)
    if features == "exit":
        return x
    part = model.module.get_submodule(f"{model.layout.layers}.{layer}")
    path = {"queries": model.layout.queries, "keys": model.layout.keys, "values": model.layout.values}[
        features
    ]
    with torch.no_grad():
        normed = part.get_submodule(model.layout.attention_norm).forward(x)
        return part.get_submodule(path).forward(normed)[..., model.projection_index(features)]


def _attention(
    model: VisionModel, batch: Tensor, layer: int, edits: Interventions
) -> Float[Tensor, "batch tokens"]:
    """Return the attention of [CLS] to each token, mean over heads."""
    found: list[Tensor] = []
    cls = model.cls or 0

    def look(call: AttentionCall) -> None:
        if call.layer == layer:
            found.append(call.weights(slice(cls, cls + 1))[:, :, 0].mean(1))

    with attending(model, look):
        last = deepest([Site("exit", layer), *edits])
        trace(model, batch, edits, readout=lambda *_: None, last=last)
    return found[0]
