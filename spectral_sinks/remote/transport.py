"""Transport of jobs to a server: each is packed, sent as one nnsight session, retried, and fetched."""

import functools
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import nnsight
from cloudpickle import list_registry_pickle_by_value, unregister_pickle_by_value
from nnsight import ndif
from nnsight.intervention.backends.local import LocalSimulationBackend
from nnsight.schema.config import CONFIG
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from spectral_sinks.errors import InputError, RemoteError
from spectral_sinks.models.language import LanguageModel
from spectral_sinks.models.remote_state import Remote, Sent
from spectral_sinks.remote.answers import SafeBackend, read_answer
from spectral_sinks.remote.failures import explained
from spectral_sinks.remote.serialization import Job, bootstrap_source, pack, sources

T = TypeVar("T")

PAYLOAD = 2**28
"""Largest size of a job in bytes."""

TRIES, LONGEST = 5, 60.0
"""Number of tries for a failure that may pass, and the longest wait between them in seconds."""

RESULT = "ss_result"


class TooLarge(InputError):
    """A job above the size limit."""


def call(model: LanguageModel, function: Callable[..., T], /, *args: Any, **options: Any) -> T:
    """Call a function where its model is, and return its result.

    Raises InputError as the function does, for what cannot be sent, and for a job above the size limit.
    Raises RemoteError if the server or the connection fails; a failure that may pass is retried a few times
    before.
    """
    job, remote = _fitting(model, function, *args, **options), _remote(model)
    if remote.to == "local":
        before, path = time.time(), list(sys.path)
        try:
            answer = _session(model, job, LocalSimulationBackend(model.nn))
        finally:
            sys.path[:] = path  # nnsight appends the entries that it hid, instead of restoring their order
        sent = Sent("local", remote.host, len(job), before, time.time() - before, len(answer))
    else:
        sent, answer = _persistently(model.name, remote.host, lambda: _wait(model, job))
    return unpack_answer(model, answer, sent)


def send_job(model: LanguageModel, function: Callable[..., Any], /, *args: Any, **options: Any) -> Sent:
    """Send a job without waiting for it; `fetch` gets its result. Raises as `call` does."""
    job = _fitting(model, function, *args, **options)

    def once() -> Sent:
        backend = _Backend(model, blocking=False)
        before = time.time()
        _session(model, job, backend)
        assert backend.job_id is not None
        return Sent(backend.job_id, backend.host, backend.sent, before)

    return _persistently(model.name, _remote(model).host, once)


def configured_host() -> str:
    """Return the address of the server that nnsight is configured for."""
    return CONFIG.API.HOST


def fetch(job: str, host: str, model: str) -> tuple[bytes | None, bool]:
    """Return the packed answer of a submitted job, or None while it is not done, and whether the job is
    known.

    Raises RemoteError for a job that failed, and if the server cannot be reached.
    """

    def once() -> tuple[bytes | None, bool]:
        backend = SafeBackend("", host=host, blocking=False, job_id=job)
        found = backend.poll()
        return None if found is None else _packed_answer(found.get(RESULT)), backend.status is not None

    return _persistently(model, host, once)


def unpack_answer(model: LanguageModel, answer: bytes, sent: Sent) -> Any:
    """Unpack an answer, and record the job with the model. Raises InputError for what the server refused."""
    remote = _remote(model)
    kind, value, remote.facts = read_answer(answer, model)
    remote.jobs.append(sent)
    if kind == "refused":
        raise InputError(value)
    return value


def packed(model: LanguageModel, function: Callable[..., Any], /, *args: Any, **options: Any) -> bytes:
    """Return a job as bytes. Raises InputError for what cannot be sent."""
    factors, hooks = _remote(model).factors or model.dtype, _remote(model).hooks
    with _modules_along():
        return pack(
            Job(model.layout, model.name, factors, pack((function, args, options, hooks), factors, model))
        )


