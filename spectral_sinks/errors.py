"""What the package raises and warns with."""

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar, cast

F = TypeVar("F", bound=Callable[..., Any])


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
