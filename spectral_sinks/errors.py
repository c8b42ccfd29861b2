"""What the package raises and warns with, and the secrets that no message contains."""

import functools
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar, cast

F = TypeVar("F", bound=Callable[..., Any])

HIDDEN = "[key]"
"""What stands in the place of a secret."""

SECRETS = ("NDIF_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN")
"""Environment variables that hold a key."""

SHORTEST = 8
"""Characters of a key, at least. Anything shorter would be found in ordinary words."""


class SpectralError(Exception):
    """Base of every error that this package raises on purpose: `except SpectralError` catches them all."""


class InputError(SpectralError, ValueError):
    """An argument, a file or a model cannot be used; the message says what was expected and what to do."""


class RemoteError(SpectralError, ConnectionError):
    """A server, or the connection to it, failed. `again` says whether the same call may succeed later."""

    def __init__(self, message: str, again: bool = False) -> None:
        super().__init__(message)
        self.again = again


class SpectralWarning(UserWarning):
    """The result can be used, with a caveat that the message states."""


def plural(count: int, noun: str) -> str:
    """Return a count with its noun, such as "1 document" and "3 documents"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


LONGEST = 280
"""Characters that `brief` keeps."""


def brief(error: BaseException) -> str:
    """Return what an error of another library says, on one line that is not longer than a sentence may be."""
    words = " ".join(str(error).split())
    return words if len(words) <= LONGEST else f"{words[:LONGEST].rpartition(' ')[0]} ..."


def secrets() -> list[str]:
    """Return the keys that this process knows: NDIF's and the hub's, from the environment or stored."""
    found: list[str | None] = [os.environ.get(name) for name in SECRETS]
    # a library that is not loaded has not read its key either
    if nnsight := sys.modules.get("nnsight.schema.config"):
        found.append(nnsight.CONFIG.API.APIKEY)
    if hub := sys.modules.get("huggingface_hub.utils._auth"):
        with suppress(OSError):  # a file that cannot be read holds no key for the hub client either
            found.append(hub.get_token())
    return sorted(
        {key.strip() for key in found if key and len(key.strip()) >= SHORTEST}, key=len, reverse=True
    )


def without_secrets(text: str) -> str:
    """Return a text without the keys of this process, because servers may repeat what they were sent."""
    for key in secrets():
        text = text.replace(key, HIDDEN)
    return text


def renamed_argument(old: str, new: str) -> Callable[[F], F]:
    """Let a function take `new` under its old name for one version, with a DeprecationWarning."""

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def call(*args: Any, **options: Any) -> Any:
            if old in options:
                if new in options:
                    raise TypeError(f"{function.__name__} got both {old!r} and {new!r}, its new name")
                message = f"{function.__name__}({old}=...) is now {function.__name__}({new}=...)"
                warnings.warn(message, DeprecationWarning, stacklevel=2)
                options[new] = options.pop(old)
            return function(*args, **options)

        return cast(F, call)

    return decorate
