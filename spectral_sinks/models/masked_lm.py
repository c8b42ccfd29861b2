"""Masked language models: which tokens of a window they predict."""

import hashlib
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor

from spectral_sinks.errors import InputError

if TYPE_CHECKING:
    from spectral_sinks.models.language import LanguageModel

SHARE = 0.15
"""Share of a window's tokens that are masked (Devlin et al. 2019, 3.1)."""

RULE = (
    "15 % of a window's tokens, at least one, become the mask token; special tokens never; drawn by a "
    "generator seeded by the SHA-256 of the window's ids"
)
"""How tokens are masked, for records."""


def masked_count(tokens: int) -> int:
    """Return how many tokens of a window are masked.

    Special tokens count towards the length of the window, as in BERT's own data.
    """
    return max(1, round(SHARE * tokens))


def masked_positions(model: "LanguageModel", ids: Int[Tensor, "batch tokens"]) -> Int[Tensor, "batch masked"]:
    """Return the positions in each window whose tokens are masked and predicted, in order.

    They depend only on the ids of the window: 15 % of its tokens, at least one, and never special tokens.
    Raises InputError for a model without a mask token, and for a window with too few tokens that are not
    special.
    """
    _ = model.mask  # raises an error that says what is missing
    special = frozenset(model.tokenizer.all_special_ids)
    return torch.tensor([_drawn(tuple(row), special) for row in ids.tolist()], device=ids.device)


def masked_ids(model: "LanguageModel", ids: Int[Tensor, "batch tokens"]) -> Int[Tensor, "batch tokens"]:
    """Return windows with the mask token at `masked_positions`, as an encoder reads them when its NLL is
    measured.

    Raises InputError as `masked_positions` does.
    """
    return ids.scatter(1, masked_positions(model, ids), model.mask)


@lru_cache(4096)
def _drawn(row: tuple[int, ...], special: frozenset[int]) -> list[int]:
    places = [place for place, token in enumerate(row) if token not in special]
    count = masked_count(len(row))
    if len(places) < count:
        raise InputError(
            f"a window of {len(row)} tokens has {len(places)} that are not special, and {count} are to be "
            "masked: give other text, or a tokenizer that knows its words"
        )
    content = hashlib.sha256(torch.tensor(row).numpy().tobytes()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(content[:8]) >> 1)
    order = torch.randperm(len(places), generator=generator)[:count]
    return sorted(places[i] for i in order.tolist())
