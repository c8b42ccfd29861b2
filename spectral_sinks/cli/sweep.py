"""The commands `sweep` and `merge`."""

from __future__ import annotations

import re
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tyro.conf import Positional

import spectral_sinks as ss
from spectral_sinks.cli.options import RemoteName
from spectral_sinks.cli.output import plain, say, show, table
from spectral_sinks.cli.parsing import Natural

SHOWN = 40
"""Number of rows of a summary that are printed. The results folder has all of them."""

PATIENCE = 10
"""Seconds to wait for an answer of the Dask scheduler."""


@dataclass(frozen=True)
class Sweep:
    """Measure the cells of a sweep file into a results folder, and continue where an earlier run stopped."""

    file: Positional[Path]
    """A TOML file with model, [texts], [spectrum] and [[grid]] blocks. Examples are in experiments/."""
    out: Path | None = None
    """Results folder; by default runs/NAME, where NAME is the name of the file."""
    resume: bool = False
    """Continue with the results that the folder has (the default)."""
    fresh: bool = False
    """Empty the folder first."""
    dry_run: bool = False
    """Print what is missing and its estimated cost, and measure no cell."""
    shard: str | None = None
    """Compute only one part of the sweep: i/n is the i-th of n parts, counted from 1.
    The command merge joins the folders."""
    workers: Natural = 0
    """Number of worker processes, which share the weights. By default this process does the work."""
    devices: str | None = None
    """Devices for the workers, such as cuda:0,cuda:1. They are assigned in turn."""
    remote: RemoteName | None = None
    """ndif sends jobs to the server that nnsight is configured for.
    The value local rehearses such a run in this process."""
    no_wait: bool = False
    """Send the jobs and return at once. The command remote collect fetches the results."""
    dask: str | None = None
    """Address of a Dask scheduler whose workers run the sweep, such as tcp://127.0.0.1:8786."""
    json: bool = False
    """Print one JSON object and nothing else on standard output."""


@dataclass(frozen=True)
class Merge:
    """Join the results folders of the shards of a sweep into one."""

    out: Positional[Path]
    """Folder for the joined results, which is created if it does not exist."""
    folders: Positional[tuple[Path, ...]]
    """The folders of the shards."""
    prefer: Path | None = None
    """Part or folder whose numbers are kept where two parts differ for one cell and window.
    Without it, such a difference is an error that names both parts."""
    json: bool = False
    """Print one JSON object and nothing else on standard output."""


def run_sweep(options: Sweep) -> None:
    if options.resume and options.fresh:
        raise ss.InputError("give --resume or --fresh, not both")
    if options.workers and options.dask:
        raise ss.InputError("give --workers or --dask, not both")
    if options.devices and not options.workers:
        raise ss.InputError("--devices are assigned to workers: give --workers as well")
    file = ss.sweeps.SweepFile.read(options.file)
    if options.remote:
        file = file.at(options.remote)
    out = options.out or Path("runs") / options.file.stem
    shard = parse_shard(options.shard)
    if options.dry_run:
        cost = ss.sweeps.plan(file, None if options.fresh else out, shard=shard)
        rows = [(name.replace("_", " "), plain(value)) for name, value in asdict(cost).items()]
        show(options.json, asdict(cost), table(str(cost), ("", ""), rows))
        return
    with ExitStack() as stack:
        executor, in_flight = None, 8
        if options.dask:
            client = stack.enter_context(dask_client(options.dask))
            executor, in_flight = client.get_executor(), max(in_flight, 2 * sum(client.nthreads().values()))
        done = ss.sweep(
            file,
            out,
            shard=shard,
            fresh=options.fresh,
            executor=executor,
            workers=options.workers,
            devices=options.devices.split(",") if options.devices else (),
            in_flight=in_flight,
            wait=not options.no_wait,
            say=(lambda _: None) if options.json else say,
        )
    if options.no_wait:
        notes = ss.sweeps.jobs(out)
        waiting = sum(note.state == "waiting" for note in notes)
        rows = [("jobs waiting", str(waiting)), ("fetch results", f"spectral-sinks remote collect {out}")]
        show(options.json, {"out": str(out), "waiting": waiting}, table("", ("", ""), rows))
        return
    summary = done.summary()
    found: dict[str, Any] = {"out": str(out), **asdict(done.report), **summary.attrs}
    found["cells"] = summary.to_dict("records")
    rows = [
        (
            row["name"],
            plain(row["delta_nll"]),
            plain([row["delta_nll_low"], row["delta_nll_high"]]),
            str(row["documents"]),
        )
        for row in found["cells"][:SHOWN]
    ]
    columns = ("cell", "NLL difference (nats)", "95 % interval", "documents")
    title = f"{len(summary)} cells in {out}"
    if (predict := summary.attrs.get("predict")) is not None:
        title += f"; {predict} predictions of each window, drawn at random, were scored"
    show(options.json, found, table(title, columns, rows))
    if not options.json:
        if len(summary) > SHOWN:
            say(f"and {len(summary) - SHOWN} more")
        say(done.report)


def dask_client(address: str) -> Any:
    """Connect to a running scheduler. Raises InputError where Dask is missing or no scheduler answers."""
    try:
        from distributed import Client
    except ImportError as error:
        raise ss.InputError("Dask is not installed: pip install 'spectral-sinks[cluster]'") from error
    try:
        return Client(address, timeout=PATIENCE)
    except (OSError, ValueError) as error:
        raise ss.InputError(f"no Dask scheduler answers at {address}: {error}") from error


def parse_shard(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    if not (match := re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)):
        raise ss.InputError(f"shard {text!r}: expected i/n, such as 1/4")
    return int(match[1]), int(match[2])


def run_merge(options: Merge) -> None:
    if not options.folders:
        raise ss.InputError("no folders to join: give the results folders of the shards after OUT")
    rows = ss.sweeps.Store.merge(options.folders, options.out, options.prefer).rows()
    found = {"out": str(options.out), "cells": rows["cell"].nunique(), "rows": len(rows)}
    show(options.json, found, table("", ("", ""), [(name, plain(value)) for name, value in found.items()]))
