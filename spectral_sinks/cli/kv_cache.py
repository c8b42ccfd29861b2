"""The command `kv-cache`: what a cache of keys and values may drop, on texts longer than it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Group

import spectral_sinks as ss
from spectral_sinks.cli.options import Reading
from spectral_sinks.cli.output import show, table
from spectral_sinks.cli.parsing import Count, Draws, Natural, Seed
from spectral_sinks.cli.progress import note, spoken
from spectral_sinks.errors import plural
from spectral_sinks.files import figure_format


@dataclass(frozen=True)
class KvCache(Reading):
    """Read long texts through bounded caches of keys and values, and measure NLL, memory and speed.

    The first entries and a window are kept. Beside them are a cache that drops nothing, a window alone,
    and as many random tokens in place of the first. The time grows with caches times texts times length.
    """

    size: Count = 256
    """Entries of each layer and head that a bounded cache keeps."""
    first: Natural = 4
    """First entries that stay."""
    caches: str = "attention,text,int4"
    """Further caches: attention (those that received most attention stay), random, text (positions of
    the text), int8, int4 and int2, with commas between them; none for none."""
    positions: Literal["cache", "text"] = "cache"
    """Where positions are counted from: the first entry of the cache, or the beginning of the text."""
    length: Count = 2048
    """Number of tokens of a text, which may exceed the context of a model with rotary positions."""
    texts: Count = 2
    """Maximum number of texts. Documents are joined until a text has its length, and the next text begins
    with the next document. A text shorter than --length is read to its end, with a warning."""
    documents: Count | None = None
    """Maximum number of documents that are read; by default as many as the texts need."""
    block: Count = 64
    """Tokens that are read at once; 1 is what happens when a model generates, and takes far longer."""
    draws: Draws = 1
    """Number of random choices of tokens that stay in place of the first."""
    seed: Seed = 0
    """Seed of the random choices."""
    bos: Literal["auto", "always", "never"] = "auto"
    """Whether texts open with BOS; auto does what the tokenizer of the model does."""
    device: str | None = None
    """Device to run on, such as cuda or cpu."""
    dtype: str = "auto"
    """Dtype of the weights, such as bfloat16; auto is the dtype of the checkpoint."""
    figure: Path | None = None
    """File (.png, .pdf or .svg) for a figure."""


def run_kv_cache(options: KvCache) -> None:
    from tqdm import tqdm  # not for --help

    if options.figure is not None:  # before minutes of work
        figure_format(options.figure)
    others = [] if options.caches == "none" else options.caches.split(",")
    planned: dict[str, Any] = {
        "first": options.first,
        "positions": options.positions,
        "others": others,
        "draws": options.draws,
        "seed": options.seed,
    }
    ss.nll.cache_settings(options.size, options.length, **planned)
    model = options.load(device=options.device, dtype=options.dtype)
    documents = options.read(options.documents)
    ids = ss.nll.join_documents(documents, model, length=options.length, count=options.texts, bos=options.bos)
    settings = ss.nll.cache_settings(options.size, ids.shape[1], **planned)
    total, done, begun = len(settings) * ids.numel(), 0, time.monotonic()
    with tqdm(
        total=total, desc="kv-cache", unit="tok", leave=False, disable=True if options.json else None
    ) as bar:

        def tick(name: str, tokens: int) -> None:
            nonlocal done
            done += tokens
            bar.set_postfix_str(name, refresh=False)
            bar.update(tokens)
            left = (time.monotonic() - begun) * (total - done) / done
            note(f"{done / total:.0%}, {name}, about {spoken(left)} left")

        found = ss.nll.cache_costs(model, ids, options.size, **planned, block=options.block, progress=tick)
    if options.figure is not None:
        ss.figures.cache_costs(found.positions, found.table, found.base, options.figure)
    record = found.record()
    show(options.json, record, Group(*_tables(record, options.size)))


def _tables(record: dict[str, Any], size: int) -> Iterator[Any]:
    texts, tokens = record["texts"], record["tokens"]
    title = (
        f"Caches of {record['model']}, {size} entries of each head; "
        f"{plural(texts, 'text')} of {tokens} tokens in blocks of {record['block']}; NLL in nats per token"
    )
    rows = [
        (
            f"{row['cache']}{' (control)' * (row['kind'] == 'control')}",
            f"{row['early']:.3f}",
            f"{row['nll']:.3f}",
            f"{row['more']:+.3f}",
            "" if math.isnan(row["more_low"]) else f"{row['more_low']:.3f} {row['more_high']:.3f}",
            f"{row['nbytes'] / 2**20:.2f}",
            f"{row['tokens_per_processor_second']:.0f}",
        )
        for row in record["caches"]
    ]
    columns = ("cache", "NLL to", "from", "more", "95 %", "MB", "tokens/s")
    ranges = ("", f"{size - 1}", f"{tokens // 2}", "", "", "", "")
    yield table(title, tuple(f"{a} {b}".strip() for a, b in zip(columns, ranges, strict=True)), rows)
    yield (
        f"more: NLL from token {tokens // 2} on above {record['base']}. MB: of one text. tokens/s: per "
        "second of processor time."
    )
