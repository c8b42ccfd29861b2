"""Passes of an image encoder that record norms and attention, and comparisons between two of them."""

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from spectral_sinks.interventions.sites import Site
from spectral_sinks.interventions.tracing import Interventions
from spectral_sinks.measure.vision.features import run_encoder, same_top_class, token_changes
from spectral_sinks.models.attention_capture import AttentionCall, attending
from spectral_sinks.models.vision import VisionModel
from spectral_sinks.spectra.edits import EditFunction, as_edits
from spectral_sinks.stats import mean_interval


@dataclass(frozen=True, eq=False)
class RecordedPass:
    """One pass over a batch: the encoder's output by kind of token, norms and attention by layer."""

    norms: Float[NDArray[np.float64], "batch layers patches"]
    """Of the patches at the exit of each layer."""
    register_norms: Float[NDArray[np.float64], "batch layers registers"]
    """Of the registers that `install_registers` added."""
    cls: Float[Tensor, "batch 1 d"] | None
    """As `features.EncoderOutput` has it."""
    patches: Float[Tensor, "batch patches d"]
    logits: Float[Tensor, "batch classes"] | None
    attention: Float[NDArray[np.float32], "batch layers heads tokens"] | None
    """From [CLS] to all tokens."""


def recorded_pass(
    model: VisionModel, batch: Tensor, edits: Interventions | None = None, *, attention: bool = False
) -> RecordedPass:
    """Run one pass over a batch of pixels under `edits`; `attention` also records the weights of [CLS]."""
    exits = [Site("exit", layer) for layer in range(model.layers)]
    start, own = len(model.prefix), as_edits(edits or {})
    sizes, weights = list[Tensor](), list[Tensor]()

    def measured(site: Site) -> EditFunction:
        def run(x: Tensor) -> Tensor:
            x = own[site].apply(x) if site in own else x
            sizes.append(x.double().norm(dim=-1).cpu())
            return x

        return run

    def record(call: AttentionCall) -> None:
        weights.append(call.weights(slice(0, 1))[:, :, 0].float().cpu())

    with attending(model, record) if attention and model.cls is not None else nullcontext():
        output, _ = run_encoder(model, batch.to(model.device), own | {site: measured(site) for site in exits})
    norms = torch.stack(sizes, dim=1).numpy()
    return RecordedPass(
        norms[..., start:],
        norms[..., list(model.added)],
        None if model.cls is None else output.tokens[:, [model.cls]],
        output.tokens[:, start:],
        output.logits,
        torch.stack(weights, dim=1).numpy() if weights else None,
    )


def output_changes(
    new: RecordedPass,
    old: RecordedPass,
    chosen: Bool[Tensor, "batch patches"],
    classes: Int[Tensor, "batch"] | None,
) -> Iterator[tuple[str, Float[NDArray[np.float64], "batch"]]]:
    """Measure how far the output of a pass is from the output of the untouched pass, by image.

    Patches count where they are `chosen`; an image without any gives NaN. `classes` are the true classes of
    the head, where they are known.
    """
    pairs = {"patch": (new.patches, old.patches, chosen)}
    if new.cls is not None and old.cls is not None:
        pairs["cls"] = new.cls, old.cls, torch.ones(new.cls.shape[:2], dtype=torch.bool)
    for kind, (after, before, counted) in pairs.items():
        for what, value in zip(("cosine", "error"), token_changes(after, before), strict=True):
            yield f"{kind} {what}", (torch.where(counted, value, 0).sum(1) / counted.sum(1)).numpy()
    if new.logits is not None and old.logits is not None:
        yield "agreement", same_top_class(new.logits, old.logits).numpy()
        if classes is not None:
            yield "accuracy", (new.logits.argmax(-1) == classes).double().numpy()


def tabled(values: Mapping[tuple[Any, ...], list[NDArray[Any]]], names: tuple[str, ...]) -> pd.DataFrame:
    """Return one row per key, with its parts under `names`, and mean and interval over `n` images.

    Images with NaN are left out.
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
