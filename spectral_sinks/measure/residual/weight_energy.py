"""Which parts of the residual stream each component reads and writes, from the weights alone."""

from collections.abc import Mapping
from typing import Literal

import pandas as pd
import torch
from torch import Tensor

from spectral_sinks.errors import InputError
from spectral_sinks.models.base import Transformer
from spectral_sinks.models.weights import PARTS, residual_weights
from spectral_sinks.remote.client import remotely
from spectral_sinks.spectra.subspace import Subspace
from spectral_sinks.spectra.subspace_pairs import share_deviation


def weight_shares(
    model: Transformer,
    subspaces: Mapping[str, Subspace],
    *,
    convention: Literal["raw", "folded"] = "raw",
) -> pd.DataFrame:
    """Measure the share of each reader's and writer's energy (squared norm) inside each of some subspaces.

    Args:
        model: a language model or an image encoder.
        subspaces: subspaces of the residual stream, by name.
        convention: `raw` reads the weights themselves. `folded` multiplies them by the gain of the norm that
            the part reads through or, for a writer, that its output passes.

    Returns:
        One row per `part` (q, k, v, gate and up read; o and down write), `layer`, `unit` (the head, a key
        head for k and v; an expert; -1 for a plain MLP) and `subspace`, with its `rank` and the `share`. The
        share is NaN where a matrix is all zero. A random subspace holds `rank / d` on average, with standard
        deviation `null_sd`. `effective_rank` is the number of directions over which the matrix spreads its
        energy.

    Raises:
        InputError: for subspaces of another width.

    Source: Cancedda 2024, section 3.

    """
    if convention not in ("raw", "folded"):
        raise InputError(f"convention {convention!r}: weights are read 'raw' or 'folded'")
    for subspace in subspaces.values():
        if subspace.d != model.d:
            raise InputError(f"a subspace of width {subspace.d} for {model.name} of width {model.d}")
    table = pd.DataFrame(_shares(model, subspaces, convention))
    return table.assign(part=pd.Categorical(table["part"], PARTS, ordered=True))


@remotely
def _shares(
    model: Transformer, subspaces: Mapping[str, Subspace], convention: str
) -> list[dict[str, object]]:
    """Return the rows of `weight_shares`."""
    model.require_weights("who reads and writes what")
    ranks = [subspace.rank for subspace in subspaces.values()]
    bases = torch.cat([subspace.orthonormal().double() for subspace in subspaces.values()], dim=1)
    bases = bases.to(model.device)
    rows: list[dict[str, object]] = []
    for weight in residual_weights(model):
        matrix = weight.rows if convention == "raw" else weight.folded()
        matrix = matrix.to(bases.dtype)
        total = matrix.square().sum()
        energies = (matrix @ bases).square().sum(0).split(ranks)
        effective = _effective_rank(matrix, total)
        for (name, subspace), energy in zip(subspaces.items(), energies, strict=True):
            dead = not float(total)
            rows.append(
                {
                    "part": weight.part,
                    "writes": weight.writes,
                    "layer": weight.layer,
                    "unit": weight.unit,
                    "convention": convention,
                    "subspace": name,
                    "rank": subspace.rank,
                    "share": float("nan") if dead else float(energy.sum() / total),
                    "null_sd": float("nan") if dead else share_deviation(model.d, subspace.rank, effective),
                    "effective_rank": effective,
                }
            )
    return rows


def _effective_rank(matrix: Tensor, total: Tensor) -> float:
    """Return `(tr G)^2 / tr G^2` of `G = W^T W`, the number of directions over which energy spreads."""
    gram = matrix @ matrix.T if matrix.shape[0] < matrix.shape[1] else matrix.T @ matrix
    return float(total.square() / gram.square().sum())
