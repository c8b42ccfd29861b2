"""Repetition of texts: shares of repeated n-grams, and the onset of loops."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Int
from torch import Tensor

from spectral_sinks.errors import InputError

SHORTEST = 12
"""Minimum number of tokens in a loop [ours]."""

TIMES = 3
"""Minimum number of periods in a loop [ours]."""


def ngrams(tokens: Sequence[int], n: int) -> list[tuple[int, ...]]:
    """All runs of n tokens, in order."""
    return list(zip(*(tokens[start:] for start in range(n)), strict=False))


def repeated(tokens: Sequence[int], n: int) -> float:
    """rep-n: 1 - distinct n-grams / n-grams of one text; n = 4 is seq-rep-4 (Welleck et al. 2020).

    Raises InputError for fewer than n tokens.
    """
    grams = ngrams(tokens, n)
    if not grams:
        raise InputError(f"rep-{n} of {len(tokens)} tokens: give {n} at least")
    return 1 - len(set(grams)) / len(grams)


def distinct(texts: Sequence[Sequence[int]], n: int) -> float:
    """distinct-n: distinct n-grams / n-grams over several texts together (Li et al. 2016).

    It also decreases where the continuations of different prompts are alike. Raises InputError for texts of
    fewer than n tokens.
    """
    grams = [gram for tokens in texts for gram in ngrams(tokens, n)]
    if not grams:
        raise InputError(f"distinct-{n} of texts of fewer than {n} tokens")
    return len(set(grams)) / len(grams)


def loop_onset(tokens: Sequence[int]) -> int | None:
    """Return the position from which a text repeats one period to its end; None where it does not.

    A loop has a period of any length, and at least three periods and twelve tokens [ours]. Tokens 0 to
    onset - 1 come before it.
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
    """Return one row per continuation: `document` (the index of the prompt), `draw`, and its repetition.

    The columns are `rep_1` to `rep_3` and `seq_rep_4`; `loops`, 0 or 1; `onset`, the number of tokens before
    the loop, or all tokens where there is none; `copied_4`, the share of its 4-grams that the prompt
    contains.
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
