"""Register neurons of an image encoder: the MLP neurons that make its outlier patches."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from spectral_sinks.errors import InputError
from spectral_sinks.interventions.registers import mlp_output
from spectral_sinks.interventions.sites import Site
from spectral_sinks.interventions.tracing import Interventions, trace
from spectral_sinks.measure.massive import RATIO, Z
from spectral_sinks.models.attending import AttentionCall, attending
from spectral_sinks.models.vision import VisionModel
from spectral_sinks.pixels import Pixels
from spectral_sinks.stats import mean_interval

DINOV2_LARGE: dict[str, Any] = {"layer": -2, "cutoff": 150.0, "top_layer": 17, "count": 50}
"""The published setting for DINOv2-L, for `register_neurons(model, pixels, **DINOV2_LARGE)` (Jiang et al.
2025)."""


def patch_norms(
    model: VisionModel, pixels: Pixels, batch_size: int = 16
) -> Float[NDArray[np.float32], "images layers patches"]:
    """Norm of every patch's residual at the exit of each layer."""
    return np.concatenate([look(model, batch).norms for _, batch in pixels.batches(batch_size)])


def cut_offs(
    norms: Float[NDArray[np.float32], "images layers patches"],
) -> Float[NDArray[np.float64], "layers"]:
    """The norm beyond which a patch is an outlier: robust z above 10 and above two medians [ours]."""
    level = np.median(norms.astype(np.float64), axis=(0, 2))
    spread = 1.4826 * np.median(np.abs(norms - level[:, None]), axis=(0, 2))
    return np.maximum(level + Z * np.maximum(spread, 1e-6 * level), RATIO * level)


def register_neurons(
    model: VisionModel,
    pixels: Pixels,
    *,
    layer: int = -2,
    cutoff: float | None = None,
    top_layer: int | None = None,
    count: int = 50,
    batch_size: int = 16,
) -> pd.DataFrame:
    """MLP neurons that make outlier patches: `layer`, `neuron`, `activation`, `elsewhere`, strongest first.

    Outliers are the patches with a norm above `cutoff` at the exit of `layer` (from the end where negative).
    Neurons, as the MLP's last matrix reads them, of the layers up to `top_layer` are ranked by `activation`:
    the mean magnitude at outliers, over those of an image and then over images; `elsewhere` is that at the
    other patches of these images. The cut-off is by default a robust one: z above 10 and two medians of the
    layer; the top layer the first at whose exit at least half of these patches are outliers already, by the
    same rule there [ours]. Both are in `attrs`, with how many outliers there are. `DINOV2_LARGE` has the
    published setting (150, layer -2, layers to 17, 50 neurons). Raises InputError for layers that the model
    does not have, and where no patch is an outlier. (Jiang et al. 2025; of [CLS], which their code counts
    where its norm is high as well, nothing is counted here)
    """
    if not -model.layers <= layer < model.layers or count < 1:
        raise InputError(f"layer {layer}, {count} neurons: {model.name} has layers 0 to {model.layers - 1}")
    norms = patch_norms(model, pixels, batch_size)
    cuts = cut_offs(norms) if cutoff is None else np.full(model.layers, float(cutoff))
    outliers = norms[:, layer] > cuts[layer]
    if not outliers.any():
        raise InputError(
            f"no outlier patch in {len(norms)} images at layer {layer % model.layers}: the largest norm is "
            f"{norms[:, layer].max():.4g}, the cut-off {cuts[layer]:.4g}; give more or larger images, "
            "another layer, or a cut-off"
        )
    share = np.moveaxis(norms > cuts[:, None], 1, 2)[outliers].mean(0)
    top = int(np.argmax(share >= 0.5)) if top_layer is None else top_layer
    if not 0 <= top < model.layers:
        raise InputError(f"top layer {top}: {model.name} has layers 0 to {model.layers - 1}")
    start, images = len(model.prefix), np.flatnonzero(outliers.any(1))
    sums: dict[int, Tensor] = {}
    here = torch.zeros(0)

    def add(at: int, act: Float[Tensor, "batch tokens neurons"]) -> None:
        size = act[:, start:].abs().double()
        marks = torch.stack([here, ~here]).double().to(size.device)
        means = torch.einsum("kbp,bpn->kbn", marks, size) / marks.sum(2, keepdim=True).clamp(min=1)
        sums[at] = sums.get(at, 0) + means.cpu()[:, here.any(1)].sum(1)

    with _activations(model, range(top + 1), add):
        for places, batch in pixels.batches(batch_size):
            here = torch.from_numpy(outliers[places])
            if here.any():
                trace(model, batch.to(model.device), {}, readout=lambda *_: None)
    rows = [
        pd.DataFrame(
            {"layer": at, "neuron": range(both.shape[1]), "activation": both[0], "elsewhere": both[1]}
        )
        for at, both in ((at, (both / len(images)).numpy()) for at, both in sums.items())
    ]
    ranked = pd.concat(rows).sort_values(["activation", "layer", "neuron"], ascending=[False, True, True])
    found = ranked.head(count).reset_index(drop=True)
    found.attrs = {"outliers": int(outliers.sum()), "images": len(images), "cutoff": float(cuts[layer])}
    found.attrs |= {"layer": layer % model.layers, "top_layer": top}
    return found


