"""From the numbers of an explorer to its page, which holds as much of them as fits."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from spectral_sinks.errors import InputError
from spectral_sinks.pages.html import LIMIT, Page, render, require_plotly
from spectral_sinks.pages.packing import as_codes, inside_script
from spectral_sinks.pages.token_readings import STRONGEST, TokenReading

MOST = 12
"""Texts or images on a page, at most."""

RESERVED = 100_000
"""Bytes that the template, the styles and the scripts take, at most."""

Part = Callable[[TokenReading], Any]
"""A part of the numbers of one text or image, rounded and compressed."""

Kind = TypeVar("Kind", bound=TokenReading)


@dataclass(frozen=True, eq=False)
class Explorer(ABC, Generic[Kind]):
    """The numbers of one to twelve texts or images, and the page that shows them."""

    model: str
    readings: tuple[Kind, ...]
    subspaces: tuple[str, ...]
    """The names of the bands, and of the dark bands of other conventions."""
    filters: dict[str, str]
    """What each filter removes, by its name."""
    exits: tuple[int, ...]
    record: dict[str, Any] = field(default_factory=dict[str, Any])
    absent: dict[str, str] = field(default_factory=dict[str, str])
    """What was not measured, and why."""

    inputs: ClassVar[str]
    """What is shown: texts or images."""
    template: ClassVar[str]
    """The file of the template."""
    view: ClassVar[str]
    """The file of the script that draws the tokens."""

    @property
    @abstractmethod
    def table(self) -> pd.DataFrame:
        """The numbers of every token."""

    @cached_property
    def page(self) -> Page:
        """The page. Raises InputError where Plotly is not installed, and for inputs that no page can hold."""
        return Page(explorer_page(self), 1000)

    def save(self, path: str | Path) -> Path:
        """Write the page to a file and return its path.

        Raises InputError for a name that does not end in .html, for a folder that does not exist, where
        Plotly is not installed, and for inputs that are too large for a page of 15 MB.
        """
        return self.page.save(path)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.model}, {len(self.readings)} {self.inputs})"

    def _repr_html_(self) -> str:
        return self.page._repr_html_()


def explorer_page(explorer: Explorer[Any]) -> str:
    """Return the page of an explorer.

    Raises InputError where Plotly is not installed, and for inputs that are too large for one page.
    """
    parts, left_out = fitted(explorer, LIMIT - RESERVED - len(require_plotly().encode()))
    record, readings = explorer.record, explorer.readings
    data = {
        "inputs": parts,
        "layers": record["layers"],
        "heads": record["heads"],
        "attentionLayers": record["attention_layers"],
        "subspaces": list(explorer.subspaces),
        "filters": explorer.filters,
        "exits": list(explorer.exits),
        "start": record["start"],
    }
    return render(
        explorer.template,
        ("common.js", explorer.view, "explorer.js"),
        data,
        title=f"{explorer.model}: {explorer.inputs}",
        explorer=explorer,
        record=record,
        names=[reading.title for reading in readings],
        left_out=left_out,
        has_attention=readings[0].received is not None,
        has_shares=readings[0].shares is not None,
        has_nll=any(reading.nll is not None for reading in readings),
    )


def fitted(explorer: Explorer[Any], budget: int) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the numbers of all inputs within a number of bytes, and a sentence on each part left out.

    Every part has forms from the fullest to the smallest. All parts begin in their smallest form; then each
    in turn takes the fullest one that still fits.
    """
    readings, since = explorer.readings, f"since {explorer.record['long']}"
    ladders: dict[str, list[tuple[Part, str]]] = {
        "shares": [
            (lambda reading: _shares(reading, 16), ""),
            (
                lambda reading: _shares(reading, 8),
                f"The shares of the bands are rounded to steps of 0.4 %, {since}.",
            ),
            (lambda reading: None, f"The shares of the bands are left out, {since}."),
        ],
        "received": [
            (lambda reading: _received(reading, heads=True), ""),
            (
                lambda reading: _received(reading, heads=False),
                f"Attention received is the mean over heads, {since}.",
            ),
        ],
        "filtered": [
            (lambda reading: _filtered(reading, attention=True), ""),
            (
                lambda reading: _filtered(reading, attention=False),
                f"Attention received under filters is left out, {since}.",
            ),
        ],
        "maps": [
            (_maps, ""),
            (
                lambda reading: _maps(reading, mean=True),
                f"Who attends to whom is the mean over heads, {since}.",
            ),
            (
                _strongest,
                f"Of who attends to whom, only the {STRONGEST} strongest weights of each token are kept, in "
                f"the mean over heads, {since}.",
            ),
            (lambda reading: None, f"Who attends to whom is left out, {since}."),
        ],
    }
    fixed = [_fixed(reading) for reading in readings]
    chosen = {name: len(forms) - 1 for name, forms in ladders.items()}
    made: dict[tuple[str, int], list[Any]] = {}
    sizes: dict[tuple[str, int], int] = {}

    def size(name: str, form: int) -> int:
        if (name, form) not in made:
            made[name, form] = [ladders[name][form][0](reading) for reading in readings]
            sizes[name, form] = len(inside_script(made[name, form]))
        return sizes[name, form]

    used = len(inside_script(fixed))
    total = used + sum(size(name, form) for name, form in chosen.items())
    if total > budget:
        raise InputError(
            f"a page with these {len(readings)} {explorer.inputs} has "
            f"{(LIMIT - budget + total) / 1e6:.0f} MB, more than {LIMIT / 1e6:.0f}: give fewer or smaller "
            "ones"
        )
    for name in ladders:
        for form in range(len(ladders[name])):
            larger = total - size(name, chosen[name]) + size(name, form)
            if larger <= budget:
                total, chosen[name] = larger, form
                break
    left_out = [ladders[name][form][1] for name, form in chosen.items() if ladders[name][form][1]]
    return [
        part | {name: made[name, form][place] for name, form in chosen.items()}
        for place, part in enumerate(fixed)
    ], left_out


