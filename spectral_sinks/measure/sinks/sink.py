"""Measurements of one sink: its attention, its layers, the norm of its residual, and its dark shares."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Shaped
from numpy.typing import NDArray
from torch import Tensor

from spectral_sinks.data.texts import Windows
from spectral_sinks.errors import plural
from spectral_sinks.interventions.sites import Site
from spectral_sinks.interventions.tracing import deepest, trace
from spectral_sinks.measure.attention.by_position import PositionAttention
from spectral_sinks.measure.memory import batch_size_for, batches
from spectral_sinks.measure.residual.band_energy import residual_sites
from spectral_sinks.measure.residual.massive import Residuals
from spectral_sinks.measure.sinks.dark_share import DarkShare, as_json, disagreement_on, record_of, row_of
from spectral_sinks.measure.sinks.rule import Place, above, in_documents
from spectral_sinks.models.base import Transformer
from spectral_sinks.models.language import LanguageModel
from spectral_sinks.models.vision import VisionModel
from spectral_sinks.spectra.conventions import suffixes
from spectral_sinks.spectra.spectrum import Spectrum
from spectral_sinks.spectra.subspace import Subspace, random_subspaces
from spectral_sinks.spectra.subspace import shares as shares_in
from spectral_sinks.stats import Estimate

SHOWN = (
    *("position", "token", "share_of_documents", "layer", "onset_layer", "attention_mass", "norm_ratio"),
    *("dark_share", "other_dark_share", "dark"),
)
"""The columns that a table of sinks shows of itself."""

UNKNOWN = Estimate(float("nan"), float("nan"), float("nan"))
"""An estimate without a value."""


@dataclass(frozen=True, repr=False)
class Sink:
    """A sink: a position, or a token that draws attention at other positions.

    Intervals are over documents.
    """

    position: int | None
    """None for a sink that is tied to a token rather than to a position."""
    token: str | None
    """The token as text; None for a position that holds different tokens."""
    tokens: dict[str, int]
    """The most frequent tokens at the sink (at most three), each with the number of windows that have it
    there."""
    documents: int
    """Number of documents in which it is a sink."""
    share_of_documents: float
    layer: int
    """The layer that gives the sink the most attention. The estimates below are for this layer and for the
    residual that it reads."""
    attention_mass: Estimate
    """Attention received (alpha_k), mean over heads."""
    uniform_mass: float
    """The value of `attention_mass` under uniform attention."""
    norm_ratio: Estimate
    """Norm of the sink's residual over the median norm of the tokens of the same text that are not sinks."""
    conventions: dict[str, DarkShare]
    """Share of the sink's residual energy in the dark tail under each convention whose spectrum was given;
    the first decides. Empty where no spectrum was given."""
    onset_layer: int
    """First layer in which the number of documents with this sink reaches half of its maximum over the
    layers."""
    erasure_layer: int | None
    """The layer after the last one that reaches it; None if the last layer of the model does."""
    norm_onset: int | None
    """First exit (-1: the embedding) at which the sink has high norm in half of the documents; None if there
    is none."""
    norm_erasure: int | None
    """The exit after the last one at which it does; None if the last exit does, or none."""

    def __repr__(self) -> str:
        place = repr(self.token) if self.position is None else f"position {self.position}"
        if self.position is not None and self.token is not None:
            place += f" ({self.token!r})"
        end = "the last" if self.erasure_layer is None else str(self.erasure_layer - 1)
        dark = "".join(f", {each.share.value:.3f} dark ({name})" for name, each in self.conventions.items())
        return (
            f"<Sink at {place} in {plural(self.documents, 'document')}: layers {self.onset_layer} to {end}; "
            f"at layer {self.layer} attention {self.attention_mass.value:.3f}, "
            f"norm ratio {self.norm_ratio.value:.3g}{dark}>"
        )

    @property
    def convention(self) -> str | None:
        """The convention of `dark_share`, `other_dark_share` and `dark`; None without a spectrum."""
        return next(iter(self.conventions), None)

    @property
    def dark_share(self) -> Estimate:
        """Share of the sink's residual energy in the dark tail, with the range over random subspaces of the
        same rank. NaN where no spectrum was given.
        """
        return self._decides.share

    @property
    def other_dark_share(self) -> Estimate:
        """Dark share of the tokens that are not sinks."""
        return self._decides.others

    @property
    def dark(self) -> bool | None:
        """Whether the dark tail carries the sink, by `RULE`; None without intervals.

        There are none without a spectrum, or with fewer than two documents.
        """
        return self._decides.dark

    @property
    def disagreement(self) -> str:
        """Where conventions disagree: "dark under folded; not dark under raw", or ""."""
        return disagreement_on(self.conventions)

    @property
    def _decides(self) -> DarkShare:
        return next(iter(self.conventions.values()), DarkShare(UNKNOWN, UNKNOWN))

    def row(self) -> dict[str, Any]:
        """Return one row of a table of sinks: `NAME`, `NAME_low`, `NAME_high`, `NAME_least`, `NAME_most`.

        Columns of the first convention have no suffix; those of another are named as in `dark_share_folded`.
        """
        named = {"convention": self.convention} if self.conventions else {}
        return scalars(self) | named | row_of(self.conventions)

    def record(self) -> dict[str, Any]:
        """Return all fields as a dictionary that JSON can hold, with names that end as in `row`."""
        found: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "conventions":
                found |= as_json(field.name, value) if isinstance(value, Estimate) else {field.name: value}
        named = {"convention": self.convention} if self.conventions else {}
        return found | named | record_of(self.conventions)


