"""The effect of interventions on the output of an image encoder: logits, features, neighbours, probes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from spectral_sinks.data.pixels import Pixels
from spectral_sinks.errors import InputError
from spectral_sinks.interventions.sites import Site
from spectral_sinks.interventions.tracing import Interventions, Resume
from spectral_sinks.measure.memory import BATCH, batches, swap_groups
from spectral_sinks.measure.nll.effects import InterventionEffect
from spectral_sinks.measure.nll.replay import apply_and_measure, first_exit, for_batch
from spectral_sinks.measure.vision.features import (
    EncoderOutput,
    classes_in_range,
    classes_of,
    features,
    neighbours,
    run_encoder,
    same_top_class,
    token_changes,
    token_kinds,
)
from spectral_sinks.measure.vision.ridge import LinearProbe, split
from spectral_sinks.models.vision import VisionModel
from spectral_sinks.spectra.edits import Edit, EditFunction, as_edits
from spectral_sinks.stats import mean_interval


@dataclass(frozen=True, eq=False, repr=False)
class ImageEffect(InterventionEffect):
    """The effect of one intervention on the output of an image encoder.

    `table` has one row per image. A value is NaN where an image has none: a probe is not tested on the images
    that it was fitted on.
    """

    def summary(self, quantities: Sequence[str] | None = None) -> pd.DataFrame:
        """Return one row per quantity, all by default: `mean`, `low` and `high` (95 % BCa) over images.

        `n` is the number of images that have a value.
        """
        rows: list[dict[str, object]] = []
        for quantity in quantities or self.table.columns.drop(["document", "image"], errors="ignore"):
            values = self.table[quantity].dropna()
            low, high = mean_interval(values)
            rows.append({"quantity": quantity, "mean": values.mean(), "low": low, "high": high})
            rows[-1]["n"] = len(values)
        table = pd.DataFrame(rows)
        for index, (column, value) in enumerate(
            (("name", self.name), ("site", self.where), ("rank", self.rank))
        ):
            table.insert(index, column, value)
        return table

    def record(self) -> dict[str, Any]:
        """Return the rows of `summary` as a dictionary that JSON can hold, by quantity."""
        numbers = self.summary().set_index("quantity")[["mean", "low", "high", "n"]].to_dict("index")
        return {"name": self.name, "site": self.where, "rank": self.rank, "quantities": numbers}

    def __repr__(self) -> str:
        shown = self.summary().drop(columns=["name", "site", "rank"])
        title = f"{self.name} at {self.where or 'no site'} (rank {self.rank})"
        return f"{title}\n{shown.to_string(index=False, float_format='%.4f')}"


def evaluate_images(
    model: VisionModel,
    pixels: Pixels,
    cells: Mapping[str, Interventions],
    *,
    labels: Sequence[int] | Int[Tensor, "images"] | None = None,
    probe: Literal["cls", "patches"] | None = None,
    batch_size: int | None = None,
) -> dict[str, ImageEffect]:
    """Return the effects of several interventions on the output of an image encoder.

    Each is compared with one untouched pass. The table of each effect has one row per image. With a
    classifier head its columns are:

    - `kl`: divergence from the untouched logits, nats.
    - `top1_agreement`: whether the most likely class is the same.
    - `accuracy` and `cross_entropy`, with labels of the head's classes, each with `baseline_...` and
      `delta_...`.

    For tokens after the final norm, and compared with the untouched model, it always has:

    - `removed_energy_share`: the share of each token's energy that the filters remove, mean over tokens.
    - `..._cosine` and the relative `..._error` of `cls`, `distillation`, `registers` and `patches` (means
      over tokens).
    - `..._nearest`: whether the nearest untouched image, by cosine of [CLS] or of the mean patch, is still
      the same.
    - `..._nearest5`: the share of the five nearest that stays.

    `probe_accuracy` is that of a ridge classifier from the untouched [CLS] or mean patch to the labels,
    fitted on half of the images of each class and tested on the other half.

    Args:
        model: an image encoder.
        pixels: the images.
        cells: interventions by name.
        labels: labels of the images; those of `pixels` by default. If the images name their classes, these
            are matched with the head's by name, and there is no accuracy where they differ. Labels given as
            numbers are classes of the head; for a probe alone they may be any.
        probe: the vector that the probe reads; None for no probe.
        batch_size: images in a pass.

    Raises:
        InputError: for sites or widths that the model does not have, a probe without labels, and a swap that
            leaves one image alone.

    """
    cells = {name: as_edits(interventions) for name, interventions in cells.items()}
    for edits in cells.values():
        for site, edit in edits.items():
            check_image_edit(site, edit, model, pixels)
    truth = pixels.labels if labels is None else torch.as_tensor(labels)
    if truth is not None and len(truth) != len(pixels):
        raise InputError(f"{len(truth)} labels for {len(pixels)} images")
    if probe is not None and truth is None:
        raise InputError("a probe learns labels: give labels=, or images with one folder per class")
    if probe == "cls" and model.cls is None:
        raise InputError(f"{model.name} has no [CLS] token: probe its 'patches'")
    classes = classes_of(model, pixels, truth) if labels is None else classes_in_range(model, truth)
    # One untouched pass per batch keeps the residuals at which cells begin
    starts = {first_exit(edits) for edits in cells.values()}
    exits = [Site("exit", layer) for layer in sorted(s for s in starts if s is not None and s >= 0)]
    base: list[dict[str, Tensor]] = []
    columns: dict[str, list[dict[str, Tensor]]] = {name: [] for name in cells}
    vectors: dict[str, list[dict[str, Tensor]]] = {name: [] for name in cells}
    swaps = any(edit.swaps for edits in cells.values() for edit in edits.values())
    for places, batch in swap_groups(pixels) if swaps else batches(model, pixels, batch_size):
        batch = batch.to(model.device)
        untouched, residuals = run_encoder(model, batch, {}, exits)
        base.append(features(model, untouched))
        for name, edits in cells.items():
            own = for_batch(edits, places, len(pixels))
            found, removed = _edited(model, batch, own, residuals)
            found = untouched if found is None else found
            right = None if classes is None else classes[places]
            columns[name].append({"removed_energy_share": removed} | _moved(model, untouched, found, right))
            vectors[name].append(features(model, found))
    # Neighbours and probes need the features of all images
    gallery = _joined(base)
    reads = _probed(gallery, truth, probe)
    described: dict[str, Any] = {"document": list(pixels.document)}
    described |= {"image": list(names)} if (names := getattr(pixels.images, "names", None)) else {}
    effects: dict[str, ImageEffect] = {}
    for name, edits in cells.items():
        found, after = _joined(columns[name]), _joined(vectors[name])
        for kind in gallery if len(pixels) > 1 else ():
            first, five = neighbours(gallery[kind], after[kind])
            found |= {f"{kind}_nearest": first, f"{kind}_nearest5": five}
        found |= reads(after)
        rows = pd.DataFrame(described | {column: values.numpy() for column, values in found.items()})
        ranks = tuple(edit.rank for edit in edits.values())
        effects[name] = ImageEffect(name, tuple(edits), ranks, rows)
    return effects


def check_image_edit(site: Site, edit: Edit, model: VisionModel, pixels: Pixels) -> None:
    """Raise InputError for a filter that is not defined at a site of this model or on these images."""
    site.check(model)
    edit.check_width(model.d, site, model.name)
    if edit.swaps:
        pixels.require_one_shape()
    if edit.swaps and len(pixels) % BATCH == 1:
        raise InputError(
            f"fill 'swap' pairs images in groups of {BATCH}, and of {len(pixels)} images one is left alone: "
            "give one more, or one less"
        )
    if max(edit.token_ids, default=0) > len(model.prefix):
        raise InputError(
            f"{edit.name!r} selects tokens of kind {max(edit.token_ids)}: {model.name} has kinds 0 to "
            f"{len(model.prefix)}, which model.at(...) names"
        )


def _edited(
    model: VisionModel, batch: Tensor, edits: dict[Site, Edit], residuals: dict[Site, Tensor]
) -> tuple[EncoderOutput | None, Tensor]:
    """Run a pass from the lowest edited site, and return its output and the share of energy removed.

    The output is None if nothing changes.
    """
    first, kinds = first_exit(edits), model.kinds(batch)
    if first is None:
        return None, torch.zeros(len(batch), dtype=torch.float64)
    shares: list[Tensor] = []

    def act(edit: Edit) -> EditFunction:
        def acting(x: Tensor) -> Tensor:
            out, share = apply_and_measure(edit, x, kinds)
            shares.append(share.double())
            return out

        return acting

    acting = {site: act(edit) for site, edit in edits.items()}
    resume = None
    if first >= 0:
        exit = Site("exit", first)
        residual = residuals[exit]
        resume = Resume(first, acting.pop(exit)(residual) if exit in acting else residual)
    found, _ = run_encoder(model, batch, acting, (), resume)
    return found, torch.stack(shares).mean(0)


def _moved(
    model: VisionModel, old: EncoderOutput, new: EncoderOutput, truth: Tensor | None
) -> dict[str, Tensor]:
    """Return the differences of logits and tokens from the untouched ones, by image."""
    found: dict[str, Tensor] = {}
    if old.logits is not None and new.logits is not None:
        p, q = old.logits.log_softmax(-1), new.logits.log_softmax(-1)
        found["kl"] = (p.exp() * (p - q)).sum(-1)
        found["top1_agreement"] = same_top_class(new.logits, old.logits)
        if truth is not None:
            right = ((x.argmax(-1) == truth).double() for x in (new.logits, old.logits))
            found |= _compared("accuracy", *right)
            found |= _compared("cross_entropy", *(-x.gather(1, truth[:, None])[:, 0] for x in (q, p)))
    cosine, error = token_changes(new.tokens, old.tokens)
    for kind, places in token_kinds(model).items():
        found[f"{kind}_cosine"] = cosine[:, places].mean(1)
        found[f"{kind}_error"] = error[:, places].mean(1)
    return found


def _probed(
    gallery: dict[str, Tensor], labels: Tensor | None, probe: str | None
) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """Fit a probe on half of the untouched images, and return a function that tests it.

    The test is on the features of the other half.
    """
    if probe is None or labels is None:
        return lambda _: {}
    fit, held = split(labels, 0.5)
    fitted = LinearProbe.fitted(gallery[probe][fit], labels[fit])

    def right(vectors: dict[str, Tensor]) -> Tensor:
        out = torch.full((len(labels),), torch.nan, dtype=torch.float64)
        out[held] = (fitted.predict(vectors[probe][held]) == labels[held]).double()
        return out

    before = right(gallery)
    return lambda after: _compared("probe_accuracy", right(after), before)


def _compared(name: str, new: Tensor, old: Tensor) -> dict[str, Tensor]:
    return {name: new, f"baseline_{name}": old, f"delta_{name}": new - old}


def _joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
