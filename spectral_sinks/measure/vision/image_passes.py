"""One pass over images that keeps what outlier tokens and attention sinks are judged by."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from spectral_sinks.data.pixels import Pixels
from spectral_sinks.interventions.sites import Site
from spectral_sinks.interventions.tracing import trace
from spectral_sinks.measure.attention.by_position import PositionAttention, received_by_keys
from spectral_sinks.measure.circuits.heads import written_norms
from spectral_sinks.measure.memory import Memory, batches
from spectral_sinks.measure.residual.band_energy import residual_sites
from spectral_sinks.measure.residual.massive import Residuals, residual_sizes
from spectral_sinks.models.attention_capture import AttentionCall, attending
from spectral_sinks.models.vision import VisionModel
from spectral_sinks.spectra.edits import EditFunction


@dataclass(frozen=True, eq=False)
class ImagePass:
    """Sizes of residuals, attention received, and norms of written values, of every token of every image."""

    attention: PositionAttention
    residuals: Residuals
    written: Float[NDArray[np.float32], "images layers heads tokens"]
    """Norm of what each token's value writes, `||W_O v_k||`."""


def pass_over_images(model: VisionModel, pixels: Pixels, batch_size: int | None = None) -> ImagePass:
    """Run every image through the model once. Raises InputError where attention cannot be seen."""
    model.require_attention("attention by position")
    model.require_equal_heads()
    sites = residual_sites(model)
    writes = [written_norms(model, layer) for layer in range(model.layers)]
    count, length = len(pixels), pixels.length
    by_head = (count, model.layers, model.heads, length)
    by_site = (count, len(sites), length)
    ids = np.full((count, length), -1)
    total, seen, written = (np.full(by_head, np.nan, dtype=np.float32) for _ in range(3))
    norm, peak = (np.full(by_site, np.nan, dtype=np.float32) for _ in range(2))
    dimension, median = np.zeros(by_site, dtype=np.int64), np.zeros(by_site[:2], dtype=np.float32)
    here: list[int] = []

    def look(call: AttentionCall) -> None:
        at = (here, call.layer, slice(None), slice(call.key.shape[2]))
        total[at], seen[at], _ = received_by_keys(call)
        value = call.value.repeat_interleave(call.groups, dim=1).double()
        written[at] = (value @ writes[call.layer].to(value.device)).norm(dim=-1).cpu()

    def measured(index: int) -> EditFunction:
        def measure(x: Tensor) -> Tensor:
            at = (here, index, slice(x.shape[1]))
            norm[at], peak[at], dimension[at], median[here, index] = residual_sizes(x)
            return x

        return measure

    edits: dict[Site, EditFunction] = {site: measured(index) for index, site in enumerate(sites)}
    memory = Memory(model, length)
    for places, batch in batches(model, pixels, batch_size):

        def run(start: int, stop: int, places: list[int] = places, batch: Tensor = batch) -> None:
            here[:] = places[start:stop]
            part = batch[start:stop]
            with attending(model, look):
                trace(model, part.to(model.device), edits, readout=lambda *_: None)
            kinds = pixels.tokens(part)
            ids[here, : kinds.shape[1]] = kinds

        memory.parts(len(places), 1, run)
    none = np.zeros(by_head[:3], dtype=np.float32)
    attention = PositionAttention(pixels, False, ids, total, seen, none)
    return ImagePass(attention, Residuals(norm, peak, dimension, median), written)
