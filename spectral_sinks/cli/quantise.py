"""The command `quantise`: what quantisation breaks, and what is saved where sinks are spared."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain, groupby, repeat
from pathlib import Path
from typing import Any, Literal

from rich.console import Group

import spectral_sinks as ss
from spectral_sinks.cli.options import Running
from spectral_sinks.cli.output import show, table
from spectral_sinks.cli.parsing import Count, Draws
from spectral_sinks.cli.progress import note
from spectral_sinks.errors import plural
from spectral_sinks.files import figure_format

LENGTH = 64
"""Tokens in a window unless --length is given, as for the command sinks."""

SHOWN = 6
"""Sites that the table shows at most, evenly spread; JSON has all of them."""


@dataclass(frozen=True)
class Quantise(Running):
    """Round the residual stream and the unembedding as integers of few bits would, and measure the damage.

    Sink tokens, massive channels, and as many random ones are spared in turn.
    """

    documents: Count = 8
    """Maximum number of documents that are read."""
    bits: str = "8,4"
    """Numbers of bits, 2 to 24, such as 8,6,4."""
    rule: Path | None = None
    """Folder of a rule for sinks that `sinks --export` wrote.
    Without it, the rule is learned on the same text."""
    by: Literal["norm", "position", "token", "place"] = "norm"
    """How the rule marks sink tokens; place is position or token."""
    draws: Draws = 5
    """Number of random choices of tokens and of channels that are spared as controls."""
    alone: bool = False
    """Quantise each site of the residual stream alone as well: which layers does the cost come from?"""
    figure: Path | None = None
    """File (.png, .pdf or .svg) for a figure."""


def run_quantise(options: Quantise) -> None:
    bits = parse_bits(options.bits)  # before minutes of work
    if options.figure is not None:
        figure_format(options.figure)
    rule = None if options.rule is None else ss.SinkRule.load(options.rule)
    length = options.length or LENGTH
    model, windows, spectra = replace(options, length=length).prepare(
        beside=True, head="the NLL of a quantised model"
    )
    if rule is None:
        found = ss.find_sinks(model, windows, spectra, length=length, draws=0, batch_size=options.batch_size)
        rule = ss.SinkRule.learn(model, found, spectra, batch_size=options.batch_size)
    sites = [ss.Site("embedding"), *(ss.Site("exit", layer) for layer in range(model.layers))]
    from tqdm import tqdm  # not for --help

    passed = 0
    with tqdm(desc="quantise", unit="pass", leave=False, disable=True if options.json else None) as bar:

        def tick(done: int) -> None:
            nonlocal passed
            passed += done
            bar.update(done)
            note(f"{passed} passes")

        report = ss.sinks.quantisation_report(
            model,
            windows,
            rule,
            spectra,
            bits=bits,
            by=options.by,
            draws=options.draws,
            alone=sites if options.alone else (),
            batch_size=options.batch_size,
            progress=tick,
        )
    if options.figure is not None:
        ss.figures.quantisation(report.summary(), report.by_site(), report.angles, options.figure)
    record = report.record() | {
        "documents": windows.record["documents"],
        "tokens_per_window": windows.length,
        "marked_by": options.by,
        "convention": spectra[0].convention,
        "data_hash": windows.record["data_hash"],
    }
    show(options.json, record, Group(*_tables(record)))


def parse_bits(text: str) -> list[int]:
    """Read numbers of bits. Raises InputError for what is none."""
    try:
        bits = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ss.InputError(f"--bits {text!r}: give numbers of bits, such as 8,4") from error
    for each in bits:
        ss.spectra.FakeQuantiser(each)
    return bits


def _tables(record: dict[str, Any]) -> Iterator[Any]:
    title = (
        f"Fake quantisation of {record['model']}, {plural(record['documents'], 'document')}, "
        f"{record['sink_tokens']:.1%} of the tokens are sinks by {record['marked_by']}; NLL in nats per token"
    )
    rows: list[tuple[str, ...]] = []
    for (what, kind), part in groupby(record["rows"], key=lambda row: (row["what"], _kind(row))):
        names = chain((what, kind), repeat(""))
        for name, row in zip(names, part, strict=False):
            numbers = (f"{row['error']:.2g}", f"{row['delta_nll']:+.3f}")
            rows.append(
                (name, row["spared"], *numbers, _ends(row, "low", "high"), _ends(row, "least", "most"))
            )
    columns = ("quantised", "spared", "error", "NLL", "95 %", "random draws")
    yield table(title, columns, rows)
    every = record["by_site"]
    names = list(dict.fromkeys(row["site"] for row in every))
    shown = {*names[:: -(-len(names) // SHOWN)], names[-1]}
    rows = [
        (
            _kind(row),
            row["site"],
            *(f"{row[name]:.2g}" for name in ("error_sinks", "error_others", "sink_share")),
            *([f"{row['delta_nll']:+.3f}", _ends(row, "low", "high")] if "delta_nll" in row else []),
        )
        for row in every
        if row["site"] in shown
    ]
    alone = ("NLL alone", "95 %") if "delta_nll" in every[0] else ()
    columns = ("kind", "site", "sinks", "others", "share", *alone)
    title = "Error of sinks and of others, and the sinks' share of it; nothing is spared"
    yield table(title, columns, rows)
    angles: dict[tuple[str, str], dict[str, str]] = {}
    for row in record["angles"]:
        if row["draw"] < 0:
            of = angles.setdefault((_kind(row), row["spared"]), {})
            of[f"{row['band']} {row['convention']}"] = f"{row['largest_angle']:.1f}"
    rows = [(*kind, *of.values()) for kind, of in angles.items()]
    columns = ("weights", "spared", *next(iter(angles.values())))
    yield table("Largest angle by which bands of the unembedding turn (degrees)", columns, rows)


def _kind(row: dict[str, Any]) -> str:
    return f"int{row['bits']} per {row['per']}"


def _ends(row: dict[str, Any], low: str, high: str) -> str:
    """Format the two ends of an interval or a range of the NLL difference; empty without one."""
    ends = [row.get(f"delta_nll_{name}", math.nan) for name in (low, high)]
    return "" if math.isnan(ends[0]) else f"{ends[0]:.3f} {ends[1]:.3f}"
