"""Functions of a user's own, in a module of their own, that a server knows only from their source."""

import threading
from dataclasses import dataclass, replace
from typing import Any

import torch

import spectral_sinks as ss

FACTOR = 2.0


def halved(call: ss.attention.AttentionCall) -> ss.attention.AttentionCall:
    return replace(call, value=0.5 * call.value)


@ss.remotely
def entropies(model: ss.LanguageModel, ids: torch.Tensor, power: float = 1.0) -> torch.Tensor:
    """A measurement that collects: mean entropy of the attention of each layer, times `FACTOR`."""
    found: list[torch.Tensor] = []

    def look(call: ss.attention.AttentionCall) -> None:
        weights = call.weights()
        found.append(-FACTOR * torch.xlogy(weights, weights).sum(-1).pow(power).mean().cpu())

    with ss.attending(model, look), ss.attending(model, halved):
        ss.trace(model, ids, {ss.Site("exit", 0): lambda x: 0.5 * x}, readout=lambda *_: None)
    return torch.stack(found)


@ss.remotely
def spread(model: ss.LanguageModel, ids: torch.Tensor) -> float:
    """Another one, which calls the first: there it is one job."""
    return float(entropies(model, ids).std())


@ss.remotely
def grid(model: ss.LanguageModel) -> Any:
    """Asks for what stays with the user."""
    return ss.grid


@dataclass(frozen=True, eq=False)
class Halved(ss.attention.AttentionEdit):
    """A move of one's own."""

    def changed(self, call: ss.attention.AttentionCall) -> ss.attention.AttentionCall:
        return halved(call)


@dataclass(frozen=True)
class Tally:
    count: int


@ss.remotely
def apart(model: ss.LanguageModel, other: ss.LanguageModel, ids: torch.Tensor) -> float:
    """How far the logits of two models are apart."""
    one, two = (
        ss.trace(each, ids, {}, readout=lambda final, *_, each=each: each.unembed(final[:, -1:]))
        for each in (model, other)
    )
    return float((one - two).abs().max())


@ss.remotely
def optioned(model: ss.LanguageModel, function: Any = 1, job: str = "") -> tuple[Any, str]:
    """Options that have the names of others on the way."""
    return function, job


@ss.remotely
def room(model: ss.LanguageModel) -> str:
    return ss.stats.__name__


@ss.remotely
def returned(model: ss.LanguageModel, what: str) -> Any:
    """Things that can, or cannot, come back."""
    if what == "lock":
        return threading.Lock()
    if what == "tally":
        return Tally(3)
    eye = torch.eye(3, dtype=torch.complex64) * 1j
    return eye.to_sparse() if what == "sparse" else eye.conj()
