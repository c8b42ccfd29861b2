"""The command `explore`: one page about the tokens of some texts or images, for a browser."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from tyro.conf import Positional

import spectral_sinks as ss
from spectral_sinks.cli.options import Running, encoder_and_images
from spectral_sinks.cli.output import say, show
from spectral_sinks.cli.parsing import Count, spelled

OF_TEXTS = ("text", "separator", "column", "chat", "length", "per_document", "bos", "remote", "factors")
OF_TEXTS += ("gguf_file", "trust_remote_code")
"""Options that do not apply to images."""

OF_IMAGES = ("size", "square", "matrix")
"""Options that apply to images alone."""


@dataclass(frozen=True)
class Explore(Running):
    """Measure every token of some texts, or of images, and write one page about them, for a browser."""

    images: Positional[tuple[str, ...]] = ()
    """For an image encoder: a folder of images, a .txt list of files, files, a tar file, a data set saved by
    datasets, or the id of one on the hub."""
    out: Path = Path("explore.html")
    """File for the page, which needs nothing besides itself and no network."""
    documents: Count = 4
    """Maximum number of documents or images that are read, at most 12."""
    exits: str | None = None
    """Layers at whose exits the filters act, such as 0,11.
    The default is the layer below the one with the strongest sink."""
    size: Count | None = None
    """Side in pixels of a square; images are resized to as many patches and keep their shape, with sides
    rounded to whole patches. By default images are prepared by the model's own processor."""
    square: bool = field(default=False)
    """Resize images to the square instead, whatever their shape."""
    matrix: str | None = None
    """Matrix whose spectrum has its bands shown for images; by default the classifier head, or name a
    parameter. The matrix embedding is the patch embedding."""


def run_explore(options: Explore) -> None:
    from spectral_sinks.pages.html import page_file, require_plotly  # not for --help

    # before the work
    page_file(options.out)
    require_plotly()
    exits = None if options.exits is None else parse_exits(options.exits)
    given: dict[str, Any] = {
        "exits": exits,
        "batch_size": options.batch_size,
        "command": spelled("explore", options),
    }
    if options.images:
        refuse_given(options, OF_TEXTS, "is for texts, and images are given")
        made: Any = ss.explore(*of_images(options), **given, convention=options.convention)
    else:
        refuse_given(options, OF_IMAGES, "is for images: name them behind the model")
        chosen = replace(options, per_document=options.per_document or 1)
        made = ss.explore(*chosen.prepare(beside=True), **given)
    path = made.save(options.out)
    if options.json:
        record = {
            "model": made.model,
            "page": str(path),
            made.inputs: len(made.readings),
            "tokens": [reading.norm.shape[1] for reading in made.readings],
            "exits": list(made.exits),
            "filters": made.filters,
            "absent": made.absent,
        }
        show(True, record, "")
        return
    for name, reason in made.absent.items():
        say(f"Not measured: {name} ({reason}).")
    say(f"The page is in {path}; open it in a browser.")


def of_images(options: Explore) -> tuple[ss.VisionModel, ss.Pixels, list[ss.Spectrum] | None]:
    """Load the image encoder and the images, and read the spectrum of --matrix."""
    model, pixels = encoder_and_images(options, limit=options.documents)
    if options.matrix is not None:
        convention = options.convention or "raw"
        spectrum = ss.read_spectrum(model, options.matrix, convention=convention, bands=options.bands)
        return model, pixels, [spectrum]
    if model.classes:
        return model, pixels, ss.read_spectra(model, convention=options.convention, bands=options.bands)
    return model, pixels, None


def refuse_given(options: Explore, names: tuple[str, ...], why: str) -> None:
    """Raise InputError where one of some options is given."""
    defaults = {each.name: each.default for each in fields(options)}
    for name in names:
        if getattr(options, name) != defaults[name]:
            raise ss.InputError(f"--{name.replace('_', '-')} {why}")


def parse_exits(text: str) -> list[int]:
    """Return layers written as in 0,11. Raises InputError for anything else."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ss.InputError(f"--exits {text!r}: give layers such as 0,11") from error
