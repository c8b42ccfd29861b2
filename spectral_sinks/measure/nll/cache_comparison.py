"""What bounded caches of keys and values cost on long texts, beside their controls."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from spectral_sinks.errors import InputError, SpectralWarning
from spectral_sinks.interventions.kv_cache import KVCache
from spectral_sinks.interventions.kv_layer import Positions
from spectral_sinks.measure.nll.cached_texts import CachedNLL, CacheTooLarge, cached_nll
from spectral_sinks.measure.results import Result
from spectral_sinks.models.language import LanguageModel
from spectral_sinks.stats import mean_interval

WHOLE = "all entries"

OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "attention": ("{first} + attention", {"evict": "attention"}),
    "random": ("{first} + random", {"evict": "random"}),
    "text": ("{first} + window, positions of the text", {"positions": "text"}),
    "int8": ("int8", {"bits": 8}),
    "int4": ("int4", {"bits": 4}),
    "int2": ("int2", {"bits": 2}),
}
"""Caches that can be measured beside the first entries and a window: their names in tables, and what is other
than there."""

USUAL = ("attention", "text", "int4")


@dataclass(frozen=True, eq=False, repr=False)
class CacheCosts(Result):
    """The NLL of long texts that were read through several caches, with memory and speed."""

    listed = ("cache", "nll", "more", "nbytes", "tokens_per_second")
    model: str
    texts: int
    tokens: int
    """Tokens of a text."""
    settings: dict[str, dict[str, Any]]
    """The arguments of each `KVCache`, by name; none for a cache that drops nothing."""
    block: int
    base: str
    """The cache with which the others are compared."""
    table: pd.DataFrame
    """One row per cache: `cache`, `kind` ("control" or "bounded"), `nbytes` of one text,
    `tokens_per_second`, `tokens_per_processor_second`, `early` (the NLL of the tokens before the smallest
    cache is full), `nll` (that of the second half of the text) and `more` (that above `base`), with `_low`
    and `_high`."""
    positions: pd.DataFrame
    """The NLL between consecutive positions: `cache`, `start`, `stop`, `nll`, `low`, `high`."""

    def summary(self) -> pd.DataFrame:
        return self.table

    def record(self) -> dict[str, Any]:
        """Return everything as a dictionary that JSON can hold."""
        own = ("model", "texts", "tokens", "settings", "block", "base")
        return {name: getattr(self, name) for name in own} | {
            "caches": self.table.to_dict("records"),
            "positions": self.positions.to_dict("records"),
        }


def cache_settings(
    size: int,
    tokens: int,
    *,
    first: int = 4,
    positions: Positions = "cache",
    others: Sequence[str] = USUAL,
    draws: int = 1,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Return the arguments of each `KVCache` that `cache_costs` measures, by name; none for all entries.

    Args:
        size: entries of a bounded cache.
        tokens: tokens of a text.
        first: first entries that stay.
        positions: where positions are counted from.
        others: names of `OTHERS`.
        draws: number of random choices of as many other entries in place of the first.
        seed: of the random choices.

    Raises:
        InputError: for unknown names, for a text that the bounded caches hold whole, and for more first
            entries than a cache has.

    """
    others = [others] if isinstance(others, str) else others
    if unknown := [name for name in others if name not in OTHERS]:
        raise InputError(f"cache {unknown[0]!r}: choose from {', '.join(OTHERS)}")
    if size <= first:
        raise InputError(
            f"a cache of {size} entries cannot keep the first {first} and a recent one: give it at least "
            f"{first + 1}"
        )
    if tokens <= size:
        raise InputError(
            f"the text has {tokens} tokens, and a cache of {size} entries would drop none of them: give a "
            "longer text, or a smaller size"
        )
    usual: dict[str, Any] = {"size": size, "first": first, "positions": positions}
    kept = f"first {first}"
    found: dict[str, dict[str, Any]] = {WHOLE: {}}
    if first:
        found[f"{kept} + window"] = usual
    found["window"] = usual | {"first": 0}
    generator = np.random.default_rng(seed)
    for draw in range(draws if first else 0):
        # tokens that are read before the cache is full, so that they are there from the first eviction on
        chosen = generator.choice(np.arange(first, max(size, 2 * first)), first, replace=False)
        number = f" ({draw + 1})" if draws > 1 else ""
        found[f"random {first} + window{number}"] = usual | {"first": sorted(map(int, chosen))}
    for other in others:
        name, own = OTHERS[other]
        if other == "text" and positions == "text":
            continue
        if "bits" in own and size - first < 32:
            own = own | {"keys_by": "token"}
        found[name.format(first=kept)] = usual | own
    return found


