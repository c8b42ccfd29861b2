"""The numbers of every token of some texts or images, which an explorer shows."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spectral_sinks.data.pixels import Pixels
from spectral_sinks.errors import InputError
from spectral_sinks.interventions.sites import Site
from spectral_sinks.interventions.tracing import Interventions, trace
from spectral_sinks.measure.attention.by_position import Inputs, PositionAttention, watch
from spectral_sinks.measure.attention.capture import show_attention
from spectral_sinks.measure.attention.received import EPSILON
from spectral_sinks.measure.memory import batches
from spectral_sinks.measure.nll.scoring import score
from spectral_sinks.measure.residual.band_energy import residual_sites
from spectral_sinks.measure.sinks.rule import above
from spectral_sinks.models.attention_capture import AttentionCall
from spectral_sinks.models.base import Transformer
from spectral_sinks.models.language import LanguageModel
from spectral_sinks.spectra.filters import remove
from spectral_sinks.spectra.spectrum import Spectrum
from spectral_sinks.spectra.subspace import Subspace, random_subspace

MAP_VALUES = 2**25
"""Attention weights of all inputs that are kept for each head; beyond, one map for each layer is kept, and
beyond that the `STRONGEST` weights of each token."""

STRONGEST = 8
"""Weights that are kept for each token of a long input."""

CHANNELS = 5
"""Channels that are kept for each sink and layer."""


@dataclass(frozen=True, eq=False)
class FilterReading:
    """What one filter at one exit does to a text or an image."""

    nll: NDArray[np.float64] | None
    """Nats by token, NaN for the first; None where no NLL is measured."""
    received: NDArray[np.float64] | None
    """Attention received by layer and token, mean over heads."""


@dataclass(frozen=True, eq=False)
class TokenReading(ABC):
    """The numbers of one text or image. Site 0 is the embedding, and site l + 1 the exit of layer l."""

    norm: NDArray[np.float64]
    """Norm of the residual, `[sites, tokens]`."""
    shares: NDArray[np.float64] | None
    """Share of the energy in each subspace of `Explorer.subspaces`, `[sites, subspaces, tokens]`; None
    without a spectrum."""
    nll: NDArray[np.float64] | None
    """Nats by token, NaN for the first; None where no NLL is measured."""
    received: NDArray[np.float64] | None
    """Attention received, `[layers, heads, tokens]`, mean over the queries that the model lets see it."""
    maps: NDArray[np.float32] | None
    """Attention weights, `[layers, heads, queries, keys]`; with one head, it is the mean over heads."""
    strongest: tuple[NDArray[np.int64], NDArray[np.float32]] | None
    """In place of maps, the keys with the largest weights and these weights, `[layers, queries, 8]`."""
    sinks: dict[int, list[list[tuple[int, float]]]]
    """The largest channels and their values at each site, by position of a sink."""
    filtered: dict[tuple[str, int], FilterReading]
    """By name of the filter and exit at which it acts."""

    @property
    @abstractmethod
    def title(self) -> str:
        """What the text or image is called in the list of them."""

    @abstractmethod
    def shown(self) -> dict[str, Any]:
        """Return what the page shows besides numbers, for JSON."""


@dataclass(frozen=True, eq=False)
class Readings:
    """The numbers of all inputs, and what was measured of them."""

    numbers: list[dict[str, Any]]
    """The fields of a `TokenReading`, by input."""
    subspaces: tuple[str, ...]
    filters: dict[str, str]
    exits: tuple[int, ...]
    record: dict[str, Any]
    absent: dict[str, str]


def read_tokens(
    model: Transformer,
    inputs: Inputs,
    spectra: Mapping[str, Spectrum],
    exits: Sequence[int] | None,
    batch_size: int | None,
) -> Readings:
    """Measure every token: its residual, its attention, and what filters at some exits change.

    Args:
        model: a language model or an image encoder.
        inputs: windows, or images.
        spectra: spectra by convention, of which the first has its bands shown; without any, no filter acts.
        exits: the layers at whose exits the filters act; by default the one below the layer with the
            strongest sink.
        batch_size: windows or images in a pass.

    Raises:
        InputError: for an exit that the model does not have.

    """
    absent: dict[str, str] = {}
    attention = _attention(model, inputs, batch_size, absent)
    strongest = _strongest_layer(model, attention)
    chosen = _exits(model, strongest, exits) if spectra else []
    subspaces, removed, described = subspaces_and_filters(model, spectra) if spectra else ({}, {}, {})
    first = next(iter(spectra.values()), None)
    sinks = _sink_positions(attention, len(inputs))
    residuals = _residuals(model, inputs, first, subspaces, sinks, batch_size)
    filtered = {
        (name, layer): _filtered(model, inputs, {Site("exit", layer): remove(space)}, attention, batch_size)
        for name, space in removed.items()
        for layer in chosen
    }
    maps, top = _maps(model, inputs, attention, batch_size, absent)
    numbers = [
        {
            **residuals[place],
            "received": None if attention is None else attention.alpha[place, :, :, :size],
            "maps": None if maps is None else maps[place],
            "strongest": None if top is None else top[place],
            "filtered": {cell: readings[place] for cell, readings in filtered.items()},
        }
        for place, size in enumerate(inputs.lengths)
    ]
    names: list[str] = []
    if first is not None:
        names = [f"band {band}" for band in range(1, first.count)] + [f"band {first.count} (dark)"]
    record = {
        "convention": None if first is None else first.convention,
        "matrix": None if first is None else first.matrix,
        "rank": None if first is None else first.dark().rank,
        "d": model.d,
        "layers": model.layers,
        "heads": model.heads,
        "attention_layers": list(model.attention_layers),
        "long": long_words(inputs),
        "start": min(chosen[0] + 1, model.layers - 1) if chosen else strongest,
    }
    subspace_names = (*names, *(f"dark, {name}" for name in subspaces))
    return Readings(numbers, subspace_names, described, tuple(chosen), record, absent)


def subspaces_and_filters(
    model: Transformer, spectra: Mapping[str, Spectrum]
) -> tuple[dict[str, Subspace], dict[str, Subspace], dict[str, str]]:
    """Return the dark bands of the other conventions, the subspaces that filters remove, and what these are.

    All filters have the rank of the dark band.
    """
    (deciding, first), *others = spectra.items()
    rank, d = first.dark().rank, model.d
    start = (d - rank) // 2
    dark = {name: each.dark() for name, each in spectra.items()}
    removed = {f"dark ({name})": space for name, space in dark.items()}
    removed |= {
        "head": first.directions(0, rank, "head"),
        "middle": first.directions(start, start + rank, "middle"),
        "random": random_subspace(d, rank, 0),
    }
    if isinstance(model, LanguageModel):
        least, most = "that the vocabulary reads least", "that the vocabulary reads most"
    else:
        least, most = (f"with the {end} singular values of {first.matrix}" for end in ("smallest", "largest"))
    described = {f"dark ({name})": f"the {rank} directions {least} ({name} convention)" for name in dark}
    described |= {
        "head": f"the {rank} directions {most} ({deciding} convention)",
        "middle": f"the {rank} directions in the middle of the spectrum ({deciding} convention)",
        "random": f"a random subspace of {rank} directions (seed 0)",
    }
    return {name: each.dark() for name, each in others}, removed, described


def _attention(
    model: Transformer, inputs: Inputs, batch_size: int | None, absent: dict[str, str]
) -> PositionAttention | None:
    """Return the attention received by every position of whole inputs; None where it cannot be read."""
    try:
        return watch(model, inputs, batch_size)
    except InputError as error:
        absent["attention"] = str(error)
        return None


def _strongest_layer(model: Transformer, attention: PositionAttention | None) -> int:
    """Return the layer that gives the first token of texts, or any one token of images, the most attention.

    It is 0 where attention is not known.
    """
    if attention is None:
        return 0
    if isinstance(model, LanguageModel):
        mass = np.nanmean(attention.alpha[..., 0], axis=(0, 2))
    else:
        mass = np.nanmax(attention.alpha.mean(2), axis=-1).mean(0)
    return int(np.nanargmax(mass))


def _exits(model: Transformer, strongest: int, exits: Sequence[int] | None) -> list[int]:
    """Return the layers at whose exits the filters act."""
    if exits is None:
        return [max(0, strongest - 1)]
    if not exits:
        raise InputError("no exit is given: name at least one layer, or leave exits out")
    for layer in exits:
        Site("exit", layer).check(model)
    return sorted(set(exits))


def _sink_positions(attention: PositionAttention | None, count: int) -> list[list[int]]:
    """Return the positions of each input that some head gives more than 0.3 of its attention."""
    if attention is None:
        return [[] for _ in range(count)]
    drawn: NDArray[np.bool_] = np.any(above(attention, EPSILON), axis=(1, 2))
    return [np.flatnonzero(row).tolist() for row in drawn]


def _residuals(
    model: Transformer,
    inputs: Inputs,
    spectrum: Spectrum | None,
    others: Mapping[str, Subspace],
    sinks: list[list[int]],
    batch_size: int | None,
) -> dict[int, dict[str, Any]]:
    """Return the norms, the shares, the NLL, and the largest channels of the sinks, by input."""
    sites = residual_sites(model)
    found: dict[int, dict[str, Any]] = {}
    for places, batch in batches(model, inputs, batch_size):

        def reduce(x: Tensor, places: list[int] = places) -> tuple[Tensor, Tensor | None, list[Any]]:
            shares: Tensor | None = None
            if spectrum is not None:
                inside = [space.share(x)[..., None] for space in others.values()]
                shares = torch.cat([spectrum.shares(x), *inside], -1).cpu()
            top = [{k: _largest(x[row, k]) for k in sinks[place]} for row, place in enumerate(places)]
            return x.float().norm(dim=-1).cpu(), shares, top

        def readout(
            final: Tensor, read: dict[Site, Any], weights: list[Tensor], batch: Tensor = batch
        ) -> tuple[Any, ...]:
            return (*zip(*(read[site] for site in sites), strict=True), _nll(model, final, batch))

        reads = dict.fromkeys(sites, reduce)
        norms, shares, top, nll = trace(model, batch.to(model.device), {}, reads, readout=readout)
        for row, place in enumerate(places):
            found[place] = {
                "norm": torch.stack([each[row] for each in norms]).double().numpy(),
                "shares": None
                if spectrum is None
                else torch.stack([each[row].T for each in shares]).double().numpy(),
                "nll": None if nll is None else nll[row],
                "sinks": {k: [each[row][k] for each in top] for k in sinks[place]},
            }
    return found


def _nll(model: Transformer, final: Tensor, batch: Tensor) -> NDArray[np.float64] | None:
    """Return the NLL of every token of a batch, NaN for the first; None for encoders."""
    if not isinstance(model, LanguageModel) or not model.causal:
        return None
    found = np.full(batch.shape, np.nan)
    found[:, 1:] = score(model, final, batch).nll.cpu().double().numpy()
    return found


def _largest(x: Tensor) -> list[tuple[int, float]]:
    """Return the channels of a residual with the largest magnitude, and their values."""
    where = x.float().abs().topk(min(CHANNELS, len(x))).indices
    return [(int(channel), float(x[channel])) for channel in where]


def _filtered(
    model: Transformer,
    inputs: Inputs,
    edits: Interventions,
    attention: PositionAttention | None,
    batch_size: int | None,
) -> dict[int, FilterReading]:
    """Return the NLL of every token and the attention that it receives under a filter, by input."""
    nll: dict[int, NDArray[np.float64]] = {}
    if isinstance(model, LanguageModel) and model.causal:
        for places, batch in batches(model, inputs, batch_size):
            scored: Any = trace(
                model,
                batch.to(model.device),
                edits,
                readout=lambda final, read, weights, batch=batch: _nll(model, final, batch),
            )
            nll |= dict(zip(places, scored, strict=True))
    received = None if attention is None else watch(model, inputs, batch_size, edits).alpha.mean(2)
    return {
        place: FilterReading(nll.get(place), None if received is None else received[place, :, :size])
        for place, size in enumerate(inputs.lengths)
    }


def long_words(inputs: Inputs) -> str:
    """Return the reason why a page leaves something out of these inputs."""
    return "the images have many patches" if isinstance(inputs, Pixels) else "the texts are long"


Strongest = tuple[NDArray[np.int64], NDArray[np.float32]]


def _maps(
    model: Transformer,
    inputs: Inputs,
    attention: PositionAttention | None,
    batch_size: int | None,
    absent: dict[str, str],
) -> tuple[list[NDArray[np.float32]] | None, list[Strongest] | None]:
    """Return the attention maps of all inputs, or the strongest weights of each token where these are large.

    The maps are those of each head if they are small enough together, and otherwise the mean over heads.
    """
    if attention is None:
        return None, None
    layers, squares = len(model.attention_layers), sum(size * size for size in inputs.lengths)
    whole = layers * squares <= MAP_VALUES
    heads = model.heads if layers * squares * model.heads <= MAP_VALUES else 1
    place_of = {layer: place for place, layer in enumerate(model.attention_layers)}
    maps = [np.zeros((layers, heads, size, size), np.float32) for size in inputs.lengths if whole]
    top: list[Strongest] = []
    for size in inputs.lengths if not whole else ():
        shape = (layers, size, min(STRONGEST, size))
        top.append((np.zeros(shape, np.int64), np.zeros(shape, np.float32)))

    def look(call: AttentionCall, places: list[int]) -> None:
        layer = place_of[call.layer]
        for rows in call.blocks():
            weights = call.weights(rows)
            weights = weights if heads > 1 else weights.mean(1, keepdim=True)
            for row, place in enumerate(places):
                if whole:
                    maps[place][layer, :, rows] = weights[row].cpu().numpy()
                else:
                    values, keys = weights[row, 0].topk(top[place][0].shape[-1])
                    top[place][0][layer, rows] = keys.cpu().numpy()
                    top[place][1][layer, rows] = values.cpu().numpy()

    try:
        show_attention(model, inputs, [look], batch_size=batch_size)
    except InputError as error:
        absent["who attends to whom"] = str(error)
        return None, None
    if not whole:
        absent["attention maps"] = (
            f"{long_words(inputs)}, so only the {STRONGEST} strongest weights of each token are kept, in the "
            "mean over heads"
        )
    elif heads == 1 and model.heads > 1:
        absent["attention maps of single heads"] = (
            f"{long_words(inputs)}, so who attends to whom is the mean over heads"
        )
    return (maps, None) if whole else (None, top)