@contextmanager
def _activations(model: VisionModel, layers: range, see: Any) -> Iterator[None]:
    """Inside the block, `see(layer, activations)` is called with every MLP's neurons."""

    def hook(layer: int) -> Any:
        return lambda _, given: see(layer, given[0].detach())

    with ExitStack() as stack:
        for layer in layers:
            handle = mlp_output(model, layer).register_forward_pre_hook(hook(layer))
            stack.callback(handle.remove)
        yield


@dataclass(frozen=True, eq=False)
class Looked:
    """What one pass over a batch shows; features are those behind the final norm (CLIP: the last exit)."""

    norms: Float[NDArray[np.float32], "batch layers patches"]
    added_norms: Float[NDArray[np.float32], "batch layers registers"]
    """Of test-time registers."""
    cls: Float[Tensor, "batch d"] | None
    patches: Float[Tensor, "batch patches d"]
    logits: Float[Tensor, "batch classes"] | None
    attention: Float[NDArray[np.float32], "batch layers heads tokens"] | None
    """Of [CLS] to all tokens."""


def look(
    model: VisionModel, batch: Tensor, edits: Interventions | None = None, *, attention: bool = False
) -> Looked:
    """One pass over a batch of pixels, with functions at sites; with `attention` that of [CLS] as well."""
    sites = [Site("exit", layer) for layer in range(model.layers)]
    start, weights = len(model.prefix), list[Tensor]()

    def note(call: AttentionCall) -> None:
        weights.append(call.weights(slice(0, 1))[:, :, 0].float().cpu())

    def readout(final: Tensor, reads: dict[Site, Tensor], _: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        norms = torch.stack([reads[site].float().norm(dim=-1) for site in sites], dim=1)
        return norms, final.float(), model.logits().float() if model.classes else None

    with attending(model, note) if attention and model.cls is not None else nullcontext():
        norms, final, logits = trace(model, batch.to(model.device), edits or {}, sites, readout=readout)
    return Looked(
        norms[..., start:].cpu().numpy(),
        norms[..., list(model.added)].cpu().numpy(),
        None if model.cls is None else final[:, model.cls],
        final[:, start:],
        logits,
        torch.stack(weights, dim=1).numpy() if weights else None,
    )


def likeness(
    found: Looked, base: Looked, chosen: Bool[Tensor, "batch patches"], labels: Tensor | None
) -> Iterator[tuple[str, NDArray[np.float64]]]:
    """How alike two passes are in each image: cosine and relative error of features, and classes."""
    pairs = {"patch": (found.patches, base.patches)}
    if found.cls is not None and base.cls is not None:
        pairs["cls"] = found.cls[:, None], base.cls[:, None]
    for name, (a, b) in pairs.items():
        here = chosen.to(a.device) if name == "patch" else torch.ones_like(a[..., 0], dtype=torch.bool)
        error = (a - b).norm(dim=-1) / b.norm(dim=-1)
        for what, value in (("cosine", torch.cosine_similarity(a, b, dim=-1)), ("error", error)):
            mean = torch.where(here, value, 0).sum(1) / here.sum(1)
            yield f"{name} {what}", mean.double().cpu().numpy()
    if found.logits is not None and base.logits is not None:
        top = found.logits.argmax(-1)
        yield "agreement", (top == base.logits.argmax(-1)).double().cpu().numpy()
        if labels is not None:
            yield "accuracy", (top.cpu() == labels).double().numpy()


def tabled(values: Mapping[tuple[Any, ...], list[NDArray[Any]]], names: tuple[str, ...]) -> pd.DataFrame:
    """A row for each key, its parts under `names`: mean and interval over the `n` images that are not NaN."""
    rows: list[dict[str, Any]] = []
    for key, parts in values.items():
        sample = np.concatenate(parts).astype(np.float64)
        sample = sample[~np.isnan(sample)]
        low, high = mean_interval(sample)
        mean = sample.mean() if len(sample) else np.nan
        rows.append(dict(zip(names, key, strict=True)) | {"mean": mean, "low": low, "high": high})
        rows[-1]["n"] = len(sample)
    return pd.DataFrame(rows)
