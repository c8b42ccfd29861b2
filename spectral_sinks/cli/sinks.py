"""The command `sinks`: the attention sinks of a model."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from rich.console import Group
from rich.text import Text

import spectral_sinks as ss
from spectral_sinks.cli.options import Running, bos_record, bos_row, ran, why
from spectral_sinks.cli.output import plain, show, table
from spectral_sinks.cli.parsing import Between, Draws
from spectral_sinks.errors import plural
from spectral_sinks.files import figure_format
from spectral_sinks.spectra.conventions import suffixes

LENGTH = 64
"""Tokens in a window unless --length is given. Attention received falls with their number."""


@dataclass(frozen=True)
class Sinks(Running):
    """Find the attention sinks: their positions and tokens, onset layer, norm and dark share."""

    epsilon: Annotated[float, Between(0, 1)] = 0.3
    """Attention received above which a token is a sink of a head."""
    draws: Draws = 20
    """Number of random subspaces that the dark band is compared with.
    Without any, it is not said whether a sink is dark."""
    figure: Path | None = None
    """File (.png, .pdf or .svg) for a figure: sink mass by head, sink rate by position,
    norm by position and layer. The dark share of each sink is shown under each convention."""
    export: Path | None = None
    """Folder for a rule that marks these sinks in other texts: rule.json and rule.safetensors.
    ss.SinkRule.load reads it back, and ss.sink_mask and ss.clean use it."""


def run_sinks(options: Sinks) -> None:
    if options.figure is not None:
        figure_format(options.figure)  # before hours of work
    model, windows, spectra = replace(options, length=options.length or LENGTH).prepare(beside=True)
    found = ss.find_sinks(
        model,
        windows,
        spectra,
        length=options.length or LENGTH,
        epsilon=options.epsilon,
        draws=options.draws,
        batch_size=options.batch_size,
    )
    if options.export is not None:
        rule = ss.SinkRule.learn(model, found, spectra, batch_size=options.batch_size)
        rule.save(options.export)
    record = found.record() | {
        "documents": found.attention.windows.record["documents"],
        "first_token_ids": found.attention.windows.record["first_token_ids"],
        "opens_with_bos": found.attention.windows.record["opens_with_bos"],
        "data_hash": found.attention.windows.record["data_hash"],
        **bos_record(model, windows),
        **ran(model),
    }
    if options.figure is not None:
        ss.figures.sinks(
            found.by_head(),
            found.rates(),
            found.norms(),
            options.figure,
            epsilon=options.epsilon,
            found=found.summary(),
        )
    show(options.json, record, Group(*_tables(record), *_disagreements(found)))


def _tables(record: dict[str, Any]) -> list[Any]:
    title = (
        f"Attention sinks, T = {record['tokens_per_window']}, epsilon = {record['epsilon']:g}: "
        f"{record['model']}"
    )
    names = {
        "sink_rate": "sink rate at position 0",
        "sink_rate_of_seen": "sink rate of queries that see it",
        "total_sink_mass": "attention to all sinks together",
        "high_norm_mass": "attention to all tokens of high norm",
        "to_sink_logit": "attention to a learned sink logit",
    }
    rows = [(label, _with_interval(record, name)) for name, label in names.items()]
    for place, name in ((2, "total_sink_mass"), (3, "high_norm_mass")):
        label, shown = rows[place]
        rows[place] = (label, f"{shown}; uniform {plain(record[f'uniform_{name}'])}")
    rows += [
        ("share of tokens with high norm", plain(record["high_norm_share"])),
        ("massive activations (published rule)", plain(record["massive_documents"]) + " documents"),
        ("dispersal over repeated tokens", "yes" if record["dispersal"] else "no"),
        ("onset layer", plain(record["onset_layer"])),
        ("documents, windows", f"{record['documents']}, {record['windows']}"),
        ("convention that decides what is dark", record["convention"]),
    ]
    rows += bos_row(record)
    if "remote" in record:
        rows.append(("server", record["remote"]["host"]))
    tables = [table(title, ("", ""), rows)]
    if "roles" in record:
        tables.append(_roles(record["roles"]))
    if not record["sinks"]:
        return [*tables, "no sinks"]
    columns = ("sink", "documents", "layers", "peak", "attention", "uniform", "norm")
    sinks = [
        (
            _name(sink),
            f"{sink['documents']} ({sink['share_of_documents']:.0%})",
            f"{sink['onset_layer']} to {_last(sink['erasure_layer'])}",
            str(sink["layer"]),
            _low_high(sink, "attention_mass"),
            f"{sink['uniform_mass']:.3f}",
            f"{sink['norm_ratio']:.2f}",
        )
        for sink in record["sinks"]
    ]
    title = "Sinks, at the layer of most attention (peak); norm beside other tokens"
    tables.append(table(title, columns, sinks))
    ends = suffixes(record["conventions"])
    columns = ("sink", "convention", "dark share", "random", "others", "dark")
    shares = [_dark_share(sink, name, end) for sink in record["sinks"] for name, end in ends.items()]
    return [*tables, table("Their share in the dark band", columns, shares)] if ends else tables


def _roles(rows: list[dict[str, Any]]) -> Any:
    columns = ("role", "tokens", "sinks", "attention received", "share of attention", "share to sinks")
    lines = [
        (
            Text(row["role"]),
            f"{row['tokens']}\n{plural(row['documents'], 'document')}",
            str(row["sink_tokens"]),
            _on_lines(row, "attention"),
            f"{_on_lines(row, 'share')}\nuniform {row['uniform_share']:.3f}",
            _on_lines(row, "sink_share"),
        )
        for row in rows
    ]
    return table("Attention by role", columns, lines)


def _low_high(row: dict[str, Any], name: str) -> str:
    """Format a mean with its interval, which a record has as a pair and a table in two columns."""
    low, high = row.get(f"{name}_interval") or (row[f"{name}_low"], row[f"{name}_high"])
    return f"{row[name]:.3f}" + ("" if math.isnan(low) else f" [{low:.3f}, {high:.3f}]")


def _on_lines(row: dict[str, Any], name: str) -> str:
    """Format a mean with its interval below it, for a table of many columns."""
    return _low_high(row, name).replace(" [", "\n[")


def _dark_share(sink: dict[str, Any], convention: str, end: str) -> tuple[str, ...]:
    """Return the row of a sink under a convention, whose columns end in `end`."""
    least, most = sink[f"random_dark_share{end}"]
    return (
        _name(sink),
        convention,
        _low_high(sink, f"dark_share{end}"),
        "no control" if math.isnan(least) else f"{least:.3f} to {most:.3f}",
        f"{sink[f'other_dark_share{end}']:.3f}",
        {True: "yes", False: "no", None: "-"}[sink[f"dark{end}"]],
    )


def _disagreements(found: ss.sinks.Sinks) -> list[Text]:
    """Return a sentence on each sink that is dark under one convention and not under another."""
    return [
        Text(f"The sink {_place(sink)} is {sink.disagreement} {why(found.conventions)}.")
        for sink in found.sinks
        if sink.disagreement
    ]


def _place(sink: ss.sinks.Sink) -> str:
    return repr(sink.token) if sink.position is None else f"at position {sink.position}"


def _with_interval(record: dict[str, Any], name: str) -> str:
    low, high = record[f"{name}_interval"]
    return f"{plain(record[name])} [{plain(low)}, {plain(high)}]"


def _name(sink: dict[str, Any]) -> str:
    """Return the position and the token of a sink."""
    token = "any token" if sink["token"] is None else repr(sink["token"])
    return token if sink["position"] is None else f"{sink['position']} {token}"


def _last(erasure: int | None) -> str:
    """Return the last layer of a sink, by the layer in which it is gone."""
    return "last" if erasure is None else str(erasure - 1)
