"""The command `spectrum`: the singular values of a matrix of a model, and its bands."""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group

import spectral_sinks as ss
from spectral_sinks.cli.options import Common
from spectral_sinks.cli.output import show, table
from spectral_sinks.spectra.conventions import DEFAULT_CONVENTION, Convention


@dataclass(frozen=True)
class SpectrumCommand(Common):
    """Print the singular values and bands of the unembedding or another matrix; reads only that tensor."""

    matrix: str | None = None
    """Matrix: unembedding, embedding, or the name of a parameter.
    The default is the unembedding, or the embedding of an encoder without a head."""
    convention: Convention = DEFAULT_CONVENTION
    """How the unembedding is read: raw as stored, folded with the gain of the final norm.
    The value centred also removes the mean over the vocabulary."""
    bands: int = 20
    """Number of bands."""


def run_spectrum(options: SpectrumCommand) -> None:
    from spectral_sinks.measure.residual.matrix_spectrum import EMBEDDING_INSTEAD  # not for --help
    from spectral_sinks.models.spectra import lacks_head, quantization_noise

    matrix = options.matrix or "unembedding"
    if options.matrix is None and lacks_head(options.model, options.revision, options.gguf_file):
        matrix = "embedding"
        warnings.warn(EMBEDDING_INSTEAD, ss.SpectralWarning, stacklevel=2)
    spectrum = ss.read_spectrum(
        matrix=matrix, convention=options.convention, bands=options.bands, **options.source()
    )
    energy = spectrum.values.square()
    bands = [
        {
            "band": j,
            "directions": stop - start,
            "first": start,
            "largest": float(spectrum.values[start]),
            "smallest": float(spectrum.values[stop - 1]),
            "energy_share": float(energy[start:stop].sum() / energy.sum()),
        }
        for j, (start, stop) in enumerate(zip(spectrum.edges, spectrum.edges[1:], strict=False), start=1)
    ]
    found = {
        "model": options.model,
        "matrix": spectrum.matrix,
        "convention": spectrum.convention,
        "tied": spectrum.tied,
        "reads_through": spectrum.reads_through,
        "d_model": spectrum.d,
        "singular_values": spectrum.values.tolist(),
        "bands": bands,
    }
    rows = [
        (
            str(b["band"]),
            str(b["directions"]),
            f"{b['largest']:.4g}",
            f"{b['smallest']:.4g}",
            f"{b['energy_share']:.4f}",
        )
        for b in bands
    ]
    noise = quantization_noise(
        options.model, spectrum, revision=options.revision, gguf_file=options.gguf_file
    )
    found["quantization_noise"] = None if noise is None else asdict(noise)
    shown: list[Any] = []
    if noise is not None:
        shown.append(
            f"Quantisation noise has a norm of {noise.norm:.3g} beside the smallest singular value of "
            f"{noise.smallest:.4g}. Noise of that size turns {100 * noise.rotated:.2g} % of the dark band "
            f"out of it (largest angle {noise.largest_angle:.2g} degrees)."
        )
    columns = ("band", "directions", "largest singular value", "smallest", "share of energy")
    show(options.json, found, Group(table(repr(spectrum), columns, rows), *shown))
