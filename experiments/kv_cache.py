"""KV cache: what may a cache of keys and values drop, and how coarsely may it store the rest?

Question: does a model read texts longer than it was trained for, with a cache of bounded size, if the first
tokens stay? Does it matter where positions are counted, which other entries stay, and how many bits they
have?
Design: streams of unseen articles are read in blocks of 64 tokens. The cache keeps half of the context, at
most 512 entries, of every layer and head: the first 0, 1 or 4 and the latest; or the latest half and, of the
others, those that received most attention. Positions are counted in the cache or in the text. Keys (by
channel, before the rotation, in groups of 32 tokens) and values (by token) are stored as integers of 8, 4 and
2 bits, with the first 4 as they are or not. The NLL is taken by position, and as a mean over the second half
of the stream.
Control: a window without first tokens; random entries instead of those that received most attention; and a
cache that drops nothing.
"""

from typing import Any

import numpy as np
import pandas as pd
import torch

import spectral_sinks as ss

TOKENS, STREAMS, BLOCK, SIZE = 4096, 4, 64, 512
"""Tokens of a stream, number of streams, tokens read at once, and entries at most."""

BASE = "first 4 + window"


def streams(model: ss.LanguageModel, opens: bool, count: int, tokens: int) -> torch.Tensor:
    """Return texts `[count, tokens]` of consecutive articles, the last of the shipped corpus first."""
    rows: list[torch.Tensor] = []
    opening = [model.bos] if opens and model.bos is not None else []
    found, needed = 0, count * (tokens - len(opening))
    for text in reversed(ss.documents()):
        cut = ss.cut([text], model, bos="never", length=64, per_document=None)
        rows += cut.rows
        found += sum(len(row) for row in cut.rows)
        if found >= needed:
            break
    if found < needed:
        raise ss.InputError(
            f"the shipped corpus has {found} tokens, and {needed} are needed: read fewer streams"
        )
    texts = torch.cat(rows)[:needed].view(count, -1)
    return torch.cat([torch.tensor(opening, dtype=texts.dtype).expand(count, -1), texts], dim=1)


def settings(size: int) -> dict[str, tuple[str, dict[str, Any]]]:
    """Return the kind and the arguments of each cache, by name."""
    kept: dict[str, dict[str, Any]] = {
        "window": {"first": 0},
        "first 1 + window": {"first": 1},
        BASE: {},
        f"{BASE}, positions of the text": {"positions": "text"},
        "attention": {"first": 0, "evict": "attention"},
        "first 4 + attention": {"evict": "attention"},
        "random": {"first": 0, "evict": "random"},
        "first 4 + random": {"evict": "random"},
    }
    stored = {
        "int8": {"bits": 8},
        "int4": {"bits": 4},
        "int2": {"bits": 2},
        "int4, first too": {"bits": 4, "exact_first": False},
        "int2, first too": {"bits": 2, "exact_first": False},
    }
    entries = {name: ("entries", {"size": size} | own) for name, own in kept.items()}
    return entries | {name: ("integers", {"size": size} | own) for name, own in stored.items()}


def measure(
    model: ss.LanguageModel, ids: torch.Tensor, size: int, block: int = BLOCK
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the NLL by cache and position, and a table of the caches."""
    length = ids.shape[1]
    edges = [1, *(2**power for power in range(5, 30) if 2**power < length), length]
    late = slice(length // 2 - 1, None)
    positions: list[pd.DataFrame] = []
    rows: list[dict[str, Any]] = []
    found: dict[str, np.ndarray] = {}
    for name, (kind, own) in {"all entries": ("entries", {}), **settings(size)}.items():
        cache = ss.nll.KVCache(model, **own) if own else None
        read = ss.nll.cached_nll(model, ids, cache, block=block)
        positions.append(read.by_position(edges).assign(cache=name))
        found[name] = read.nll[:, late].double().mean(1).numpy()
        rows.append(
            {
                "cache": name,
                "kind": kind,
                "bytes": read.nbytes / len(ids),
                "tokens_per_second": read.tokens_per_second,
                "nll": found[name].mean(),
            }
            | dict(zip(("low", "high"), ss.stats.mean_interval(found[name]), strict=True))
        )
    for row in rows:
        more = found[row["cache"]] - found[BASE]
        row |= {"more": more.mean()}
        row |= dict(zip(("more_low", "more_high"), ss.stats.mean_interval(more), strict=True))
    return pd.concat(positions, ignore_index=True), pd.DataFrame(rows)


def run(study: ss.experiments.Study) -> ss.experiments.Finding:
    model = study.model
    size = min(SIZE, (model.context or 2 * SIZE) // 2)
    ids = streams(model, study.windows.opens_with_bos, STREAMS, TOKENS)
    positions, caches = measure(model, ids, size)
    study.save(positions, "kv_cache")
    study.save(caches, "kv_cache_caches")
    ss.figures.kv_cache(positions, caches, study.figure("kv_cache"))
    by = caches.set_index("cache")
    answers = [
        ss.experiments.answer(
            f"{name}: late NLL above {BASE}",
            float(row["more"]),
            f"{row['bytes'] / 2**20:.3g} MB",
            (row["more_low"], row["more_high"]),
        )
        for name, row in by.iterrows()
        if name != BASE
    ]
    low = by["more_low"]
    held = {
        "the first tokens have to stay": low["window"] > 0,
        "positions have to be counted in the cache": low[f"{BASE}, positions of the text"] > 0,
        "received attention is a better choice than chance": by["nll"]["attention"] < by["nll"]["random"],
    }
    word = "holds" if all(held.values()) else "holds partly" if any(held.values()) else "does not hold here"
    said = ", ".join(f"{name}: {'yes' if value else 'no'}" for name, value in held.items())
    more = by["more"]
    return ss.experiments.Finding(
        answers,
        verdict=f"{word}: {said}; window {more['window']:+.3f} nats, positions of the text "
        f"{more[f'{BASE}, positions of the text']:+.3f}, int4 {more['int4']:+.3f}, int2 {more['int2']:+.3f}",
    )
