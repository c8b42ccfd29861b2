"""The command `circuits`: the heads that have a no-op circuit, and the parts of each circuit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import spectral_sinks as ss
from spectral_sinks.cli.options import Running, ran
from spectral_sinks.cli.output import show, table
from spectral_sinks.cli.parsing import Natural
from spectral_sinks.errors import plural

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = {
    "attention": "to sink",
    "value_ratio": "value ratio",
    "top_two": "two modes",
    "random_top_two": "random bases",
    "always_on": "query always on",
    "rival": "next key",
}
"""The columns of `Circuits.heads` that the table shows, and their labels."""

DARK = ("key_dark", "reading_dark", "value_dark")
"""The shares of the dark band, which the table shows in one column."""


@dataclass(frozen=True)
class Circuits(Running):
    """Find the heads that attend, through a mode that is always on, to a sink whose value writes nothing."""

    position: Natural = 0
    """Position of the sink, counted from 0."""
    token: str | None = None
    """Token that is the sink, in place of a position, such as [SEP]: its first occurrence in each window."""
    figures: Path | None = None
    """Folder for figures: a map of all heads, and one page for each head with a circuit."""


def run_circuits(options: Circuits) -> None:
    model, windows, (spectrum,) = options.prepare(beside=False)
    position = options.position if options.token is None else options.token
    found = ss.no_op_circuits(model, windows, spectrum, position, batch_size=options.batch_size)
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
        "matrix": spectrum.matrix,
        "convention": spectrum.convention,
        "bands": spectrum.count,
        "random_dark": spectrum.dark().rank / spectrum.d,
        "rule": ss.circuits.Circuits.rule,
        "circuits": heads[heads["circuit"]].to_dict("records"),
        "heads": heads.to_dict("records"),
        **ran(model),
    }
    where = f"at position {position}" if options.token is None else f"at {position}"
    title = (
        f"No-op circuits of {found.model}, sink {where}, {windows.length} tokens per "
        f"window, {plural(windows.record['documents'], 'document')} "
        f"(dark share of a random direction in the {spectrum.matrix}: {result['random_dark']:.3f})"
    )
    rows = [
        (f"{row['layer']}.{row['head']}\n{row['use']}", *(cell(row, name) for name in COLUMNS), dark(row))
        for row in result["circuits"]
    ]
    columns = ("head", *COLUMNS.values(), "dark: key, read, value") if rows else ("head",)
    show(options.json, result, table(title, columns, rows or [("none",)]))


def cell(row: dict[str, Any], name: str) -> str:
    """Format a value, with its interval on the line below."""
    if f"{name}_low" not in row:
        return f"{row[name]:.2f}"
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return f"{row[name]:.2f}" + ("" if low != low else f"\n{low:.2f} {high:.2f}")


def dark(row: dict[str, Any]) -> str:
    """Format the dark shares of the key direction, of what it reads, and of what the sink's value writes."""
    return "\n".join(f"{row[name]:.2f}" for name in DARK)


def draw(found: ss.circuits.Circuits, folder: Path) -> None:
    """Draw the map of all heads, and one page for each circuit."""
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
