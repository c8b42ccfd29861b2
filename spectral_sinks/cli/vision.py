"""The command `vision`: outlier tokens, sinks, circuits and test-time registers of an image encoder."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from rich.console import Group
from rich.text import Text
from tyro.conf import Positional

import spectral_sinks as ss
from spectral_sinks.cli.options import encoder_and_images
from spectral_sinks.cli.output import show
from spectral_sinks.cli.parsing import Between, Count, Natural
from spectral_sinks.cli.vision_answers import (
    answers,
    circuit_table,
    layer_table,
    outlier_table,
    place_table,
    probe_table,
    repair_table,
    sink_table,
)

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Vision:
    """Measure outlier tokens, attention sinks and no-op circuits of an image encoder."""

    model: Positional[str]
    """A Hugging Face id, or a folder."""
    images: Positional[tuple[str, ...]]
    """A folder (its subfolders are classes), a .txt list of files, files, a tar file (also of WebDataset),
    a data set saved by datasets, or the id of one on the hub."""
    size: Count | None = None
    """Side in pixels of a square; images are resized to as many patches and keep their shape, with sides
    rounded to whole patches. By default images are prepared by the model's own processor."""
    square: bool = field(default=False)
    """Resize images to the square instead, whatever their shape."""
    limit: Count | None = 200
    """Maximum number of images that are read, taken from each class in turn."""
    broken: Literal["skip", "refuse"] = "skip"
    """Skip broken files with a warning that names them, or refuse them with an error."""
    split: str = "train"
    """Split of a data set."""
    rule: str = "robust"
    """Rule for outliers: robust, published (norm above 150), or a number (norm above it)."""
    matrix: str | None = None
    """Matrix whose spectrum defines the dark share; by default the classifier head, or name a parameter."""
    epsilon: Annotated[float, Between(0, 1)] = 0.3
    """Attention received above which a token is a sink of a head."""
    registers: Natural = 0
    """Number of test-time registers to add. Their effect is compared with an edit of random neurons."""
    neurons: Count = 50
    """Number of register neurons whose activations go to the added registers."""
    layer: int = -2
    """Layer at whose exit outliers are sought to find register neurons, counted from the end if negative."""
    figures: Path | None = None
    """Folder for figures (PNG): norm maps of the first images, outliers by layer, attention, registers."""
    batch_size: Count | None = None
    """Number of images in a batch; by default as many as the memory holds, at most 16."""
    device: str | None = None
    """Device to run on, such as cuda or cpu."""
    dtype: str = "auto"
    """Dtype of the weights; auto is the dtype of the checkpoint."""
    revision: str | None = None
    """Branch, tag or commit of a Hugging Face id."""
    allow_pickle: bool = False
    """Allow pickled weights, which can run code when they are loaded."""
    json: bool = field(default=False)
    """Print one JSON object and nothing else on standard output."""


def run_vision(options: Vision) -> None:
    from spectral_sinks.cli.image_progress import counted  # with torch, which --help does not need

    rule = rule_of(options.rule)
    model, images = encoder_and_images(options, limit=options.limit, broken=options.broken)
    pixels = counted(images)
    # the spectrum that the dark shares refer to
    spectra: list[ss.Spectrum] = []
    if options.matrix is not None:
        spectra = [ss.read_spectrum(model, options.matrix)]
    elif model.classes:
        spectra = ss.read_spectra(model)
    spectrum = spectra[0] if spectra else None
    # outliers and sinks, which are judged by what one pass has seen
    batch: dict[str, Any] = {"batch_size": options.batch_size}
    pixels.stages.append("norms and attention")
    sinks = ss.vision_sinks(model, pixels, spectra or None, epsilon=options.epsilon, **batch)
    found = ss.outliers(model, pixels, rule=rule, measured=sinks)
    record: dict[str, Any] = {
        "model": model.name,
        "family": model.family,
        "pixels": pixels.record,
        "reads": None if spectrum is None else f"{spectrum.matrix}, rank {spectrum.rank} of {spectrum.d}",
        "outliers": found.record() | {"layers": found.summary().to_dict("records")},
        "sinks": sinks.record(),
        "circuits": {},
    }
    tables: list[Any] = [layer_table(found, sinks), outlier_table(found), sink_table(sinks)]
    # circuits, positions and probes, where there is something to measure
    if spectrum is not None and sinks.sinks:
        import numpy as np  # here, so that --help does not import it

        from spectral_sinks.measure.circuits.no_op import circuits_of

        alpha = sinks.attention.alpha[..., len(model.prefix) :]
        strongest = len(model.prefix) + np.nan_to_num(alpha, nan=-1.0).max((1, 2)).argmax(-1)
        pixels.stages.append("circuits")
        kinds = [str(sink.token) for sink in sinks.sinks]
        at: list[Any] = [strongest.tolist() if kind == "patch" else kind for kind in kinds]
        for kind, circuits in zip(kinds, circuits_of(model, pixels, spectrum, at, **batch), strict=True):
            record["circuits"][kind] = circuits.heads.drop(columns="ranks").to_dict("records")
            tables.append(circuit_table(kind, circuits.heads))
    if found.member.any() and len(pixels) >= 4 and found.strongest is not None and pixels.alike:
        pixels.stages.append("probes")
        places = ss.vision.outlier_places(found)
        probes = ss.vision.token_probes(found, **batch)
        record["places"] = places.to_dict("records")
        record["probes"] = probes.to_dict("records")
        tables += [place_table(places), probe_table(probes)]
    if options.registers:
        repair(options, found, record, tables)
    if options.figures is not None:
        draw(found, sinks, options.figures)
    record["passes"] = len(pixels.passes)
    record["answers"] = answers(found, sinks, record, options.registers, options.layer)
    said = [Text(f"{line}\n") for line in record["answers"]]
    show(options.json, record, Group(*said, *tables))


