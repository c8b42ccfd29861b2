"""One sink in numbers: how large, since which layer, at what norm, how dark."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from spectral_sinks.interventions.sites import Site
from spectral_sinks.interventions.tracing import trace
from spectral_sinks.measure.attention.by_position import PositionAttention
from spectral_sinks.measure.residual.band_energy import residual_sites
from spectral_sinks.measure.residual.massive import Residuals
from spectral_sinks.measure.sinks.rule import Place, above, in_documents
from spectral_sinks.models.base import Transformer
from spectral_sinks.models.vision import VisionModel
from spectral_sinks.spectra.spectrum import Spectrum
from spectral_sinks.spectra.subspace import Subspace, random_subspace
from spectral_sinks.stats import Estimate


@dataclass(frozen=True)
class Sink:
    """A position, or a token at other positions, that draws attention; intervals are over documents."""

    position: int | None
    """None for a sink that goes with its token."""
    token: str | None
    """As text; None at a position that holds different tokens."""
    tokens: dict[str, int]
    """The most frequent tokens there, and in how many windows."""
    documents: int
    """In how many documents it is a sink."""
    share_of_documents: float
    layer: int
    """The layer that gives it most attention: the numbers below are of this layer and of what it reads."""
    attention_mass: Estimate
    """alpha_k, mean over heads."""
    uniform_mass: float
    """The same of uniform attention."""
    norm_ratio: Estimate
    """Residual norm, in medians of the other tokens of the text."""
    dark_share: Estimate
    """Share of residual energy in the dark band, and the range of random subspaces of that rank; NaN where
    no spectrum was given."""
    other_dark_share: Estimate
    """The same of the tokens that are no sinks."""
    onset_layer: int
    """First layer in which it is a sink of half as many documents as in its best."""
    erasure_layer: int | None
    """First layer after the last such; None if that is the last layer."""
    norm_onset: int | None
    """First exit (-1: the embedding) where it has high norm in half of the documents; None for never."""
    norm_erasure: int | None
    """First exit after the last such; None if that is the last, or there is none."""

    @property
    def dark(self) -> bool | None:
        """Whether the dark band carries it, by `RULE`; None with fewer than two documents."""
        if np.isnan([self.dark_share.low, self.other_dark_share.high]).any():
            return None
        return self.dark_share.low > max(self.dark_share.most, self.other_dark_share.high)

    def record(self) -> dict[str, Any]:
        """All of it, as JSON holds it."""
        found: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            found |= as_json(field.name, value) if isinstance(value, Estimate) else {field.name: value}
        found["random_dark_share"] = [self.dark_share.least, self.dark_share.most]
        return found | {"dark": self.dark}


def as_json(name: str, value: Estimate) -> dict[str, Any]:
    """A mean and its interval under a name."""
    return {name: value.value, f"{name}_interval": [value.low, value.high]}


def measure_sinks(
    model: Transformer,
    attention: PositionAttention,
    residuals: Residuals,
    high: Bool[NDArray[np.bool_], "windows sites tokens"],
    spectrum: Spectrum | None,
    places: Sequence[Place],
    others: Bool[NDArray[np.bool_], "windows tokens"],
    epsilon: float,
    draws: int,
    batch_size: int,
) -> list[Sink]:
    """The numbers of every sink beside other tokens, in the layer that gives it most; largest first."""
    alphas = [_mean(np.moveaxis(attention.alpha.mean(2), 1, 2), place.member) for place in places]
    layers = [int(np.nanmean(attention.by_document(alpha), axis=0).argmax()) for alpha in alphas]
    shares = _dark_shares(model, attention, spectrum, layers, places, others, draws, batch_size)
    drawn: NDArray[np.bool_] = np.any(above(attention, epsilon), axis=2)
    found: list[Sink] = []
    for place, alpha, layer, share in zip(places, alphas, layers, shares, strict=True):
        present = in_documents(attention, np.any(drawn & place.member[:, None], axis=2))
        documents = int(present.any(1).sum())
        onset, erasure = _spell(present.sum(0) >= present.sum(0).max() / 2)
        is_high = attention.by_document(_mean(np.moveaxis(high, 1, 2), place.member))
        rise, fall = _spell(np.nanmean(is_high, axis=0) >= 0.5)
        assert onset is not None, "its best layer counts"
        found.append(
            Sink(
                position=place.position,
                token=None if place.token is None else _text(model, place.token),
                tokens={_text(model, token): count for token, count in place.held.most_common(3)},
                documents=documents,
                share_of_documents=documents / len(present),
                layer=layer,
                attention_mass=_over_documents(attention, alpha[:, layer]),
                uniform_mass=_over_documents(attention, _mean(_uniform(attention), place.member)).value,
                norm_ratio=_over_documents(attention, _norm_ratio(residuals.norm[:, layer], place, others)),
                dark_share=_over_documents(attention, share[:, 0], share[:, 2:]),
                other_dark_share=_over_documents(attention, share[:, 1]),
                onset_layer=onset,
                erasure_layer=erasure,
                norm_onset=None if rise is None else rise - 1,
                norm_erasure=None if fall is None else fall - 1,
            )
        )
    return sorted(found, key=lambda sink: -sink.attention_mass.value)


def _mean(
    values: Float[NDArray[Any], "windows tokens *rest"], member: Bool[NDArray[np.bool_], "windows tokens"]
) -> NDArray[np.float64]:
    """Mean of the values at the members of each window; NaN in a window without any."""
    chosen = np.where(member.reshape(*member.shape, *(1,) * (values.ndim - 2)), values, 0.0).sum(1)
    count = member.sum(1).reshape(-1, *(1,) * (values.ndim - 2))
    return np.where(count > 0, chosen / np.maximum(count, 1), np.nan)


def _norm_ratio(
    norm: Float[NDArray[Any], "windows tokens"],
    place: Place,
    others: Bool[NDArray[np.bool_], "windows tokens"],
) -> Float[NDArray[np.float64], "windows"]:
    """Mean norm of the sink's tokens over the median of the others, by window; NaN without either."""
    usual = np.array(
        [np.median(row[other]) if other.any() else np.nan for row, other in zip(norm, others, strict=True)]
    )
    return _mean(norm, place.member) / usual


