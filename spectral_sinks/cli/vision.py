"""The command `vision`: outlier tokens, sinks, circuits and test-time registers of an image encoder."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from rich.console import Group
from tyro.conf import Positional

import spectral_sinks as ss
from spectral_sinks.cli.output import plain, show, table
from spectral_sinks.cli.parsing import Between, Count, Natural

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Vision:
    """Measure outlier tokens, attention sinks and no-op circuits of an image encoder."""

    model: Positional[str]
    """A Hugging Face id, or a folder."""
    images: Positional[tuple[str, ...]]
    """A folder (its subfolders are classes), a .txt list of files, files, or the id of a hub data set."""
    size: Count | None = None
    """Side in pixels of the square that images are resized to; position embeddings are interpolated.
    By default images are resized by the model's own processor."""
    limit: Count | None = 200
    """Maximum number of images that are read, taken from each class in turn."""
    broken: Literal["skip", "refuse"] = "skip"
    """Skip broken files with a warning that names them, or refuse them with an error."""
    split: str = "train"
    """Split of a hub data set."""
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
    model = ss.load_vision(
        options.model,
        revision=options.revision,
        allow_pickle=options.allow_pickle,
        device=options.device,
        dtype=options.dtype,
    )
    # the images, and the spectrum that the dark shares refer to
    source: Any = options.images[0] if len(options.images) == 1 else list(options.images)
    images = ss.images(source, limit=options.limit, broken=options.broken, split=options.split)
    pixels = ss.pixels(images, model, size=options.size)
    spectra: list[ss.Spectrum] = []
    if options.matrix is not None:
        spectra = [ss.read_spectrum(model, options.matrix)]
    elif model.classes:
        spectra = ss.read_spectra(model)
    spectrum = spectra[0] if spectra else None
    # outliers and sinks
    batch: dict[str, Any] = {"batch_size": options.batch_size}
    found = ss.outliers(model, pixels, rule=rule_of(options.rule), **batch)
    sinks = ss.vision_sinks(model, pixels, spectra or None, epsilon=options.epsilon, **batch)
    record: dict[str, Any] = {
        "model": model.name,
        "family": model.family,
        "pixels": pixels.record,
        "reads": None if spectrum is None else f"{spectrum.matrix}, rank {spectrum.rank} of {spectrum.d}",
        "outliers": found.record() | {"layers": found.summary().to_dict("records")},
        "sinks": sinks.record(),
        "circuits": {},
    }
    tables: list[Any] = [outlier_table(found), sink_table(sinks)]
    # circuits, positions and probes, where there is something to measure
    if spectrum is not None:
        for sink in sinks.sinks:
            kind = str(sink.token)
            heads = ss.no_op_circuits(model, pixels, spectrum, kind, **batch).heads
            record["circuits"][kind] = heads.drop(columns="ranks").to_dict("records")
            tables.append(circuit_table(kind, heads))
    if found.member.any() and len(pixels) >= 4 and found.strongest is not None:
        places = ss.vision.outlier_places(found)
        probes = ss.vision.token_probes(found, **batch)
        record["places"] = places.to_dict("records")
        record["probes"] = probes.to_dict("records")
        tables += [place_table(places), probe_table(probes)]
    if options.registers:
        repair(options, found, images, record, tables)
    if options.figures is not None:
        draw(found, sinks, images, options.figures)
    show(options.json, record, Group(*tables))


def repair(
    options: Vision,
    found: ss.vision.Outliers,
    images: ss.Images,
    record: dict[str, Any],
    tables: list[Any],
) -> None:
    """Measure test-time registers and their controls, and add them to the record and the tables.

    Where there are no outliers, a warning says so and nothing is measured.

    Args:
        options: the options of the command.
        found: the outliers.
        images: the images, for the figure.
        record: the record that is extended.
        tables: the tables that are extended.

    """
    pixels, model = found.pixels, found.pixels.model
    batch: dict[str, Any] = {"measured": found, "batch_size": options.batch_size}
    record["register_neurons"], record["registers"] = [], []
    try:
        neurons = ss.vision.register_neurons(
            model, pixels, layer=options.layer, count=options.neurons, **batch
        )
    except ss.InputError as error:
        warnings.warn(f"no test-time registers: {error}", ss.SpectralWarning, stacklevel=2)
        return
    changed = ss.vision.register_repair(
        model, pixels, neurons, registers=options.registers, layer=options.layer, **batch
    )
    record["register_neurons"] = neurons.to_dict("records")
    record["registers"] = changed.to_dict("records")
    tables.append(repair_table(changed, options.registers))
    if options.figures is not None:
        maps = ss.vision.register_maps(
            model, pixels, neurons, registers=options.registers, layer=options.layer
        )
        options.figures.mkdir(parents=True, exist_ok=True)
        shown = [images[i] for i in range(min(SHOWN, len(images)))]
        ss.figures.registers(shown, maps, options.figures / "registers.png")


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


