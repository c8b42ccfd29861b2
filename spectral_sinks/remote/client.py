"""The same functions of a model, called where the model is: at an NDIF server, or in a rehearsal of one.

A model that was loaded with `remote=` carries a `Remote`. A function decorated with `remotely` is then sent
to the model as one nnsight session, whatever number of traces it makes there, and what it returns comes back.
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
    """A function of a model, its first argument (by place), that is called where the model is: decorate it.

    Of a model in this process nothing changes. To one that is elsewhere the function goes as source, as one
    job; its arguments and what it returns travel, so they are small. There it may use numpy, torch and the
    filters, models and measurements of this package (`import spectral_sinks as ss` is the same). Raises
    InputError for what cannot be sent and for what the function itself refuses, and RemoteError where the
    server or the way to it fails, or the function in any other way.
    """

    @functools.wraps(function)
    def called(model: M, /, *args: P.args, **options: P.kwargs) -> T:
        if model.remote is None or not isinstance(model, LanguageModel):
            return function(model, *args, **options)
        return send(model, called, *args, **options)

    vars(called)[SENT] = called
    return called


def send(model: LanguageModel, function: Callable[..., T], /, *args: Any, **options: Any) -> T:
    """What a function returns that is called where the model is.

    Raises InputError as the function does, for what cannot be sent and for a job above the size limit, and
    RemoteError where the server or the way to it fails, after some tries of what may succeed later.
    """
    handshake.require(model)
    return transport.call(model, function, *args, **options)


def submit(model: LanguageModel, function: Callable[..., Any], /, *args: Any, **options: Any) -> Sent:
    """Send a job without waiting for it; `transport.fetch` asks for its result. Raises as `send` does."""
    handshake.require(model)
    return transport.submit(model, function, *args, **options)
