"""Attention received by every position, measured one layer and one block of queries at a time."""

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from numpy.typing import NDArray
from torch import Tensor

from spectral_sinks.data.pixels import Pixels
from spectral_sinks.data.texts import Windows
from spectral_sinks.errors import InputError, SpectralWarning, renamed_argument
from spectral_sinks.interventions.tracing import Interventions, trace
from spectral_sinks.measure.attention.received import EPSILON, from_others
from spectral_sinks.measure.memory import Memory, batches
from spectral_sinks.models.attention_capture import AttentionCall, attending, can_attend
from spectral_sinks.models.attention_sdpa import TOKENS
from spectral_sinks.models.base import Transformer
from spectral_sinks.models.language import LanguageModel
from spectral_sinks.models.vision import VisionModel
from spectral_sinks.remote.client import remotely

Inputs = Windows | Pixels
"""The input of a model: windows of tokens, or images."""


@dataclass(frozen=True, eq=False)
class PositionAttention:
    """The attention that every position receives in the first T tokens of each window, by layer and head."""

    windows: Inputs
    """The windows that were read, T tokens each; whole windows if the model is bidirectional."""
    causal: bool
    ids: Int[NDArray[np.int64], "windows tokens"]
    """Token ids. Behind the end of a shorter window they are -1, and all values below are NaN. For images
    this is the kind of each token: its index in the model's prefix, or the number of prefix tokens for a
    patch."""
    total: Float[NDArray[np.float32], "windows layers heads tokens"]
    """Sum over queries of the attention to each position."""
    seen: Float[NDArray[np.float32], "windows layers heads tokens"]
    """Number of queries that can see each position. With sliding windows, fewer than come after it."""
    to_sink_logit: Float[NDArray[np.float32], "windows layers heads"]
    """Share of each row that a learned logit without a value takes (gpt-oss), mean over queries; 0 without
    one."""

    @property
    def length(self) -> int:
        """T, the number of tokens in the longest window read."""
        return self.ids.shape[1]

    @cached_property
    def lengths(self) -> Int[NDArray[np.int64], "windows"]:
        """Number of tokens in each window."""
        return (self.ids >= 0).sum(1)

    @cached_property
    def queries(self) -> Float[NDArray[np.float64], "windows tokens"]:
        """Number of queries in the mean: those at the position and after it, or all if not causal."""
        ends = self.lengths[:, None].astype(np.float64)
        return ends - np.arange(self.length) if self.causal else np.broadcast_to(ends, self.ids.shape)

    @cached_property
    def alpha(self) -> Float[NDArray[np.float64], "windows layers heads tokens"]:
        """alpha_k: the mean over queries i >= k of A[i, k], or over all queries in a bidirectional model.

        Queries whose sliding window excludes k count as 0, as published. (Gu et al. 2025)
        """
        return self.total / self.queries[:, None, None]

    @property
    def alpha_seen(self) -> Float[NDArray[np.float64], "windows layers heads tokens"]:
        """The mean over only those queries that can see k [ours]; NaN where none can."""
        with np.errstate(invalid="ignore"):
            return self.total.astype(np.float64) / self.seen

    def rate(self, epsilon: float = EPSILON) -> Float[NDArray[np.float64], "documents tokens"]:
        """Return Sink^eps_k: the share of a document's (window, layer, head) with alpha_k above epsilon."""
        return self.by_document(_above(self.alpha, epsilon).mean((1, 2)))

    def mass(
        self, members: Bool[NDArray[np.bool_], "windows #layers tokens"]
    ) -> Float[NDArray[np.float64], "windows layers heads"]:
        """Return the attention to some positions of each window together, mean over all queries."""
        chosen = np.where(members[:, :, None], self.total, 0.0)
        return np.nansum(chosen, axis=-1) / self.lengths[:, None, None]

    def uniform(
        self, members: Bool[NDArray[np.bool_], "windows #layers tokens"]
    ) -> Float[NDArray[np.float64], "windows #layers"]:
        """Return the value of `mass` under uniform attention to all visible tokens.

        A query sees itself and all earlier tokens, or all tokens if the model is not causal.
        """
        if not self.causal:
            return members.sum(-1) / self.lengths[:, None]
        shares = np.cumsum(members, axis=-1) / np.arange(1, self.length + 1)
        return shares.mean(-1)

    def by_document(self, values: NDArray[Any]) -> NDArray[np.float64]:
        """Return the mean over the windows of each document, documents in ascending order.

        NaNs are left out.
        """
        owners, values = np.asarray(self.windows.document), np.asarray(values, dtype=np.float64)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a mean of NaNs alone stays NaN
            return np.stack([np.nanmean(values[owners == owner], axis=0) for owner in np.unique(owners)])


def _above(values: NDArray[np.float64], threshold: float) -> NDArray[np.float64]:
    """Return 1 where a value is strictly above the threshold, 0 where it is not, and NaN where it is NaN."""
    return np.where(np.isnan(values), np.nan, values > threshold)


