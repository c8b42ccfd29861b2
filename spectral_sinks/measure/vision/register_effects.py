"""The effect of test-time registers on an image encoder, compared with the same edit at random neurons."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray

from spectral_sinks.data.pixels import Pixels
from spectral_sinks.errors import InputError
from spectral_sinks.interventions.registers import install_registers
from spectral_sinks.interventions.silencing import Neurons, by_layer, mlp_output
from spectral_sinks.measure.memory import batches
from spectral_sinks.measure.vision.features import classes_of
from spectral_sinks.measure.vision.outlier_tokens import Outliers, outliers
from spectral_sinks.measure.vision.register_passes import RecordedPass, output_changes, recorded_pass, tabled
from spectral_sinks.models.vision import VisionModel

MapsOfImages = (
    Float[NDArray[np.floating], "images rows columns"] | list[Float[NDArray[np.floating], "rows columns"]]
)

MAPS = ("norm before", "norm after", "attention before", "attention after")


def register_repair(
    model: VisionModel,
    pixels: Pixels,
    neurons: Neurons,
    *,
    registers: int = 1,
    layer: int = -2,
    draws: int = 5,
    seed: int = 0,
    measured: Outliers | None = None,
    batch_size: int | None = None,
) -> pd.DataFrame:
    """Measure the effect of test-time registers, and of controls, on norms, attention and output.

    The states are "original"; "repaired"; and the controls "silenced" (the neurons are 0 at the patches, and
    no token is added), "tokens alone" (tokens are added, and no neuron is changed), and "random 1", ... (the
    edit at as many other neurons of the same layers).

    By layer, the measures are:

    - "outlier share": share of patches beyond the original model's robust cut-off of that layer.
    - "largest norm": of a patch.
    - "register norm": of the added tokens.
    - "attention entropy": of [CLS] over the patches, mean over heads, as a share of the entropy of uniform
      attention.
    - "attention on outliers": of [CLS] to the patches that are outliers at `layer` in the original model.
    - "attention on registers": of [CLS] to the added tokens.

    For the output, at no layer, they are:

    - "cls cosine" and "cls error": compared with the original model.
    - "patch cosine" and "patch error": the same over the patches that are not outliers in the original model.
    - "agreement": whether the most likely class is the same.
    - "accuracy": where there are labels.

    Args:
        model: an image encoder.
        pixels: the images.
        neurons: the register neurons.
        registers: number of tokens that are added.
        layer: the layer at which outliers are found in the original model.
        draws: number of random controls.
        seed: of the random controls.
        measured: the outliers of the same model and pixels, if known; their norms are not measured again.
        batch_size: images in a pass.

    Returns:
        One row per `state`, `layer` and `measure`: `mean`, `low` and `high` (95 % BCa) over `n` images.

    Raises:
        InputError: for no neurons, for a layer without enough other neurons, and as `install_registers` does.

    """
    chosen = by_layer(model, neurons)
    if not chosen or draws < 1:
        raise InputError(f"{len(chosen)} layers with neurons, {draws} draws: expected at least one of each")
    states: dict[str, tuple[list[tuple[int, int]], int]] = {
        "original": ([], 0),
        "repaired": (pairs(chosen), registers),
        "silenced": (pairs(chosen), 0),
        "tokens alone": ([], registers),
    }
    rng = np.random.default_rng(seed)
    for draw in range(draws):
        states[f"random {draw + 1}"] = (others(model, chosen, rng), registers)
    # Outliers and cut-offs are those of the original model
    known = outliers(model, pixels, measured=measured, batch_size=batch_size)
    marked, cuts = known.member[:, 1:][:, layer], known.cutoff[1:]
    values: dict[tuple[Any, ...], list[NDArray[Any]]] = defaultdict(list)
    classes = classes_of(model, pixels, pixels.labels)
    for places, batch in batches(model, pixels, batch_size):
        rows, columns = model.grid(batch)
        marks = marked[places, : rows * columns]
        labels = None if classes is None else classes[places]
        base: RecordedPass | None = None
        # The first state is the original, with which the others are compared
        for state, edit in states.items():
            with install_registers(model, *edit):
                found = recorded_pass(model, batch, attention=True)
                base = base or found
                for where, measure, value in by_layers(model, found, marks, cuts):
                    values[state, where, measure].append(value)
            for measure, value in output_changes(found, base, torch.from_numpy(~marks), labels):
                values[state, None, measure].append(value)
    order = {state: place for place, state in enumerate(states)}
    table = tabled(values, ("state", "layer", "measure")).astype({"layer": "Int64"})
    return table.sort_values("state", key=lambda s: s.map(order), kind="stable").reset_index(drop=True)


def register_maps(
    model: VisionModel,
    pixels: Pixels,
    neurons: Neurons,
    *,
    registers: int = 1,
    layer: int = -1,
    batch_size: int | None = None,
) -> dict[str, MapsOfImages]:
    """Return maps over the patches of each image, before and after test-time registers.

    The maps of images of several shapes are in a list.

    They serve `figures.registers`. The maps are "norm before" and "norm after" at the exit of `layer`, and,
    where there is a [CLS] token, "attention before" and "attention after": the attention of [CLS] in that
    layer, mean over heads.

    Args:
        model: an image encoder.
        pixels: the images.
        neurons: the register neurons.
        registers: number of tokens that are added.
        layer: the layer.
        batch_size: images in a pass.

    """
    maps: dict[str, list[NDArray[Any]]] = defaultdict(list)
    for _, batch in batches(model, pixels, batch_size):
        for when, edit in (
            ("before", nullcontext()),
            ("after", install_registers(model, neurons, registers)),
        ):
            with edit:
                found, start = recorded_pass(model, batch, attention=True), len(model.prefix)
            grid = model.grid(batch)
            maps[f"norm {when}"] += [row.reshape(grid) for row in found.norms[:, layer]]
            if found.attention is not None:
                attention = found.attention[:, layer, :, start:].mean(1)
                maps[f"attention {when}"] += [row.reshape(grid) for row in attention]
    return {name: np.stack(maps[name]) if pixels.alike else maps[name] for name in MAPS if name in maps}


def pairs(chosen: dict[int, tuple[int, ...]]) -> list[tuple[int, int]]:
    """Return neurons by layer as pairs."""
    return [(layer, neuron) for layer, found in chosen.items() for neuron in found]


def others(
    model: VisionModel, chosen: dict[int, tuple[int, ...]], rng: np.random.Generator
) -> list[tuple[int, int]]:
    """Draw as many random other neurons of each layer. Raises InputError where there are too few."""
    found: list[tuple[int, int]] = []
    for layer, taken in chosen.items():
        rest = np.setdiff1d(np.arange(mlp_output(model, layer).in_features), taken)
        if len(rest) < len(taken):
            raise InputError(
                f"{len(taken)} neurons of layer {layer}: {len(rest)} others are left for the control; "
                "name fewer"
            )
        found += [(layer, int(neuron)) for neuron in rng.choice(rest, len(taken), replace=False)]
    return found


def by_layers(
    model: VisionModel,
    found: RecordedPass,
    marks: Bool[NDArray[np.bool_], "batch patches"],
    cuts: Float[NDArray[np.float64], "layers"],
) -> Iterator[tuple[int, str, NDArray[Any]]]:
    """Yield what `register_repair` measures by layer: the layer, the measure, and a value for each image."""
    for layer in range(model.layers):
        norms = found.norms[:, layer]
        yield layer, "outlier share", (norms > cuts[layer]).mean(1)
        yield layer, "largest norm", norms.max(1)
        if model.added:
            yield layer, "register norm", found.register_norms[:, layer].mean(1)
        if found.attention is None:
            continue
        weights = found.attention[:, layer].astype(np.float64)
        patches = weights[..., len(model.prefix) :]
        share = patches / patches.sum(-1, keepdims=True)
        entropy = -(share * np.log(np.maximum(share, 1e-300))).sum(-1) / np.log(max(2, share.shape[-1]))
        yield layer, "attention entropy", entropy.mean(1)
        on = (patches * marks[:, None]).sum(-1).mean(1)
        yield layer, "attention on outliers", np.where(marks.any(1), on, np.nan)
        yield layer, "attention on registers", weights[..., list(model.added)].sum(-1).mean(1)
