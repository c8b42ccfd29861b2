"""The command `report`: one page about a model, for a browser."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import spectral_sinks as ss
from spectral_sinks.cli.options import Running, ran
from spectral_sinks.cli.output import say, show
from spectral_sinks.cli.parsing import Count, Draws, spelled

LENGTH = 128
"""Tokens in a window unless --length is given."""


@dataclass(frozen=True)
class Report(Running):
    """Measure a model and write one page about it, for a browser: its spectrum, sinks, heads and bands."""

    out: Path = Path("report.html")
    """File for the page, which needs nothing besides itself and no network."""
    documents: Count = 16
    """Maximum number of documents that are read."""
    draws: Draws = 20
    """Number of random subspaces that the dark band is compared with."""


def run_report(options: Report) -> None:
    from spectral_sinks.pages.html import page_file, require_plotly  # not for --help

    # before hours of work
    page_file(options.out)
    require_plotly()
    length, per_document = options.length or LENGTH, options.per_document or 1
    card = None
    if options.remote is None:
        card = ss.describe(
            options.model,
            revision=options.revision,
            trust_remote_code=options.trust_remote_code,
            gguf_file=options.gguf_file,
        )
        length = options.length or min(LENGTH, card["context"] or LENGTH)
    chosen = replace(options, length=length, per_document=per_document)
    model, windows, spectra = chosen.prepare(beside=True)
    made = ss.report(
        model,
        windows,
        spectra,
        draws=options.draws,
        batch_size=options.batch_size,
        card=card,
        command=spelled("report", options),
    )
    path = made.save(options.out)
    if options.json:
        show(True, made.record | {"page": str(path), "absent": made.absent} | ran(model), "")
        return
    verdict = made.record["verdict"]
    say(verdict["sentence"] if verdict else f"There is no verdict: {made.absent['the verdict on the sink']}.")
    for name, reason in made.absent.items():
        say(f"Not measured: {name} ({reason}).")
    say(f"The page is in {path}; open it in a browser.")
