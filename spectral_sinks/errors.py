"""What the package raises and warns with."""


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