def cache_costs(
    model: LanguageModel,
    ids: Int[Tensor, "texts tokens"],
    size: int = 256,
    *,
    first: int = 4,
    positions: Positions = "cache",
    others: Sequence[str] = USUAL,
    draws: int = 1,
    seed: int = 0,
    block: int = 64,
    progress: Callable[[str, int], object] | None = None,
) -> CacheCosts:
    """Read long texts through a cache that keeps the first entries and a window, and through others.

    The controls are a cache that drops nothing, a window without the first entries, and one that keeps as
    many random tokens in place of the first. They are drawn among the tokens that are read before the cache
    is full.

    Args:
        model: a causal language model in this process.
        ids: texts of equal length.
        size: entries of each layer and head of the bounded caches.
        first: first entries that stay.
        positions: whether positions are counted in the cache, or are those of the text.
        others: which further caches are measured: "attention" (those entries stay that received most
            attention; H2O), "random", "text" (positions of the text), "int8", "int4" and "int2".
        draws: number of random choices of tokens.
        seed: of the random choices.
        block: tokens that are read at once.
        progress: a function that is called with the name of the cache and the number of tokens of each block.

    Raises:
        InputError: as `cached_nll`, `cache_settings` and `KVCache` do.

    """
    ids = torch.as_tensor(ids)
    settings = cache_settings(
        size, ids.shape[1], first=first, positions=positions, others=others, draws=draws, seed=seed
    )
    return compare_caches(model, ids, settings, block=block, progress=progress)


def compare_caches(
    model: LanguageModel,
    ids: Int[Tensor, "texts tokens"],
    settings: Mapping[str, Mapping[str, Any]],
    *,
    base: str | None = None,
    block: int = 64,
    progress: Callable[[str, int], object] | None = None,
) -> CacheCosts:
    """Read long texts through each of several caches, and compare their NLL with that of one of them.

    Args:
        model: a causal language model in this process.
        ids: texts of equal length.
        settings: the arguments of each `KVCache`, by a name of one's own; none for a cache that drops
            nothing. Such a cache is left out, with a warning, if it does not fit into the memory.
        base: the cache with which the others are compared; by default the first that was measured.
        block: tokens that are read at once.
        progress: a function that is called with the name of the cache and the number of tokens of each block.

    Raises:
        InputError: as `cached_nll` and `KVCache` do, for no cache, and if `base` is not measured.

    """
    ids = torch.as_tensor(ids)
    if not settings:
        raise InputError("no cache to measure: give the arguments of at least one, as in {'whole': {}}")
    if base is not None and base not in settings:
        raise InputError(f"base {base!r}: choose from {', '.join(settings)}")
    caches = {name: KVCache(model, **own) if own else None for name, own in settings.items()}
    reads: dict[str, CachedNLL] = {}
    for name, cache in caches.items():
        tick = None if progress is None else lambda count, name=name: progress(name, count)
        try:
            reads[name] = cached_nll(model, ids, cache, block=block, progress=tick)
        except CacheTooLarge as error:
            if cache is not None or len(caches) == 1 or name == base:
                raise
            warnings.warn(f"{name} is left out: {error}", SpectralWarning, stacklevel=2)
    length = ids.shape[1]
    half = length // 2
    full = min((own["size"] for own in settings.values() if own.get("size")), default=length)
    edges = [1, *(2**power for power in range(5, 30) if 2**power < length), length]
    late = {name: read.nll[:, half - 1 :].double().mean(1).numpy() for name, read in reads.items()}
    base = base or next(iter(reads))
    rows: list[dict[str, Any]] = []
    parts: list[pd.DataFrame] = []
    for name, read in reads.items():
        parts.append(read.by_position(edges).assign(cache=name))
        control = not settings[name] or name == "window" or "random" in name
        row: dict[str, Any] = {
            "cache": name,
            "kind": "control" if control else "bounded",
            "nbytes": read.nbytes / len(ids),
            "tokens_per_second": read.tokens_per_second,
            "tokens_per_processor_second": read.tokens_per_processor_second,
            "early": float(read.nll[:, : min(full, length) - 1].double().mean()),
        }
        for column, values in (("nll", late[name]), ("more", late[name] - late[base])):
            low, high = mean_interval(values)
            row |= {column: float(values.mean()), f"{column}_low": low, f"{column}_high": high}
        rows.append(row)
    return CacheCosts(
        model.name,
        len(ids),
        length,
        {name: dict(own) for name, own in settings.items()},
        block,
        base,
        pd.DataFrame(rows),
        pd.concat(parts, ignore_index=True),
    )
