"""The explorer of texts and images: the numbers of every token, measured before the page is made."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
from torch import Tensor

from spectral_sinks.data.images import Images
from spectral_sinks.data.pixels import Pixels
from spectral_sinks.data.texts import Windows, cut
from spectral_sinks.errors import InputError
from spectral_sinks.measure.residual.matrix_spectrum import by_convention, read_spectra
from spectral_sinks.models.checkpoint import find_source
from spectral_sinks.models.configuration import is_vision
from spectral_sinks.models.embedded import DEFAULT
from spectral_sinks.models.language import LanguageModel
from spectral_sinks.models.loading import load
from spectral_sinks.models.loading_vision import load_vision
from spectral_sinks.models.vision import VisionModel
from spectral_sinks.pages.explorer_page import MOST, Explorer
from spectral_sinks.pages.image_explorer import ImageExplorer, Pictures, explore_images
from spectral_sinks.pages.model_report import provenance
from spectral_sinks.pages.token_readings import TokenReading, read_tokens
from spectral_sinks.pages.token_text import ShownToken, direction, shown_tokens
from spectral_sinks.spectra.conventions import Convention
from spectral_sinks.spectra.spectrum import Spectrum


@dataclass(frozen=True, eq=False)
class TextReading(TokenReading):
    """The numbers of one text."""

    ids: list[int]
    tokens: list[ShownToken]
    direction: str

    @property
    def title(self) -> str:
        words = "".join(token.label for token in self.tokens if token.kind == "text").replace("␣", " ")
        return f"{words.strip()[:40]}… ({len(self.ids)} tokens)"

    def shown(self) -> dict[str, Any]:
        return {
            "ids": self.ids,
            "shown": [token.text for token in self.tokens],
            "labels": [token.label for token in self.tokens],
            "kinds": [token.kind for token in self.tokens],
            "direction": self.direction,
        }


@dataclass(frozen=True, eq=False, repr=False)
class TextExplorer(Explorer[TextReading]):
    """The numbers of one to twelve texts, and the page that shows them."""

    inputs: ClassVar[str] = "texts"
    template: ClassVar[str] = "text_explorer.html.j2"
    view: ClassVar[str] = "text_view.js"

    @property
    def texts(self) -> tuple[TextReading, ...]:
        """The numbers of each text."""
        return self.readings

    @property
    def table(self) -> pd.DataFrame:
        """One row per text and token: `text`, `position`, `id`, `token`, `nll`, and the change of the NLL
        under each filter, named as in `delta_nll dark exit 0`.
        """
        parts: list[pd.DataFrame] = []
        for index, text in enumerate(self.texts):
            columns: dict[str, Any] = {
                "text": index,
                "position": range(len(text.ids)),
                "id": text.ids,
                "token": [token.label for token in text.tokens],
                "nll": np.nan if text.nll is None else text.nll,
            }
            for (name, layer), reading in text.filtered.items():
                change = np.nan if reading.nll is None or text.nll is None else reading.nll - text.nll
                columns[f"delta_nll {name} exit {layer}"] = change
            parts.append(pd.DataFrame(columns))
        return pd.concat(parts, ignore_index=True)


def explore(
    model: LanguageModel | VisionModel | str | Path = DEFAULT,
    texts: Windows | Pictures = (),
    spectrum: Spectrum | Sequence[Spectrum] | None = None,
    *,
    exits: Sequence[int] | None = None,
    convention: Convention | None = None,
    length: int | None = None,
    batch_size: int | None = None,
    command: str = "",
) -> TextExplorer | ImageExplorer:
    """Measure every token of some texts or images, and return an explorer that becomes a page for a browser.

    The page shows the texts with their tokens, or the images with their patches, coloured by the attention
    that they receive, by norm, by the share of a band, or by NLL. A click on a token shows what it attends to
    and what attends to it. Filters that remove a dark band, the head or the middle of the spectrum, or a
    random subspace of equal rank can be switched on; their effects are measured here.

    Args:
        model: a language model, what `load` takes, an image encoder, or its name or folder.
        texts: windows, or one to twelve texts, of each of which one window is read; for an image encoder,
            one to twelve images, prepared by `ss.pixels` or as `ss.images` takes them.
        spectrum: the spectrum whose bands are shown, or several, as from `read_spectra`, of which the
            first has its bands shown, and the others their dark band. By default it is that of the
            unembedding, or of the classifier head of an image encoder; one without a head has bands only of
            a spectrum that is given.
        exits: the layers at whose exits the filters act; by default the one below the layer with the
            strongest sink.
        convention: the convention of the bands where `spectrum` is not given; folded by default.
        length: the number of tokens in a window of a text; by default 256, or the context of the model.
        batch_size: windows or images in a pass.
        command: the command that the page states.

    Raises:
        InputError: for no text or image or more than twelve, an exit that the model does not have, exits
            without a spectrum, a spectrum of another width, images for a language model, texts for an image
            encoder, and a model at a server.

    """
    if isinstance(model, str | Path):
        model = load_vision(model) if is_vision(find_source(str(model))) else load(model)
    if isinstance(model, VisionModel):
        if length is not None:
            raise InputError(f"length {length}: {model.name} reads images, so give their size to ss.pixels")
        return explore_images(
            model,
            texts,
            spectrum,
            exits=exits,
            convention=convention,
            batch_size=batch_size,
            command=command,
        )
    if isinstance(texts, Pixels | Images | Tensor):
        raise InputError(f"{model.name} reads texts, and images were given: give an image encoder")
    if model.remote is not None:
        raise InputError(
            f"an explorer of {model.name} reads every attention weight, which is too much to fetch from a "
            "server: load the model in this process"
        )
    windows = texts if isinstance(texts, Windows) else _windows(model, texts, length)
    if len(windows) > MOST:
        raise InputError(f"{len(windows)} windows: an explorer shows at most {MOST}, so give fewer")
    if spectrum is None:
        spectrum = read_spectra(model, convention=convention)
    spectra = by_convention(model, spectrum)
    found = read_tokens(model, windows, spectra, exits, batch_size)
    absent = dict(found.absent)
    if not model.causal:
        absent["NLL by token"] = "an encoder predicts masked tokens only, and these texts are read unmasked"
    read: list[TextReading] = []
    for row, numbers in zip(windows.rows, found.numbers, strict=True):
        tokens = shown_tokens(row.tolist(), model.tokenizer)
        read.append(TextReading(**numbers, ids=row.tolist(), tokens=tokens, direction=direction(tokens)))
    record = found.record | {
        "documents": list(windows.document),
        "provenance": provenance(model, windows, list(spectra.values()), command),
    }
    return TextExplorer(model.name, tuple(read), found.subspaces, found.filters, found.exits, record, absent)


def _windows(model: LanguageModel, texts: Any, length: int | None) -> Windows:
    if isinstance(texts, list | tuple) and not texts:
        raise InputError("no text is given: give one to twelve texts, or windows from ss.cut")
    return cut(texts, model, length=length, per_document=1)
