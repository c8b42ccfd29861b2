"""A sweep at a server: jobs that outlive the process, nothing lost, nothing twice, and no key anywhere."""

import io
import json
import pickle
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import zstandard
from support import fake_ndif, small_sweeps, tiny_models

import spectral_sinks as ss
from spectral_sinks.measure.nll import remote_batch
from spectral_sinks.models.remote_state import Sent
from spectral_sinks.sweeps import remote_jobs

FILE = """
model = "{folder}"
batch_size = 2
[texts]
text = "{text}"
separator = "|"
length = 65
[spectrum]
bands = 4
[[grid]]
layer = [0, 1]
keep = "1-3"
remove = ["2", "4"]
controls = 1
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    at = tmp_path_factory.mktemp("sweep")
    folder = tiny_models.save(at / "model")
    (at / "texts.txt").write_text("|".join(tiny_models.text(70, seed) for seed in range(4)))
    (at / "mine.toml").write_text(FILE.format(folder=folder, text=at / "texts.txt"))
    return at / "mine.toml"


@pytest.fixture
def fake(file: Path, monkeypatch: pytest.MonkeyPatch) -> fake_ndif.Fake:
    monkeypatch.setattr(remote_batch, "CELLS_PER_JOB", 3)
    monkeypatch.setattr(remote_jobs, "POLL", 0.0)
    return fake_ndif.serve(file.parent / "model", monkeypatch)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture(scope="module")
def local(file: Path, tmp_path_factory: pytest.TempPathFactory) -> ss.sweeps.Done:
    return ss.sweep(file, tmp_path_factory.mktemp("local"))


def afar(file: Path) -> ss.sweeps.SweepFile:
    return ss.sweeps.SweepFile.read(file).at("ndif")


def agree(done: ss.sweeps.Done, local: ss.sweeps.Done) -> None:
    one, other = (each.table.drop(columns=["cell", "model"]) for each in (done, local))
    by = ["name", "document"]
    one, other = (each.sort_values(by).reset_index(drop=True) for each in (one, other))
    assert len(one) == len(other) and not one.duplicated(by).any()
    assert one[by].equals(other[by])
    assert (one[small_sweeps.NUMBERS] - other[small_sweeps.NUMBERS]).abs().max().max() < 1e-6
    assert (one["sink_mass"].map(max) - other["sink_mass"].map(max)).abs().max() < 1e-6


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".lock"
    }


def test_a_sweep_at_a_server_is_the_sweep_here(
    fake: fake_ndif.Fake, file: Path, local: ss.sweeps.Done, out: Path
) -> None:
    done = ss.sweep(afar(file), out)
    agree(done, local)
    notes = ss.sweeps.jobs(out)
    assert len(notes) == len(fake.blobs) - 1 > 3 and {note.state for note in notes} == {"done"}
    (run,) = done.store.manifest["runs"].values()
    assert run["remote"]["host"] == fake_ndif.HOST and run["remote"]["server"]["attention"] == "eager"
    assert sorted(run["remote"]["jobs"]) == sorted(note.sent.id for note in notes)
    sent = len(fake.blobs)
    again = ss.sweep(afar(file), out)
    assert again.report.computed == 0 and len(fake.blobs) == sent + 1  # one token, to look at the server
    agree(again, local)
    for name, data in files(out).items():
        assert fake_ndif.without_key(data.decode(errors="replace")), name


def test_a_laptop_can_be_closed(
    fake: fake_ndif.Fake, file: Path, local: ss.sweeps.Done, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ss.load(file.parent / "model", remote=True)
    ss.remote.examine(model)
    fake.holds = True
    fake.trouble = []
    hold = fake.holds

    def unheld(job: str) -> None:
        fake.finish(job)

    fake.holds = False  # the token that looks at the server is not held
    original = fake._accept

    def accept(body: bytes, failure: str | None) -> dict[str, str]:
        fake.holds = hold and len(fake.blobs) > 1
        return original(body, failure)

    fake._accept = accept
    ran = tiny_models.run(capsys, "sweep", file, "--out", out, "--remote", "ndif", "--no-wait", "--json")
    assert ran.status == 0, ran.err
    waiting = json.loads(ran.out)["waiting"]
    assert waiting == len(fake.blobs) - 2 > 3
    ran = tiny_models.run(capsys, "remote", "status", out, "--json")
    assert json.loads(ran.out)["states"] == {"waiting": waiting}
    for job in list(fake.answers)[2:5]:
        unheld(job)
    ran = tiny_models.run(capsys, "remote", "collect", out, "--json")
    assert json.loads(ran.out)["states"] == {"done": 3, "waiting": waiting - 3}
    sent = len(fake.blobs)
    for job in list(fake.answers)[5:]:
        unheld(job)
    ran = tiny_models.run(capsys, "remote", "collect", out)
    assert ran.status == 0 and f"{waiting} done" in " ".join(ran.out.split())
    assert len(fake.blobs) == sent
    hold = False
    done = ss.sweep(afar(file), out)
    assert done.report.computed == 0
    agree(done, local)
    assert fake_ndif.without_key(ran.out + ran.err)


def test_a_job_that_fails_leaves_the_store_as_it_was(
    fake: fake_ndif.Fake, file: Path, local: ss.sweeps.Done, out: Path
) -> None:
    fake.trouble = [None, None, "Your job exceeded the execution timeout of 60.0s."]
    with pytest.raises(ss.RemoteError, match="took longer than"):
        ss.sweep(afar(file), out, in_flight=1)
    kept = {name: data for name, data in files(out).items() if name.startswith("parts")}
    assert len(kept) == 1 and [note.state for note in ss.sweeps.jobs(out)] == ["done", "failed"]
    fake.trouble = [None, (403, "Invalid API key.")]
    before = files(out)
    with pytest.raises(ss.RemoteError, match="API key"):
        ss.sweep(afar(file), out)
    after = files(out)
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed <= {"manifest.json"} and before.keys() == after.keys()
    agree(ss.sweep(afar(file), out), local)
    assert {note.state for note in ss.sweeps.jobs(out)} == {"done"}
    assert kept.items() <= files(out).items()


@pytest.mark.parametrize("known", [False, True])
def test_what_a_server_forgot_is_sent_again(
    known: bool,
    fake: fake_ndif.Fake,
    file: Path,
    local: ss.sweeps.Done,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ss.sweep(afar(file), out, wait=False)
    for job in list(fake.answers)[1:3]:
        if known:
            fake.answers[job] = {"id": job, "status": "RUNNING", "description": ""}
        else:
            del fake.answers[job]
    monkeypatch.setattr(remote_jobs, "FORGOTTEN", -1.0)
    states = [note.state for note in ss.sweeps.collect(out, give_up=-1.0 if known else 60.0)]
    assert states.count("lost") == 2 and "waiting" not in states
    agree(ss.sweep(afar(file), out), local)


def test_too_large_jobs_go_in_halves(
    fake: fake_ndif.Fake, file: Path, local: ss.sweeps.Done, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from spectral_sinks.remote import transport

    cost = ss.sweeps.plan(afar(file))
    assert isinstance(cost, remote_jobs.RemoteCost)
    monkeypatch.setattr(transport, "PAYLOAD", cost.bytes // cost.jobs - 50)
    agree(ss.sweep(afar(file), out), local)
    assert {len(note.cells) for note in ss.sweeps.jobs(out)} == {1, 2}


def test_a_rehearsed_sweep(file: Path, local: ss.sweeps.Done, out: Path) -> None:
    done = ss.sweep(ss.sweeps.SweepFile.read(file).at("local"), out)
    agree(done, local)
    assert done.sweep.addresses == local.sweep.addresses, "it is the same model, and the same numbers"


def test_what_a_sweep_will_send(fake: fake_ndif.Fake, file: Path, out: Path) -> None:
    cost = ss.sweeps.plan(afar(file), out)
    assert isinstance(cost, remote_jobs.RemoteCost)
    ss.sweep(afar(file), out)
    assert cost.jobs == len(ss.sweeps.jobs(out)) and cost.windows == 4
    assert ss.sweeps.plan(afar(file), out).cells == 0


def note_of(out: Path, **changes: object) -> Path:
    """Change the record of the first job."""
    path = min((out / "jobs").glob("*.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return path


EVIL = "https://evil.invalid"


@pytest.mark.parametrize("command", [("remote", "collect"), ("sweep", "--remote", "ndif", "--out")])
def test_only_the_configured_server_is_asked(
    command: tuple[str, ...],
    fake: fake_ndif.Fake,
    file: Path,
    out: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ss.sweep(afar(file), out, wait=False)
    path = min((out / "jobs").glob("*.json"))
    note_of(out, sent=json.loads(path.read_text())["sent"] | {"host": EVIL})
    fake.asked.clear()
    before = {name: data for name, data in files(out).items() if name != "manifest.json"}
    given = [*command, out] if command[0] == "remote" else [command[0], file, *command[1:], out]
    ran = tiny_models.run(capsys, *given)
    assert ran.status == 2 and EVIL in ran.err and fake_ndif.HOST in ran.err and path.name in ran.err
    assert not any(asked.startswith("/response/") for asked in fake.asked), "nobody is asked for a result"
    assert {name: data for name, data in files(out).items() if name != "manifest.json"} == before


def test_an_answer_with_code_fails_its_job(
    fake: fake_ndif.Fake, file: Path, local: ss.sweeps.Done, out: Path, tmp_path: Path
) -> None:
    class Planted:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (tmp_path / "ran",)

    ss.sweep(afar(file), out, wait=False)
    jobs = list(fake.answers)[1:3]
    for job, value in zip(jobs, (Planted(), pickle.dumps(("result", Planted(), {}))), strict=True):
        buffer = io.BytesIO()
        torch.save({"ss_result": value}, buffer)
        fake.results[job] = zstandard.ZstdCompressor().compress(buffer.getvalue())
    notes = {note.sent.id: note for note in ss.sweeps.collect(out)}
    assert not (tmp_path / "ran").exists()
    assert {notes[job].state for job in jobs} == {"failed"}
    assert all("could run code" in notes[job].said for job in jobs)
    agree(ss.sweep(afar(file), out), local)


def test_an_answer_of_another_size_fails_its_job(fake: fake_ndif.Fake, file: Path, out: Path) -> None:
    ss.sweep(afar(file), out, wait=False)
    one, other = list(fake.answers)[1:3]
    note_of(out)
    fake.results[one] = fake.results["job0"]
    states = {note.sent.id: note.state for note in ss.sweeps.collect(out)}
    assert states.pop(one) == "failed" and states.pop(other) == "done"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"unit": "../../OUTSIDE"}, "it names the unit"),
        ({"unit": "b" * 32}, "it names the unit"),
        ({"unit": 3}, "unit: Input should be a valid string"),
        ({"sent": {"id": "../whoami"}}, "is no id of a job"),
        ({"sent": {"id": "x?y=1"}}, "is no id of a job"),
        ({"sent": {"submitted": "now"}}, r"sent: submitted: Input should be a valid number"),
        ({"sent": 4}, "sent: "),
        ({"cells": [{"name": "x"}]}, "are incomplete"),
        ({"cells": 5}, "cells: "),
        ({"documents": [0]}, "are incomplete"),
        ({"windows": ["0", "1"]}, "windows: 0: "),
        ({"state": "odd"}, "state: "),
    ],
    ids=str,
)
def test_a_note_names_nothing_outside(changes: dict[str, object], reason: str, out: Path) -> None:
    store = ss.sweeps.Store(out)
    sent = Sent("job1", fake_ndif.HOST, 10, 0.0)
    cells: list[dict[str, object]] = [{"cell": "a" * 32}]
    remote_jobs.Notes(out).write(remote_jobs.Note("a" * 32, "run", "tiny", sent, cells, [0, 1], [0, 1], 9))
    assert [note.sent.id for note in ss.sweeps.jobs(out)] == ["job1"]
    if isinstance(changes.get("sent"), dict):
        changes = {"sent": asdict(sent) | changes["sent"]}
    path, before = note_of(out, **changes), files(out.parent)
    for act in (ss.sweeps.collect, ss.sweeps.jobs):
        with pytest.raises(ss.InputError, match=rf"{path.name} is damaged \(.*{reason}"):
            act(store.folder)
    assert files(out.parent) == before


def test_a_server_that_repeats_the_key_has_it_neither_printed_nor_stored(
    fake: fake_ndif.Fake, file: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = f"headers: ndif-api-key={fake_ndif.KEY}, boom"
    fake.trouble = [None, told]
    ran = tiny_models.run(capsys, "sweep", file, "--out", out, "--remote", "ndif")
    assert ran.status == 2 and "boom" in ran.err and "[key]" in ran.err
    status = tiny_models.run(capsys, "remote", "status", out, "--json")
    assert "boom" in status.out
    for text in (ran.out, ran.err, status.out, status.err):
        assert fake_ndif.without_key(text)
    for name, data in files(out).items():
        assert fake_ndif.without_key(data.decode(errors="replace")), name


def test_bad_input(file: Path, out: Path) -> None:
    with pytest.raises(ss.InputError, match="can be left alone"):
        ss.sweep(file, out, wait=False)
    with pytest.raises(ss.InputError, match="needs no workers"):
        ss.sweep(ss.sweeps.SweepFile.read(file).at("local"), out, workers=2)
    with pytest.raises(ss.InputError, match="holds no sweep results"):
        ss.sweeps.collect(out / "nothing")
    store = ss.sweeps.Store(out / "store")
    assert ss.sweeps.collect(store.folder) == []
    (store.folder / "jobs").mkdir()
    (store.folder / "jobs" / "x.json").write_text("{")
    with pytest.raises(ss.InputError, match=r"x\.json is damaged"):
        ss.sweeps.jobs(store.folder)
