"""How jobs travel to a server: packed, sent as one nnsight session each, retried, and fetched."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, TypeVar

import nnsight
from cloudpickle import list_registry_pickle_by_value, unregister_pickle_by_value
from nnsight import ndif
from nnsight.intervention.backends.local import LocalSimulationBackend
from nnsight.intervention.backends.remote import RemoteBackend
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from spectral_sinks.errors import InputError, RemoteError
from spectral_sinks.models.language import LanguageModel
from spectral_sinks.models.remote_state import Remote, Sent
from spectral_sinks.remote.failures import explained
from spectral_sinks.remote.serialization import Job, bootstrap_source, pack, sources, unpack

T = TypeVar("T")

PAYLOAD = 2**28
"""Bytes of a job, at most."""

TRIES, LONGEST = 5, 60.0
"""Tries of what may succeed later, and seconds between them, at most."""

RESULT = "ss_result"


class TooLarge(InputError):
    """A job of more bytes than are sent."""


def call(model: LanguageModel, function: Callable[..., T], /, *args: Any, **options: Any) -> T:
    """What a function returns that is called where the model is.

    Raises InputError as the function does, for what cannot be sent and for a job above the size limit, and
    RemoteError where the server or the way to it fails, after some tries of what may succeed later.
    """
    job, remote = _fitting(model, function, *args, **options), _remote(model)
    if remote.to == "local":
        before, path = time.time(), list(sys.path)
        try:
            answer = _session(model, job, LocalSimulationBackend(model.nn))
        finally:
            sys.path[:] = path  # nnsight puts back what it hid at the end
        sent = Sent("local", remote.host, len(job), before, time.time() - before, len(answer))
    else:
        sent, answer = _persistently(model.name, lambda: _wait(model, job))
    return received(model, answer, sent)


def submit(model: LanguageModel, function: Callable[..., Any], /, *args: Any, **options: Any) -> Sent:
    """Send a job without waiting for it; `fetch` asks for its result. Raises as `call` does."""
    job = _fitting(model, function, *args, **options)

    def once() -> Sent:
        backend = _Backend(model, blocking=False)
        before = time.time()
        _session(model, job, backend)
        assert backend.job_id is not None
        return Sent(backend.job_id, backend.host, backend.sent, before)

    return _persistently(model.name, once)


def fetch(job: str, host: str, model: str) -> tuple[bytes | None, bool]:
    """The packed answer of a job that was submitted, None while it is not done; and whether it is known.

    Raises RemoteError for a job that failed, and where the server cannot be reached.
    """

    def once() -> tuple[bytes | None, bool]:
        backend = RemoteBackend("", host=host, blocking=False, job_id=job)
        backend.display.enabled = False
        found = backend.poll()
        return None if found is None else found[RESULT], backend.status is not None

    return _persistently(model, once)


def received(model: LanguageModel, answer: bytes, sent: Sent) -> Any:
    """What a packed answer says, noted with the model. Raises InputError for what the far end refused."""
    remote = _remote(model)
    kind, value, remote.facts = unpack(answer, model)
    remote.jobs.append(sent)
    if kind == "refused":
        raise InputError(value)
    return value


def packed(model: LanguageModel, function: Callable[..., Any], /, *args: Any, **options: Any) -> bytes:
    """A job as bytes. Raises InputError for what cannot be sent."""
    factors, looks = _remote(model).factors or model.dtype, _remote(model).looks
    with _modules_along():
        return pack(
            Job(model.layout, model.name, factors, pack((function, args, options, looks), factors, model))
        )


@contextmanager
def _modules_along() -> Iterator[None]:
    """A user's own modules travel as source, as nnsight has it; elsewhere, as to a pool, by name again."""
    before = list_registry_pickle_by_value()
    ndif.pull_env()
    try:
        yield
    finally:
        for name in list_registry_pickle_by_value() - before:
            unregister_pickle_by_value(ModuleType(name))  # it may not be imported
        ndif._PULLED_ENV = False  # so that nnsight registers them again for the next


def _fitting(model: LanguageModel, function: Callable[..., Any], /, *args: Any, **options: Any) -> bytes:
    """A job of no more than `PAYLOAD` bytes. Raises TooLarge."""
    job = packed(model, function, *args, **options)
    if len(job) > PAYLOAD:
        raise TooLarge(
            f"a job of {len(job) / 2**20:.0f} MB, {PAYLOAD / 2**20:.0f} MB at most: give fewer cells or "
            "documents at once"
        )
    return job


def _session(model: LanguageModel, job: bytes, backend: Any) -> Any:
    """Run or send a job as one nnsight session; the names are such that nothing else is captured."""
    ss_nn, ss_job, ss_bootstrap = model.nn, job, bootstrap_source()
    ss_sources, ss_digest = sources()
    ss_result: Any = None
    with _modules_along(), ss_nn.session(backend=backend):
        ss_space = {"__name__": "ss_bootstrap"}
        exec(ss_bootstrap, ss_space)
        ss_result = nnsight.save(ss_space["run"](ss_nn, ss_sources, ss_digest, ss_job))  # pyright: ignore
    return ss_result


class _Backend(RemoteBackend):
    """nnsight's, silent, that remembers the job's id and size."""

    def __init__(self, model: LanguageModel, blocking: bool = True) -> None:
        nn, to = model.nn, _remote(model).to
        host = to if isinstance(to, str) else None
        super().__init__(nn.to_model_key(), host=host, env=nn._remoteable_get_env(), blocking=blocking)
        self.display.enabled = False
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
    if not isinstance(answer, bytes):
        raise RemoteError("the connection ended before the result came", again=True)
    seconds = time.time() - before
    return Sent(str(backend.job_id), backend.host, backend.sent, before, seconds, len(answer)), answer


def _persistently(model: str, attempt: Callable[[], T]) -> T:
    """Try, and again after a while, what may succeed later."""

    def once() -> T:
        try:
            return attempt()
        except Exception as error:  # of several libraries
            raise explained(error, model) from None

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
