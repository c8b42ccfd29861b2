"""A sweep at a server: units of work as jobs that outlive this process, recorded in the results folder.

jobs/UNIT.json    the job of a unit: its id and host, the cells and windows it measures, and its state
"""

import json
import re
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from pydantic import TypeAdapter, ValidationError
from tqdm import tqdm

from spectral_sinks.errors import InputError, RemoteError, plural, without_secrets
from spectral_sinks.files import atomic_write, clearly, read_regular
from spectral_sinks.measure.nll.remote_batch import RemoteBatch
from spectral_sinks.measure.nll.replay import BatchResult
from spectral_sinks.models.remote_state import Sent
from spectral_sinks.remote import client, transport
from spectral_sinks.remote.answers import read_answer
from spectral_sinks.sweeps.definition import Sweep, Unit, described, table_of
from spectral_sinks.sweeps.schema import UNIT
from spectral_sinks.sweeps.store import Store

POLL = 2.0
"""Seconds between two requests for the state of a job."""

FORGOTTEN = 60.0
"""Seconds after which a job that the server does not know counts as lost."""

STALE = 6 * 3600.0
"""Seconds after which a job that has not ended counts as lost, as after a crash of the server."""

JOB = re.compile(r"[A-Za-z0-9][\w.:-]{0,149}", re.ASCII)
"""The id of a job, which becomes a part of an address at the server."""

State = Literal["waiting", "done", "failed", "lost"]


@dataclass(frozen=True)
class Note:
    """The record of a job in the results folder."""

    unit: str
    run: str
    """Key of the sweep."""
    model: str
    sent: Sent
    cells: list[dict[str, Any]]
    """The columns that describe each cell."""
    documents: list[int]
    windows: list[int]
    tokens: int
    state: State = "waiting"
    said: str = ""
    """The reason why it failed."""
    server: dict[str, Any] = field(default_factory=dict)
    """What the server reported about itself."""


NOTE = TypeAdapter(Note)


