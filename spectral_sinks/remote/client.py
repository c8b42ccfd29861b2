"""Calls of functions where their model is: on an NDIF server, or in a local rehearsal of one.

A model that was loaded with `remote=` carries a `Remote`. A function decorated with `remotely` is sent to the
model as one nnsight session, however many traces it makes there. Its return value comes back.
"""

import functools
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

from spectral_sinks.models.base import Transformer
from spectral_sinks.models.language import LanguageModel
from spectral_sinks.models.remote_state import Sent
from spectral_sinks.remote import handshake, transport
from spectral_sinks.remote.serialization import SENT

M = TypeVar("M", bound=Transformer)
P = ParamSpec("P")
T = TypeVar("T")


def remotely(
    function: Callable[Concatenate[M, P], T],
) -> Callable[Concatenate[M, P], T]:
    """Decorate a function of a model so that it runs where the model is.

    The model is the first argument, passed by position. For a model in this process, nothing changes. For a
    remote model, the function is sent as source in one job. Its arguments and its return value are
    transferred, so they should be small. On the server it can use numpy, torch, and the filters, models and
    measurements of this package (`import spectral_sinks as ss` works as usual).

    Raises InputError for what cannot be sent and for errors that the function raises as InputError. Raises
    RemoteError if the server or the connection fails, or if the function fails in any other way.
    """

    @functools.wraps(function)
    def called(model: M, /, *args: P.args, **options: P.kwargs) -> T:
        if model.remote is None or not isinstance(model, LanguageModel):
            return function(model, *args, **options)
        return send(model, called, *args, **options)

    vars(called)[SENT] = called
    return called


def send(model: LanguageModel, function: Callable[..., T], /, *args: Any, **options: Any) -> T:
    """Call a function where its model is, and return its result.

    Raises InputError as the function does, for what cannot be sent, and for a job above the size limit.
    Raises RemoteError if the server or the connection fails; a failure that may pass is retried a few times
    before.
    """
    handshake.require(model)
    return transport.call(model, function, *args, **options)


def submit(model: LanguageModel, function: Callable[..., Any], /, *args: Any, **options: Any) -> Sent:
    """Send a job without waiting for it; `transport.fetch` gets its result. Raises as `send` does."""
    handshake.require(model)
    return transport.send_job(model, function, *args, **options)