@contextmanager
def _modules_along() -> Iterator[None]:
    """Send a user's own modules as source inside the block, as nnsight does; outside, they are pickled by
    name again.
    """
    before = list_registry_pickle_by_value()
    for name in _own_modules(tuple((os.path.abspath(path), _changed(path)) for path in sys.path)):
        ndif.register(name)
    ndif._PULLED_ENV = True  # so that nnsight does not look for them again
    try:
        yield
    finally:
        for name in list_registry_pickle_by_value() - before:
            unregister_pickle_by_value(ModuleType(name))  # the module itself may not be imported
        ndif._PULLED_ENV = False  # so that nnsight registers them again for the next job


@functools.lru_cache(maxsize=1)
def _own_modules(paths: tuple[tuple[str, int], ...]) -> tuple[str, ...]:
    """Return the modules of the user's own, which nnsight tells from installed ones by reading all metadata.

    That takes seconds, so it is done again only after a folder of `sys.path` has changed.
    """
    return tuple(name for name, version in ndif.get_local_env()["packages"].items() if version == "local")


def _changed(path: str) -> int:
    """Return when a folder of `sys.path` was changed; 0 for what is not there."""
    try:
        return Path(path or ".").stat().st_mtime_ns
    except OSError:
        return 0


def _fitting(model: LanguageModel, function: Callable[..., Any], /, *args: Any, **options: Any) -> bytes:
    """Return a job of at most `PAYLOAD` bytes. Raises TooLarge for a larger one."""
    job = packed(model, function, *args, **options)
    if len(job) > PAYLOAD:
        raise TooLarge(
            f"a job of {len(job) / 2**20:.0f} MB, {PAYLOAD / 2**20:.0f} MB at most: give fewer cells or "
            "documents at once"
        )
    return job


def _session(model: LanguageModel, job: bytes, backend: Any) -> Any:
    """Run or send a job as one nnsight session; its local names avoid that nnsight captures anything else."""
    ss_nn, ss_job, ss_bootstrap = model.nn, job, bootstrap_source()
    ss_sources, ss_digest = sources()
    ss_result: Any = None
    with _modules_along(), ss_nn.session(backend=backend):
        ss_space = {"__name__": "ss_bootstrap"}
        exec(ss_bootstrap, ss_space)
        ss_result = nnsight.save(ss_space["run_job"](ss_nn, ss_sources, ss_digest, ss_job))  # pyright: ignore
    return ss_result


class _Backend(SafeBackend):
    """A backend that records the job's id and size."""

    def __init__(self, model: LanguageModel, blocking: bool = True) -> None:
        nn, to = model.nn, _remote(model).to
        host = to if isinstance(to, str) else None
        super().__init__(nn.to_model_key(), host=host, env=nn._remoteable_get_env(), blocking=blocking)
        self.sent = 0

    def _serialize(self, tracer: Any) -> bytes:
        blob = super()._serialize(tracer)
        self.sent = len(blob)
        return blob

    def note(self, response: Any) -> bool:
        self.job_id = response.id
        return super().note(response)


def _wait(model: LanguageModel, job: bytes) -> tuple[Sent, bytes]:
    backend = _Backend(model)
    before = time.time()
    answer = _session(model, job, backend)
    if answer is None:
        raise RemoteError("the connection ended before the result came", again=True)
    answer = _packed_answer(answer)
    seconds = time.time() - before
    return Sent(str(backend.job_id), backend.host, backend.sent, before, seconds, len(answer)), answer


def _packed_answer(found: Any) -> bytes:
    if not isinstance(found, bytes):
        raise RemoteError(f"the answer of the server is a {type(found).__name__}, not a packed result")
    return found


def _persistently(model: str, host: str, attempt: Callable[[], T]) -> T:
    """Try, and retry after a while if the failure may pass."""

    def once() -> T:
        try:
            return attempt()
        except Exception as error:  # errors of several libraries
            raise explained(error, model, host) from None

    tries = Retrying(
        stop=stop_after_attempt(TRIES),
        wait=wait_random_exponential(1, LONGEST),
        retry=retry_if_exception(lambda error: isinstance(error, RemoteError) and error.again),
        reraise=True,
    )
    return tries(once)


def _remote(model: LanguageModel) -> Remote:
    assert isinstance(model.remote, Remote)
    return model.remote
