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

from spectral_sinks.data.pixels import Pixels
from spectral_sinks.errors import InputError
from spectral_sinks.interventions.registers import mlp_output
from spectral_sinks.interventions.sites import Site
from spectral_sinks.interventions.tracing import Interventions, trace
from spectral_sinks.measure.vision.outlier_tokens import outliers
from spectral_sinks.models.attention_capture import AttentionCall, attending
from spectral_sinks.models.vision import VisionModel
from spectral_sinks.spectra.edits import EditFunction, as_edits
from spectral_sinks.stats import mean_interval

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
    batch_size: int = 16,
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
    known = outliers(model, pixels, rule=rule, batch_size=batch_size)
    norms, member, cut = known.patches[:, 1:], known.member[:, 1:], known.cutoff[1:][layer]
    marked = member[:, layer]
    if not marked.any():
        raise InputError(
            f"no outlier patch in {len(norms)} images at layer {layer % model.layers}: the largest norm is "
            f"{norms[:, layer].max():.4g}, the cut-off {cut:.4g}; give more or larger images, "
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

    with _activations(model, range(top + 1), add):
        for places, batch in pixels.batches(batch_size):
            here = torch.from_numpy(marked[places])
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
    found.attrs = {"outliers": int(marked.sum()), "images": len(images), "cutoff": float(cut)}
    found.attrs |= {"layer": layer % model.layers, "top_layer": top}
    return found


@contextmanager
def _activations(model: VisionModel, layers: range, see: Any) -> Iterator[None]:
    """Inside the block, call `see(layer, activations)` with the neurons of every MLP."""
    with ExitStack() as stack:
        for layer in layers:
            hook: Any = lambda _, given, layer=layer: see(layer, given[0].detach())  # noqa: E731
            stack.callback(mlp_output(model, layer).register_forward_pre_hook(hook).remove)
        yield


@dataclass(frozen=True, eq=False)
class Looked:
    """The measurements of one pass over a batch.

    Features are those after the final norm (for CLIP, at the last exit).
    """

    norms: Float[NDArray[np.float32], "batch layers patches"]
    added_norms: Float[NDArray[np.float32], "batch layers registers"]
    """Norms of the test-time registers."""
    cls: Float[Tensor, "batch d"] | None
    patches: Float[Tensor, "batch patches d"]
    logits: Float[Tensor, "batch classes"] | None
    attention: Float[NDArray[np.float32], "batch layers heads tokens"] | None
    """Attention of [CLS] to all tokens."""


def look(
    model: VisionModel, batch: Tensor, edits: Interventions | None = None, *, attention: bool = False
) -> Looked:
    """Run one pass over a batch of pixels, with edits at sites.

    The attention of [CLS] is recorded only with `attention`.
    """
    sites = [Site("exit", layer) for layer in range(model.layers)]
    start, given = len(model.prefix), as_edits(edits or {})
    sizes, weights = list[Tensor](), list[Tensor]()

    def sized(site: Site) -> EditFunction:
        def run(x: Tensor) -> Tensor:
            x = given[site].apply(x) if site in given else x
            sizes.append(x.float().norm(dim=-1).cpu())
            return x

        return run

    def note(call: AttentionCall) -> None:
        weights.append(call.weights(slice(0, 1))[:, :, 0].float().cpu())

    def readout(final: Tensor, *_: Any) -> tuple[Tensor, Tensor | None]:
        return final.float(), model.logits().float() if model.classes else None

    with attending(model, note) if attention and model.cls is not None else nullcontext():
        watched = given | {site: sized(site) for site in sites}
        final, logits = trace(model, batch.to(model.device), watched, readout=readout)
    norms = torch.stack(sizes, dim=1).numpy()
    return Looked(
        norms[..., start:],
        norms[..., list(model.added)],
        None if model.cls is None else final[:, model.cls],
        final[:, start:],
        logits,
        torch.stack(weights, dim=1).numpy() if weights else None,
    )


def likeness(
    found: Looked, base: Looked, chosen: Bool[Tensor, "batch patches"], labels: Tensor | None
) -> Iterator[tuple[str, NDArray[np.float64]]]:
    """Yield how similar two passes are in each image: cosine and relative error of features, and classes."""
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
    """Return one row per key: mean and interval over the `n` images that are not NaN.

    `names` are the columns of the parts of a key.
    """
    rows: list[dict[str, Any]] = []
    for key, parts in values.items():
        sample = np.concatenate(parts).astype(np.float64)
        sample = sample[~np.isnan(sample)]
        low, high = mean_interval(sample)
        mean = sample.mean() if len(sample) else np.nan
        found = {"mean": mean, "low": low, "high": high, "n": len(sample)}
        rows.append(dict(zip(names, key, strict=True)) | found)
    return pd.DataFrame(rows)