def counted_sinks(sinks: Sequence[Sink]) -> str:
    """Return how many sinks there are, in words."""
    return plural(len(sinks), "sink") if sinks else "no sink"


def scalars(result: Any) -> dict[str, Any]:
    """Return the numbers, texts and sites of a result as one flat row.

    An estimate NAME becomes `NAME`, `NAME_low`, `NAME_high`, `NAME_least` and `NAME_most`, without those that
    are not numbers. Tables and other fields are left out.
    """
    return flat_row(vars(result))


def flat_row(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return one flat row from values by name, as `scalars` does from the fields of a result."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Estimate):
            found |= value.all_columns(name)
        elif isinstance(value, Site):
            found[name] = str(value)
        elif value is None or isinstance(value, str | int | float):
            found[name] = value
    return found


def sink_rows(sinks: Sequence[Sink], conventions: Sequence[str]) -> pd.DataFrame:
    """Return one row per sink; a table with the columns of `Sink` and no row if there is none."""
    if sinks:
        return pd.DataFrame([sink.row() for sink in sinks])
    names = [field.name for field in fields(Sink) if field.name != "conventions"]
    names += ["convention"] if conventions else []
    for suffix in suffixes(conventions).values():
        names += [f"dark_share{suffix}", f"other_dark_share{suffix}", f"dark{suffix}"]
    return pd.DataFrame(columns=names)


def measure_sinks(
    model: Transformer,
    attention: PositionAttention,
    residuals: Residuals,
    high: Bool[NDArray[np.bool_], "windows sites tokens"],
    spectra: Mapping[str, Spectrum],
    places: Sequence[Place],
    others: Bool[NDArray[np.bool_], "windows tokens"],
    epsilon: float,
    draws: int,
    batch_size: int | None,
) -> list[Sink]:
    """Measure every sink in the layer that gives it the most attention, and compare it with other tokens.

    Args:
        model: the model that was observed.
        attention: attention received by every position.
        residuals: norms of the residuals at every site. Their shares in the dark tails are measured here if
            they do not hold them, and so are those of tokens in random subspaces.
        high: which tokens have high norm at each site.
        spectra: the spectra whose dark tails are tested, by convention; without one there is no dark share.
        places: the sinks to measure.
        others: the tokens that are not sinks.
        epsilon: attention received above which a head has a sink.
        draws: number of random subspaces of the rank of the dark tail.
        batch_size: windows in a pass.

    Returns:
        The sinks, the one that receives the most attention first.

    """
    # Mean over heads of the attention received by each sink, [windows, layers]
    alphas = [_mean(np.moveaxis(attention.alpha.mean(2), 1, 2), place.member) for place in places]
    # The layer that gives each sink the most attention
    layers = [int(np.nanmean(attention.by_document(alpha), axis=0).argmax()) for alpha in alphas]
    darks = {name: spectrum.dark() for name, spectrum in spectra.items()}
    lacking = [name for name in darks if name not in residuals.shares]
    rank = next((dark.rank for dark in darks.values()), 0)
    randoms = random_subspaces(model.d, rank, draws)
    spaces = [*(darks[name] for name in lacking), *(randoms if darks else [])]
    shares = _shares(model, attention, residuals, spaces, layers, places, bool(lacking), batch_size)
    # Which tokens are sinks of some head, [windows, layers, tokens]
    drawn: NDArray[np.bool_] = np.any(above(attention, epsilon), axis=2)
    found: list[Sink] = []
    for place, alpha, layer, share in zip(places, alphas, layers, shares, strict=True):
        # In which documents and layers it is a sink, and at which sites it has high norm
        present = in_documents(attention, np.any(drawn & place.member[:, None], axis=2))
        documents = int(present.any(1).sum())
        dark = {name: residuals.shares[name][:, layer] for name in darks if name not in lacking}
        dark |= {name: share[..., index] for index, name in enumerate(lacking)}
        random = _mean(share[..., len(lacking) :], place.member)
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
                conventions={
                    name: DarkShare(
                        _over_documents(attention, _mean(dark[name], place.member), random),
                        _over_documents(attention, _mean(dark[name], others)),
                    )
                    for name in darks
                },
                onset_layer=onset,
                erasure_layer=erasure,
                norm_onset=None if rise is None else rise - 1,
                norm_erasure=None if fall is None else fall - 1,
            )
        )
    return sorted(found, key=lambda sink: -sink.attention_mass.value)


