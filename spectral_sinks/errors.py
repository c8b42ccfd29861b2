"""What the package raises and warns with."""


class InputError(ValueError):
    """Something given cannot be used; the message says what was given, what was expected, what to do."""


class SpectralWarning(UserWarning):
    """Something given can be used, with a caveat that the message states."""