@renamed_argument("tokens", "length")
def attention_by_position(
    model: Transformer, windows: Inputs, *, length: int = TOKENS, batch_size: int | None = None
) -> PositionAttention:
    """Measure the attention received by every position in the first `length` tokens of each window, in every
    head.

    No map of all queries and keys is held, whatever the attention implementation, with two exceptions. Whole
    maps are read if the model has an attention implementation of its own, which may not be a softmax. Then
    the diagonal is left out, since it may hold any value, and a warning reports the sum of the rows. Whole
    maps of eager attention are also read where a server keeps the weights apart from the code that is sent to
    it. A bidirectional model reads its windows, or images, whole. Causal models leave out windows shorter
    than `length`, with a warning.

    Args:
        model: a language model or an image encoder.
        windows: windows of text, or images.
        length: T, the number of tokens read in each window.
        batch_size: windows in a pass.

    Raises:
        InputError: where no window is left, `length` exceeds the context, ids are padded, or attention cannot
            be seen.

    """
    return watch(model, opened(model, windows, length), batch_size)


@remotely
def watch(
    model: Transformer,
    windows: Inputs,
    batch_size: int | None = None,
    edits: Interventions | None = None,
    before: Callable[[list[int]], None] = lambda places: None,
) -> PositionAttention:
    """Measure `attention_by_position` on whole windows, in passes with edits at sites.

    Args:
        model: a language model or an image encoder.
        windows: the windows, which are not cut.
        batch_size: windows in a pass.
        edits: the edit at each site.
        before: is called before each pass with the indices of its windows, in the process of the model.

    """
    model.require_attention("attention by position")
    model.require_equal_heads()
    count, length = len(windows), windows.length
    shape = (count, model.layers, model.heads, length)
    ids = np.full((count, length), -1)
    total, seen = (np.full(shape, np.nan, dtype=np.float32) for _ in range(2))
    sink_logit = np.zeros(shape[:3], dtype=np.float32)
    here, left = list[int](), list[int]()
    observed: dict[int, ReceivedByKeys] = {}

    # A layer's sums are written down before the next layer runs, so that a pass holds those of one
    def write(layer: int, mass: Tensor, visible: Tensor, rest: Tensor) -> None:
        at = (here, layer, slice(None), slice(mass.shape[-1]))
        total[at], seen[at], sink_logit[here, layer] = mass, visible, rest

    def finish() -> None:
        for layer, received in observed.items():
            write(layer, *received.result())
        observed.clear()

    # Attention comes in blocks of queries through a hook, or else as whole maps
    def look(call: AttentionCall) -> AttentionCall:
        finish()
        received = observed[call.layer] = ReceivedByKeys(call)
        return replace(call, observers=(*call.observers, received.add))

    def read(weights: Tensor) -> Tensor:
        sums.extend(weights.float().sum(-1).mean((1, 2)).tolist())
        given = from_others(model, weights)
        write(left.pop(0), *received_in_maps(given, causal(model), softmax=own is None))
        return weights[:0]

    own, sums = model.own_attention, list[float]()
    maps = own is not None or model.weightless or not can_attend(model)
    memory = Memory(model, length)
    for places, rows in batches(model, windows, batch_size):

        def run(start: int, stop: int, places: list[int] = places, rows: Tensor = rows) -> None:
            observed.clear()
            left[:] = range(model.layers)
            here[:] = places[start:stop]
            before(here)
            part = rows[start:stop]
            with nullcontext() if maps else attending(model, look):
                seeing = maps and read
                trace(model, part.to(model.device), edits or {}, readout=lambda *_: None, attention=seeing)
            finish()
            kinds = windows.tokens(part)  # shorter windows fill only the beginning of their rows
            ids[here, : kinds.shape[1]] = kinds

        memory.parts(len(places), 1, run)
    if own is not None:
        warnings.warn(
            f"{model.name} runs {own!r} attention, an implementation of its own: the weights that it "
            f"returns, whose rows sum to {np.mean(sums):.3g} on average (to 1 under softmax), are measured "
            "without the diagonal",
            SpectralWarning,
            stacklevel=3,
        )
    return PositionAttention(windows, causal(model), ids, total, seen, sink_logit)