class Notes:
    """The records of all jobs of a results folder, which somebody else may have written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "jobs"

    def write(self, note: Note) -> Note:
        with clearly(self.folder):
            self.folder.mkdir(exist_ok=True)
            with atomic_write(self.folder / f"{note.unit}.json") as path:
                text = without_secrets(json.dumps(asdict(note), indent=1))
                path.write_text(text + "\n", encoding="utf-8")
        return note

    def all(self) -> list[Note]:
        """Read all records, ordered by the time of sending. Raises InputError for a damaged file."""
        notes: list[Note] = []
        for path in self.folder.glob("*.json"):
            try:
                note = NOTE.validate_json(read_regular(path), strict=True)
            except OSError as error:
                raise InputError(f"{path} cannot be read: {error.strerror}") from error
            except ValidationError as error:
                first = error.errors()[0]
                reason = ": ".join([*map(str, first["loc"]), first["msg"]])
                raise _damaged(path, reason) from error
            if path.stem != note.unit or not UNIT.fullmatch(note.unit):
                raise _damaged(path, f"it names the unit {note.unit!r}")
            if not JOB.fullmatch(note.sent.id):
                raise _damaged(path, f"{note.sent.id!r} is no id of a job")
            if len(note.documents) != len(note.windows) or not all(
                isinstance(cell.get("cell"), str) for cell in note.cells
            ):
                raise _damaged(path, "its cells and windows are incomplete")
            notes.append(note)
        return sorted(notes, key=lambda note: note.sent.submitted)

    def waiting(self) -> list[Note]:
        return [note for note in self.all() if note.state == "waiting"]


def _damaged(path: Path, reason: str) -> InputError:
    return InputError(f"{path} is damaged ({reason}): delete it, its job will be sent again")


def collect(folder: str | Path, give_up: float = STALE) -> list[Note]:
    """Ask once for the result of each job of a results folder, store what has arrived, and return all jobs.

    Only the server that nnsight is configured for is asked. A job that has not ended after `give_up` seconds
    counts as lost; another run of the sweep sends it again. Raises InputError for a folder that is not a
    store and for jobs of another server, and RemoteError where the server cannot be reached; the store is
    then unchanged.
    """
    store = Store(folder, create=False)
    notes = Notes(store.folder)
    host = transport.configured_host()
    for note in waiting_at(host, notes):
        settle(store, notes, note, host, give_up)
    return notes.all()


def waiting_at(host: str, notes: Notes) -> list[Note]:
    """Return the jobs that wait. Raises InputError if one of them is at another server than `host`.

    The folder may come from somebody else, and whoever is asked for a result receives the API key.
    """
    waiting = notes.waiting()
    for note in waiting:
        if note.sent.host.rstrip("/") != host.rstrip("/"):
            raise InputError(
                f"{notes.folder / note.unit}.json names a job at {note.sent.host}, but nnsight is configured "
                f"for {host}, which alone is asked: set NDIF_HOST if you trust the other server with your "
                "API key, or delete the file"
            )
    return waiting


def jobs(folder: str | Path) -> list[Note]:
    """Return the jobs of a results folder as recorded there, without asking the server."""
    return Notes(Store(folder, create=False).folder).all()


def settle(store: Store, notes: Notes, note: Note, host: str, give_up: float = STALE) -> Note:
    """Ask a server for the result of a job, and store its rows if it is done."""
    age = time.time() - note.sent.submitted
    try:
        answer, known = transport.fetch(note.sent.id, host, note.model)
        if answer is None:
            if age > give_up or (not known and age > FORGOTTEN):
                return notes.write(replace(note, state="lost", said="the server did not finish it"))
            return note
        kind, value, server = read_answer(answer)
        if kind == "refused":
            return notes.write(replace(note, state="failed", said=value))
        rows = _rows(note, value)
    except RemoteError as error:
        if error.again:
            raise
        return notes.write(replace(note, state="failed", said=str(error)))
    store.add(note.unit, rows)
    sent = replace(note.sent, seconds=age, received=len(answer))
    note = notes.write(replace(note, state="done", sent=sent, server=server))
    _record(store, notes, note)
    return note


def _rows(note: Note, value: Any) -> pd.DataFrame:
    """Return the rows of an answer. Raises RemoteError for one that does not have the cells and windows."""
    shape = len(note.cells), len(note.windows)
    match value:
        case (BatchResult() as baseline, BatchResult() as measured) if measured.nll.shape == shape:
            return table_of(note.cells, note.documents, note.windows, note.tokens, baseline, measured)
        case _:
            raise RemoteError(f"the answer to {note.sent.id} is not that of its cells and windows")


def _record(store: Store, notes: Notes, last: Note) -> None:
    """Record in the manifest where the rows of a run come from."""
    done = [note for note in notes.all() if note.state == "done" and note.run == last.run]
    origin = {
        "host": last.sent.host,
        "server": last.server,
        "jobs": [note.sent.id for note in done],
        "bytes_sent": sum(note.sent.payload for note in done),
        "bytes_received": sum(note.sent.received or 0 for note in done),
    }
    store.record(last.run, {"remote": origin})


def run_jobs(
    sweep: Sweep,
    store: Store,
    missing: Callable[[Collection[tuple[str, int]]], list[Unit]],
    *,
    in_flight: int = 8,
    wait: bool = True,
) -> int:
    """Send the missing part of a sweep as jobs, and wait for them.

    An interrupted run continues from the notes of the folder.

    Args:
        sweep: the sweep.
        store: the results folder.
        missing: a function that returns the units that are neither finished nor among the cells and windows
            of its argument.
        in_flight: the maximum number of unfinished jobs while the run waits.
        wait: whether to wait for the jobs. If not, all jobs are sent at once.

    Returns:
        The number of cells x windows whose results arrived.

    Raises:
        InputError: where the folder names a job at another server than that of the model.
        RemoteError: for a job that fails on the server, with its message.

    """
    notes = Notes(store.folder)
    assert sweep.model.remote is not None
    host = sweep.model.remote.host
    computed = 0
    total = sum(map(sweep.size, missing(())))
    with tqdm(total=total, unit="cell", leave=False, disable=None) as bar:
        while missing(()):
            waiting = waiting_at(host, notes)
            sent = {
                (cell["cell"], window) for note in waiting for cell in note.cells for window in note.windows
            }
            room = in_flight - len(waiting) if wait else None
            for unit in missing(sent)[:room]:
                for note in _sent(sweep, unit):
                    notes.write(note)
            if not wait:
                break
            settled = [settle(store, notes, note, host) for note in waiting_at(host, notes)]
            for note in settled:
                if note.state == "failed":
                    raise RemoteError(f"a job failed at {note.sent.host}: {note.said}")
                if note.state == "done":
                    computed += len(note.cells) * len(note.windows)
                    bar.update(len(note.cells) * len(note.windows))
            if not any(note.state == "done" for note in settled):
                time.sleep(POLL)
    return computed


def _sent(sweep: Sweep, unit: Unit) -> Iterable[Note]:
    """Send the job of a unit, or the jobs of its halves where it is too large."""
    indices, ids = sweep.batches[unit.batch]
    batch = RemoteBatch(sweep.model, sweep.windows, indices, ids, sweep.predict)
    try:
        sent = client.submit(sweep.model, *batch.job([sweep.cells[i].edits for i in unit.cells]))
    except transport.TooLarge:
        if len(unit.cells) == 1:
            raise
        half = len(unit.cells) // 2
        for part in (unit.cells[:half], unit.cells[half:]):
            yield from _sent(sweep, sweep.unit(unit.batch, part))
        return
    yield Note(
        unit=unit.name,
        run=sweep.key,
        model=sweep.model.name,
        sent=sent,
        cells=[described(sweep, index) for index in unit.cells],
        documents=[int(sweep.windows.document[index]) for index in indices],
        windows=list(indices),
        tokens=batch.predicted,
    )


@dataclass(frozen=True)
class RemoteCost:
    """The size of what a sweep will send."""

    cells: int
    windows: int
    jobs: int
    bytes: int
    """Of all jobs, before compression."""

    def __str__(self) -> str:
        return (
            f"{plural(self.cells, 'cell')} x {plural(self.windows, 'window')} in {plural(self.jobs, 'job')}, "
            f"about {self.bytes / 2**20:.1f} MB to send"
        )


def remote_cost(sweep: Sweep, units: tuple[Unit, ...]) -> RemoteCost:
    """Pack the jobs of some units to count their bytes; none is sent."""
    total = 0
    for unit in units:
        indices, ids = sweep.batches[unit.batch]
        batch = RemoteBatch(sweep.model, sweep.windows, indices, ids, sweep.predict)
        total += len(transport.packed(sweep.model, *batch.job([sweep.cells[i].edits for i in unit.cells])))
    cells = len({cell for unit in units for cell in unit.cells})
    return RemoteCost(cells, len(sweep.windows), len(units), total)
