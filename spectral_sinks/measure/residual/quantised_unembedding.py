"""The unembedding with quantised weights: its NLL, and what becomes of the bands of its spectrum."""

# scipy is not typed:
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from scipy.linalg import subspace_angles
from torch import Tensor, nn

from spectral_sinks.data.texts import Windows
from spectral_sinks.errors import InputError
from spectral_sinks.interventions.tracing import trace
from spectral_sinks.measure.memory import batches
from spectral_sinks.measure.nll.scoring import predicted, score
from spectral_sinks.models.language import LanguageModel, rows_of, token_rows
from spectral_sinks.models.masked_lm import masked_ids
from spectral_sinks.spectra.fake_quantiser import FakeQuantiser
from spectral_sinks.spectra.spectrum import Spectrum
from spectral_sinks.spectra.subspace import Subspace
from spectral_sinks.stats import document_means


class Unembeddings:
    """A model's unembedding in other weights, on texts whose residuals are computed once."""

    def __init__(self, model: LanguageModel, windows: Windows, batch_size: int | None = None) -> None:
        """Run the untouched model, and keep what the unembedding reads.

        Raises InputError for a model whose unembedding is stored in another form than it acts.
        """
        if not model.unembeds_in_parts:
            raise InputError(
                f"the unembedding of {model.name} is no plain matrix in memory, so it cannot be quantised: "
                "load the model dequantised, without adapters"
            )
        self.model, self.windows = model, windows
        self._read: list[tuple[list[int], Tensor, Tensor]] = []
        for places, ids in batches(model, windows, batch_size):
            ids = ids.to(model.device)
            read = ids if model.causal else masked_ids(model, ids)
            final = trace(model, read, {}, readout=lambda final, read, weights: final.detach())
            self._read.append((places, ids, final))

    @property
    def weight(self) -> Float[Tensor, "vocabulary d"]:
        return self.model.unembedding_weight.detach()

    def nll(self, weight: Float[Tensor, "vocabulary d"] | None = None) -> NDArray[np.float64]:
        """Return the NLL by document, in nats per token, with other weights or with the model's own."""
        owners: list[int] = []
        tokens: list[int] = []
        parts: list[Tensor] = []
        with torch.no_grad(), _weights(self.model, weight):
            for places, ids, final in self._read:
                parts.append(score(self.model, final, ids).nll.double().mean(1).cpu())
                owners += [self.windows.document[place] for place in places]
                tokens += [predicted(self.model, ids.shape[1])] * len(places)
        return document_means(torch.cat(parts).numpy(), owners, tokens)[1]

    def quantised(self, quantiser: FakeQuantiser) -> tuple[Float[Tensor, "vocabulary d"], float]:
        """Return quantised weights, and the share of their energy that the error has."""
        weight = self.weight
        rounded = quantiser(weight)
        error, energy = (float(x.square().sum(dtype=torch.float64)) for x in (rounded - weight, weight))
        return rounded, error / energy

    def angles(self, weight: Float[Tensor, "vocabulary d"], spectra: Sequence[Spectrum]) -> pd.DataFrame:
        """Return how far other weights turn the dark band and the first band of each spectrum.

        The columns are `convention`, `band`, its `rank`, the `largest_angle` between the bands before and
        after in degrees, the share of the band that is `rotated` out of itself (the mean squared sine of the
        principal angles), and that share for a `random` subspace of the same rank.
        """
        rows: list[dict[str, Any]] = []
        for spectrum in spectra:
            after = self._spectrum(weight, spectrum)
            for name, old, new in (
                ("dark", spectrum.dark(), after.dark()),
                ("first", spectrum.band(1), after.band(1)),
            ):
                found = principal_angles(old, new)
                row = {"convention": spectrum.convention, "band": name, "rank": old.rank}
                row["largest_angle"] = float(np.degrees(found.max()))
                row["rotated"] = float(np.mean(np.sin(found) ** 2))
                rows.append(row | {"random": 1 - old.rank / old.d})
        return pd.DataFrame(rows)

    def _spectrum(self, weight: Tensor, like: Spectrum) -> Spectrum:
        tokens = token_rows(self.model.tokenizer) if like.convention == "centred" else None
        return Spectrum.from_matrix(
            rows_of(weight, tokens),
            name=like.matrix,
            convention=like.convention,
            gain=None if like.convention == "raw" else self.model.final_gain,
            centre_residual=self.model.centres_residual,
            bands=like.count,
            use_cache=False,
        )


def principal_angles(a: Subspace, b: Subspace) -> Float[NDArray[np.float64], "min_rank"]:
    """Return the principal angles between two subspaces, in radians, largest first; small ones are exact."""
    return subspace_angles(a.orthonormal().double().cpu().numpy(), b.orthonormal().double().cpu().numpy())


@contextmanager
def _weights(model: LanguageModel, weight: Tensor | None) -> Iterator[None]:
    """Give the unembedding other weights inside the block; a tied embedding keeps its own."""
    head: Any = model.module.get_submodule(model.layout.unembedding)
    own = head.weight
    try:
        if weight is not None:
            head.weight = nn.Parameter(weight.to(own), requires_grad=False)
        yield
    finally:
        head.weight = own