def draw(found: ss.vision.Outliers, sinks: Any, images: ss.Images, folder: Path) -> None:
    """Draw norm maps at four layers, outliers by layer, and attention by head and on the images."""
    import numpy as np  # here, so that --help does not import it

    folder.mkdir(parents=True, exist_ok=True)
    last = found.norm.shape[1] - 2
    layers = sorted({-1, last // 3, 2 * last // 3, last})
    shown = range(min(SHOWN, len(images)))
    ss.figures.vision_sinks(sinks.by_head(), folder / "attention.png")
    maps = {layer: np.stack([found.map(image, layer) for image in shown]) for layer in layers}
    cutoffs = {layer: float(found.cutoff[layer + 1]) for layer in layers}
    ss.figures.norm_maps([images[i] for i in shown], maps, cutoffs, folder / "norms.png")
    ss.figures.attention_maps(
        np.stack([found.pixels[image].numpy() for image in shown]),
        [sinks.maps(layer) for layer in layers if layer >= 0],
        [f"layer {layer}" for layer in layers if layer >= 0],
        1 / sinks.length,
        folder / "attention_maps.png",
    )
    ss.figures.outlier_shares(found.summary(), found.pixels.model.prefix, folder / "outliers.png")


def outlier_table(found: ss.vision.Outliers) -> Any:
    """Make the table of outliers by layer."""
    record = found.record()
    title = (
        f"Outlier patches of {found.model}, {record['images']} images of {record['patches']} patches; "
        f"onset layer {plain(record['onset_layer'])}"
    )
    prefix = found.pixels.model.prefix
    columns = ("layer", "outliers", "images", "largest norm", *prefix)
    rows = [
        (
            "embedding" if row["layer"] < 0 else str(row["layer"]),
            spread(row, "share", "low", "high"),
            str(row["images"]),
            f"{row['largest'] / row['median']:.2f}",
            *(f"{row[name]:.2f}" for name in prefix),
        )
        for row in found.summary().to_dict("records")
    ]
    return table(title + "; norms in medians of patches", columns, rows)


def sink_table(sinks: ss.vision.VisionSinks) -> Any:
    """Make the table of the attention that each kind of token receives."""
    title = (
        f"Attention by kind of token, T = {sinks.length}, epsilon = {sinks.epsilon:g}, onset layer "
        f"{plain(sinks.onset_layer)}"
    )
    found = {sink.token: sink for sink in sinks.sinks}
    rows: list[tuple[str, ...]] = []
    for row in sinks.by_kind().to_dict("records"):
        rows.append(
            (
                row["kind"],
                spread(row, "sink_rate"),
                f"{spread(row, 'mass')}\nuniform {row['uniform']:.3f}",
                spread(row, "weighted"),
                f"{row['share_of_images']:.0%}",
                *(dark_of(found.get(row["kind"]), name) for name in sinks.conventions),
            )
        )
    shares = (f"dark share,\n{name}" for name in sinks.conventions)
    columns = ("token", "sink rate", "attention", "norm-weighted", "sink in images", *shares)
    return table(title, columns, rows)


def dark_of(sink: ss.sinks.Sink | None, convention: str) -> str:
    """Format the dark share of a sink, with that of the tokens that are not sinks below it."""
    if sink is None:
        return "-"
    share = sink.conventions[convention]
    return f"{plain(share.share.value)}\nothers {plain(share.others.value)}"


def circuit_table(kind: str, heads: pd.DataFrame) -> Any:
    """Make the table of heads with a no-op circuit at one kind of token."""
    rows = [
        (
            f"{row['layer']}.{row['head']}",
            spread(row, "attention"),
            spread(row, "value_ratio"),
            f"{row['top_two']:.2f}\nrandom {row['random_top_two']:.2f}",
            f"{row['always_on']:.2f}",
            f"{row['rival']:.2f}",
        )
        for row in heads[heads["circuit"]].to_dict("records")
    ]
    columns = ("head", "to sink", "value ratio", "two modes", "query always on", "next key")
    return table(f"No-op circuits at {kind}", columns if rows else ("head",), rows or [("none",)])


def place_table(places: pd.DataFrame) -> Any:
    """Make the table of the positions of outliers, compared with other patches."""
    rows = [
        (
            f"{row['quantity']}, {row['control']}",
            plain(row["outliers"]),
            plain(row["others"]),
            spread(row, "difference", "low", "high"),
        )
        for row in places.to_dict("records")
    ]
    return table(
        "Position of outliers, and similarity to their neighbours",
        ("quantity, control", "outliers", "others", "difference"),
        rows,
    )


def probe_table(probes: pd.DataFrame) -> Any:
    """Make the table of what linear probes read from outliers, other patches and [CLS]."""
    rows = [
        (question, *(spread(by[name], "mean", "low", "high") if name in by else "-" for name in READ))
        for question, part in probes.groupby("question", sort=False)
        for by in [part.set_index("tokens").to_dict("index")]
    ]
    return table("Linear probes of tokens, at the layer with most outliers", ("", *READ), rows)


READ = ("outliers", "others", "cls", "shuffled")
"""Kinds of tokens in the table of the probes."""


def repair_table(repair: pd.DataFrame, registers: int) -> Any:
    """Make the table of the effect of test-time registers, and of the controls."""
    last = repair["layer"].max()
    chosen = repair[repair["layer"].isna() | (repair["layer"] == last)]
    rows = [
        (str(state), str(row["measure"]), spread(row, "mean", "low", "high"))
        for state, part in chosen.groupby("state", sort=False)
        for row in part.to_dict("records")
    ]
    return table(
        f"Effect of {registers} test-time registers on the last layer and the output",
        ("state", "measure", "mean"),
        rows,
    )


def spread(row: Any, name: str, low: str = "", high: str = "") -> str:
    """Format a mean with its interval."""
    low, high = low or f"{name}_low", high or f"{name}_high"
    return f"{plain(float(row[name]))} [{plain(float(row[low]))}, {plain(float(row[high]))}]"
