"""The explorer of images: the numbers of every patch and of the tokens beside the picture."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
from PIL import Image
from torch import Tensor

from spectral_sinks.data.images import Images, images
from spectral_sinks.data.pixels import Pixels, pixels
from spectral_sinks.data.texts import Windows
from spectral_sinks.errors import InputError
from spectral_sinks.measure.residual.matrix_spectrum import by_convention, read_spectra
from spectral_sinks.models.vision import VisionModel
from spectral_sinks.pages.explorer_page import MOST, Explorer
from spectral_sinks.pages.model_report import provenance
from spectral_sinks.pages.token_readings import TokenReading, read_tokens
from spectral_sinks.pages.token_text import visible
from spectral_sinks.spectra.conventions import Convention
from spectral_sinks.spectra.spectrum import Spectrum

Pictures = Pixels | Images | Tensor | Sequence[Any] | str | Path
"""Images as `explore` takes them."""

QUALITY = 90
"""Quality of the pictures on a page, as JPEG has it."""

LABELS = {"cls": "[CLS]", "distillation": "distillation"}
"""Labels of tokens before the patches, as they are usually written."""


@dataclass(frozen=True, eq=False)
class ImageReading(TokenReading):
    """The numbers of one image, whose tokens are those of the prefix and the patches row by row."""

    name: str
    prefix: tuple[str, ...]
    grid: tuple[int, int]
    """Rows and columns of patches."""
    picture: Image.Image
    """The part of the picture that the patches cover, at the size that the encoder reads."""

    @property
    def title(self) -> str:
        rows, columns = self.grid
        return f"{visible(self.name)[:60]} ({columns} x {rows} patches)"

    @property
    def labels(self) -> list[str]:
        """A name for every token; that of a patch says its row and column, from 0."""
        rows, columns = self.grid
        patches = [f"row {row}, column {column}" for row in range(rows) for column in range(columns)]
        return [*(prefix_label(name) for name in self.prefix), *patches]

    def shown(self) -> dict[str, Any]:
        stored = io.BytesIO()
        self.picture.save(stored, "JPEG", quality=QUALITY)
        return {
            "name": visible(self.name),
            "labels": self.labels,
            "prefix": len(self.prefix),
            "grid": list(self.grid),
            "picture": f"data:image/jpeg;base64,{base64.b64encode(stored.getvalue()).decode()}",
        }


def prefix_label(name: str) -> str:
    """Return the label of a token before the patches."""
    for kind, label in (("reg", "register"), ("test", "test-time register")):
        if name.removeprefix(kind).isdigit():
            return f"{label} {name.removeprefix(kind)}"
    return LABELS.get(name, name)


@dataclass(frozen=True, eq=False, repr=False)
class ImageExplorer(Explorer[ImageReading]):
    """The numbers of one to twelve images, and the page that shows them."""

    inputs: ClassVar[str] = "images"
    template: ClassVar[str] = "image_explorer.html.j2"
    view: ClassVar[str] = "image_view.js"

    @property
    def images(self) -> tuple[ImageReading, ...]:
        """The numbers of each image."""
        return self.readings

    @property
    def table(self) -> pd.DataFrame:
        """One row per image, token and layer (-1 for the embedding): `image`, `name`, `position`, `token`,
        `layer`, the `norm` of the residual, the attention `received` (mean over heads), and the share of each
        subspace under its name.
        """
        parts: list[pd.DataFrame] = []
        for index, image in enumerate(self.images):
            for site, norm in enumerate(image.norm):
                columns: dict[str, Any] = {
                    "image": index,
                    "name": image.name,
                    "position": range(len(norm)),
                    "token": image.labels,
                    "layer": site - 1,
                    "norm": norm,
                    "received": np.nan,
                }
                if image.received is not None and site > 0:
                    columns["received"] = image.received[site - 1].mean(0)
                if image.shares is not None:
                    columns |= dict(zip(self.subspaces, image.shares[site], strict=True))
                parts.append(pd.DataFrame(columns))
        return pd.concat(parts, ignore_index=True)


def explore_images(
    model: VisionModel,
    given: Pictures | Windows,
    spectrum: Spectrum | Sequence[Spectrum] | None = None,
    *,
    exits: Sequence[int] | None = None,
    convention: Convention | None = None,
    batch_size: int | None = None,
    command: str = "",
) -> ImageExplorer:
    """Measure every token of some images. The arguments and errors are those of `explore`."""
    read = prepared(model, given)
    if len(read) > MOST:
        raise InputError(f"{len(read)} images: an explorer shows at most {MOST}, so give fewer")
    reason = ""
    if spectrum is None:
        if model.classes:
            spectrum = read_spectra(model, convention=convention)
        else:
            reason = (
                f"{model.name} has no classifier head, so nothing names what is read of its residual stream: "
                "give a spectrum of a matrix, by read_spectrum or --matrix"
            )
    spectra = {} if spectrum is None else by_convention(model, spectrum)
    if not spectra and exits is not None:
        raise InputError(f"exits are those of filters, which need a spectrum, and {reason}")
    found = read_tokens(model, read, spectra, exits, batch_size)
    names = [f"image {place + 1}" for place in range(len(read))]
    if isinstance(read.images, Images):
        names = ["/".join(Path(name).parts[-2:]) for name in read.images.names]
    readings = [
        ImageReading(
            **numbers, name=name, prefix=model.prefix, grid=read.grids[place], picture=seen(read, place)
        )
        for place, (name, numbers) in enumerate(zip(names, found.numbers, strict=True))
    ]
    record = found.record | {"provenance": provenance(model, read, list(spectra.values()), command)}
    return ImageExplorer(
        model.name,
        tuple(readings),
        found.subspaces,
        found.filters,
        found.exits,
        record,
        found.absent | ({"bands and filters": reason} if reason else {}),
    )


def prepared(model: VisionModel, given: Pictures | Windows) -> Pixels:
    """Return images as the model reads them. Raises InputError for none, and for texts and windows."""
    if isinstance(given, Pixels):
        return given
    if isinstance(given, str | Path):
        given = images(given)
    elif isinstance(given, Windows):
        raise InputError(
            f"{model.name} reads images: ss.pixels(images, model), and windows of text were given"
        )
    elif not len(given):
        raise InputError("no image is given: give one to twelve images, or pixels from ss.pixels")
    return pixels(given, model)


def seen(read: Pixels, place: int) -> Image.Image:
    """Return the part of a picture that its patches cover, at the size that the encoder reads."""
    height, width = read[place].shape[-2:]
    rows, columns = read.grids[place]
    side = read.model.patch_size
    whole = read.picture(place).convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    return whole.crop((0, 0, columns * side, rows * side))
