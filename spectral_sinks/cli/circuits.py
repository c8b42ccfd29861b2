"""`spectral-sinks circuits`: which heads have a no-op circuit, and what it is made of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import spectral_sinks as ss
from spectral_sinks.cli.options import Running, ran
from spectral_sinks.cli.output import show, table

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = {
    "attention": "on sink",
    "value_ratio": "value ratio",
    "top_two": "two modes",
    "random_top_two": "random",
    "always_on": "query on",
    "rival": "rival",
}
"""What the table shows of `Circuits.heads`, and what it calls it."""

DARK = ("key_dark", "reading_dark", "value_dark")
"""Shares of the dark band that stand in one column."""


@dataclass(frozen=True)
class Circuits(Running):
    """Heads with a no-op circuit: they attend to a sink that writes nothing, found by a mode always on."""

    position: int = 0
    """Position of the sink, from 0."""
    figures: Path | None = None
    """Folder for a map of all heads, and one page per head with a circuit."""


def run_circuits(options: Circuits) -> None:
    model, windows, spectrum = options.prepare()
    found = ss.no_op_circuits(model, windows, spectrum, options.position, batch_size=options.batch_size)
    if options.figures is not None:
        draw(found, options.figures)
    heads = found.heads
    result: dict[str, Any] = {
        "model": found.model,
        "position": found.position,
        "tokens_per_window": windows.length,
        "documents": windows.record["documents"],
        "first_token_ids": windows.first_token_ids,
        "opens_with_bos": windows.opens_with_bos,
        "data_hash": windows.record["data_hash"],
        "convention": spectrum.convention,
        "bands": spectrum.count,
        "random_dark": spectrum.dark().rank / spectrum.d,
        "rule": ss.circuits.Circuits.rule,
        "circuits": heads[heads["circuit"]].to_dict("records"),
        "heads": heads.to_dict("records"),
        **ran(model),
    }
    title = (
        f"No-op circuits of {found.model}, sink at position {found.position}, {windows.length} tokens per "
        f"window, {windows.record['documents']} documents (dark by chance: {result['random_dark']:.3f})"
    )
    rows = [
        (f"{row['layer']}.{row['head']}\n{row['use']}", *(cell(row, name) for name in COLUMNS), dark(row))
        for row in result["circuits"]
    ]
    columns = ("head", *COLUMNS.values(), "dark: key, read, value") if rows else ("head",)
    show(options.json, result, table(title, columns, rows or [("none",)]))


def cell(row: dict[str, Any], name: str) -> str:
    """A value, with its interval below it."""
    if f"{name}_low" not in row:
        return f"{row[name]:.2f}"
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return f"{row[name]:.2f}" + ("" if low != low else f"\n{low:.2f} {high:.2f}")


def dark(row: dict[str, Any]) -> str:
    """The dark shares of what the detector's direction is, of what it reads, and of what the value writes."""
    return "\n".join(f"{row[name]:.2f}" for name in DARK)


def draw(found: ss.circuits.Circuits, folder: Path) -> None:
    """The map, and a page for each circuit."""
    folder.mkdir(parents=True, exist_ok=True)
    ss.figures.circuits(found.heads, folder / "heads.png")
    for layer, head in found.found:
        row: pd.Series = found.heads.set_index(["layer", "head"]).loc[(layer, head)]
        path = folder / f"layer{layer}_head{head}.png"
        ss.figures.circuit_page(
            f"{found.model}, layer {layer}, head {head}",
            row,
            found.sides(layer, head),
            found.profile(layer, head),
            found.detectors.shown,
            path,
        )
