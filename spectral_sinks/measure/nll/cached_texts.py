"""The NLL of long texts that are read in blocks, through a cache of keys and values."""

import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, QuantizedLayer, StaticLayer

from spectral_sinks.data.joined_texts import join_documents as join_documents
from spectral_sinks.errors import InputError, SpectralWarning
from spectral_sinks.interventions.kv_cache import KVCache, held_bytes
from spectral_sinks.interventions.kv_layer import KVLayer
from spectral_sinks.interventions.tracing import trace
from spectral_sinks.measure.memory import free
from spectral_sinks.measure.nll.scoring import score
from spectral_sinks.models.attention_capture import attending
from spectral_sinks.models.language import LanguageModel
from spectral_sinks.stats import mean_interval


@dataclass(frozen=True)
class CachedNLL:
    """The NLL by position of texts that were read through a cache, with what the cache cost."""

    nll: Float[Tensor, "texts predicted"]
    """Nats; entry t is the NLL of token t + 1."""
    nbytes: int
    """Most bytes that the cache held after a block, over all texts of the batch."""
    tokens_per_second: float
    """Tokens read per second, over all texts of the batch, without the time of the unembedding."""
    tokens_per_processor_second: float
    """The same per second of processor time, which other programs on the machine do not change. It says
    nothing of a GPU."""
    block: int

    def __repr__(self) -> str:
        texts, predicted = self.nll.shape
        return (
            f"NLL of {texts} texts of {predicted + 1} tokens in blocks of {self.block}: "
            f"{float(self.nll.double().mean()):.4f} nats per token, {self.nbytes / 2**20:.3g} MB, "
            f"{self.tokens_per_second:.0f} tokens per second"
        )

    def by_position(self, edges: Sequence[int]) -> pd.DataFrame:
        """Return the mean NLL of the tokens between consecutive positions.

        The table has `start`, `stop` (the position after the last token), `nll` and, over texts, `low` and
        `high` of a 95 % interval. Raises InputError for edges that do not increase or lie outside the text.
        """
        last = self.nll.shape[1] + 1
        if len(edges) < 2 or any(a >= b for a, b in pairwise(edges)):
            raise InputError(f"edges {list(edges)}: expected at least two increasing positions")
        if edges[0] < 1 or edges[-1] > last:
            raise InputError(f"edges {list(edges)}: the predicted tokens stand at positions 1 to {last - 1}")
        rows: list[dict[str, float]] = []
        for start, stop in pairwise(edges):
            means = self.nll[:, start - 1 : stop - 1].double().mean(1).numpy()
            low, high = mean_interval(means)
            rows.append({"start": start, "stop": stop, "nll": float(means.mean()), "low": low, "high": high})
        return pd.DataFrame(rows)