def repair(
    options: Vision,
    found: ss.vision.Outliers,
    record: dict[str, Any],
    tables: list[Any],
) -> None:
    """Measure test-time registers and their controls, and add them to the record and the tables.

    Where there are no outliers, a warning says so and nothing is measured.

    Args:
        options: the options of the command.
        found: the outliers.
        record: the record that is extended.
        tables: the tables that are extended.

    """
    pixels: Any = found.pixels
    model = pixels.model
    batch: dict[str, Any] = {"measured": found, "batch_size": options.batch_size}
    record["register_neurons"], record["registers"] = [], []
    pixels.stages.append("register neurons")
    try:
        neurons = ss.vision.register_neurons(
            model, pixels, layer=options.layer, count=options.neurons, **batch
        )
    except ss.InputError as error:
        warnings.warn(f"no test-time registers: {error}", ss.SpectralWarning, stacklevel=2)
        return
    pixels.stages.append("test-time registers")
    changed = ss.vision.register_repair(
        model, pixels, neurons, registers=options.registers, layer=options.layer, **batch
    )
    record["register_neurons"] = neurons.to_dict("records")
    record["registers"] = changed.to_dict("records")
    tables.append(repair_table(changed, options.registers))
    if options.figures is not None:
        shown = range(min(SHOWN, len(pixels)))
        few = ss.Pixels(
            [pixels.images[image] for image in shown],
            model,
            pixels.options,
            pixels.record,
            None if pixels.own_grids is None else pixels.own_grids[: len(shown)],
        )
        maps = ss.vision.register_maps(model, few, neurons, registers=options.registers, layer=options.layer)
        options.figures.mkdir(parents=True, exist_ok=True)
        pictures = [pixels.picture(image) for image in shown]
        ss.figures.registers(pictures, maps, options.figures / "registers.png")


SHOWN = 4
"""Number of images in a figure."""


def rule_of(given: str) -> Any:
    """Return the rule as a name or a norm. Raises InputError where it is neither."""
    if given in ("robust", "published"):
        return given
    try:
        return float(given)
    except ValueError:
        raise ss.InputError(f"--rule {given}: give robust, published or a norm") from None


def draw(found: ss.vision.Outliers, sinks: ss.vision.VisionSinks, folder: Path) -> None:
    """Draw norm maps at four layers, outliers by layer, and attention by head and on the images."""
    folder.mkdir(parents=True, exist_ok=True)
    last = found.norm.shape[1] - 2
    layers = sorted({-1, last // 3, 2 * last // 3, last})
    shown = range(min(SHOWN, len(found.pixels)))
    pictures = [found.pixels.picture(image) for image in shown]
    ss.figures.vision_sinks(sinks.by_head(), folder / "attention.png")
    norms = {layer: [found.map(image, layer) for image in shown] for layer in layers}
    cutoffs = {layer: float(found.cutoff[layer + 1]) for layer in layers}
    ss.figures.norm_maps(pictures, norms, cutoffs, folder / "norms.png")
    inner = [layer for layer in layers if layer >= 0]
    ss.figures.attention_maps(
        pictures,
        [[sinks.map(image, layer) for image in shown] for layer in inner],
        [f"layer {layer}" for layer in inner],
        float(sinks.uniform.mean()),
        folder / "attention_maps.png",
    )
    ss.figures.outlier_shares(found.summary(), found.pixels.model.prefix, folder / "outliers.png")
