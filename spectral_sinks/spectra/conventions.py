"""The conventions in which an unembedding is read, and how results name them."""

from collections.abc import Iterable, Mapping
from typing import Literal

Convention = Literal["raw", "folded", "centred"]
"""`raw` is the matrix as stored, `folded` the matrix times the gain of the norm before it. `centred` also
removes the mean over the vocabulary."""

DEFAULT_CONVENTION: Convention = "raw"
"""The convention of `read_spectrum` and of sweep files unless another one is named: the matrix as stored."""

DARK_CONVENTION: Convention = "folded"
"""The convention that decides what the commands call dark unless another one is named.

The vocabulary reads a residual through the gain of the final norm, so a direction is dark to it if the
product of gain and matrix hardly reads it. `results/real/README.md` measures what this decides.
"""

SIDE_BY_SIDE: tuple[Convention, ...] = ("raw", "folded")
"""The conventions that are shown beside the one that decides."""


def suffixes(conventions: Iterable[str]) -> dict[str, str]:
    """Return what the names of columns end in, by convention: nothing for the first, which decides."""
    return {name: f"_{name}" if place else "" for place, name in enumerate(conventions)}


def disagreement(words: Mapping[str, str]) -> str:
    """Return a text such as "dark under folded; not dark under raw"; "" where all conventions agree."""
    if len(set(words.values())) < 2:
        return ""
    return "; ".join(
        f"{word} under {' and '.join(name for name, said in words.items() if said == word)}"
        for word in sorted(set(words.values()))
    )
