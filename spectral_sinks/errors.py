"""What the package raises and warns with."""


class InputError(ValueError):
    """Something given cannot be used; the message says what was given, what was expected, what to do."""


class RemoteError(InputError):
    """A server, or the way to it, failed; `again` says whether the same may succeed later."""

    def __init__(self, message: str, again: bool = False) -> None:
        super().__init__(message)
        self.again = again


class SpectralWarning(UserWarning):
    """Something given can be used, with a caveat that the message states."""
