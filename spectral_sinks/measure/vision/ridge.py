"""Ridge regression in closed form, and a classifier made of it, to test what is linearly readable."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from spectral_sinks.errors import InputError

PENALTIES = tuple(10.0**power for power in range(-4, 5))
"""Ridge penalties that are tried, relative to the number of rows [ours]."""


@dataclass(frozen=True, eq=False)
class Ridge:
    """A linear map to targets from features, which are standardised by the rows of the fit."""

    centre: Float[Tensor, "d"]
    scale: Float[Tensor, "d"]
    weight: Float[Tensor, "d outputs"]
    bias: Float[Tensor, "outputs"]

    def __call__(self, features: Float[Tensor, "rows d"]) -> Float[Tensor, "rows outputs"]:
        return (features.double() - self.centre) / self.scale @ self.weight + self.bias


def ridge(features: Float[Tensor, "rows d"], targets: Float[Tensor, "rows outputs"], penalty: float) -> Ridge:
    """Fit by least squares, plus `penalty * rows` times the squared weights; the bias is not penalised."""
    features, targets = features.double(), targets.double()
    centre, scale = features.mean(0), features.std(0, correction=0)
    scale = torch.where(scale > 0, scale, 1.0)
    x, bias = (features - centre) / scale, targets.mean(0)
    gram = x.T @ x + penalty * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
    return Ridge(centre, scale, torch.linalg.solve(gram, x.T @ (targets - bias)), bias)


@dataclass(frozen=True, eq=False)
class LinearProbe:
    """A ridge classifier: least squares to one column per class, of which the largest is the answer."""

    ridge: Ridge
    classes: Int[Tensor, "classes"]
    penalty: float

    @classmethod
    def fitted(
        cls,
        features: Float[Tensor, "rows d"],
        labels: Int[Tensor, "rows"],
        penalties: Sequence[float] = PENALTIES,
        seed: int = 0,
    ) -> "LinearProbe":
        """Fit on all rows, with the penalty that is best on a fifth of each class, held out to choose it.

        Raises InputError for fewer than two classes, or a class of fewer than two rows.
        """
        classes, counts = labels.unique(return_counts=True)
        if len(classes) < 2 or int(counts.min()) < 2:
            raise InputError(
                f"a linear probe of {len(labels)} rows in {len(classes)} classes, the smallest of "
                f"{int(counts.min()) if len(counts) else 0}: give two classes at least, and two rows of each"
            )
        kept, chosen = split(labels, 0.2, seed)
        targets = (labels[:, None] == classes).double()

        def right(penalty: float) -> float:
            answers = ridge(features[kept], targets[kept], penalty)(features[chosen]).argmax(-1)
            return float((classes[answers] == labels[chosen]).double().mean())

        best = max(penalties, key=lambda penalty: (right(penalty), penalty))
        return cls(ridge(features, targets, best), classes, best)

    def predict(self, features: Float[Tensor, "rows d"]) -> Int[Tensor, "rows"]:
        return self.classes[self.ridge(features).argmax(-1)]


def split(labels: Int[Tensor, "rows"], share: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return the indices of rows kept and of rows held out.

    The share `share` of each class is held out, at least one row, chosen at random.
    """
    generator = torch.Generator().manual_seed(seed)
    kept: list[Tensor] = []
    held: list[Tensor] = []
    for label in labels.unique():
        places = (labels == label).nonzero().flatten()
        places = places[torch.randperm(len(places), generator=generator)]
        count = max(1, round(share * len(places)))
        held.append(places[:count])
        kept.append(places[count:])
    return torch.cat(kept).sort().values, torch.cat(held).sort().values
