"""Negative log-likelihood per token, and the divergence of an edited model from the untouched one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from spectral_sinks.errors import InputError
from spectral_sinks.models.language import LanguageModel
from spectral_sinks.models.masked_lm import masked_count, masked_positions

MIN_PREDICTIONS = 256
"""Minimum number of predictions that are unembedded at once: with fewer, memory traffic dominates."""

LOGITS = {"cpu": 2**19, "cuda": 2**26}
"""Logits held at once: as many as stay in a processor's cache, or as keep a GPU busy. A model that cannot
unembed in parts holds those of `MIN_PREDICTIONS` predictions at least."""


@dataclass(frozen=True)
class Sample:
    """Some of the predictions of each window, drawn without replacement: only these are scored."""

    count: int
    """Number of predictions of a window; all of them in a window that has no more."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.count < 2:
            raise InputError(
                f"predict {self.count}: give at least 2 predictions of each window, from which the error of "
                "their mean can be told"
            )

    @classmethod
    def of(cls, predict: "Sample | int | None") -> "Sample | None":
        """Return a sample of a number of predictions (seed 0), or None to score all predictions."""
        given: Any = predict
        return cls(int(given)) if isinstance(given, Integral) else given

    def drawn(self, window: int, predicted: int) -> Int[Tensor, "scored"]:
        """Return which of the `predicted` predictions of a window are scored, in ascending order.

        They depend on the seed and on the index of the window alone, and not on batches.
        """
        generator = np.random.default_rng((self.seed, window))
        return torch.from_numpy(
            np.sort(generator.choice(predicted, min(self.count, predicted), replace=False))
        )

    def drawn_each(self, windows: Sequence[int], predicted: int) -> Int[Tensor, "windows scored"]:
        """Return `drawn` of several windows of one length."""
        return torch.stack([self.drawn(window, predicted) for window in windows])


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
    model: LanguageModel,
    final: Float[Tensor, "batch tokens d"],
    ids: Int[Tensor, "batch tokens"],
    chosen: Int[Tensor, "batch scored"] | None = None,
) -> tuple[Float[Tensor, "rows d"], Int[Tensor, "rows"]]:
    """Return the final residuals from which tokens are predicted, and these tokens.

    A causal model predicts token t + 1 at position t. An encoder, whose pass has read `masked_ids`, predicts
    the tokens of `ids` at the masked positions. `chosen` are the predictions of each window that are scored;
    by default all are.
    """
    ids = ids.to(final.device)
    if model.causal and chosen is None:
        return final[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    if model.causal and chosen is not None:
        positions = chosen.to(final.device)
        targets = positions + 1
    else:
        positions = masked_positions(model, ids).to(final.device)  # [batch, predicted]
        positions = positions if chosen is None else positions.gather(1, chosen.to(final.device))
        targets = positions
    rows = final.gather(1, positions[..., None].expand(-1, -1, final.shape[-1]))
    return rows.flatten(0, 1), ids.gather(1, targets).flatten()


def untouched(
    model: LanguageModel,
    final: Float[Tensor, "batch tokens d"],
    ids: Int[Tensor, "batch tokens"],
    chosen: Int[Tensor, "batch scored"] | None = None,
) -> tuple[Scores, Reference]:
    """Score the untouched pass, or the `chosen` predictions of it, and keep the reference for others."""
    rows, targets = predictions(model, final, ids, chosen)
    linear = model.logit_cap is None and model.layout.traits.logit_factor == 1
    linear = linear and torch.finfo(final.dtype).bits >= 32 and not model.weightless
    weight = model.stored_unembedding if linear else None
    nll, total, top, expected = [], [], [], []
    for part in _chunks(model, rows):
        sums, best, mean = _LogSum(rows[part]), torch.zeros_like(targets[part]), torch.zeros_like(rows[part])
        hit = sums.most
        for tokens in _blocks(model, rows):
            logits = model.unembed(rows[part], tokens)
            hit = _picked(hit, targets[part], logits, tokens)
            high, where = logits.max(-1)
            best = torch.where(high > sums.most, where + tokens.start, best)
            shrunk, exponentials = sums.add(logits, high)
            if weight is not None:
                own = weight[tokens].to(final.device, exponentials.dtype)
                mean = torch.addmm(mean * shrunk[:, None], exponentials, own)
        total.append(sums.total)
        top.append(best)
        nll.append(sums.total - hit)
        expected.append(mean / sums.sums[:, None])
    scores = Scores(torch.cat(nll).view(len(ids), -1))
    kept = None if weight is None else torch.cat(expected)
    return scores, Reference(rows, torch.cat(total), torch.cat(top), kept)


def score(
    model: LanguageModel,
    final: Float[Tensor, "batch tokens d"],
    ids: Int[Tensor, "batch tokens"],
    reference: Reference | None = None,
    chosen: Int[Tensor, "batch scored"] | None = None,
) -> Scores:
    """Score token ids from the output of the final norm, one chunk of predictions and tokens at a time.

    A window of T tokens gives T - 1 values, in float32 at least; an encoder gives values for 15 % of the
    tokens, whose original `ids` are given. The batch may be several times the batch of the `reference`, which
    then repeats. With `chosen`, these predictions of each window alone are scored, of which the reference is
    one too. The function works inside a trace and outside.
    """
    rows, targets = predictions(model, final, ids, chosen)
    shape = (len(ids), -1)
    if reference is None:
        parts: list[Tensor] = []
        for part in _chunks(model, rows):
            sums = _LogSum(rows[part])
            hit = sums.most
            for tokens in _blocks(model, rows):
                logits = model.unembed(rows[part], tokens)
                hit = _picked(hit, targets[part], logits, tokens)
                sums.add(logits, logits.amax(-1))
            parts.append(sums.total - hit)
        return Scores(torch.cat(parts).view(shape))
    reference = reference.to(final.device)
    period = len(reference.total)
    nll, kl, agrees = (
        torch.empty(len(rows), device=final.device, dtype=reference.total.dtype) for _ in "123"
    )
    for part in _chunks(model, reference.final):
        cells = [slice(start + part.start, start + part.stop) for start in range(0, len(rows), period)]
        sums = [_LogSum(rows[own]) for own in cells]
        hit, at_top = ([one.most for one in sums] for _ in "12")
        gained = [torch.zeros_like(reference.total[part]) for _ in cells]
        for tokens in _blocks(model, rows):
            theirs, p = None, None
            if reference.expected is None:
                theirs = model.unembed(reference.final[part], tokens)
                p = (theirs - reference.total[part, None]).exp()
            for cell, own in enumerate(cells):
                logits = model.unembed(rows[own], tokens)  # [chunk, block]
                hit[cell] = _picked(hit[cell], targets[own], logits, tokens)
                at_top[cell] = _picked(at_top[cell], reference.top[part], logits, tokens)
                if theirs is not None and p is not None:
                    gained[cell] += (p * (logits - theirs)).sum(-1)
                sums[cell].add(logits, logits.amax(-1))
        for cell, own in enumerate(cells):
            if reference.expected is not None:
                moved = (rows[own] - reference.final[part]).to(reference.expected.dtype)
                gained[cell] = (reference.expected[part] * moved).sum(-1)
            total = sums[cell].total
            nll[own] = total - hit[cell]
            agrees[own] = (at_top[cell] >= sums[cell].most).to(agrees.dtype)
            kl[own] = total - reference.total[part] - gained[cell]
    return Scores(nll.view(shape), kl.view(shape), agrees.view(shape).bool())


def chunk(model: LanguageModel, device: torch.device) -> int:
    """Return the number of predictions that are unembedded at once."""
    return max(MIN_PREDICTIONS, LOGITS.get(device.type, LOGITS["cpu"]) // model.vocabulary)


def block(model: LanguageModel, device: torch.device) -> int:
    """Return the number of tokens for which these predictions are unembedded at once.

    It is the whole vocabulary for a model that cannot unembed in parts.
    """
    if model.weightless or not model.unembeds_in_parts:
        return model.vocabulary
    return max(1, LOGITS.get(device.type, LOGITS["cpu"]) // chunk(model, device))


def _chunks(model: LanguageModel, rows: Tensor) -> list[slice]:
    step = chunk(model, rows.device)
    return [slice(start, min(start + step, len(rows))) for start in range(0, len(rows), step)]


def _blocks(model: LanguageModel, rows: Tensor) -> list[slice]:
    """Return the ids whose logits are computed together, as slices of the vocabulary."""
    size, step = model.vocabulary, block(model, rows.device)
    if step >= size:
        return [slice(0, None)]
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


class _LogSum:
    """The log of the sum of the exponentials of some rows of logits, block by block of the vocabulary."""

    def __init__(self, like: Tensor) -> None:
        """Begin with no block, for as many rows as `like` has."""
        kind = torch.promote_types(like.dtype, torch.float32)
        self.most = like.new_full(like.shape[:1], torch.finfo(kind).min, dtype=kind)
        """The largest logit."""
        self.sums = torch.zeros_like(self.most)
        """The sum of exponentials relative to the largest logit."""

    def add(self, logits: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Add a block, whose largest logits are `high`, and overwrite it with its exponentials.

        Returns the factor by which earlier exponentials shrink, since they are relative to the largest logit,
        and the exponentials.
        """
        most = torch.maximum(self.most, high)
        shrunk = (self.most - most).exp_()
        exponentials = logits.sub_(most[:, None]).exp_()
        self.sums = self.sums * shrunk + exponentials.sum(-1)
        self.most = most
        return shrunk, exponentials

    @property
    def total(self) -> Float[Tensor, "rows"]:
        return self.most + self.sums.log()


def _picked(known: Tensor, ids: Tensor, logits: Tensor, tokens: slice) -> Float[Tensor, "rows"]:
    """Return the logit of one id in each row: from this block of the vocabulary, or as known before."""
    place = ids - tokens.start
    inside = (place >= 0) & (place < logits.shape[-1])
    own = logits.gather(-1, place.clamp(0, logits.shape[-1] - 1)[:, None])[:, 0]
    return torch.where(inside, own, known)
