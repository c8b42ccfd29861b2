"""A sweep as a TOML file: model, texts, spectrum, and grids of cells."""

import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, field_validator

from spectral_sinks.data.document_sources import documents
from spectral_sinks.data.texts import Bos, cut
from spectral_sinks.errors import InputError
from spectral_sinks.measure.residual.matrix_spectrum import read_spectrum
from spectral_sinks.models.embedded import DEFAULT
from spectral_sinks.models.loading import load
from spectral_sinks.models.remote_state import To
from spectral_sinks.spectra.conventions import DEFAULT_CONVENTION, Convention
from spectral_sinks.spectra.filters import Tokens
from spectral_sinks.sweeps.cells import Cell, FillName, Rung, grid
from spectral_sinks.sweeps.content_address import digest
from spectral_sinks.sweeps.definition import Sweep

REMOTE: dict[str | None, To] = {None: False, "ndif": True, "local": "local"}
"""The location of a model, as written in files and on the command line."""


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Texts(_Table):
    """The text of the measurement; the included corpus by default."""

    text: str | None = None
    """A file or a hub data set id."""
    documents: int = Field(default=16, ge=1)
    split: str = "train"
    column: str | None = None
    """"text" by default, or "messages" for chats where the rows have it."""
    separator: str | None = None
    length: int | None = None
    """Tokens in a window."""
    per_document: int | None = 1
    bos: Bos = "auto"
    chat: bool = False
    """Whether the documents are chats, which become windows by the chat template of the tokenizer."""


class SpectrumTable(_Table):
    """The spectrum that the bands belong to."""

    matrix: str = "unembedding"
    convention: Convention = DEFAULT_CONVENTION
    bands: int = Field(default=20, ge=1)


class Grid(_Table):
    """One block of cells: every combination of its lists."""

    site: list[str] = ["exit"]
    layer: list[int | list[int]] | None = None
    """Layers, all of them by default; a list within the list is several at once."""
    keep: list[str] = []
    remove: list[str] = []
    ladder: list[Rung] = []
    kept: list[int] | None = None
    """Bands kept on the rungs of the ladder, all numbers by default."""
    fill: list[FillName] = ["zero"]
    tokens: list[Literal["all", "first", "all-but-first"] | list[int]] = ["all"]
    """Which tokens are filtered; a list is token ids."""
    controls: int = Field(default=0, ge=0, le=10**5)
    """Random subspaces of the rank of each filter."""

    @field_validator("site", "keep", "remove", "ladder", "fill", "tokens", "layer", "kept", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str | int) else value


class SweepFile(_Table):
    """A sweep file as it was read; `SweepFile.read(path)` makes one, `prepare` the sweep itself."""

    model: str = DEFAULT
    """The embedded model's name, a Hugging Face id, or a folder."""
    device: str | None = None
    device_map: str | None = None
    """"auto" distributes a model that is larger than one device over all devices."""
    dtype: str = "auto"
    remote: Literal["ndif", "local"] | None = None
    """"ndif" for the server that nnsight is configured for, "local" for the same path within this machine."""
    factors: str | None = None
    """Dtype in which bases travel to a server; the model's own by default."""
    batch_size: int = Field(default=16, ge=1)
    predict: int | None = Field(default=None, ge=2)
    """Number of predictions of each window that are scored, drawn at random; all of them by default."""
    texts: Texts = Texts()
    spectrum: SpectrumTable = SpectrumTable()
    grid: list[Grid] = Field(min_length=1)
    _path: Path | None = PrivateAttr(None)

    @classmethod
    def read(cls, path: str | Path) -> "SweepFile":
        """Read a sweep file.

        Raises InputError for a file that is missing, is not TOML, or has unknown or wrong entries.
        """
        path = Path(path)
        try:
            file = cls.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}") from error
        except ValidationError as error:
            first = error.errors()[0]
            if first["type"] == "extra_forbidden":
                raise InputError(f"{path}: {_unknown_key(first['loc'])}") from error
            where = ".".join(map(str, first["loc"]))
            given = "" if first["type"] == "missing" else f" (given: {_short(first['input'])})"
            raise InputError(f"{path}: {where}: {first['msg']}{given}") from error
        except (ValueError, RecursionError) as error:  # tomllib also refuses integers of thousands of digits
            raise InputError(f"{path} is not TOML: {error}") from error
        file._path = path
        return file

    def at(self, remote: Literal["ndif", "local"]) -> "SweepFile":
        """Return the same sweep with its model at another location."""
        return self.model_copy(update={"remote": remote})

    @property
    def key(self) -> str:
        return digest(self.model_dump(mode="json"))

    def prepare(self) -> Sweep:
        """Load the model, cut the texts and make the cells. Raises InputError as each of these does."""
        with self._at("model"):
            model = load(
                self.model,
                device=self.device,
                dtype=self.dtype,
                device_map=self.device_map,
                remote=REMOTE[self.remote],
                factors=self.factors,
            )
        texts, reading = self.texts, self.spectrum
        with self._at("texts"):
            text = documents(
                texts.text,
                split=texts.split,
                column=texts.column,
                limit=texts.documents,
                separator=texts.separator,
                chat=texts.chat,
            )
            windows = cut(
                text,
                model,
                length=texts.length,
                per_document=texts.per_document,
                bos=texts.bos,
                chat=texts.chat,
            )
        embedding = None
        with self._at("spectrum"):
            spectrum = read_spectrum(
                model, reading.matrix, convention=reading.convention, bands=reading.bands
            )
            if any("psi" in block.ladder for block in self.grid):
                embedding = read_spectrum(model, "embedding", bands=reading.bands)
        cells: dict[str, Cell] = {}
        for entry, block in enumerate(self.grid):
            with self._at(f"grid.{entry}"):
                for cell in grid(
                    model,
                    windows,
                    spectrum,
                    embedding,
                    sites=block.site,
                    layers=block.layer,
                    keep=block.keep,
                    remove=block.remove,
                    ladder=block.ladder,
                    kept=block.kept,
                    fills=block.fill,
                    tokens=_tokens(block),
                    controls=block.controls,
                ):
                    cells.setdefault(cell.name, cell)
        label = (
            f"{spectrum.matrix}, {spectrum.convention}, {spectrum.count} bands, {spectrum.fingerprint[:16]}"
        )
        with self._at("grid"):
            return Sweep.of(
                model,
                windows,
                cells.values(),
                batch_size=self.batch_size,
                spectrum=label,
                predict=self.predict,
            )

    @contextmanager
    def _at(self, entry: str) -> Iterator[None]:
        """Let errors name the file and the entry in it."""
        try:
            yield
        except InputError as error:
            file = "" if self._path is None else f"{self._path}: "
            raise InputError(f"{file}{entry}: {error}") from error


def _unknown_key(place: Sequence[int | str]) -> str:
    """Say that a key is not known, and which are known in the same table."""
    tables: dict[Any, type[BaseModel]] = {"texts": Texts, "spectrum": SpectrumTable, "grid": Grid}
    fields = tables.get(place[0], SweepFile).model_fields if len(place) > 1 else SweepFile.model_fields
    return f"{'.'.join(map(str, place))} is not known here: choose from {', '.join(fields)}"


def _short(given: Any) -> str:
    try:
        text = repr(given)
    except ValueError:  # an integer of thousands of digits
        return "a very large number"
    return text if len(text) <= 80 else f"{text[:80]}..."


def _tokens(block: Grid) -> Sequence[Tokens]:
    return [which if isinstance(which, str) else frozenset(which) for which in block.tokens]
