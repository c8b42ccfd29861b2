"""Options that several commands share: flags come from the fields, their help from the lines below them."""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

import spectral_sinks as ss

RemoteName = Literal["ndif", "local"]


@dataclass(frozen=True)
class Common:
    """What every command takes."""

    model: Positional[str] = ss.DEFAULT
    """The embedded model's name, a Hugging Face id, or a folder."""
    json: bool = False
    """Print one JSON object and nothing else on standard output."""
    revision: str | None = None
    """Branch, tag or commit of a Hugging Face id."""
    allow_pickle: bool = False
    """Load pickled weights, which can run code."""
    trust_remote_code: bool = False
    """Let a checkpoint run code of its own."""

    def load(self, **options: Any) -> ss.LanguageModel:
        return ss.load(
            self.model,
            revision=self.revision,
            allow_pickle=self.allow_pickle,
            trust_remote_code=self.trust_remote_code,
            **options,
        )


@dataclass(frozen=True)
class Running(Common):
    """What every command that runs a model takes."""

    text: str | None = None
    """A text file, .jsonl, .csv or .parquet, a hub data set id, or - for standard input; the shipped corpus
    by default."""
    separator: str | None = None
    """What separates documents in a text file or on standard input, such as "\\n\\n"; without it, it is one
    document."""
    split: str = "train"
    """Split of a hub data set."""
    column: str = "text"
    """Column of a table or data set that holds the text."""
    documents: int = 48
    """Read at most this many documents."""
    length: int | None = None
    """Tokens in a window, BOS included; 256 by default, or the context where that is shorter."""
    per_document: int | None = None
    """At most this many windows from a document; 2 by default, or all of a text that is one document."""
    bos: Literal["auto", "always", "never"] = "auto"
    """Open windows with BOS: always, never, or as the model's own tokenizer does."""
    batch_size: int = 16
    device: str | None = None
    """Where to run, such as cuda or cpu."""
    dtype: str = "auto"
    """Weights in this dtype, such as bfloat16; the checkpoint's own by default."""
    remote: RemoteName | None = None
    """ndif: at the server that nnsight is configured for; local: the same, rehearsed here."""
    factors: str | None = None
    """Dtype in which bases travel to a server, such as float32; the model's own by default."""
    convention: Literal["raw", "folded", "centred"] = "raw"
    """Convention of the unembedding."""
    bands: int = 20
    """Number of bands."""

    def prepare(self) -> tuple[ss.LanguageModel, ss.Windows, ss.Spectrum]:
        if self.remote == "ndif":
            model = self.load(dtype=self.dtype, remote=True, factors=self.factors, device=self.device)
            spectrum = ss.read_spectrum(model, convention=self.convention, bands=self.bands)
        else:
            spectrum = read_spectrum(self, "unembedding", self.convention, self.bands)
            remote = remote_of(self.remote)
            model = self.load(device=self.device, dtype=self.dtype, remote=remote, factors=self.factors)
        separator = self.separator and self.separator.replace("\\n", "\n").replace("\\t", "\t")
        source: Any = self.text
        if self.text == "-":
            source = sys.stdin.read().split(separator or "\0")
        elif self.text is not None and any(c.isspace() for c in self.text):
            source = Path(self.text)
        texts = ss.documents(
            source, split=self.split, column=self.column, limit=self.documents, separator=separator
        )
        per_document = self.per_document
        if per_document is None and len(texts) > 1:
            per_document = 2
        windows = ss.cut(texts, model, length=self.length, per_document=per_document, bos=self.bos)
        if windows.record["documents"] == 1 and len(windows) > 1:
            warnings.warn(
                "the text is one document: intervals are over its windows, which are not independent",
                ss.SpectralWarning,
                stacklevel=2,
            )
            windows = windows.as_documents()
        return model, windows, spectrum


def remote_of(name: RemoteName | None) -> bool | str:
    """`load`'s word for it."""
    return {None: False, "ndif": True, "local": "local"}[name]


def read_spectrum(options: Common, matrix: str, convention: Any, bands: int) -> ss.Spectrum:
    model = options.load() if options.allow_pickle else options.model  # single tensors need safetensors
    return ss.read_spectrum(model, matrix, convention=convention, bands=bands, revision=options.revision)


def ran(model: ss.LanguageModel) -> dict[str, Any]:
    """Where the model is, if it is elsewhere."""
    return {} if model.remote is None else {"remote": model.remote.record()}
