"""The store under fire: killed at any moment, several processes at once, a full disk, a read-only folder."""

import errno
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from contextlib import contextmanager
from itertools import chain, count
from pathlib import Path

import pandas as pd
import pytest
from pandas.testing import assert_frame_equal
from support import synthetic_rows

from spectral_sinks import files
from spectral_sinks.errors import InputError, SpectralWarning
from spectral_sinks.sweeps import store as module
from spectral_sinks.sweeps.store import Store

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="forks"),
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
]

UNITS = {f"unit-{place}": [f"{place} a", f"{place} rnd"] for place in range(24)}
PLAN = {"cells": [synthetic_rows.address(name) for names in UNITS.values() for name in names]}


def forked(work, *arguments) -> int:
    """The id of a process that does the work and ends with status 0, or 1 for an exception."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        work(*arguments)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def status(pid: int) -> int:
    """0, an exit status, or minus the signal that ended the process."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def wait_until(ready, seconds=20.0) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end
        time.sleep(0.002)


def sweep(folder: Path, diary: Path, pause: float = 0.0) -> None:
    """What a runner does: go over the units until all are finished, noting what it does."""
    store = Store(folder)
    store.record("run", PLAN)
    with diary.open("a", buffering=1) as notes:
        while len(store.finished()) < 8 * len(UNITS):
            for unit, names in UNITS.items():
                with store.claim(unit) as mine:
                    if mine and (synthetic_rows.address(names[0]), 0) not in store.finished():
                        notes.write(f"computed {unit}\n")
                        time.sleep(pause)
                        store.add(unit, synthetic_rows.rows(*names))
                        notes.write(f"finished {unit}\n")


def noted(diary: Path, what: str) -> list[str]:
    lines = diary.read_text().splitlines() if diary.exists() else []
    return [unit for word, unit in map(str.split, lines) if word == what]


def pairs(units):
    return {
        (synthetic_rows.address(name), window)
        for unit in units
        for name in UNITS[unit]
        for window in range(4)
    }


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The rows of one process that nobody disturbs."""
    folder = tmp_path_factory.mktemp("single")
    sweep(folder / "store", folder / "diary")
    return Store(folder / "store").rows()


def check(folder: Path, expected) -> Store:
    """The store opens without a word, and every row in it is right and there once, for plain pandas too."""
    store = Store(folder)
    found = by_address(store.rows())
    assert_frame_equal(found, by_address(expected.merge(found[["cell", "window"]])), check_exact=True)
    assert not found.duplicated(["cell", "window"]).any()
    if len(found):
        assert len(pd.read_parquet(folder / "parts")) >= len(found)
    return store


def by_address(rows):
    return rows.sort_values(["cell", "window"], ignore_index=True)


def test_killed_at_random_moments(tmp_path, expected):
    moments = random.Random(0)
    kills = 0
    for sweeps in count():
        folder, diary = tmp_path / f"{sweeps}", tmp_path / f"diary {sweeps}"
        ended = None
        while ended != 0:
            pid = forked(sweep, folder, diary)
            if kills < 30:
                time.sleep(moments.uniform(0, 0.1))
                os.kill(pid, signal.SIGKILL)
            ended = status(pid)
            assert ended in (0, -signal.SIGKILL)
            kills += ended != 0
            finished = noted(diary, "finished")
            assert len(finished) == len(set(finished)), "computed again what was finished"
            assert pairs(finished) <= check(folder, expected).finished(), "lost what was finished"
        assert_frame_equal(Store(folder).rows(), expected, check_exact=True)
        assert len(list((folder / "parts").glob("*"))) == len(UNITS)
        if kills >= 30:
            break


def until_operation(number: int, folder: Path) -> None:
    """Write a unit and be killed before the file operation of that number since the store was opened."""
    operations = count(1)

    def kill(event, _):
        if (event == "open" or event.startswith(("os.", "fcntl."))) and next(operations) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(kill)
    store = Store(folder)
    store.add("unit-1", synthetic_rows.rows(*UNITS["unit-1"]))
    store.record("run", PLAN)


def test_killed_before_each_file_operation(tmp_path, expected):
    ended, leftovers = None, 0
    begun = tmp_path / "begun"
    Store(begun).add("unit-0", synthetic_rows.rows(*UNITS["unit-0"]))
    for number in count(1):
        for folder in (tmp_path / f"new {number}", tmp_path / f"begun {number}"):
            if "begun" in folder.name:
                shutil.copytree(begun, folder)
            ended = status(forked(until_operation, number, folder))
            leftovers += len(list(folder.rglob(".*.part")))
            store = check(folder, expected)
            before = pairs(["unit-0"]) if "begun" in folder.name else set()
            assert store.finished() in (before, before | pairs(["unit-1"]))
            for unit in ("unit-0", "unit-1"):
                store.add(unit, synthetic_rows.rows(*UNITS[unit]))
            store.record("run", PLAN)
            assert_frame_equal(store.rows(), expected[:16], check_exact=True)
            assert not list(folder.rglob(".*.part"))
        if ended == 0:
            break
        assert ended == -signal.SIGKILL
    assert number > 15 and leftovers > 2


@contextmanager
def room(size: int):
    """No file of this process grows beyond `size` bytes, as on a disk that fills up in the middle of it."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def dies_at_byte(size: int, action) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    with room(size):
        action()


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "store")
    store.add("unit-0", synthetic_rows.rows(*UNITS["unit-0"]))
    store.record("first", PLAN)
    return store


