"""Modes of a bilinear form on data: pairs of directions whose products add up to every score."""

# torch is typed only in part:
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

RANK = 1e-12
"""Second moments below this share of the largest are rounding of float32 data [ours]."""


@dataclass(frozen=True, eq=False)
class Modes:
    """Pairs of directions of a head's space: `q . k = sum_m strength_m (q . query_m)(k . key_m)`.

    The singular value decomposition of the scores of all queries with all keys, from their second moments:
    `C_q^(1/2) C_k^(1/2) = U S V^T`, `query = C_q^(-1/2) U`, `key = C_k^(-1/2) V`. Over the data each query
    side and each key side has mean square 1, and sides of different modes are uncorrelated, so a mode's
    `strength` is the root mean square of its part of the scores. The sum is exact for every query and key of
    the data, whatever norms, biases, rotations and shared keys made them; a change of basis of the head's
    space changes no side. For white inputs, without biases and rotations, this is the SVD of `W_Q^T W_K`.
    [ours]
    """

    strength: Float[Tensor, "*batch modes"]
    query: Float[Tensor, "*batch size modes"]
    key: Float[Tensor, "*batch size modes"]

    @classmethod
    def of(
        cls, queries: Float[Tensor, "*batch size size"], keys: Float[Tensor, "*batch size size"]
    ) -> "Modes":
        """From second moments `mean of q q^T` and `mean of k k^T`, strongest first; float64."""
        (root_q, inverse_q), (root_k, inverse_k) = roots(queries), roots(keys)
        u, s, vt = torch.linalg.svd(root_q @ root_k)
        return cls(s, inverse_q @ u, inverse_k @ vt.mT)

    def parts(self, cross: Float[Tensor, "*batch size size"]) -> Float[Tensor, "*batch modes"]:
        """Return the part of each mode in the mean of `q . k`; the parts add up to the trace of `cross`.

        `cross` is the mean of `q k^T`.
        """
        return self.strength * (self.query * (cross @ self.key)).sum(-2)

    def take(self, order: Int[Tensor, "*batch kept"]) -> "Modes":
        """Return some modes, in the given order."""
        columns = order.unsqueeze(-2).expand(*self.query.shape[:-1], order.shape[-1])
        return Modes(
            self.strength.gather(-1, order), self.query.gather(-1, columns), self.key.gather(-1, columns)
        )


def random_parts(
    queries: Float[Tensor, "*batch size size"], cross: Float[Tensor, "*batch size size"], seed: int
) -> Float[Tensor, "*batch size"]:
    """Return the parts for a random orthonormal basis of the whitened queries: the control of `parts`."""
    root, inverse = roots(queries)
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(queries.shape[-1], queries.shape[-1], generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(normal).Q.to(queries.device)
    return (basis * (inverse @ cross @ root @ basis)).sum(-2)


def roots(moment: Float[Tensor, "*batch size size"]) -> tuple[Tensor, Tensor]:
    """Return the symmetric square root of a second moment, and its pseudo-inverse."""
    values, vectors = torch.linalg.eigh(moment.double())
    held = values > RANK * values[..., -1:].clamp_min(torch.finfo(torch.float64).tiny)
    root = torch.where(held, values, 0.0).sqrt()
    inverse = torch.where(held, root.clamp_min(torch.finfo(torch.float64).tiny).reciprocal(), 0.0)
    return vectors * root.unsqueeze(-2) @ vectors.mT, vectors * inverse.unsqueeze(-2) @ vectors.mT
