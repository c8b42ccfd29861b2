"""The checks before a remote run, in order, each with a remedy if it fails."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from platform import python_version
from typing import Any

import httpx
from nnsight import ndif
from nnsight.schema.config import CONFIG

from spectral_sinks.errors import InputError, RemoteError, without_secrets
from spectral_sinks.models.embedded import DEFAULT
from spectral_sinks.models.language import LanguageModel
from spectral_sinks.models.loading import load
from spectral_sinks.remote.failures import explained
from spectral_sinks.remote.handshake import examine

PATIENCE = 30.0
"""Seconds to wait for an answer to a small request."""

MUST_AGREE = ("nnsight", "transformers")
"""Libraries whose minor version must be the same on both sides; other differences are only reported."""

TOLD = (*MUST_AGREE, "torch")


@dataclass(frozen=True)
class Step:
    """The result of one check."""

    name: str
    ok: bool
    found: str
    """What was found, or the problem and its remedy."""


def preflight(model: str = DEFAULT, **options: Any) -> Iterator[Step]:
    """Check in turn that the server is reachable, the key, the versions, the model, and a pass of one token.

    Yields one `Step` for each check and stops at the first that fails. `options` are passed to `load`. The
    output never contains the key.
    """
    host = CONFIG.API.HOST
    loaded: list[LanguageModel] = []

    def token() -> str:
        found = examine(loaded[0])
        _agreed(found)
        return (
            f"dtype {found['dtype']}, attention {found['attention']}, BOS {found['bos']}; writing a residual "
            "back leaves the logits the same bit for bit, and the modules of a layer add up"
        )

    def weights() -> str:
        loaded.append(load(model, remote=True, **options))
        return f"{loaded[0].layers} layers, d {loaded[0].d}; no weights loaded"

    steps: tuple[tuple[str, Callable[[], str]], ...] = (
        ("reachable", lambda: f"{host} says {_ask('/ping')!r}"),
        ("key", _key),
        ("versions", _versions),
        ("configuration", weights),
        ("running", lambda: _running(loaded[0])),
        ("one token", token),
    )
    for name, look in steps:
        try:
            yield Step(name, True, without_secrets(look()))
        except Exception as error:  # errors of several libraries
            yield Step(name, False, str(explained(error, model)))
            return


def _ask(path: str, headers: dict[str, str] | None = None) -> Any:
    answer = httpx.get(f"{CONFIG.API.HOST}{path}", timeout=PATIENCE, headers=headers)
    answer.raise_for_status()
    return answer.json()


def _key() -> str:
    key = CONFIG.API.APIKEY
    if not key:
        if CONFIG.API.HOST.startswith(("http://127.0.0.1", "http://localhost")):
            return "no key, which a server on this machine may not need"
        raise InputError(
            "no API key: get one at https://login.ndif.us and store it with `nnsight login`, or set "
            "NDIF_API_KEY"
        )
    email = _ask("/whoami", {"ndif-api-key": key}).get("email")
    return (
        "present; the server recognises its owner"
        if email
        else "present; the server does not say whose it is"
    )


def _versions() -> str:
    try:
        there = ndif.get_remote_env(force_refresh=True)
    except httpx.HTTPError:  # a busy server may be slow to list them, and a pass reports them as well
        return "the server does not list its versions now; the pass of one token reports them"
    return _agreed({**there["packages"], "python": there["python_version"].split()[0]})


def _agreed(remote: dict[str, Any]) -> str:
    """Return the versions on both sides. Raises RemoteError if they must be the same and are not."""
    here = {name: _installed(name) for name in TOLD} | {"python": python_version()}
    for name in MUST_AGREE:
        if _minor(here[name]) != _minor(remote.get(name, "")):
            raise RemoteError(
                f"{name} is {here[name]} in this process and {remote.get(name, 'none')} at {CONFIG.API.HOST}"
                f": pip install {name}=={remote.get(name, '')}"
            )
    return "client / server: " + ", ".join(f"{name} {here[name]} / {remote.get(name, '-')}" for name in here)


def _running(model: LanguageModel) -> str:
    key = model.nn.to_model_key()
    entries: dict[str, Any] = _ask("/status").get("deployments", {})
    states = [e.get("application_state", "") for e in entries.values() if e.get("model_key") == key]
    if "RUNNING" in states:
        return "yes"
    running = sorted(e["repo_id"] for e in entries.values() if e.get("application_state") == "RUNNING")
    return f"not yet; the first job requests it. Running models: {', '.join(running) or 'none'}"


def _installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "-"


def _minor(text: str) -> list[str]:
    return text.split(".")[:2]