def actions(store):
    return {
        "add": lambda: store.add("unit-1", synthetic_rows.rows(*UNITS["unit-1"])),
        "record": lambda: store.record("run", {"note": "n" * 20_000}),
    }


@pytest.mark.parametrize("action", ["add", "record"])
@pytest.mark.parametrize("size", [0, 1, 4095, 5000])
def test_killed_in_the_middle_of_a_file(store, expected, action, size):
    ended = status(forked(dies_at_byte, size, actions(store)[action]))
    assert ended == -signal.SIGXFSZ
    (half,) = store.folder.rglob(".*.part")
    assert half.stat().st_size == size
    assert_frame_equal(check(store.folder, expected).rows(), expected[:8], check_exact=True)
    assert list(store.manifest["runs"]) == ["first"]
    fresh = Store(store.folder)
    fresh.add("unit-2", synthetic_rows.rows(*UNITS["unit-2"]))
    assert not list(store.folder.rglob(".*.part")) and len(fresh.rows()) == 16


# Several processes


def test_processes_share_the_work(tmp_path, expected):
    folder = tmp_path / "store"
    diaries = [tmp_path / f"diary {place}" for place in range(3)]

    def work(diary):
        diary.touch()
        wait_until(lambda: all(other.exists() for other in diaries))
        sweep(folder, diary, 0.01)

    workers = [forked(work, diary) for diary in diaries]
    assert [status(pid) for pid in workers] == [0, 0, 0]
    computed = [noted(diary, "computed") for diary in diaries]
    assert sorted(chain(*computed)) == sorted(UNITS), "each unit once"
    assert all(computed), "each process some"
    assert_frame_equal(check(folder, expected).rows(), expected, check_exact=True)


def test_processes_share_the_work_while_one_after_another_is_killed(tmp_path, expected):
    folder, diary = tmp_path / "store", tmp_path / "diary"
    moments = random.Random(1)
    for _ in range(6):
        workers = [forked(sweep, folder, diary, 0.005) for _ in range(2)]
        time.sleep(moments.uniform(0.02, 0.1))
        for pid in workers:
            os.kill(pid, signal.SIGKILL)
            status(pid)
        assert pairs(noted(diary, "finished")) <= check(folder, expected).finished()
    assert [status(pid) for pid in [forked(sweep, folder, diary) for _ in range(2)]] == [0, 0]
    finished = noted(diary, "finished")
    assert len(finished) == len(set(finished))
    assert_frame_equal(check(folder, expected).rows(), expected, check_exact=True)


