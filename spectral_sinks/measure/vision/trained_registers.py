"""The output of an image encoder without its trained registers, or with others that replace them."""

from collections import defaultdict
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from typing import Any, Literal, get_args

import pandas as pd
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from spectral_sinks.data.pixels import Pixels
from spectral_sinks.errors import InputError
from spectral_sinks.interventions.registers import require_registers, without_registers
from spectral_sinks.interventions.sites import Site
from spectral_sinks.interventions.tracing import deepest, trace
from spectral_sinks.measure.memory import batches
from spectral_sinks.measure.vision.features import classes_of
from spectral_sinks.measure.vision.outlier_tokens import Outliers, outliers
from spectral_sinks.measure.vision.register_passes import RecordedPass, output_changes, recorded_pass, tabled
from spectral_sinks.models.vision import VisionModel
from spectral_sinks.spectra.edits import EditFunction

RegisterEdit = Literal["removed", "zero", "mean", "noise", "swapped", "shuffled"]


def register_ablation(
    model: VisionModel,
    pixels: Pixels,
    *,
    edits: Sequence[RegisterEdit] = get_args(RegisterEdit),
    layers: Collection[int] | None = None,
    layer: int = -2,
    seed: int = 0,
    measured: Outliers | None = None,
    batch_size: int | None = None,
) -> pd.DataFrame:
    """Measure the effect of removing or replacing trained registers on the output of an image encoder.

    The edits are:

    - "removed": the tokens are removed from the embedding on.
    - "zero": the registers become zero.
    - "mean": each register's own mean over images, as Sun et al. 2024 fix them at the entry of every layer.
    - "noise": normal noise with the mean and deviation of the register in every dimension.
    - "swapped": the registers of the next image (the last image gets those of the first), which Parodi et al.
      2026 (arXiv 2604.14433) call shuffling.
    - "shuffled": within an image, each register gets the content of the next one. Registers differ only in
      what they hold, so this must change neither [CLS] nor patches. It is a check of the edit.

    All except "removed" act at the exit of every layer, or of those in `layers`. At the embedding, registers
    are the same in all images, so only "zero" differs there. If zero hurts and mean, noise and swapped do
    not, zeros are out of distribution, and what an image wrote to its registers does not matter.

    The measures are "cls cosine", "cls error" (relative), "patch cosine" and "patch error", compared with the
    untouched model; "agreement" of the most likely class; "accuracy" where there are labels; and "outlier
    share", the share of patches beyond the untouched model's robust cut-off at the exit of `layer`. The
    registers of all images at all those layers are held in memory at once.

    Args:
        model: an image encoder with trained registers.
        pixels: the images, at least two.
        edits: the edits; all by default.
        layers: the layers at whose exit edits act, -1 for the embedding; all exits by default.
        layer: the layer of "outlier share".
        seed: of the noise.
        measured: the outliers of the same model and pixels, if known; their norms are not measured again.
        batch_size: images in a pass.

    Returns:
        One row per `edit` and `measure`: `mean`, `low` and `high` (95 % BCa) over `n` images. The edit "none"
        is the untouched model.

    Raises:
        InputError: for a model without trained registers, unknown edits or layers, and fewer than two images.

    """
    require_registers(model)
    where = tuple(range(model.layers)) if layers is None else tuple(sorted(layers))
    if unknown := set(edits) - set(get_args(RegisterEdit)):
        raise InputError(
            f"edits {', '.join(sorted(unknown))}: choose from {', '.join(get_args(RegisterEdit))}"
        )
    if not where or not all(-1 <= at < model.layers for at in where) or len(pixels) < 2:
        raise InputError(
            f"layers {where} and {len(pixels)} images: expected some of -1 (embedding) to "
            f"{model.layers - 1}, and at least two images"
        )
    sites = [Site("embedding") if at < 0 else Site("exit", at) for at in where]
    # Replacements are made from the registers of all images
    held = _registers(model, pixels, sites, batch_size)
    given = {edit: replaced(held, edit, seed) for edit in edits if edit != "removed"}
    known = outliers(model, pixels, measured=measured, batch_size=batch_size)
    cut = float(known.cutoff[1:][layer])
    values: dict[tuple[Any, ...], list[NDArray[Any]]] = defaultdict(list)
    classes = classes_of(model, pixels, pixels.labels)
    for places, batch in batches(model, pixels, batch_size):
        labels = None if classes is None else classes[places]
        base: RecordedPass | None = None
        for edit in ("none", *edits):
            with without_registers(model) if edit == "removed" else nullcontext():
                put = _put(model, sites, given[edit][places]) if edit in given else {}
                found = recorded_pass(model, batch, put)
            base = base or found
            every = torch.ones(found.patches.shape[:2], dtype=torch.bool)
            for measure, value in output_changes(found, base, every, labels):
                values[edit, measure].append(value)
            values[edit, "outlier share"].append((found.norms[:, layer] > cut).mean(1))
    order = {edit: place for place, edit in enumerate(("none", *edits))}
    table = tabled(values, ("edit", "measure"))
    return table.sort_values("edit", key=lambda s: s.map(order), kind="stable").reset_index(drop=True)


def _registers(
    model: VisionModel, pixels: Pixels, sites: list[Site], batch_size: int | None
) -> Float[Tensor, "images sites registers d"]:
    """Return the residuals of the registers at some sites."""
    here = list(model.registers)
    parts = [
        trace(
            model,
            batch.to(model.device),
            {},
            sites,
            readout=lambda _, reads, __: torch.stack([reads[site][:, here] for site in sites], dim=1).cpu(),
            last=deepest(sites),
        )
        for _, batch in batches(model, pixels, batch_size)
    ]
    return torch.cat(parts)


def replaced(
    held: Float[Tensor, "images sites registers d"], edit: RegisterEdit, seed: int = 0
) -> Float[Tensor, "images sites registers d"]:
    """Return the residuals that replace the registers of each image."""
    if edit == "zero":
        return torch.zeros_like(held)
    if edit == "swapped":
        return held.roll(-1, dims=0)
    if edit == "shuffled":
        return held.roll(-1, dims=2)
    mean = held.mean(0, keepdim=True)
    if edit == "mean":
        return mean.expand_as(held)
    noise = torch.randn(held.shape, generator=torch.Generator().manual_seed(seed)).to(held.dtype)
    return mean + held.std(0, keepdim=True) * noise


def _put(
    model: VisionModel, sites: list[Site], values: Float[Tensor, "batch sites registers d"]
) -> dict[Site, EditFunction]:
    """Return edits that set the registers to these values."""
    here = list(model.registers)

    def edit(index: int) -> EditFunction:
        def change(x: Tensor) -> Tensor:
            x = x.clone()
            x[:, here] = values[:, index].to(x.device, x.dtype)
            return x

        return change

    return {site: edit(index) for index, site in enumerate(sites)}
