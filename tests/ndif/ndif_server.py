"""An NDIF server on this machine, on loopback, on the CPU: started, killed and brought back by process id."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).parent
BIN = Path(sys.executable).parent
PATIENCE = 240.0
"""Seconds for each part to be up."""

TRIES = 3
"""Of Ray."""


class Ndif:
    """Redis, an object store, Ray with NDIF's controller, and NDIF's API, each a child of this process."""

    def __init__(self, folder: Path, actor: str = "Trusting") -> None:
        self.folder, self.actor = folder, actor
        folder.mkdir(parents=True, exist_ok=True)
        names = ("redis", "store", "head", "client", "api", "board")
        self.ports = dict(zip(names, _free(len(names)), strict=True))
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.family: set[psutil.Process] = set()
        """What they started, so far."""

    @property
    def host(self) -> str:
        return f"http://127.0.0.1:{self.ports['api']}"

    def start(self) -> None:
        """Raises RuntimeError that names the step that did not come up, with the end of its log."""
        ports = self.ports
        self._run(
            "redis",
            _redis(),
            "--port",
            ports["redis"],
            "--bind",
            "127.0.0.1",
            "--save",
            "",
            "--dir",
            self.folder,
        )
        self._until("redis", lambda: _listens(ports["redis"]))
        self._run("store", BIN / "moto_server", "-H", "127.0.0.1", "-p", ports["store"])
        self._until("store", lambda: _listens(ports["store"]))
        for left in reversed(range(TRIES)):
            try:
                self.start_ray()
                break
            except RuntimeError:  # on a busy machine Ray does not wait long enough for itself
                if not left:
                    raise
        self.start_api()

    def start_ray(self) -> None:
        ports = self.ports
        resources = {"head": 10, "cuda_memory_bytes": 8_000_000_000, "cpu_memory_bytes": 16_000_000_000}
        self._run(
            *("ray", BIN / "ray", "start", "--head", "--block", "--node-ip-address=127.0.0.1"),
            *(f"--port={ports['head']}", f"--ray-client-server-port={ports['client']}"),
            *("--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={ports['board']}"),
            *("--disable-usage-stats", "--num-gpus=1", "--num-cpus=3"),
            *(f"--temp-dir={self.folder}/ray", f"--resources={json.dumps(resources)}"),
            "--object-store-memory=200000000",
        )
        self._until("ray", lambda: _listens(ports["client"]))
        self._run("controller", sys.executable, "-m", "ndif.services.ray.deployments.controller.controller")
        self._until("controller", lambda: self.processes["controller"].poll() == 0)

    def start_api(self) -> None:
        self._run(
            *("api", BIN / "gunicorn", "--config", "python:ndif.services.api.gunicorn_conf"),
            *("--bind", f"127.0.0.1:{self.ports['api']}", "ndif.services.api.app:app"),
        )
        self._until("api", lambda: _answers(f"{self.host}/connected"))

    def kill(self) -> None:
        """Kill all of it without warning, and what it started."""
        family = {*self.family, *(child for each in self.processes.values() for child in _children(each.pid))}
        for process in self.processes.values():
            process.kill()
        for member in family:
            with suppress(psutil.NoSuchProcess):  # which it knows by its start, should the id be another's
                member.kill()
        for process in self.processes.values():
            process.wait(timeout=20)
        psutil.wait_procs(family, timeout=20)
        self.processes, self.family = {}, set()

    def environment(self) -> dict[str, str]:
        ports = self.ports
        return {
            **os.environ,
            "PYTHONPATH": str(HERE),
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "RAY_ADDRESS": f"127.0.0.1:{ports['head']}",
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # so that Ray stays on loopback
            "GRPC_ENABLE_FORK_SUPPORT": "0",
            "NDIF_REDIS_URL": f"redis://127.0.0.1:{ports['redis']}",
            "NDIF_OBJECT_STORE_URL": f"http://127.0.0.1:{ports['store']}",
            "NDIF_API_PORT": str(ports["api"]),
            "NDIF_API_URL": self.host,
            "NDIF_RAY_ADDRESS": f"ray://127.0.0.1:{ports['client']}",
            "NDIF_RAY_TEMP_DIR": str(self.folder / "ray"),
            "NDIF_HOME": str(self.folder / "home"),
            "NDIF_DEFAULT_DTYPE": "float32",
            "NDIF_MODEL_IMPORT_PATH": f"cpu_ndif.{self.actor}",
            "NDIF_CONTROLLER_IMPORT_PATH": "cpu_ndif.Controller",
            "NDIF_SANDBOX_POOL_SIZE": "1",
            "NDIF_AUTOSCALING_MAX_REPLICAS": "1",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }

    def _run(self, name: str, *command: Any) -> None:
        environment = self.environment()
        if name == "ray":
            del environment["RAY_ADDRESS"]  # it would join that cluster instead of making it
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                list(map(str, command)), env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )

    def _until(self, name: str, ready: Callable[[], bool]) -> None:
        began = time.monotonic()
        while not ready():
            ended = self.processes[name].poll()
            if time.monotonic() - began > PATIENCE or ended not in (None, 0):
                log = (self.folder / f"{name}.log").read_text(errors="replace")[-2000:]
                raise RuntimeError(f"step {name!r} did not come up (exit status {ended}):\n{log}")
            time.sleep(0.2)
        for process in self.processes.values():
            self.family |= _children(process.pid)


def _children(pid: int) -> set[psutil.Process]:
    try:
        return set(psutil.Process(pid).children(recursive=True))
    except psutil.NoSuchProcess:
        return set()


def _redis() -> str:
    return os.environ.get("REDIS_SERVER", "redis-server")


def _free(count: int) -> list[int]:
    """Ports that nobody listens on, on loopback."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False