def test_one_process_has_a_unit_until_it_dies(store, tmp_path):
    def hold():
        with store.claim("unit-5") as mine:
            (tmp_path / f"claimed {mine}").touch()
            time.sleep(60)

    holder = forked(hold)
    wait_until((tmp_path / "claimed True").exists)
    with store.claim("unit-5") as mine, store.claim("unit-6") as other:
        assert not mine and other
    with pytest.raises(InputError, match="another process is at work"):
        Store(store.folder).clear()
    assert len(store.rows()) == 8
    os.kill(holder, signal.SIGKILL)
    status(holder)
    with store.claim("unit-5") as mine:
        assert mine
        with store.claim("unit-5") as again:
            assert not again
    with pytest.raises(RuntimeError), store.claim("unit-5"):
        raise RuntimeError
    with store.claim("unit-5") as mine:
        assert mine


def test_a_file_that_a_live_process_writes_is_left_to_it(store, tmp_path, monkeypatch):
    def slowly():
        def write(path, data):
            with path.open("wb") as file:
                file.write(data[:50])
                file.flush()
                (tmp_path / "half").touch()
                time.sleep(0.3)
                file.write(data[50:])

        monkeypatch.setattr(Path, "write_bytes", write)
        store.add("unit-1", synthetic_rows.rows(*UNITS["unit-1"]))

    writer = forked(slowly)
    wait_until((tmp_path / "half").exists)
    fresh = Store(store.folder)
    assert len(fresh.rows()) == 8
    fresh.add("unit-2", synthetic_rows.rows(*UNITS["unit-2"]))
    assert status(writer) == 0
    assert fresh.finished() == pairs(["unit-0", "unit-1", "unit-2"])


def test_a_suspended_writer_is_not_waited_for_without_end(store, monkeypatch):
    monkeypatch.setattr(module, "PATIENCE", 0.02)
    with store._alone(), pytest.raises(InputError, match=r"kept .* locked"):
        Store(store.folder).add("unit-1", synthetic_rows.rows(*UNITS["unit-1"]))
    assert len(store.rows()) == 8


def test_no_record_is_lost(tmp_path):
    """Among processes that begin one store at the same time."""

    def record(who):
        wait_until((tmp_path / "go").exists)
        for number in range(10):
            Store(tmp_path / "store").record(f"{who} {number}", {"cells": ["x"]})

    workers = [forked(record, who) for who in range(3)]
    (tmp_path / "go").touch()
    assert [status(pid) for pid in workers] == [0, 0, 0]
    assert len(Store(tmp_path / "store").manifest["runs"]) == 30


def test_readers_meet_no_half_file(tmp_path, expected):
    writer = forked(sweep, tmp_path / "store", tmp_path / "diary", 0.01)
    wait_until((tmp_path / "store" / "manifest.json").exists)
    reads = 0
    while os.waitpid(writer, os.WNOHANG) == (0, 0):
        check(tmp_path / "store", expected)
        reads += 1
    assert reads
    assert_frame_equal(Store(tmp_path / "store").rows(), expected, check_exact=True)


def test_a_name_appears_once_its_bytes_are_on_the_disk(store, monkeypatch):
    steps, fsync, replace = [], os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda file: (steps.append(os.fstat(file).st_ino), fsync(file)))
    monkeypatch.setattr(Path, "replace", lambda *paths: (steps.append("renamed"), replace(*paths)))
    path = store.add("unit-1", synthetic_rows.rows(*UNITS["unit-1"]))
    assert steps == [path.stat().st_ino, "renamed", path.parent.stat().st_ino]


# A full disk, a read-only folder


def intact(folder: Path, expected) -> None:
    """Nothing came and nothing went, and no temporary file is left."""
    assert_frame_equal(check(folder, expected).rows(), expected[:8], check_exact=True)
    assert list(Store(folder).manifest["runs"]) == ["first"]
    assert not list(folder.rglob(".*.part"))


