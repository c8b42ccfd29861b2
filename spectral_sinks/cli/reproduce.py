"""The command `reproduce`: the experiments, with their tables and figures."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import spectral_sinks as ss
from spectral_sinks.cli.options import RemoteName, remote_of
from spectral_sinks.cli.output import plain, say, show, table
from spectral_sinks.cli.parsing import Count
from spectral_sinks.cli.progress import note


@dataclass(frozen=True)
class Reproduce:
    """Run the experiments, write their tables and figures, and print a summary."""

    only: str | None = None
    """Name of one experiment; by default all are run."""
    out: Path = Path("results")
    """Folder for tables and figures."""
    model: str = ss.DEFAULT
    """Name of the embedded model, a Hugging Face id, or a folder."""
    documents: Count = 16
    """Number of documents of the shipped corpus, with one window each."""
    remote: RemoteName | None = None
    """ndif runs the model on the server that nnsight is configured for.
    The value local rehearses such a run in this process."""
    jobs: Count | None = None
    """Experiments that run at the same time, each with one thread; by default one for each idle core."""
    json: bool = False
    """Print the summary as one JSON object and nothing else on standard output."""


def run_reproduce(options: Reproduce) -> None:

    ended: list[str] = []

    def tell(found: ss.experiments.Finding) -> None:
        ended.append(found.name)
        note(f"{len(ended)} experiments have ended")
        if not options.json:
            say(f"{found.name}: {found.seconds:.0f} s of processor time", sys.stderr)

    findings = ss.reproduce(
        model=options.model,
        out=options.out,
        only=options.only,
        documents=options.documents,
        remote=remote_of(options.remote),
        jobs=options.jobs,
        progress=tell,
    )
    rows = [
        {"experiment": f.name, **answer, "seconds": round(f.seconds, 1)}
        for f in findings
        for answer in f.answers
    ]
    lines = [
        (r["experiment"], r["quantity"], plain(r["value"]), plain([r["low"], r["high"]]), r["control"])
        for r in rows
    ]
    columns = ("experiment", "quantity", "value", "95 % interval", "control")
    verdicts = {f.name: f.verdict for f in findings if f.verdict}
    found = {"out": str(options.out), "rows": rows, "verdicts": verdicts}
    show(options.json, found, table("Findings", columns, lines))
    if verdicts and not options.json:
        show(False, {}, table("", ("experiment", "verdict"), verdicts.items()))
