"""A real scheduler with two worker processes on loopback: the same rows, also when one is killed."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask
import pytest
from distributed import Client
from support import small_sweeps, tiny_models

import spectral_sinks as ss
from spectral_sinks.cli import sweep as sweeping_commands

TESTS = Path(__file__).parents[1]

PATIENT: dict[str, Any] = {
    "distributed.comm.timeouts.connect": "600s",
    "distributed.comm.timeouts.tcp": "600s",
    "distributed.scheduler.worker-ttl": None,
}
"""A busy machine may not answer within Dask's 30 s, after which a client gives up all that it waits for."""


class Cluster:
    """A scheduler and two workers, processes of ours; what they say is in `log`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.file = folder, folder / "scheduler.json"
        path = os.pathsep.join([str(TESTS), str(TESTS.parent), *filter(None, sys.path)])
        self.environment = os.environ | {"PYTHONPATH": path, "SPECTRAL_SINKS_CACHE": str(folder / "cache")}
        with dask.config.set(PATIENT):
            self.environment["DASK_INTERNAL_INHERIT_CONFIG"] = dask.config.serialize(
                dask.config.global_config
            )
        self.log = (folder / "log").open("w")
        self.processes: list[subprocess.Popen[bytes]] = []
        self.start("scheduler", "--port", "0", "--no-show", "--no-dashboard")
        self.workers = [
            self.start(
                *("worker", "--no-nanny", "--no-dashboard", "--nthreads", "1", "--memory-limit", "0"),
                *("--local-directory", str(folder)),
            )
            for _ in range(2)
        ]

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "dask", *arguments, "--host", "127.0.0.1"]
        made = subprocess.Popen(
            [*command, "--scheduler-file", str(self.file)],
            env=self.environment,
            cwd=self.folder,
            stdout=self.log,
            stderr=subprocess.STDOUT,
        )
        self.processes.append(made)
        return made

    def stop(self) -> None:
        for process in reversed(self.processes):
            process.kill()
            process.wait()
        self.log.close()

    @property
    def address(self) -> str:
        return json.loads(self.file.read_text())["address"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    made = Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        until = time.monotonic() + 600
        while not made.file.exists() and time.monotonic() < until:
            time.sleep(0.05)
        yield made
    finally:
        made.stop()


@pytest.fixture(scope="module")
def client(cluster: Cluster) -> Iterator[Client]:
    with dask.config.set(PATIENT), Client(cluster.address, timeout=600, set_as_default=False) as made:
        made.wait_for_workers(2, timeout=600)
        yield made


@pytest.fixture(scope="module")
def file(cluster: Cluster) -> Path:
    checkpoint = tiny_models.save(cluster.folder / "model")
    text = cluster.folder / "text.jsonl"
    text.write_text("".join(json.dumps({"text": tiny_models.text(80, seed)}) + "\n" for seed in range(4)))
    path = cluster.folder / "sweep.toml"
    path.write_text(
        f'model = "{checkpoint}"\nbatch_size = 2\n[texts]\ntext = "{text}"\nlength = 66\n'
        '[[grid]]\nremove = ["dark", "1-3"]\nfill = ["zero", "mean", "swap"]\ncontrols = 1\n'
    )
    return path


def test_objects(client: Client, tmp_path: Path) -> None:
    done = ss.sweep(small_sweeps.sweep(), tmp_path / "out", executor=client.get_executor())
    alone = ss.sweep(small_sweeps.sweep(), tmp_path / "alone")
    assert done.report.computed == 36 * 5
    assert done.store.rows().equals(alone.store.rows())


def test_a_file(client: Client, cluster: Cluster, file: Path, tmp_path: Path, capsys: Any) -> None:
    """The workers make the sweep from the file: nothing but units travels."""
    alone = ss.sweep(file, tmp_path / "alone")
    ran = tiny_models.run(
        capsys, "sweep", file, "--out", tmp_path / "out", "--dask", cluster.address, "--json"
    )
    assert (ran.status, ran.err) == (0, "")
    assert json.loads(ran.out)["computed"] == len(alone.store.rows()) == 3 * 3 * 4 * 4
    assert ss.sweeps.Store(tmp_path / "out").rows().equals(alone.store.rows())


def test_an_error_in_a_unit(client: Client, tmp_path: Path) -> None:
    made = small_sweeps.sweep({"bad": {ss.Site("mlp", 2): small_sweeps.Failing(9)}})
    with pytest.raises(ValueError, match=r"failed at \(\d, 66, 32\)"):
        ss.sweep(made, tmp_path / "out", executor=client.get_executor())


def test_a_killed_worker(client: Client, cluster: Cluster, tmp_path: Path) -> None:
    """Last but one: one worker is left."""
    out = tmp_path / "out"
    cells: dict[str, Any] = {}
    for layer in (0, 1, 2):
        cells |= {f"{layer} {name}": e for name, e in small_sweeps.scaled(6, 0.1, layer).items()}

    def kill() -> None:
        while not list(out.glob("parts/*.parquet")):
            time.sleep(0.01)
        cluster.workers[0].send_signal(signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    done = ss.sweep(small_sweeps.sweep(cells), out, executor=client.get_executor())
    killer.join()
    assert cluster.workers[0].wait() == -signal.SIGKILL
    assert done.report.computed == 18 * 5 == len(done.store.rows())
    alone = ss.sweep(small_sweeps.sweep(cells), tmp_path / "alone")
    assert done.store.rows().equals(alone.store.rows())


def test_nobody_answers(file: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeping_commands, "PATIENCE", 0.5)
    for address in ("tcp://127.0.0.1:1", "nonsense://x"):
        ran = tiny_models.run(capsys, "sweep", file, "--out", tmp_path / "out", "--dask", address)
        assert ran.status == 2 and ran.err.count("\n") == 1
        assert f"no Dask scheduler answers at {address}" in ran.err
    monkeypatch.setitem(sys.modules, "distributed", None)
    ran = tiny_models.run(capsys, "sweep", file, "--out", tmp_path / "out", "--dask", "tcp://127.0.0.1:1")
    assert ran.status == 2 and "pip install 'spectral-sinks[cluster]'" in ran.err
    assert not (tmp_path / "out").exists()
