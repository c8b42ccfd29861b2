"""How much a text repeats itself: shares of repeated n-grams, and where a loop begins."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Int
from torch import Tensor

from spectral_sinks.errors import InputError

SHORTEST = 12
"""Tokens at least in a loop [ours]."""

TIMES = 3
"""Passes through its period at least in a loop [ours]."""


def ngrams(tokens: Sequence[int], n: int) -> list[tuple[int, ...]]:
    """All runs of n tokens, in order."""
    return list(zip(*(tokens[start:] for start in range(n)), strict=False))


def repeated(tokens: Sequence[int], n: int) -> float:
    """rep-n: 1 - distinct n-grams / n-grams of one text; n = 4 is seq-rep-4 (Welleck et al. 2020).

    Raises InputError for fewer than n tokens.
    """
    found = ngrams(tokens, n)
    if not found:
        raise InputError(f"rep-{n} of {len(tokens)} tokens: give {n} at least")
    return 1 - len(set(found)) / len(found)


def distinct(texts: Sequence[Sequence[int]], n: int) -> float:
    """distinct-n: distinct n-grams / n-grams over several texts together (Li et al. 2016).

    It also falls where different prompts are continued alike.
    """
    found = [gram for tokens in texts for gram in ngrams(tokens, n)]
    if not found:
        raise InputError(f"distinct-{n} of texts of fewer than {n} tokens")
    return len(set(found)) / len(found)


def loop_onset(tokens: Sequence[int]) -> int | None:
    """Where a text begins to repeat one period to its end; None where it does not.

    A loop goes through its period three times and lasts twelve tokens at least, of any period [ours]. Tokens
    0 to onset - 1 come before it.
    """
    ids = np.asarray(tokens)
    best: int | None = None
    for period in range(1, len(ids) // TIMES + 1):
        differs = np.flatnonzero(ids[period:] != ids[:-period])
        onset = int(differs[-1]) + 1 if len(differs) else 0
        if len(ids) - onset >= max(TIMES * period, SHORTEST) and (best is None or onset < best):
            best = onset
    return best


def repetition(
    continuations: Int[Tensor, "prompts draws new"], prompts: Int[Tensor, "prompts tokens"]
) -> pd.DataFrame:
    """A row per continuation: `document` (the prompt's place), `draw`, and how it repeats itself.

    Columns: `rep_1` to `rep_3`, `seq_rep_4`; `loops`, 0 or 1; `onset`, the tokens before the loop, all of
    them where there is none; `copied_4`, the share of its 4-grams that the prompt has.
    """
    rows: list[dict[str, float]] = []
    for document, (prompt, drawn) in enumerate(zip(prompts.tolist(), continuations.tolist(), strict=True)):
        seen = set(ngrams(prompt, 4))
        for draw, tokens in enumerate(drawn):
            onset = loop_onset(tokens)
            grams = ngrams(tokens, 4)
            rows.append(
                {"document": document, "draw": draw}
                | {f"rep_{n}": repeated(tokens, n) for n in (1, 2, 3)}
                | {
                    "seq_rep_4": repeated(tokens, 4),
                    "loops": float(onset is not None),
                    "onset": float(len(tokens) if onset is None else onset),
                    "copied_4": sum(gram in seen for gram in grams) / len(grams),
                }
            )
    return pd.DataFrame(rows)
