"""Rows of an imagined sweep, the same whoever computes them."""

import hashlib

import numpy as np
import pandas as pd

from spectral_sinks.sweeps.schema import BY_LAYER, MEANS

LAYERS = 6


def address(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def rows(*names: str, windows=range(4), per_document: int = 2) -> pd.DataFrame:
    """Every cell named at every window; a name decides all numbers."""
    return pd.DataFrame([row(name, window, window // per_document) for name in names for window in windows])


def row(name: str, window: int, document: int) -> dict[str, object]:
    cell = address(name)
    generator = np.random.default_rng([int(cell[:8], 16), window])
    return {
        "cell": cell,
        "name": name,
        "model": "tiny",
        "site": "exit",
        "layer": 3,
        "head": None,
        "filter": "omega",
        "rank": None if "custom" in name else 8,
        "fill": "zero",
        "at": "all",
        "draw": 2 if "rnd" in name else None,
        "document": document,
        "window": window,
        "tokens": int(generator.integers(1, 100)),
        **{column: generator.normal() for column in MEANS},
        **{column: list(generator.random(LAYERS)) for column in BY_LAYER},
    }