def message(action) -> str:
    with pytest.raises(InputError) as caught:
        action()
    assert isinstance(caught.value.__cause__, OSError)
    return str(caught.value)


@pytest.mark.parametrize("action", ["add", "record"])
@pytest.mark.parametrize("size", [0, 1, 4095, 5000])
def test_a_file_larger_than_the_room_left(store, expected, action, size):
    def fill():
        with room(size):
            said = message(actions(store)[action])
        assert "disk is full" in said and "finished is intact" in said and "run again" in said

    assert status(forked(fill)) == 0
    intact(store.folder, expected)
    actions(store)[action]()


def failing(code):
    """A function of the operating system that fails."""

    def fail(*_, **__):
        raise OSError(code, os.strerror(code))

    return fail


@pytest.mark.parametrize("action", ["add", "record"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize(
    ("owner", "name"), [(files.os, "fsync"), (Path, "replace"), (Path, "mkdir"), (os, "open")]
)
def test_a_full_disk_at_any_step(store, expected, action, code, owner, name, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, failing(code))
        said = message(actions(store)[action])
    assert "disk is full" in said and str(store.folder) in said
    intact(store.folder, expected)
    actions(store)[action]()


def test_an_error_that_is_neither(store, monkeypatch):
    monkeypatch.setattr(Path, "replace", failing(errno.EIO))
    assert "cannot be written: Input/output error" in message(actions(store)["add"])


@pytest.fixture
def open_folder():
    """A folder that any user may reach."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def as_nobody(work) -> int:
    """Do the work in a process that permissions hold for; its status."""

    def unprivileged():
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
        work()

    return status(forked(unprivileged))


def read_only(folder: Path, yes: bool) -> None:
    for path in (folder, *folder.rglob("*")):
        path.chmod((0o555 if yes else 0o755) if path.is_dir() else (0o444 if yes else 0o644))


def test_a_read_only_folder_can_be_read(open_folder, expected):
    folder = open_folder / "store"
    sweep(folder, open_folder / "diary")
    (damaged,) = folder.glob("parts/unit-3-*")
    sound = damaged.read_bytes()

    def visit():
        store = Store(folder)
        assert_frame_equal(store.rows(), expected, check_exact=True)
        for write in (
            *actions(store).values(),
            store.clear,
            lambda: store.claim("unit-1").__enter__(),
            lambda: Store(folder / "new"),
            lambda: Store.merge([folder], open_folder / "merged"),
        ):
            assert "is read-only" in message(write)

    def visit_damaged():
        with pytest.warns(SpectralWarning, match="truncated.*left there"):
            assert len(Store(folder).rows()) == len(expected) - 8

    read_only(folder, True)
    open_folder.chmod(0o555)
    try:
        assert as_nobody(visit) == 0
        read_only(folder, False)
        damaged.write_bytes(sound[:-1])
        read_only(folder, True)
        assert as_nobody(visit_damaged) == 0
    finally:
        read_only(folder, False)
        open_folder.chmod(0o755)
    damaged.write_bytes(sound)
    assert_frame_equal(Store(folder).rows(), expected, check_exact=True)


def test_a_killed_merge_is_done_again(tmp_path, expected):
    sweep(tmp_path / "a", tmp_path / "diary")
    moments = random.Random(2)
    for _ in range(8):
        pid = forked(Store.merge, [tmp_path / "a"], tmp_path / "merged")
        time.sleep(moments.uniform(0, 0.05))
        os.kill(pid, signal.SIGKILL)
        status(pid)
        check(tmp_path / "merged", expected)
    merged = Store.merge([tmp_path / "a"], tmp_path / "merged")
    assert_frame_equal(merged.rows(), expected, check_exact=True)
    assert json.loads((tmp_path / "merged" / "manifest.json").read_text()) == Store(tmp_path / "a").manifest
