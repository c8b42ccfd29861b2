"""What NDIF answers, without NDIF: its HTTP and websocket interface, in this process, on a model of ours.

The texts of its failures are those of ndif 0.1.2 (services/api, services/ray, common/errors.py).
"""

import io
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import nnsight
import pytest
import torch
import websocket
import zstandard
from nnsight import TransformersModel, ndif
from nnsight.schema.config import CONFIG
from nnsight.schema.request import RequestModel
from nnsight.tracing.globals import BLOCKS, SOURCES
from nnsight.tracing.tracer import _saves, dec, inc

from spectral_sinks.remote import transport

HOST = "https://ndif.invalid"
KEY = "0a1b2c3d-secret-4e5f-8a9b-000011112222"

Answer = Callable[[httpx.Request], httpx.Response]


class Fake:
    """A server with one model; `trouble` is what it says instead of answers, first to last, None for none."""

    def __init__(self, folder: Path, task: str = "text-generation") -> None:
        self.nn = TransformersModel(str(folder), task=task, dispatch=True, attn_implementation="eager")
        self.nn._module.eval()
        self.trouble: list[tuple[int, str] | str | Exception | None] = []
        self.asked: list[str] = []
        self.blobs: list[bytes] = []
        self.answers: dict[str, dict[str, Any]] = {}
        self.results: dict[str, bytes] = {}
        self.holds = False
        """Whether jobs stay queued."""
        self.version: str | None = None
        """What it takes its transformers for."""
        self.packages = {"nnsight": nnsight.__version__, "transformers": "", "torch": torch.__version__}

    def __call__(self, request: httpx.Request) -> httpx.Response:
        path = request.url.path
        self.asked.append(path)
        if path == "/request":
            said = self.trouble.pop(0) if self.trouble else None
            if isinstance(said, Exception):
                raise said
            if isinstance(said, tuple):
                return httpx.Response(said[0], json={"detail": said[1]})
            return httpx.Response(200, json=self._accept(request.read(), said))
        if path.startswith("/response/"):
            found = self.answers.get(path.rpartition("/")[2])
            return httpx.Response(404) if found is None else httpx.Response(200, json=found)
        if path.startswith("/result/"):
            return httpx.Response(200, content=self.results[path.rpartition("/")[2]])
        if path == "/ping":
            return httpx.Response(200, json="pong")
        if path == "/whoami":
            return httpx.Response(200, json={"email": "somebody", "tags": []})
        if path == "/env":
            return httpx.Response(200, json={"python_version": "3.12.3 (main)", "packages": self.packages})
        if path == "/status":
            return httpx.Response(200, json={"deployments": {}})
        return httpx.Response(500, json={"detail": "Internal server error."})

    def _accept(self, body: bytes, failure: str | None) -> dict[str, Any]:
        job = f"job{len(self.blobs)}"
        boundary = body.split(b"\r\n", 1)[0]
        _, data, blob, _ = body.split(boundary)
        self.blobs.append(blob.split(b"\r\n\r\n", 1)[1].removesuffix(b"\r\n"))
        compress = json.loads(data.split(b"\r\n\r\n", 1)[1])["compress"]
        if failure is not None:
            self.answers[job] = {"id": job, "status": "ERROR", "description": failure}
        elif self.holds:
            self.answers[job] = {"id": job, "status": "QUEUED", "description": ""}
        else:
            self.finish(job, compress)
        return {"id": job, "status": "RECEIVED", "description": ""}

    def finish(self, job: str, compress: bool = True) -> None:
        """Do a job that was accepted."""
        try:
            self.results[job] = self.run(self.blobs[int(job.removeprefix("job"))], compress)
            url = f"{HOST}/result/{job}"
            self.answers[job] = {"id": job, "status": "COMPLETED", "description": "", "data": url}
        except Exception as error:
            said = f"Traceback (most recent call last):\n{type(error).__name__}: {error}"
            self.answers[job] = {"id": job, "status": "ERROR", "description": said}

    def run(self, blob: bytes, compress: bool) -> bytes:
        """As the server's model actor does it."""
        import transformers

        with _sources(), pytest.MonkeyPatch.context() as patch:
            if self.version is not None:
                patch.setattr(transformers, "__version__", self.version)
            objects = self.nn._remoteable_persistent_objects()
            tracer = RequestModel.deserialize(blob, objects, compress=compress)
            depth = _depth()
            inc()
            try:
                tracer.execute(tracer.info.code)
                saved = {k: v for k, v in tracer.info.frame.f_locals.items() if id(v) in _saves()}
            finally:
                dec()
            assert _depth() == depth
        buffer = io.BytesIO()
        torch.save(saved, buffer)
        return zstandard.ZstdCompressor().compress(buffer.getvalue()) if compress else buffer.getvalue()


class Socket:
    """The websocket of a blocking job: the session, then how the job ended."""

    def __init__(self, fake: Fake) -> None:
        self.fake, self.first = fake, True

    def recv(self) -> str:
        if self.first:
            self.first = False
            return json.dumps({"session_id": "session"})
        return json.dumps(self.fake.answers[f"job{len(self.fake.blobs) - 1}"])

    def settimeout(self, seconds: float) -> None: ...

    def close(self) -> None: ...


@contextmanager
def _sources() -> Iterator[None]:
    import linecache

    before = [(each, dict(each)) for each in (linecache.cache, SOURCES, BLOCKS)]
    try:
        yield
    finally:
        for each, kept in before:
            each.clear()
            each.update(kept)


def _depth() -> int:
    from nnsight.tracing import tracer

    return getattr(tracer._local, "depth", 0)


def serve(folder: Path, patch: pytest.MonkeyPatch, task: str = "text-generation") -> Fake:
    """Put a fake in the place of every way out of this process."""
    import transformers

    fake = Fake(folder, task)
    fake.packages["transformers"] = transformers.__version__
    client = httpx.Client

    def connected(**options: Any) -> httpx.Client:
        return client(transport=httpx.MockTransport(fake), timeout=options.get("timeout"))

    def get(url: str, **options: Any) -> httpx.Response:
        with connected() as one:
            return one.get(url, headers=options.get("headers"))

    patch.setattr(httpx, "Client", connected)
    patch.setattr(httpx, "get", get)
    patch.setattr(websocket, "create_connection", lambda *_, **__: Socket(fake))
    patch.setattr(CONFIG.API, "HOST", HOST)
    patch.setattr(CONFIG.API, "APIKEY", KEY)
    patch.setattr(ndif, "_REMOTE_ENV", None)
    patch.setattr(transport, "LONGEST", 0.0)
    return fake


def without_key(text: str) -> bool:
    return KEY not in text and not re.search(r"0a1b2c3d", text)
