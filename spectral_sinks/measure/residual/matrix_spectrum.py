"""The spectrum of a model, from its weights, from its checkpoint, or computed by a server."""

import hashlib
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from spectral_sinks.errors import InputError, SpectralWarning
from spectral_sinks.interventions.tracing import trace
from spectral_sinks.models.base import Transformer
from spectral_sinks.models.embedded import DEFAULT
from spectral_sinks.models.language import LanguageModel, rows_of, token_rows
from spectral_sinks.models.spectra import lacks_head, read_local_spectrum
from spectral_sinks.remote.client import remotely
from spectral_sinks.spectra import cache
from spectral_sinks.spectra.conventions import (
    DARK_CONVENTION,
    DEFAULT_CONVENTION,
    SIDE_BY_SIDE,
    Convention,
)
from spectral_sinks.spectra.spectrum import Spectrum

COLUMNS = 64
"""Columns of the unembedding that are read at once where the weights are in another process."""

EMBEDDING_INSTEAD = (
    "this encoder has no head over the vocabulary, and so no unembedding: its bands are those of the "
    "embedding, from the directions in which words differ most to those in which they differ least"
)
"""What is said where a spectrum of the embedding takes the place of the unembedding's."""


def read_spectrum(
    model: Any = DEFAULT,
    matrix: str = "unembedding",
    *,
    convention: Convention = DEFAULT_CONVENTION,
    bands: int = 20,
    revision: str | None = None,
    gguf_file: str | None = None,
    use_cache: bool = True,
) -> Spectrum:
    """Return the spectrum of a model's unembedding, embedding, or any matrix named by its parameter.

    Given a name or folder, or a model on a server, only the tensors that are needed are read, unless they are
    stored quantised or an adapter belongs to them, for which the model is loaded. If only the server has the
    unembedding, it is decomposed there, and the result is cached by name, commit and server. A named matrix
    reads the residual stream along the side that has the model's width. A square one is taken as
    `nn.Linear` stores it (columns read). If the transform of a head lies between the residual stream and the
    unembedding, as in BERT, the unembedding reads the output of the transform, and `reads_through` of the
    spectrum says so.

    For an image encoder, "classifier" or the default is what its head reads of the residual stream, with one
    row per class and token, and "embedding" is the patch embedding. If it has no head, name a matrix.
    `centred` removes the mean over classes for each token. A head with fewer rows than d leaves a null space:
    see `rank` and `null()` of the spectrum.

    Args:
        model: a model, or its name or folder.
        matrix: "unembedding", "embedding", "classifier", or the name of a parameter.
        convention: `raw`, `folded` or `centred`. Only the unembedding and the classifier have the last two.
            `centred` leaves out rows that no token of the tokenizer uses, with a warning.
        bands: number of bands.
        revision: revision of the checkpoint, where it is read by name.
        gguf_file: name of the GGUF file in a folder or hub repository that is read by name.
        use_cache: whether a cached spectrum is used, and a computed one stored.

    Raises:
        InputError: for an unknown matrix; where none is named for an image encoder without a head; for a
            matrix that does not have a side of the model's width, or that holds NaN or Inf; and for a
            convention that the matrix does not have.

    """
    if not isinstance(model, LanguageModel) or model.remote is None or not model.weightless:
        return read_local_spectrum(
            model,
            matrix,
            convention=convention,
            bands=bands,
            revision=revision,
            gguf_file=gguf_file,
            use_cache=use_cache,
        )
    # First the checkpoint, then the server
    revision = revision or model.remote.commit
    try:
        return read_local_spectrum(
            model.name, matrix, convention=convention, bands=bands, revision=revision, use_cache=use_cache
        )
    except InputError as error:
        if matrix != "unembedding":
            raise
        key = f"{model.fingerprint} {matrix} {convention}"
        fingerprint = hashlib.sha256(key.encode()).hexdigest()
        stored = cache.find(fingerprint) if use_cache else None
        if stored is None:
            try:
                stored = decomposed(model, convention, token_rows(model.tokenizer))
            except InputError as other:
                raise InputError(f"{error}; and at the server: {other}") from other
            if use_cache:
                cache.store(fingerprint, *stored)
        values, vectors = stored
        return Spectrum(vectors, values, matrix, convention, model.tied, fingerprint, bands)


