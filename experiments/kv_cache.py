"""KV cache: what may a cache of keys and values drop, and how coarsely may it store the rest?

Question: does a model read texts longer than it was trained for, with a cache of bounded size, if the first
tokens stay? Does it matter where positions are counted, which other entries stay, and how many bits they
have?
Design: texts of unseen articles, joined, are read in blocks of 64 tokens. The cache keeps half of the
context, at most 512 entries, of every layer and head: the first 0, 1 or 4 and the latest; or the latest half
and, of the others, those that received most attention. Positions are counted in the cache or in the text.
Keys (by channel, before the rotation, in groups of 32 tokens) and values (by token) are stored as integers of
8, 4 and 2 bits, with the first 4 as they are or not. The NLL is taken by position, and as a mean over the
second half of the text.
Control: a window without first tokens; random entries instead of those that received most attention; and a
cache that drops nothing.
"""

from typing import Any

import spectral_sinks as ss

TOKENS, TEXTS, BLOCK, SIZE = 4096, 4, 64, 512
"""Tokens of a text, number of texts, tokens read at once, and entries at most."""

BASE = "first 4 + window"


def settings(size: int) -> dict[str, dict[str, Any]]:
    """Return the arguments of each cache, by name."""
    kept: dict[str, dict[str, Any]] = {
        "window": {"first": 0},
        "first 1 + window": {"first": 1},
        BASE: {},
        f"{BASE}, positions of the text": {"positions": "text"},
        "attention": {"first": 0, "evict": "attention"},
        "first 4 + attention": {"evict": "attention"},
        "random": {"first": 0, "evict": "random"},
        "first 4 + random": {"evict": "random"},
        "int8": {"bits": 8},
        "int4": {"bits": 4},
        "int2": {"bits": 2},
        "int4, first too": {"bits": 4, "exact_first": False},
        "int2, first too": {"bits": 2, "exact_first": False},
    }
    return {"all entries": {}} | {name: {"size": size} | own for name, own in kept.items()}


def run(study: ss.experiments.Study) -> ss.experiments.Finding:
    model = study.model
    size = min(SIZE, (model.context or 2 * SIZE) // 2)
    bos = "always" if study.windows.opens_with_bos else "never"
    unseen = ss.documents()[::-1]
    ids = ss.nll.join_documents(unseen, model, length=TOKENS, count=TEXTS, bos=bos)
    costs = ss.nll.compare_caches(model, ids, settings(size), base=BASE, block=BLOCK)
    study.save(costs.positions, "kv_cache")
    study.save(costs.table, "kv_cache_caches")
    by = costs.table.set_index("cache")
    bounded = costs.table[costs.table["cache"] != "all entries"]
    ss.figures.cache_costs(costs.positions, bounded, BASE, study.figure("kv_cache"))
    answers = [
        ss.experiments.answer(
            f"{name}: late NLL above {BASE}",
            float(row["more"]),
            f"{row['nbytes'] / 2**20:.3g} MB",
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