def _fixed(reading: TokenReading) -> dict[str, Any]:
    """Return what every page holds of a text or an image."""
    return {
        **reading.shown(),
        "norm": as_codes(reading.norm, 16, log=True),
        "nll": _rounded(reading.nll),
        "sinks": {str(k): [[list(pair) for pair in site] for site in v] for k, v in reading.sinks.items()},
    }


def _rounded(nll: NDArray[np.float64] | None) -> list[float | None] | None:
    return None if nll is None else [None if np.isnan(v) else round(float(v), 5) for v in nll]


def _shares(reading: TokenReading, bits: Any) -> Any:
    return None if reading.shares is None else as_codes(reading.shares, bits, within=(0.0, 1.0))


def _received(reading: TokenReading, heads: bool) -> Any:
    """Return the attention received: the mean over heads first, then the heads."""
    if reading.received is None:
        return None
    mean = reading.received.mean(1, keepdims=True)
    values = np.concatenate([mean, reading.received], axis=1) if heads else mean
    return as_codes(values, 16, within=_from_zero(values))


def _from_zero(values: NDArray[np.float64]) -> tuple[float, float]:
    """Return the range of attention received: 0 to 1, or to more without a softmax."""
    return 0.0, max(1.0, float(np.nanmax(values)))


def _filtered(reading: TokenReading, attention: bool) -> dict[str, Any]:
    """Return the readings under the filters, by the name of the filter and the exit."""
    found: dict[str, Any] = {}
    for (name, layer), under in reading.filtered.items():
        received = None
        if attention and under.received is not None:
            received = as_codes(under.received, 16, within=_from_zero(under.received))
        found[f"{name}/{layer}"] = {"nll": _rounded(under.nll), "received": received}
    return found


def _maps(reading: TokenReading, mean: bool = False) -> Any:
    """Return the attention weights: whole maps, or the strongest weights of each token."""
    if reading.maps is not None:
        maps = reading.maps.mean(1, keepdims=True) if mean else reading.maps
        return {"kind": "whole", "weights": as_codes(maps, 8, within=(0.0, 1.0))}
    return _strongest(reading)


def _strongest(reading: TokenReading) -> Any:
    """Return the strongest weights of each token, in the mean over heads; None without attention."""
    found = reading.strongest
    if reading.maps is not None:
        mean = reading.maps.mean(1)
        keys = np.argsort(-mean, axis=-1, kind="stable")[..., :STRONGEST]
        found = keys, np.take_along_axis(mean, keys, -1)
    if found is None:
        return None
    keys, weights = found
    return {
        "kind": "strongest",
        "keys": as_codes(keys, 16, within=(0.0, 65534.0)),
        "weights": as_codes(weights, 8, within=(0.0, 1.0)),
    }
