"""Negative log-likelihood per token, and the divergence of an edited model from the untouched one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from spectral_sinks.models.language import LanguageModel
from spectral_sinks.models.masked_lm import masked_count, masked_positions

MIN_PREDICTIONS = 256
"""Minimum number of predictions that are unembedded at once: with fewer, memory traffic dominates."""

LOGITS = {"cpu": 2**19, "cuda": 2**26}
"""Logits held at once where more than `MIN_PREDICTIONS` fit: as many as stay in a processor's cache, or as
keep a GPU busy."""


@dataclass(frozen=True)
class Scores:
    """Numbers by predicted token; `kl` and `agrees` compare with the untouched pass."""

    nll: Float[Tensor, "batch predicted"]
    """Nats."""
    kl: Float[Tensor, "batch predicted"] | None = None
    """KL(untouched || filtered) of the predicted distributions, nats."""
    agrees: Bool[Tensor, "batch predicted"] | None = None
    """Whether the most likely token of the untouched pass is among the most likely ones of this pass."""


@dataclass(frozen=True)
class Reference:
    """The part of the untouched pass that an edited pass is compared with, without any logits.

    Let `z = W f + b` and `p = softmax(z)` in the untouched pass, and z' and f' the same in another. Then
    `KL(p || q) = lse(z') - lse(z) - p W (f' - f)`. The expected unembedding row `p W` makes the last term a
    product of width d.
    """

    final: Float[Tensor, "rows d"]
    """Output of the final norm."""
    total: Float[Tensor, "rows"]
    """Log of the sum of the exponentials of the logits."""
    top: Int[Tensor, "rows"]
    """Most likely token."""
    expected: Float[Tensor, "rows d"] | None
    """`p W`. It is None where logits are capped or rounded to half precision, or where no weight of the
    unembedding lies in this process as it acts; the logits are then computed again."""

    def to(self, device: torch.device) -> "Reference":
        return self._each(lambda x: x.to(device))

    def windows(self, start: int, stop: int, predicted: int) -> "Reference":
        """Return the reference for some windows of the batch, with `predicted` predictions each."""
        return self._each(lambda x: x[start * predicted : stop * predicted])

    @classmethod
    def joined(cls, parts: Sequence["Reference"]) -> "Reference":
        """Join the references of consecutive windows."""
        expected = [part.expected for part in parts if part.expected is not None]
        return cls(
            torch.cat([part.final for part in parts]),
            torch.cat([part.total for part in parts]),
            torch.cat([part.top for part in parts]),
            torch.cat(expected) if expected else None,
        )

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Reference":
        expected = None if self.expected is None else change(self.expected)
        return Reference(change(self.final), change(self.total), change(self.top), expected)


def predicted(model: LanguageModel, length: int) -> int:
    """Return the number of predicted tokens in a window: all but the first, or an encoder's masked ones."""
    return length - 1 if model.causal else masked_count(length)


def predictions(
    model: LanguageModel, final: Float[Tensor, "batch tokens d"], ids: Int[Tensor, "batch tokens"]
) -> tuple[Float[Tensor, "rows d"], Int[Tensor, "rows"]]:
    """Return the final residuals from which tokens are predicted, and these tokens.

    A causal model predicts token t + 1 at position t. An encoder, whose pass has read `masked_ids`, predicts
    the tokens of `ids` at the masked positions.
    """
    if model.causal:
        return final[:, :-1].flatten(0, 1), ids[:, 1:].to(final.device).flatten()
    positions = masked_positions(model, ids).to(final.device)  # [batch, predicted]
    rows = final.gather(1, positions[..., None].expand(-1, -1, final.shape[-1]))
    return rows.flatten(0, 1), ids.to(final.device).gather(1, positions).flatten()


def untouched(
    model: LanguageModel, final: Float[Tensor, "batch tokens d"], ids: Int[Tensor, "batch tokens"]
) -> tuple[Scores, Reference]:
    """Score the untouched pass, and keep the reference for others."""
    rows, targets = predictions(model, final, ids)
    linear = model.logit_cap is None and model.layout.traits.logit_factor == 1
    linear = linear and torch.finfo(final.dtype).bits >= 32 and not model.weightless
    weight = model.stored_unembedding if linear else None
    nll, total, top, expected = [], [], [], []
    for part in _chunks(model, rows):
        logits = model.unembed(rows[part])
        hit = logits.gather(-1, targets[part, None])[:, 0]
        top.append(logits.argmax(-1))
        most, sums, exponentials = _exponentials(logits)
        total.append(most + sums.log())
        nll.append(total[-1] - hit)
        if weight is not None:
            mean = exponentials @ weight.to(final.device, exponentials.dtype)
            expected.append(mean / sums[:, None])
    scores = Scores(torch.cat(nll).view(len(ids), -1))
    return scores, Reference(
        rows, torch.cat(total), torch.cat(top), torch.cat(expected) if expected else None
    )


def score(
    model: LanguageModel,
    final: Float[Tensor, "batch tokens d"],
    ids: Int[Tensor, "batch tokens"],
    reference: Reference | None = None,
) -> Scores:
    """Score token ids from the output of the final norm, one chunk of predictions at a time.

    A window of T tokens gives T - 1 values, in float32 at least; an encoder gives values for 15 % of the
    tokens, whose original `ids` are given. The batch may be several times the batch of the `reference`, which
    then repeats. The function works inside a trace and outside.
    """
    if reference is None:
        return untouched(model, final, ids)[0]
    rows, targets = predictions(model, final, ids)
    reference = reference.to(final.device)
    period = len(reference.total)
    nll, kl, agrees = (
        torch.empty(len(rows), device=final.device, dtype=reference.total.dtype) for _ in "123"
    )
    for part in _chunks(model, reference.final):
        theirs, p = None, None
        if reference.expected is None:
            theirs = model.unembed(reference.final[part])
            p = (theirs - reference.total[part, None]).exp()
        for start in range(0, len(rows), period):
            own = slice(start + part.start, start + part.stop)
            logits = model.unembed(rows[own])  # [chunk, vocabulary]
            hit = logits.gather(-1, targets[own, None])[:, 0]
            at_top = logits.gather(-1, reference.top[part, None])[:, 0]
            if reference.expected is not None:
                moved = (rows[own] - reference.final[part]).to(reference.expected.dtype)
                gained = (reference.expected[part] * moved).sum(-1)
            else:
                assert theirs is not None and p is not None
                gained = (p * (logits - theirs)).sum(-1)
            most, sums, _ = _exponentials(logits)
            total = most + sums.log()
            nll[own] = total - hit
            agrees[own] = (at_top >= most).to(agrees.dtype)
            kl[own] = total - reference.total[part] - gained
    shape = (len(ids), -1)
    return Scores(nll.view(shape), kl.view(shape), agrees.view(shape).bool())


def chunk(model: LanguageModel, device: torch.device) -> int:
    """Return the number of predictions that are unembedded at once."""
    return max(MIN_PREDICTIONS, LOGITS.get(device.type, LOGITS["cpu"]) // model.vocabulary)


def _chunks(model: LanguageModel, rows: Tensor) -> list[slice]:
    step = chunk(model, rows.device)
    return [slice(start, min(start + step, len(rows))) for start in range(0, len(rows), step)]


def _exponentials(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the largest logit, the sum of exponentials relative to it, and the exponentials.

    The logits are overwritten.
    """
    most = logits.amax(-1)
    exponentials = logits.sub_(most[:, None]).exp_()
    return most, exponentials.sum(-1), exponentials
