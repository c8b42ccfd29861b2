"""Running functions of a model where the model is: on an NDIF server, or in a local rehearsal of one.

This package also holds the checks that come before a remote run.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "client": ["remotely"],
        "handshake": ["examine"],
        "server_check": ["preflight"],
    },
)