def cached_nll(
    model: LanguageModel,
    ids: Int[Tensor, "texts tokens"],
    cache: Cache | None = None,
    *,
    block: int = 64,
    progress: Callable[[int], object] | None = None,
) -> CachedNLL:
    """Measure the NLL of every token of long texts, which are read in blocks through a cache.

    The tokens of a block see the entries that the cache held before it, and each other causally; then the
    cache drops what is too much. `block=1` is what happens when a model generates. Texts may be longer than
    the context of a model with rotary positions; a warning says so unless the cache counts positions anew and
    is small enough. The cache is emptied first, and holds the last entries afterwards. With a bounded cache
    the memory does not grow with the text, but for the NLL itself.

    Args:
        model: a causal language model in this process.
        ids: texts of equal length, with whatever tokens should open them.
        cache: a `KVCache`, or any cache of transformers; by default one that drops nothing.
        block: tokens that are read at once.
        progress: a function that is called with the number of tokens of each block.

    Returns:
        The NLL by position, the memory of the cache and the speed.

    Raises:
        InputError: for another kind of model, a cache that grows with the text beyond the free memory, the
            `KVCache` of another model, a static cache that is shorter than the text, a `QuantizedCache`,
            fewer than two tokens, ids outside the vocabulary, a block of less than one, and texts beyond the
            context of a model whose positions are learned one by one.

    """
    if not model.causal or model.remote is not None:
        kind = "is an encoder" if not model.causal else "runs on a server"
        raise InputError(
            f"{model.name} {kind}: a text is read through a cache by causal models in this process"
        )
    ids = torch.as_tensor(ids).long()
    if ids.ndim != 2 or not ids.numel() or ids.shape[1] < 2 or block < 1:
        raise InputError(
            f"ids of shape {tuple(ids.shape)} in blocks of {block}: expected [texts, tokens] of at least two "
            "tokens, and blocks of at least one"
        )
    if not 0 <= int(ids.min()) <= int(ids.max()) < model.vocabulary:
        bad = ids[(ids < 0) | (ids >= model.vocabulary)][0]
        raise InputError(f"token id {int(bad)} lies outside the vocabulary of {model.vocabulary}")
    length = ids.shape[1]
    limited = not any(name.endswith("inv_freq") for name, _ in model.module.named_buffers())
    if limited and model.context is not None and length > model.context:
        raise InputError(
            f"{length} tokens: {model.name} ({model.family}) has no rotary positions and a context of "
            f"{model.context}"
        )
    if cache is None:
        cache = DynamicCache(config=model.config)
    _check_cache(model, cache, length)
    _warn_beyond_context(model, cache, length, block)
    cache.reset()
    hook = cache if isinstance(cache, KVCache) and cache.rule.evict == "attention" else None
    losses: list[Tensor] = []
    most, seconds, processor = 0, 0.0, 0.0
    with nullcontext() if hook is None else attending(model, hook):
        for start in range(0, length, block):
            part = ids[:, start : start + block].to(model.device)
            began, worked = time.perf_counter(), time.process_time()
            final = trace(model, part, {}, readout=_final, cache=cache)
            if final.is_cuda:
                torch.cuda.synchronize(final.device)
            seconds += time.perf_counter() - began
            processor += time.process_time() - worked
            most = max(most, held_bytes(cache))
            if not start:
                _check_memory(cache, model.device, part.shape[1], length)
            if progress is not None:
                progress(part.numel())
            if start + block < length:  # the last token of a block predicts the first of the next
                part = ids[:, start : start + block + 1].to(model.device)
                final = torch.cat([final, final[:, -1:]], dim=1)
            if part.shape[1] > 1:
                with torch.no_grad():  # a detached tensor would keep the logits of its block alive
                    losses.append(score(model, final, part).nll.cpu())
    nll = torch.cat(losses, dim=1)
    return CachedNLL(nll, most, ids.numel() / seconds, ids.numel() / max(processor, 1e-9), block)


def _check_cache(model: LanguageModel, cache: Cache, length: int) -> None:
    if isinstance(cache, KVCache):
        cache.check(model)
    for layer in cache.layers:
        if isinstance(layer, StaticLayer) and not layer.is_sliding and layer.max_cache_len < length:
            raise InputError(
                f"a static cache of {layer.max_cache_len} entries cannot hold a text of {length} tokens: "
                "make it longer, or use a KVCache"
            )
        if isinstance(layer, QuantizedLayer):
            raise InputError(
                "the memory of a QuantizedCache cannot be counted, since its entries have a format of their "
                "own: use a KVCache with `bits`"
            )


def _warn_beyond_context(model: LanguageModel, cache: Cache, length: int, block: int) -> None:
    reach = length
    if isinstance(cache, KVCache) and cache.rule.size is not None and cache.rule.positions == "cache":
        reach = min(length, cache.rule.size + block)
    if model.context is None or reach <= model.context:
        return
    warnings.warn(
        f"with this cache positions go up to {reach - 1}, and {model.name} knows none beyond its context of "
        f"{model.context}, so the NLL there is that of positions it was not trained on",
        SpectralWarning,
        stacklevel=3,
    )


class CacheTooLarge(InputError):
    """A cache that grows with the text would not fit into the memory."""


def _check_memory(cache: Cache, device: torch.device, read: int, length: int) -> None:
    """Raise CacheTooLarge if the layers that drop nothing will outgrow the free memory."""
    growing = [
        layer
        for layer in cache.layers
        if (layer.rule.size is None if isinstance(layer, KVLayer) else type(layer) is DynamicLayer)
    ]
    more = held_bytes(growing) * (length - read) / read
    if more > (unused := free(device)):
        raise CacheTooLarge(
            f"a cache that drops nothing takes {more / 2**30:.3g} GB more for {length} tokens, and "
            f"{unused / 2**30:.3g} GB are free: bound it, as KVCache(model, 512) does, or read fewer texts"
        )


def _final(final: Tensor, *_: Any) -> Tensor:
    return final