def _mean(
    values: Shaped[NDArray[Any], "windows tokens *rest"], member: Bool[NDArray[np.bool_], "windows tokens"]
) -> NDArray[np.float64]:
    """Return the mean of the values over the members of each window, NaN in a window without members."""
    chosen = np.where(member.reshape(*member.shape, *(1,) * (values.ndim - 2)), values, 0.0)
    chosen = chosen.sum(1, dtype=np.float64)
    count = member.sum(1).reshape(-1, *(1,) * (values.ndim - 2))
    return np.where(count > 0, chosen / np.maximum(count, 1), np.nan)


def _norm_ratio(
    norm: Float[NDArray[Any], "windows tokens"],
    place: Place,
    others: Bool[NDArray[np.bool_], "windows tokens"],
) -> Float[NDArray[np.float64], "windows"]:
    """Return the mean norm of the sink's tokens over the median norm of the others, by window.

    The ratio is NaN in a window without sink tokens or without others.
    """
    usual = np.array(
        [np.median(row[other]) if other.any() else np.nan for row, other in zip(norm, others, strict=True)]
    )
    return _mean(norm, place.member) / usual


def _over_documents(
    attention: PositionAttention, values: NDArray[Any], controls: NDArray[Any] | None = None
) -> Estimate:
    """Return the mean and interval over the documents that have a value.

    Each column of `controls` is one random draw; it is averaged over documents first.
    """
    sample = attention.by_document(values)
    if np.isnan(sample).all():
        return UNKNOWN
    drawn = None if controls is None else np.nanmean(attention.by_document(controls), axis=0)
    return Estimate.of(sample[~np.isnan(sample)], drawn)


def _spell(present: Bool[NDArray[np.bool_], "places"]) -> tuple[int | None, int | None]:
    """Return the first index where something is present, and the index after the last one, or None."""
    where = np.flatnonzero(present)
    if not len(where):
        return None, None
    last = int(where[-1]) + 1
    return int(where[0]), last if last < len(present) else None


def _uniform(attention: PositionAttention) -> Float[NDArray[np.float64], "windows tokens"]:
    """Return alpha_k for attention that is spread evenly over all visible keys, ignoring sliding windows."""
    if not attention.causal:
        return np.where(attention.ids >= 0, 1 / attention.lengths[:, None], np.nan)
    sums = np.cumsum(1 / np.arange(attention.length, 0, -1))[::-1]
    return np.broadcast_to(sums / attention.queries, attention.ids.shape)


def _text(model: Transformer, token: int) -> str:
    if isinstance(model, VisionModel):
        return (*model.prefix, "patch")[token]
    tokenizer = getattr(model, "tokenizer", None)
    return str(token) if tokenizer is None else tokenizer.decode([token])


def _shares(
    model: Transformer,
    attention: PositionAttention,
    residuals: Residuals,
    spaces: Sequence[Subspace],
    layers: Sequence[int],
    places: Sequence[Place],
    of_all: bool,
    batch_size: int | None,
) -> list[Float[NDArray[np.float64], "windows tokens spaces"]]:
    """Return the shares of the residuals that some layers read in some subspaces, for each of the layers.

    The passes end with the highest layer that is needed. If not the shares `of_all` tokens are wanted, they
    also end behind the last token of the sinks, which in a causal model reads nothing behind it. The shares
    of tokens come from `residuals` where these hold them.
    """
    found = [np.full((*attention.ids.shape, len(spaces)), np.nan) for _ in layers]
    if not spaces:
        return found
    stream, whole = residual_sites(model), attention.windows
    whole_texts = of_all or not attention.causal
    cut = not whole_texts and isinstance(model, LanguageModel) and not model.positions_by_length
    kinds = [place.position is None if cut else None for place in places]
    left = list(dict.fromkeys(kinds))
    held = residuals.marked_shares
    if held is not None and True in left:
        left.remove(True)
        for index in (place for place, kind in enumerate(kinds) if kind):
            found[index][residuals.marked] = held[:, layers[index]]
    for kind in left:
        group = [index for index, other in enumerate(kinds) if other == kind]
        sites = list(dict.fromkeys(stream[layers[index]] for index in group))
        windows, size = whole, batch_size
        if cut and isinstance(whole, Windows) and isinstance(model, LanguageModel):
            members = np.any([places[index].member for index in group], axis=(0, 1))
            end = max(int(np.flatnonzero(members).max()) + 1, 2)
            windows = Windows.of_ids([row[:end] for row in whole.rows], model, whole.document)
            # As many tokens in a pass as whole windows have
            size = batch_size_for(model, whole.length, batch_size) * (whole.length // end)
        for rows, ids in batches(model, windows, size):

            def readout(final: Tensor, read: dict[Site, Tensor], weights: list[Tensor]) -> dict[Site, Any]:
                return {s: shares_in(spaces, x).double().cpu().numpy() for s, x in read.items()}

            read = trace(model, ids.to(model.device), {}, sites, readout=readout, last=deepest(sites))
            for index in group:
                here = read[stream[layers[index]]]
                found[index][rows, : here.shape[1]] = here
    return found
