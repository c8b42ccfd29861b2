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
    record["answers"] = answers(found, sinks, record, options)
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


def answers(
    found: ss.vision.Outliers, sinks: ss.vision.VisionSinks, record: dict[str, Any], options: Vision
) -> list[str]:
    """Return what was found, in sentences with numbers: outliers, attention, no-op heads, registers."""
    lines = [of_images(found.pixels), of_outliers(found), of_attention(sinks), of_no_op(sinks)]
    return [*lines, of_registers(found, record, options)]


def of_images(pixels: ss.Pixels) -> str:
    """Say what the model has read."""
    record = pixels.record
    count = f"{record['images']} image{'s' * (record['images'] != 1)}"
    if pixels.alike:
        sides = (
            f"{record['width']} x {record['height']} pixels ({record['columns']} x {record['rows']} patches)"
        )
        return f"{record['model']} on {count} of {sides}."
    tokens = min(pixels.lengths)
    return (
        f"{record['model']} on {count} that keep their {len(set(pixels.grids))} shapes, in {tokens} to "
        f"{pixels.length} tokens. Sides are rounded to whole patches of {pixels.model.patch_size} pixels, "
        f"which changes proportions by at most {record['stretched']:.1%}."
    )


def of_outliers(found: ss.vision.Outliers) -> str:
    """Say whether there are outlier tokens, since which layer, how many and how large."""
    layers = found.summary()
    ratio = layers["largest"] / layers["median"]
    if found.strongest is None:
        most = int(ratio.argmax())
        return (
            f"Outlier tokens: no. No patch of any image is an outlier in any layer ({found.rule}). The "
            f"largest norm is {ratio[most]:.2f} times the median of its layer, at {layer_name(most - 1)}, "
            f"where the cut-off is {layers['cutoff'][most] / layers['median'][most]:.2f} times."
        )
    row = layers.iloc[found.strongest + 1]
    assert found.onset_layer is not None
    return (
        f"Outlier tokens: yes, since {layer_name(found.onset_layer)}. At {layer_name(found.strongest)}, "
        f"where most are, {row['share']:.2%} of the patches are outliers (95 %: {row['low']:.2%} to "
        f"{row['high']:.2%}), in {row['images']:.0f} of {len(found.pixels)} images. The largest norm is "
        f"{ratio[found.strongest + 1]:.1f} times the median there."
    )


def layer_name(layer: int) -> str:
    return "the embedding" if layer < 0 else f"layer {layer}"


def of_attention(sinks: ss.vision.VisionSinks) -> str:
    """Say where attention goes, in the mean over layers and in the layer where each kind draws most."""
    layers = sinks.by_layer()
    names = {f"to_{name}": TOKEN_NAMES.get(name, name) for name in sinks.prefix}
    names |= {"to_top_patch": "the one patch that draws most"}
    parts = [
        f"{layers[column].mean():.1%} to {name} (most in layer {layers[column].argmax()}: "
        f"{layers[column].max():.1%})"
        for column, name in names.items()
    ]
    rest = f"{layers['to_other_patches'].mean():.1%} to the other patches"
    return (
        f"Attention: over all layers and heads, {', '.join(parts)}, and {rest}. Uniform attention gives each "
        f"token {sinks.uniform.mean():.2%}."
    )


TOKEN_NAMES = {"cls": "[CLS]"}
"""Names of tokens as they are usually written."""


def of_no_op(sinks: ss.vision.VisionSinks) -> str:
    """Say which heads spend their attention on tokens that write nothing, or what comes nearest to that."""
    heads, layers = sinks.heads(), sinks.by_layer()
    wasted = heads[heads["no_op"]]
    most = int(layers["no_op_mass"].argmax())
    rule = f"above {sinks.epsilon:g} of its attention on tokens whose value writes at most 0.2 of the mean"
    if len(wasted):
        shown = ", ".join(f"{row.layer}.{row.head}" for row in wasted.head(12).itertuples())
        more = f" and {len(wasted) - 12} more" if len(wasted) > 12 else ""
        return (
            f"No-op heads: {len(wasted)} of {len(heads)} (layer.head: {shown}{more}). Each spends {rule}. "
            f"Layer {most} spends most on such tokens: {layers['no_op_mass'].max():.1%} of its attention."
        )
    at_sink = heads[heads["attention"] > sinks.epsilon]
    if at_sink.empty:
        row = heads.loc[heads["attention"].idxmax()]
        near = f"No head gives one token so much; the most is {row['attention']:.2f}"
    else:
        row = at_sink.loc[at_sink["value_ratio"].idxmin()]
        near = (
            f"{len(at_sink)} give one token so much, and the nearest of them gives {row['attention']:.2f} to "
            f"a token that writes {row['value_ratio']:.2f} of the mean"
        )
    where = f"layer {row['layer']}, head {row['head']}, at {TOKEN_NAMES.get(row['kind'], row['kind'])}"
    return f"No-op heads: none of {len(heads)} spends {rule}. {near} ({where})."


def of_registers(found: ss.vision.Outliers, record: dict[str, Any], options: Vision) -> str:
    """Say what test-time registers change, or what option measures it."""
    if not options.registers:
        reason = "" if found.strongest is not None else ", once there are outliers that they could take over"
        return f"Registers: not measured. --registers 1 measures what test-time registers change{reason}."
    rows = record["registers"]
    if not rows:
        return "Registers: nothing to change, since no patch is an outlier at the layer that --layer names."
    layer = options.layer % found.pixels.model.layers

    def mean(state: str, measure: str, at: int | None = None) -> float | None:
        here = [
            row["mean"]
            for row in rows
            if (row["state"], row["measure"]) == (state, measure) and (at is None or row["layer"] == at)
        ]
        return here[0] if here else None

    random = [
        row["mean"]
        for row in rows
        if row["state"].startswith("random") and row["measure"] == "outlier share" and row["layer"] == layer
    ]
    count = f"{options.registers} test-time register{'s' * (options.registers > 1)}"
    said = (
        f"Registers: with {count}, the share of outliers at layer {layer} changes from "
        f"{mean('original', 'outlier share', layer):.2%} to {mean('repaired', 'outlier share', layer):.2%}; "
        f"with as many random neurons, it is {min(random):.2%} to {max(random):.2%}."
    )
    kept = mean("repaired", "patch cosine")
    return said + (
        "" if kept is None else f" The other patches keep their output, with a cosine of {kept:.3f}."
    )


def layer_table(found: ss.vision.Outliers, sinks: ss.vision.VisionSinks) -> Any:
    """Make the table of what happens in each layer."""
    outliers = found.summary().set_index("layer")
    columns = ("layer", "outliers", "largest norm", *(f"to {name}" for name in sinks.prefix))
    columns += ("to one patch", "to others", "to no-ops", "no-op heads")
    shares = [f"to_{name}" for name in (*sinks.prefix, "top_patch", "other_patches")] + ["no_op_mass"]
    rows = [
        (
            str(row["layer"]),
            f"{outliers['share'][row['layer']]:.2%}",
            f"{outliers['largest'][row['layer']] / outliers['median'][row['layer']]:.2f}",
            *(f"{row[name]:.3f}" for name in shares),
            str(row["no_op_heads"]),
        )
        for row in sinks.by_layer().to_dict("records")
    ]
    title = "Layer by layer: outliers at its exit, largest norm in medians, shares of its attention"
    return table(title, columns, rows)


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
    chosen = repair[repair["layer"].isna() | (repair["layer"] == repair["layer"].max())]
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