def _over_documents(
    attention: PositionAttention, values: NDArray[Any], controls: NDArray[Any] | None = None
) -> Estimate:
    """Mean and interval over the documents that have a value; random controls are columns, averaged first."""
    sample = attention.by_document(values)
    if np.isnan(sample).all():
        return Estimate(float("nan"), float("nan"), float("nan"))
    drawn = None if controls is None else np.nanmean(attention.by_document(controls), axis=0)
    return Estimate.of(sample[~np.isnan(sample)], drawn)


def _spell(present: Bool[NDArray[np.bool_], "places"]) -> tuple[int | None, int | None]:
    """First place where something is present, and the first after the last such, if there is one."""
    where = np.flatnonzero(present)
    if not len(where):
        return None, None
    last = int(where[-1]) + 1
    return int(where[0]), last if last < len(present) else None


def _uniform(attention: PositionAttention) -> Float[NDArray[np.float64], "windows tokens"]:
    """alpha_k of attention spread evenly over all that a query may see but for a sliding window."""
    if not attention.causal:
        return np.where(attention.ids >= 0, 1 / attention.lengths[:, None], np.nan)
    sums = np.cumsum(1 / np.arange(attention.tokens, 0, -1))[::-1]
    return np.broadcast_to(sums / attention.queries, attention.ids.shape)


def _text(model: Transformer, token: int) -> str:
    if isinstance(model, VisionModel):
        return (*model.prefix, "patch")[token]
    tokenizer = getattr(model, "tokenizer", None)
    return str(token) if tokenizer is None else tokenizer.decode([token])


def _dark_shares(
    model: Transformer,
    attention: PositionAttention,
    spectrum: Spectrum | None,
    layers: Sequence[int],
    places: Sequence[Place],
    others: NDArray[np.bool_],
    draws: int,
    batch_size: int,
) -> list[Float[NDArray[np.float64], "windows columns"]]:
    """For each sink: its share in the dark band, that of other tokens, its share in each random subspace."""
    if not layers or spectrum is None:
        return [np.full((len(others), 2 + draws), np.nan) for _ in layers]
    dark = spectrum.dark()
    spaces: list[Subspace] = [dark, *(random_subspace(model.d, dark.rank, seed) for seed in range(draws))]
    stream = residual_sites(model)
    sites = list(dict.fromkeys(stream[layer] for layer in layers))
    found = [np.full((len(others), 2 + draws), np.nan) for _ in layers]
    for rows, ids in attention.windows.batches(batch_size):

        def readout(final: Tensor, read: dict[Site, Tensor], weights: list[Tensor]) -> dict[Site, Any]:
            shares = {s: torch.stack([space.share(x) for space in spaces], -1) for s, x in read.items()}
            return {s: x.double().cpu().numpy() for s, x in shares.items()}

        read = trace(model, ids.to(model.device), {}, sites, readout=readout)
        for values, layer, place in zip(found, layers, places, strict=True):
            here = read[stream[layer]]
            length = slice(attention.windows.tokens(ids).shape[1])
            at = _mean(here, place.member[rows, length])
            values[rows, 0], values[rows, 2:] = at[:, 0], at[:, 1:]
            values[rows, 1] = _mean(here[..., 0], others[rows, length])
    return found
