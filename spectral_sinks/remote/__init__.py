"""A function of a model, called where the model is: at an NDIF server, or in a rehearsal of one.

The checks that come before a run stand here too.
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
