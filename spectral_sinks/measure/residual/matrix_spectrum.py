"""The spectrum of a model wherever it is: from its weights, its checkpoint, or computed where they are."""

import hashlib
from typing import Any

import torch
from torch import Tensor

from spectral_sinks.errors import InputError
from spectral_sinks.interventions.tracing import trace
from spectral_sinks.models import spectra as matrices
from spectral_sinks.models.embedded import DEFAULT
from spectral_sinks.models.language import LanguageModel
from spectral_sinks.remote.client import remotely
from spectral_sinks.spectra import cache
from spectral_sinks.spectra.spectrum import Convention, Spectrum

COLUMNS = 64
"""Columns of the unembedding that are read at once where the weights are in another process."""


def read_spectrum(
    model: Any = DEFAULT,
    matrix: str = "unembedding",
    *,
    convention: Convention = "raw",
    bands: int = 20,
    revision: str | None = None,
    use_cache: bool = True,
) -> Spectrum:
    """The spectrum of a model's unembedding, embedding, or any matrix named by its parameter.

    From a name or folder, and for a model at a server, only the tensors it needs are read; where a server has
    the unembedding and nobody else, it is decomposed there, and cached by name, commit and server. A named
    matrix reads the residual stream along whichever of its sides has the model's width; a square one is taken
    as `nn.Linear` stores it (columns read). `folded` and `centred` are conventions of the unembedding.

    Of an image encoder "classifier", or the default, is what its head reads of the residual stream, a row for
    each class and token; "embedding" is the patch embedding; without a head, name a matrix. A head of fewer
    rows than d leaves a null space: `rank` and `null()` of the spectrum.

    Raises InputError for an unknown matrix, none named for an image encoder without a head, one without a
    side of the model's width, NaN or Inf, or a convention that the matrix does not have.
    """
    if not isinstance(model, LanguageModel) or model.remote is None or not model.weightless:
        return matrices.read_spectrum(
            model, matrix, convention=convention, bands=bands, revision=revision, use_cache=use_cache
        )
    revision = revision or model.remote.commit
    try:
        return matrices.read_spectrum(
            model.name, matrix, convention=convention, bands=bands, revision=revision, use_cache=use_cache
        )
    except InputError as error:
        if matrix != "unembedding":
            raise
        key = f"{model.fingerprint} {matrix} {convention}"
        fingerprint = hashlib.sha256(key.encode()).hexdigest()
        stored = cache.load(fingerprint) if use_cache else None
        if stored is None:
            try:
                stored = decomposed(model, convention)
            except InputError as other:
                raise InputError(f"{error}; and at the server: {other}") from other
            if use_cache:
                cache.store(fingerprint, *stored)
        values, vectors = stored
        return Spectrum(vectors, values, matrix, convention, model.tied, fingerprint, bands)


@remotely
def decomposed(model: LanguageModel, convention: Convention) -> tuple[Tensor, Tensor]:
    """Singular values `[d]` and right singular vectors `[d, d]` of the unembedding, float64."""
    if model.weightless:
        if convention != "raw":
            raise InputError(
                f"convention {convention!r} reads the final norm, whose gain is not shown: use 'raw'"
            )
        found = Spectrum.from_matrix(_columns(model), use_cache=False)
    else:
        gain = None if convention == "raw" else model.final_gain
        found = Spectrum.from_matrix(
            model.unembedding_weight,
            convention=convention,
            gain=gain,
            centre_residual=model.centres_residual,
            use_cache=False,
        )
    return found.values, found.vectors


def _columns(model: LanguageModel) -> Tensor:
    """The unembedding `[vocabulary, d]`, read through its module: a unit vector gives a column."""

    def readout(final: Tensor, *_: Any) -> Tensor:
        head = model.nn.get(model.layout.unembedding)
        unit = torch.eye(model.d, dtype=final.dtype, device=final.device)
        nothing = head(torch.zeros_like(unit[:1]))
        return torch.cat([(head(part) - nothing).cpu() for part in unit.split(COLUMNS)]).T.contiguous()

    return trace(model, torch.tensor([[0]]), {}, readout=readout)
