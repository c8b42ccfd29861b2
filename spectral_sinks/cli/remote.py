"""The command `remote`: the checks before a remote run, and the jobs on a server."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Literal

from tyro.conf import Positional

import spectral_sinks as ss
from spectral_sinks.cli.output import plain, show, table


@dataclass(frozen=True)
class Remote:
    """Check the requirements of a remote run, or show and collect the jobs of a results folder."""

    action: Positional[Literal["check", "status", "collect"]]
    """With check, test whether a model can be run on the NDIF server.
    With status, list the jobs that a results folder has recorded, without asking the server.
    With collect, ask the server for these jobs, and store the results that are ready."""
    what: Positional[str] = ss.DEFAULT
    """A model for check, or a results folder for status and collect."""
    revision: str | None = None
    """Branch, tag or commit of a Hugging Face id."""
    json: bool = False
    """Print one JSON object and nothing else on standard output."""


def run_remote(options: Remote) -> None:
    """Raise SystemExit with status 1 where a check fails."""
    if options.action == "check":
        steps = list(ss.remote.preflight(options.what, revision=options.revision))
        ok = all(step.ok for step in steps)
        found = {"model": options.what, "ok": ok, "steps": [asdict(step) for step in steps]}
        rows = [("yes" if step.ok else "NO", step.name, step.found) for step in steps]
        show(options.json, found, table(f"Checks for a remote run of {options.what}", ("", "", ""), rows))
        if not ok:
            raise SystemExit(1)
        return
    notes = ss.sweeps.collect(options.what) if options.action == "collect" else ss.sweeps.jobs(options.what)
    states = Counter(note.state for note in notes)
    found = {"folder": options.what, "states": states, "jobs": [asdict(note) for note in notes]}
    rows = [
        (
            note.sent.id,
            note.state,
            str(len(note.cells)),
            f"{note.sent.payload / 1e6:.2f}",
            plain(note.sent.seconds),
            note.said,
        )
        for note in notes
    ]
    title = ", ".join(f"{count} {state}" for state, count in states.items()) or "no jobs"
    columns = ("job", "state", "cells", "MB sent", "seconds", "")
    show(options.json, found, table(f"{title} in {options.what}", columns, rows))
