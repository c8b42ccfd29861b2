"""Options that several commands share.

Each field is a flag, and the string below it is its help text. Help keeps the line breaks of that string.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

import spectral_sinks as ss
from spectral_sinks.cli.parsing import Count
from spectral_sinks.cli.progress import say_cost
from spectral_sinks.spectra.conventions import SIDE_BY_SIDE, Convention

ITSELF = "text:"
"""What stands before a text that is given as it is, in place of its file."""

RemoteName = Literal["ndif", "local"]


@dataclass(frozen=True)
class Common:
    """Options of every command that reads a model."""

    model: Positional[str] = ss.DEFAULT
    """Name of the embedded model, a Hugging Face id, a folder, or a GGUF file."""
    json: bool = False
    """Print one JSON object and nothing else on standard output."""
    revision: str | None = None
    """Branch, tag or commit of a Hugging Face id."""
    gguf_file: str | None = None
    """Name of the GGUF file in a folder that holds several, or in a Hugging Face repository."""
    allow_pickle: bool = False
    """Allow pickled weights, which can run code when they are loaded."""
    trust_remote_code: bool = False
    """Allow a checkpoint to run its own code."""

    def load(self, **options: Any) -> ss.LanguageModel:
        return ss.load(
            self.model,
            revision=self.revision,
            gguf_file=self.gguf_file,
            allow_pickle=self.allow_pickle,
            trust_remote_code=self.trust_remote_code,
            **options,
        )

    def source(self) -> dict[str, Any]:
        """Return the arguments by which `read_spectrum` finds the checkpoint."""
        # A single tensor can be read from safetensors only; pickled weights are loaded as a whole
        model = self.load() if self.allow_pickle else self.model
        return {"model": model, "revision": self.revision, "gguf_file": self.gguf_file}


@dataclass(frozen=True)
class Reading(Common):
    """Options of every command that reads a text."""

    text: str | None = None
    """A text file, .jsonl, .csv, .tsv or .parquet, any of these with .gz, a folder of .txt files,
    the id of a hub data set, - for standard input, or text:WORDS for a text itself.
    By default it is the shipped corpus."""
    separator: str | None = None
    """String between the documents of a text file or of standard input, such as "\\n\\n".
    Without it, the whole text is one document."""
    split: str = "train"
    """Split of a hub data set."""
    column: str | None = None
    """Column of a table or data set that holds the text; by default text."""

    def read(self, limit: int | None, chat: bool = False) -> list[Any]:
        """Return the documents of --text."""
        separator = self.separator and self.separator.replace("\\n", "\n").replace("\\t", "\t")
        source: Any = self.text
        if self.text == "-":
            from spectral_sinks.data.document_sources import decoded, split_text  # not for --help

            raw = getattr(sys.stdin, "buffer", sys.stdin).read()
            text = decoded(raw, "standard input") if isinstance(raw, bytes) else raw
            source = split_text(text, separator)
        elif self.text is not None and self.text.startswith(ITSELF):
            source = [self.text.removeprefix(ITSELF)]
        elif self.text is not None and any(c.isspace() for c in self.text):
            source = Path(self.text)
        return ss.documents(
            source, split=self.split, column=self.column, limit=limit, separator=separator, chat=chat
        )


@dataclass(frozen=True)
class Running(Reading):
    """Options of every command that runs a model."""

    column: str | None = None
    """Column of a table or data set that holds the text.
    The default is text, or with --chat messages where the rows have it."""
    chat: bool = False
    """Read chats: lists of messages with role and content, or texts, each as one message of a user.
    A window is the start of a chat, as the chat template of the tokenizer writes it."""
    documents: Count = 48
    """Maximum number of documents that are read."""
    length: int | None = None
    """Number of tokens in a window, including BOS.
    The default is 256, or the context of the model where that is shorter."""
    per_document: Count | None = None
    """Maximum number of windows from one document.
    The default is 2, or all windows where the text is a single document. A chat gives one."""
    bos: Literal["auto", "always", "never"] = "auto"
    """Whether windows open with BOS; auto does what the tokenizer of the model does."""
    batch_size: Count | None = None
    """Number of windows in a batch; by default as many as the memory holds, at most 16."""
    device: str | None = None
    """Device to run on, such as cuda or cpu."""
    dtype: str = "auto"
    """Dtype of the weights, such as bfloat16; auto is the dtype of the checkpoint."""
    remote: RemoteName | None = None
    """ndif runs the model on the server that nnsight is configured for.
    The value local rehearses such a run in this process."""
    factors: str | None = None
    """Dtype in which bases are sent to a server, such as float32; by default the dtype of the model."""
    convention: Convention | None = None
    """How the unembedding is read: raw as stored, folded with the gain of the final norm.
    The value centred also removes the mean over the vocabulary.
    The default is folded, or raw with a warning where the gain is not known.
    The commands sinks, energy and nll show raw and folded beside it."""
    bands: int = 20
    """Number of bands."""

    def prepare(
        self, *, beside: bool, head: str = ""
    ) -> tuple[ss.LanguageModel, ss.Windows, list[ss.Spectrum]]:
        """Load the model and the text, and read the spectrum of --convention, with raw and folded beside it.

        Without `beside`, only the spectrum of --convention is read. `head` names what needs a head over the
        vocabulary, for the message about an encoder without one.
        """

        def read(**source: Any) -> list[ss.Spectrum]:
            others = SIDE_BY_SIDE if beside else ()
            return ss.read_spectra(**source, convention=self.convention, beside=others, bands=self.bands)

        if self.remote == "ndif":
            model = self.load(dtype=self.dtype, remote=True, factors=self.factors, device=self.device)
            spectra = read(model=model)
        else:
            remote = remote_of(self.remote)
            model = self.load(device=self.device, dtype=self.dtype, remote=remote, factors=self.factors)
            if head:
                model.require_head(head)
            spectra = read(**self.source())
        texts = self.read(self.documents, self.chat)
        per_document = self.per_document
        if per_document is None and len(texts) > 1:
            per_document = 2
        windows = ss.cut(
            texts, model, length=self.length, per_document=per_document, bos=self.bos, chat=self.chat
        )
        if windows.record["documents"] == 1 and len(windows) > 1:
            warnings.warn(
                "the text is one document: intervals are over its windows, which are not independent",
                ss.SpectralWarning,
                stacklevel=2,
            )
            windows = windows.as_documents()
        say_cost(model, windows, self.batch_size)
        return model, windows, spectra


def remote_of(name: RemoteName | None) -> bool | str:
    """Return the argument `remote` of `load` for the value of the option."""
    return {None: False, "ndif": True, "local": "local"}[name]


def why(conventions: Iterable[str]) -> str:
    """Return in brackets what the conventions other than raw do, for a sentence on where they disagree."""
    names = [name for name in conventions if name != "raw"]
    read = f"{' and '.join(names)} read" + ("s" if len(names) == 1 else "")
    return f"({read} the residual through the gain of the final norm, as the vocabulary does)"


def encoder_and_images(options: Any, **reading: Any) -> tuple[ss.VisionModel, ss.Pixels]:
    """Load the image encoder and prepare the images that the options of a command name.

    `reading` goes to `ss.images`. Raises InputError as loading does, and for --square without --size.
    """
    if options.square and options.size is None:
        raise ss.InputError("--square without --size: say the side of the square in pixels")
    model = ss.load_vision(
        options.model,
        revision=options.revision,
        allow_pickle=options.allow_pickle,
        device=options.device,
        dtype=options.dtype,
    )
    source: Any = options.images[0] if len(options.images) == 1 else list(options.images)
    images = ss.images(source, split=options.split, **reading)
    shape = "square" if options.square or options.size is None else "own"
    return model, ss.pixels(images, model, size=options.size, shape=shape)


def bos_record(model: ss.LanguageModel, windows: ss.Windows) -> dict[str, Any]:
    """Compare the untouched NLL with and without BOS, and warn where the policy in use is worse.

    Nothing is compared for a model at a server.
    """
    found = None if model.weightless else ss.nll.compare_bos(model, windows)
    if found is not None and found.advice is not None:
        warnings.warn(found.advice, ss.SpectralWarning, stacklevel=2)
    return {"bos_comparison": None if found is None else found.record()}


def bos_row(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the row of a table for the comparison of `bos_record`; none if nothing was compared."""
    if not (compared := found.get("bos_comparison")):
        return []
    return [
        (
            "NLL with and without BOS",
            f"{compared['with_bos']:.3f}, {compared['without_bos']:.3f} ({compared['windows']} windows)",
        )
    ]


def ran(model: ss.LanguageModel) -> dict[str, Any]:
    """Return the record of the server, or nothing where the model is in this process."""
    return {} if model.remote is None else {"remote": model.remote.record()}
