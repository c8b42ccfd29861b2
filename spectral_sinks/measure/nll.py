"""Negative log-likelihood per token, and how far a filtered model has moved from the untouched one."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from spectral_sinks.models.language import LanguageModel

BUDGET = 2**26
"""Logits (float32 numbers) held at once."""


@dataclass(frozen=True)
class Scores:
    """Per predicted token, `[batch, tokens - 1]`; `kl` and `agrees` compare with a reference pass."""

    nll: Float[Tensor, "batch predicted"]
    """Nats."""
    kl: Float[Tensor, "batch predicted"] | None = None
    """KL(untouched || filtered) of the next-token distributions, nats."""
    agrees: Bool[Tensor, "batch predicted"] | None = None
    """Whether both give the same most likely token."""


@dataclass(frozen=True)
class Reference:
    """The untouched pass that a filtered one is compared with."""

    final: Float[Tensor, "batch tokens d"]
    """Output of the final norm."""
    logs: Float[Tensor, "rows vocabulary"] | None
    """Log probabilities of all predictions where they fit into `BUDGET`; else unembedded when needed."""

    top: Int[Tensor, "rows"] | None
    """Most likely next token of all predictions, kept with them."""

    @classmethod
    def of(cls, model: LanguageModel, final: Float[Tensor, "batch tokens d"]) -> "Reference":
        rows = final[:, :-1].flatten(0, 1)
        if len(rows) * model.vocabulary > BUDGET:
            return cls(final, None, None)
        logs = model.unembed(rows).log_softmax(-1)
        return cls(final, logs, logs.argmax(-1))


def score(
    model: LanguageModel,
    final: Float[Tensor, "batch tokens d"],
    ids: Int[Tensor, "batch tokens"],
    reference: Reference | None = None,
) -> Scores:
    """Score token ids from the output of the final norm, a chunk of tokens at a time, in float32 at least.

    Token t + 1 is predicted from position t: T tokens give T - 1 values. At most `BUDGET` logits of this
    pass, and as many of the `reference`, exist at once. Runs inside a trace or outside.
    """
    before = final[:, :-1].flatten(0, 1)
    targets = ids[:, 1:].to(final.device).flatten()
    nll: list[Tensor] = []
    kl: list[Tensor] = []
    agrees: list[Tensor] = []
    step = max(1, BUDGET // model.vocabulary)
    for start in range(0, len(before), step):
        part = slice(start, start + step)
        logs = model.unembed(before[part]).log_softmax(-1)
        nll.append(-logs.gather(-1, targets[part, None])[:, 0])
        if reference is not None:
            if reference.logs is not None and reference.top is not None:
                theirs, top = reference.logs[part].to(logs.device), reference.top[part].to(logs.device)
            else:
                other = reference.final[:, :-1].flatten(0, 1)[part]
                theirs = model.unembed(other.to(final.device)).log_softmax(-1)
                top = theirs.argmax(-1)
            kl.append((theirs.exp() * (theirs - logs)).sum(-1))
            agrees.append(top == logs.argmax(-1))
    shape = (ids.shape[0], ids.shape[1] - 1)
    if reference is None:
        return Scores(torch.cat(nll).view(shape))
    return Scores(torch.cat(nll).view(shape), torch.cat(kl).view(shape), torch.cat(agrees).view(shape))