def read_spectra(
    model: Any = DEFAULT,
    *,
    convention: Convention | None = None,
    beside: Sequence[Convention] = SIDE_BY_SIDE,
    bands: int = 20,
    revision: str | None = None,
    gguf_file: str | None = None,
    use_cache: bool = True,
) -> list[Spectrum]:
    """Return the spectrum of the unembedding under the convention that decides what is dark, and others.

    For an encoder without a head, it is the raw spectrum of the embedding, and a `SpectralWarning` says so.

    The first has the convention asked for. A `SpectralWarning` names each of the others that this model does
    not have, such as `folded` where no gain of a final norm is known, and it is left out.

    Args:
        model: a model, or its name or folder.
        convention: the convention of the first spectrum. By default it is `folded`; for a model that does not
            have it, a `SpectralWarning` says that it is `raw`.
        beside: the other conventions.
        bands: number of bands.
        revision: revision of the checkpoint, where it is read by name.
        gguf_file: name of the GGUF file in a folder or hub repository that is read by name.
        use_cache: whether cached spectra are used, and computed ones stored.

    Raises:
        InputError: as `read_spectrum` does, for the first spectrum.

    """
    given: dict[str, Any] = {
        "bands": bands,
        "revision": revision,
        "gguf_file": gguf_file,
        "use_cache": use_cache,
    }
    if lacks_head(model, revision, gguf_file):
        found = [read_spectrum(model, "embedding", convention=convention or "raw", **given)]
        warnings.warn(EMBEDDING_INSTEAD, SpectralWarning, stacklevel=2)
        return found
    try:
        found = [read_spectrum(model, convention=convention or DARK_CONVENTION, **given)]
    except InputError as error:
        if convention is not None:
            raise
        found = [read_spectrum(model, **given)]
        warnings.warn(
            f"what is dark is judged under convention {found[0].convention!r}, since {DARK_CONVENTION!r} "
            f"cannot be read: {error}",
            SpectralWarning,
            stacklevel=2,
        )
        beside = [other for other in beside if other != DARK_CONVENTION]
    for other in beside:
        if other != found[0].convention:
            try:
                found.append(read_spectrum(model, convention=other, **given))
            except InputError as error:
                warnings.warn(
                    f"nothing is shown under convention {other!r}: {error}", SpectralWarning, stacklevel=2
                )
    return found


def by_convention(model: Transformer, spectrum: Spectrum | Sequence[Spectrum]) -> dict[str, Spectrum]:
    """Return one spectrum, or several of one matrix, by convention, in the order given.

    Raises InputError for none, for a spectrum of another width, and unless all have the same matrix, the same
    number of bands and different conventions.
    """
    spectra = [spectrum] if isinstance(spectrum, Spectrum) else list(spectrum)
    if not spectra:
        raise InputError("no spectrum is given: give at least one")
    for each in spectra:
        if each.d != model.d:
            raise InputError(f"a spectrum of width {each.d} for {model.name} of width {model.d}")
    found = {each.convention: each for each in spectra}
    if len(found) < len(spectra):
        raise InputError(
            f"spectra of conventions {', '.join(each.convention for each in spectra)}: give each convention "
            "once"
        )
    first = spectra[0]
    for each in spectra[1:]:
        if each.matrix != first.matrix:
            raise InputError(
                f"spectra of {first.matrix} and {each.matrix}: give several conventions of one matrix"
            )
        if each.count != first.count:
            raise InputError(
                f"spectra of {first.count} and {each.count} bands: give the same number of bands"
            )
    return found


@remotely
def decomposed(
    model: LanguageModel, convention: Convention, tokens: Int[Tensor, "tokens"] | None = None
) -> tuple[Tensor, Tensor]:
    """Return the singular values `[d]` and right singular vectors `[d, d]` of the unembedding, float64.

    `tokens` are the rows that `centred` is about; by default they are all.
    """
    if model.weightless:
        if convention != "raw":
            raise InputError(
                f"convention {convention!r} reads the final norm, whose gain is not shown: use 'raw'"
            )
        found = Spectrum.from_matrix(_columns(model), use_cache=False)
    else:
        gain = None if convention == "raw" else model.final_gain
        found = Spectrum.from_matrix(
            rows_of(model.unembedding_weight, tokens if convention == "centred" else None),
            convention=convention,
            gain=gain,
            centre_residual=model.centres_residual,
            use_cache=False,
        )
    return found.values, found.vectors


def _columns(model: LanguageModel) -> Tensor:
    """Return the unembedding `[vocabulary, d]`, read through its module.

    A unit vector at its input gives one column.
    """

    def readout(final: Tensor, *_: Any) -> Tensor:
        head = model.nn.get(model.layout.unembedding)
        unit = torch.eye(model.d, dtype=final.dtype, device=final.device)
        nothing = head(torch.zeros_like(unit[:1]))
        return torch.cat([(head(part) - nothing).cpu() for part in unit.split(COLUMNS)]).T.contiguous()

    return trace(model, torch.tensor([[0]]), {}, readout=readout)
