"""Whether a model wants BOS before a text: the untouched NLL with it and without it."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from spectral_sinks.data.texts import Windows
from spectral_sinks.errors import InputError
from spectral_sinks.interventions.tracing import trace
from spectral_sinks.measure.nll.scoring import score
from spectral_sinks.models.language import LanguageModel

WINDOWS, LENGTH = 4, 64
"""Windows that are compared, and the tokens that are read of each."""

WORSE = 0.2
"""Nats per token by which the NLL may exceed that of the other policy without a warning [ours]."""


@dataclass(frozen=True)
class BosComparison:
    """The untouched NLL of the same tokens with BOS before the text and without it."""

    token: str
    """BOS as text."""
    opens_with_bos: bool
    """Whether the windows that were given open with it."""
    with_bos: float
    """Nats per token, mean over windows. The first token of the text, which nothing precedes without BOS, is
    left out of both."""
    without_bos: float
    windows: int

    @property
    def worse_by(self) -> float:
        """Nats per token by which the policy in use is worse than the other; negative where it is better."""
        difference = self.with_bos - self.without_bos
        return difference if self.opens_with_bos else -difference

    @property
    def advice(self) -> str | None:
        """What to do about a policy that is worse by more than 0.2 nats per token; None for any other."""
        if not self.worse_by > WORSE:
            return None
        used, other = ("with", "without") if self.opens_with_bos else ("without", "with")
        values = {"with": self.with_bos, "without": self.without_bos}
        policy = "never" if self.opens_with_bos else "always"
        return (
            f"windows open {used} BOS ({self.token}), and the untouched NLL is {values[used]:.2f} nats per "
            f"token where it is {values[other]:.2f} {other} BOS: use --bos {policy}, cut(..., bos={policy!r})"
        )

    def record(self) -> dict[str, Any]:
        """Return the fields as a dictionary that JSON can hold."""
        return asdict(self) | {"worse_by": self.worse_by}


def compare_bos(model: LanguageModel, windows: Windows) -> BosComparison | None:
    """Compare the untouched NLL with and without BOS on the first window of the first four documents.

    At most 64 tokens of each window are read. Returns None for an encoder, for a model whose tokenizer has no
    BOS, for windows of fewer than two tokens of text, and for chats, which open as their template has it.

    Raises InputError for a model whose weights are in another process.
    """
    if model.weightless:
        raise InputError(f"the weights of {model.name} are in another process: BOS is compared in this one")
    if not model.causal or model.bos is None or windows.roles is not None:
        return None
    first = {owner: row for owner, row in reversed(list(zip(windows.document, windows.rows, strict=True)))}
    texts = [row[int(row[0] == model.bos) :][:LENGTH] for row in (first[o] for o in sorted(first)[:WINDOWS])]
    by_length: dict[int, list[Tensor]] = {}
    for text in texts:
        if len(text) > 1:
            by_length.setdefault(len(text), []).append(text)
    if not by_length:
        return None
    with_bos, without_bos = list[float](), list[float]()
    for length, rows in by_length.items():
        batch = torch.stack(rows)
        opened = torch.cat([torch.full_like(batch[:, :1], model.bos), batch], dim=1)
        with_bos += _nlls(model, opened, length - 1)
        without_bos += _nlls(model, batch, length - 1)
    count = len(with_bos)
    token = str(model.tokenizer.convert_ids_to_tokens(model.bos))
    return BosComparison(
        token, windows.opens_with_bos, sum(with_bos) / count, sum(without_bos) / count, count
    )


def _nlls(model: LanguageModel, batch: Tensor, predicted: int) -> list[float]:
    """Return the mean NLL of the last tokens of each window."""

    def readout(final: Tensor, *_: Any) -> list[float]:
        return score(model, final, batch).nll[:, -predicted:].double().mean(1).tolist()

    return trace(model, batch.to(model.device), {}, readout=readout)