def received_by_keys(call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
    """Return the results of `ReceivedByKeys` from weights that are computed for this alone."""
    found = ReceivedByKeys(call)
    for rows in call.blocks():
        found.add(rows, call.weights(rows))
    return found.result()


class ReceivedByKeys:
    """The attention that each key of one layer receives, summed up from blocks of weights."""

    def __init__(self, call: AttentionCall) -> None:
        batch, heads, self.queries, _ = call.query.shape
        shape = (batch, heads, call.key.shape[2])
        self.total = torch.zeros(shape, dtype=torch.float32, device=call.query.device)
        self.seen = seen_by_queries(call).float().expand(shape)
        self.has_sink_logit = call.sinks is not None

    def add(self, rows: slice, weights: Float[Tensor, "batch heads rows keys"]) -> None:
        """Count a block of weights, as `AttentionCall.observers` do."""
        self.total[..., : weights.shape[-1]] += weights.detach().sum(2)

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return, by key, the sum over queries of the attention to it, and the number of queries that see it.

        The third value is the mean mass of a learned logit. The shapes are `[batch, heads, keys]`, twice, and
        `[batch, heads]`; all are float32 on the CPU.
        """
        rest = 1 - self.total.sum(-1) / self.queries
        rest = rest if self.has_sink_logit else torch.zeros_like(rest)
        return self.total.cpu(), self.seen.cpu(), rest.cpu()


def seen_by_queries(call: AttentionCall) -> Shaped[Tensor, "#batch #heads keys"]:
    """Return the number of queries that see each key."""
    queries, keys = call.query.shape[2], call.key.shape[2]
    if call.mask is not None or not call.causal:
        return call.visible().sum(2)
    first = torch.arange(keys, device=call.query.device) - (keys - queries)
    return (queries - first.clamp(min=0))[None, None]


def received_in_maps(
    weights: Float[Tensor, "batch heads tokens tokens"], causal: bool, *, softmax: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the results of `ReceivedByKeys` from whole maps.

    With a softmax, a query counts as seeing a key if any query gives weight at that distance (a single weight
    may be rounded to 0), and the rest of a row, up to 1, went to a logit without a value. Without a softmax,
    every later query counts as seeing a key, and no logit is known.
    """
    total = weights.float().sum(2)
    if softmax:
        # Which distances between query and key get any weight
        given, size = (weights > 0).flatten(0, 1).any(0), weights.shape[-1]
        visible = torch.stack([given.diagonal(k).any() for k in range(1 - size, size)])
        place = torch.arange(size, device=given.device)
        seen = visible[place - place[:, None] + size - 1].sum(0).float()
        rest = (1 - weights.float().sum(-1)).mean(-1)
        return total.cpu(), seen.expand_as(total).cpu(), rest.cpu()
    tokens = torch.arange(total.shape[-1], 0, -1, device=total.device)
    seen = (tokens if causal else torch.full_like(tokens, len(tokens))).float().expand_as(total)
    return total.cpu(), seen.cpu(), torch.zeros(total.shape[:2])


def causal(model: Transformer) -> bool:
    """Return whether a token sees only earlier tokens and itself."""
    return getattr(model, "causal", True)


def opened(model: Transformer, windows: Inputs, length: int) -> Inputs:
    """Return the first `length` tokens of each window that has them, or whole windows if bidirectional."""
    check_inputs(model, windows)
    if isinstance(windows, Pixels):
        return windows
    language: Any = model
    _check_padding(language, windows)
    if length < 2:
        raise InputError(f"attention received over {length} tokens: give at least 2")
    if language.context is not None and length > language.context:
        raise InputError(
            f"attention received over {length} tokens: {model.name} has a context of {language.context}"
        )
    if not causal(model):
        return windows
    kept = [place for place, row in enumerate(windows.rows) if len(row) >= length]
    if not kept:
        raise InputError(
            f"attention received is taken over {length} tokens, and the longest window has {windows.length}: "
            f"give longer texts, or take it over fewer (length={windows.length}, --length), which raises it"
        )
    if short := len(windows) - len(kept):
        warnings.warn(
            f"windows shorter than {length} tokens are left out: {short} of {len(windows)}",
            SpectralWarning,
            stacklevel=3,
        )
    return Windows.of_ids(
        [windows.rows[place][:length] for place in kept],
        language,
        [windows.document[place] for place in kept],
        roles=windows.roles and [windows.roles[place][:length] for place in kept],
    )


def check_inputs(model: Transformer, windows: Inputs) -> None:
    """Raise InputError for images given to a language model, and for tokens given to an image encoder."""
    if isinstance(windows, Pixels) != isinstance(model, VisionModel):
        reads = "images: ss.pixels(images, model)" if isinstance(model, VisionModel) else "windows of tokens"
        raise InputError(f"{model.name} reads {reads}, and {type(windows).__name__} were given")


def _check_padding(model: LanguageModel, windows: Windows) -> None:
    """Raise InputError for windows that begin or end with at least two padding tokens, and hold others."""
    pad = getattr(model.tokenizer, "pad_token_id", None)
    pad = model.config.pad_token_id if pad is None else pad
    if pad is None:
        return
    for place, row in enumerate(windows.rows):
        for side, end in (("opens", row[:2]), ("ends", row[-2:])):
            if bool((end == pad).all()) and bool((row != pad).any()):
                raise InputError(
                    f"window {place} {side} with the padding token {pad}: padding shifts positions and "
                    "receives attention; give unpadded windows, which may differ in length"
                )
