"""The no-op circuit: a head attends to a sink that writes nothing, by a mode that is always on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from spectral_sinks.errors import InputError
from spectral_sinks.measure.attention.by_position import Inputs
from spectral_sinks.measure.attention.capture import Position, sink_positions
from spectral_sinks.measure.attention.received import EPSILON
from spectral_sinks.measure.circuits import heads as head_use
from spectral_sinks.measure.circuits import qk_detectors
from spectral_sinks.measure.circuits.bands import SinkValues, key_directions, random_shares, readings
from spectral_sinks.measure.circuits.heads import NO_OP, Found, HeadUse
from spectral_sinks.measure.circuits.qk_detectors import Detectors
from spectral_sinks.measure.results import Result
from spectral_sinks.models.base import Transformer
from spectral_sinks.remote.client import remotely
from spectral_sinks.spectra.spectrum import Spectrum
from spectral_sinks.stats import mean_interval

MOST = 0.5
"""Share of the margin that the two leading modes of a no-op circuit carry, at least [ours]."""

ALWAYS_ON = 0.8
"""Share of a query side's mean square that is constant, from which the side counts as always on. At this
share its mean is twice its standard deviation [ours]."""

RIVAL = 0.5
"""Largest key side on another key, relative to the key side on the sink, up to which a mode is selective
[ours]."""

RULE = (
    "a head has a no-op circuit if, in the mean over documents, its queries put at least "
    f"{EPSILON} of their attention on the sink [published], the sink's value ratio is at most {NO_OP} "
    f"[published], the two leading modes of its scores carry at least {MOST} of the sink's margin and more "
    "than those of any random basis [ours], the query side of the leading mode is always on (at least "
    f"{ALWAYS_ON} of its mean square is constant) [ours], and no other key has more than {RIVAL} of the "
    "sink's key side [ours]"
)
"""The rule of `no_op_circuits`."""


@dataclass(frozen=True, eq=False, repr=False)
class Circuits(Result):
    """What every head does with its sink, and which heads have a no-op circuit by the stated `rule`."""

    model: str
    position: Position
    """The position as it was given. `detectors.sinks` holds the number in each window."""
    windows: dict[str, Any]
    """How the windows were cut."""
    heads: pd.DataFrame
    """One row per layer and head: each quantity of `head_use` and `detectors` with `_low` and `_high`; the
    share of documents on which the head is `dormant`; its most frequent `use`; `random_top_two`, the largest
    value among the random bases; `modes_needed` for half of the margin; the dark shares `key_dark`,
    `value_dark` and `reading_dark`; whether it is a `circuit`; and the conditions that are `lacking`."""
    use: pd.DataFrame
    """The table of `head_use`."""
    detectors: Detectors
    spectrum: Spectrum
    key_shares: Float[Tensor, "layers heads bands"]
    """Share of each band in the direction of the residual that the key side of the leading mode reads."""
    value_shares: pd.DataFrame
    """One row per document, layer and head, and one column per band: shares of what the sink's value writes.
    NaN where it writes nothing at all."""
    read_shares: pd.DataFrame
    """The same for what the leading mode reads from the residual at the sink. These parts have signs and add
    up to 1."""
    sink_shares: pd.DataFrame
    """One row per document and layer: share of each band in the energy of that residual."""

    rule: ClassVar[str] = RULE

    listed: ClassVar[tuple[str, ...]] = (
        *("layer", "head", "use", "attention", "value_ratio", "top_two", "always_on", "rival", "circuit"),
    )

    @property
    def headline(self) -> str:
        """How many heads have a no-op circuit."""
        return f"{len(self.found)} of {len(self.heads)} heads of {self.model} have a no-op circuit"

    def digest(self) -> pd.DataFrame:
        """Return the heads with a circuit, or all of them where there is none."""
        return self.heads[self.heads["circuit"]] if self.found else self.heads

    @property
    def found(self) -> list[tuple[int, int]]:
        """Layer and head of every no-op circuit."""
        table = self.heads[self.heads["circuit"]]
        return list(zip(table["layer"].tolist(), table["head"].tolist(), strict=True))

    @property
    def table(self) -> pd.DataFrame:
        """One row per document, layer and head: the columns of `head_use` and `detectors`."""
        keys = ["document", "layer", "head"]
        return self.use.merge(self.detectors.table, on=keys)

    def summary(self) -> pd.DataFrame:
        """Return one row per layer and head: the table `heads`."""
        return self.heads

    def record(self) -> dict[str, Any]:
        """Return the rule, the heads with a circuit and all heads, as a dictionary that JSON can hold."""
        return {
            "model": self.model,
            "position": np.asarray(self.position).tolist(),
            "rule": self.rule,
            "windows": self.windows,
            "circuits": self.heads[self.heads["circuit"]].to_dict("records"),
            "heads": self.heads.to_dict("records"),
        }

    def by_layer(self) -> pd.DataFrame:
        """Return how much of each layer's attention goes to a sink that writes nothing, one row per `layer`.

        `mass` is the attention to the sink, mean over heads and queries. `no_op_mass` is the part of it in
        heads whose value ratio is at most 0.2 on that document. Both have `_low` and `_high` over documents.
        `no_op_heads` is the number of heads that, on average, put 0.3 on such a sink, and `one_or_two` is the
        number of these in which one or two modes carry half of the margin.
        """
        use = self.use.assign(no_op=self.use["attention"].where(self.use["value_ratio"] <= NO_OP, 0.0))
        means = use.groupby(["document", "layer"])[["attention", "no_op"]].mean().reset_index()
        rows: list[dict[str, Any]] = []
        for layer, part in means.groupby("layer"):
            row: dict[str, Any] = {"layer": layer}
            for name, column in (("mass", "attention"), ("no_op_mass", "no_op")):
                low, high = mean_interval(part[column])
                row |= {name: float(part[column].mean()), f"{name}_low": low, f"{name}_high": high}
            heads = _only(self.heads, layer=row["layer"])
            chosen = heads[(heads["attention"] >= EPSILON) & (heads["value_ratio"] <= NO_OP)]
            row |= {"no_op_heads": len(chosen), "one_or_two": int(chosen["modes_needed"].between(1, 2).sum())}
            rows.append(row)
        return pd.DataFrame(rows)

    def sides(self, layer: int, head: int) -> pd.DataFrame:
        """Return both sides of a head's two leading modes over the first longest window, in roots of nats.

        The columns are `position`, `query_1`, `key_1`, `query_2` and `key_2`. The product of the two sides of
        a mode is its part of a score, up to what all keys share. Signs are chosen so that the sink's key side
        is positive.
        """
        found = self.detectors
        query, key = found.query_sides[layer][head], found.key_sides[layer][head]
        sign = torch.where(key[found.shown] < 0, -1.0, 1.0)
        columns: dict[str, Any] = {"position": range(len(key))}
        for mode in range(key.shape[-1]):
            columns[f"query_{mode + 1}"] = (query * sign)[:, mode].numpy()
            columns[f"key_{mode + 1}"] = (key * sign)[:, mode].numpy()
        return pd.DataFrame(columns)

    def profile(self, layer: int, head: int) -> pd.DataFrame:
        """Return the band shares of one head.

        The columns are `what`, `band`, `share`, `low`, `high`, `random`, `random_low` and `random_high`. For
        "key direction" and "value", `share` is a share of energy, and `random` that of a random direction:
        its mean r/d, and the interval of 95 % of draws. For "reading", it is what the leading mode reads at
        the sink, and `random` is what random directions read there on average, which is the energy of the
        sink's residual.
        """
        here = {"layer": layer, "head": head}
        value, read = (_only(table, **here) for table in (self.value_shares, self.read_shares))
        sink = _only(self.sink_shares, layer=layer)
        rows: list[dict[str, Any]] = []
        for band, null in enumerate(random_shares(self.spectrum), start=1):
            key = [float(self.key_shares[layer, head, band - 1])] * 2
            energy = (float(sink[str(band)].mean()), float("nan"), float("nan"))
            for what, sample, control in (
                ("key direction", key, null),
                ("value", value[str(band)], null),
                ("reading", read[str(band)], energy),
            ):
                low, high = mean_interval(sample)
                row = {"what": what, "band": band, "share": float(np.mean(sample)), "low": low, "high": high}
                rows.append(row | dict(zip(("random", "random_low", "random_high"), control, strict=True)))
        return pd.DataFrame(rows)


def no_op_circuits(
    model: Transformer,
    windows: Inputs,
    spectrum: Spectrum,
    position: Position = 0,
    *,
    batch_size: int | None = None,
) -> Circuits:
    """Find the heads with a no-op circuit for the sink at `position`, by the rule `Circuits.rule`.

    Beside the use of the sink and its detectors, three vectors are split by band of the spectrum: the
    direction of the residual stream that the key side of the leading mode reads (through W_K at the sink's
    position, with the gains of the norms on the way, whose scales are one number); what the sink's value
    writes (through W_O, with the gain of a norm after it); and what the leading mode reads from the residual
    at the sink (without biases). There are three passes over the windows, and one more to find the position
    "patch".

    Args:
        model: a language model or an image encoder.
        windows: windows of text, or images.
        spectrum: the spectrum whose bands are used.
        position: the position of the sink, as in `head_use`.
        batch_size: windows in a pass.

    Raises:
        InputError: for a spectrum of another width, and for a position as `head_use` does.

    """
    return circuits_of(model, windows, spectrum, [position], batch_size=batch_size)[0]


def circuits_of(
    model: Transformer,
    windows: Inputs,
    spectrum: Spectrum,
    positions: Sequence[Position],
    *,
    batch_size: int | None = None,
) -> list[Circuits]:
    """Find the no-op circuits of several sinks, as `no_op_circuits` does, in the same three passes.

    Args:
        model: a language model or an image encoder.
        windows: windows of text, or images.
        spectrum: the spectrum whose bands are used.
        positions: the position of each sink, as in `head_use`.
        batch_size: windows in a pass.

    Raises:
        InputError: as `no_op_circuits` does.

    """
    if spectrum.d != model.d:
        raise InputError(f"a spectrum of width {spectrum.d} for {model.name} of width {model.d}")
    every = _seen(model, windows, spectrum, positions, batch_size)  # all passes
    return [
        _judged(model, windows, spectrum, position, seen)
        for position, seen in zip(positions, every, strict=True)
    ]


def _judged(
    model: Transformer, windows: Inputs, spectrum: Spectrum, position: Position, seen: "Seen"
) -> Circuits:
    frame = head_use.use_table(seen.use, windows.document)
    bands = tuple(str(band) for band in range(1, spectrum.count + 1))
    written, read, sink = (
        head_use.per_document(found, windows.document, bands)
        for found in (seen.values, seen.read, seen.energy)
    )
    heads = judged(frame, seen.detectors)
    heads["key_dark"] = seen.key_shares[heads["layer"].tolist(), heads["head"].tolist(), -1].numpy()
    for name, table in (("value_dark", written), ("reading_dark", read)):
        heads[name] = table.groupby(["layer", "head"])[bands[-1]].mean().to_numpy()
    return Circuits(
        model.name,
        position,
        windows.record,
        heads,
        frame,
        seen.detectors,
        spectrum,
        seen.key_shares,
        written,
        read,
        sink.drop(columns="head"),
    )


@dataclass(frozen=True, eq=False)
class Seen:
    """The results of the passes behind `no_op_circuits`, before they are put into tables."""

    use: Found
    values: Found
    detectors: Detectors
    key_shares: Float[Tensor, "layers heads bands"]
    read: Found
    energy: Found


@remotely
def _seen(
    model: Transformer,
    windows: Inputs,
    spectrum: Spectrum,
    positions: Sequence[Position],
    batch_size: int | None,
) -> list[Seen]:
    sinks = [sink_positions(model, windows, position, batch_size) for position in positions]
    # Two passes for the detectors, of which the first also shows what heads do and values write, and one for
    # the readings
    uses = [HeadUse(model, each) for each in sinks]
    values = [SinkValues(model, spectrum, each) for each in sinks]
    found = qk_detectors.detectors_of(model, windows, sinks, batch_size, [*uses, *values])
    directions = [key_directions(model, each) for each in found]
    read = readings(model, windows, spectrum, directions, sinks, batch_size)
    return [
        Seen(use.found, value.found, detected, spectrum.shares(direction), *split)
        for use, value, detected, direction, split in zip(uses, values, found, directions, read, strict=True)
    ]


def judged(use: pd.DataFrame, found: Detectors) -> pd.DataFrame:
    """Return one row per head: means with intervals, and the verdict by `RULE`."""
    both = use.merge(found.table, on=["document", "layer", "head"])
    both["dormant"] = both["dormant"].astype(float)
    quantities = ("dormant", *head_use.QUANTITIES, *qk_detectors.QUANTITIES)
    rows: list[dict[str, Any]] = []
    for (layer, head), part in both.groupby(["layer", "head"]):
        row: dict[str, Any] = {"layer": layer, "head": head, "use": part["use"].mode().iloc[0]}
        for name in quantities:
            low, high = mean_interval(part[name])
            row |= {name: float(part[name].mean()), f"{name}_low": low, f"{name}_high": high}
        row["random_top_two"] = float(found.controls[layer, head, :, -1].max())
        row["ranks"] = found.ranks[layer, head].tolist()
        row["modes_needed"] = int(found.needed[layer, head])
        row["lacking"] = ", ".join(name for name, holds in conditions(row).items() if not holds)
        rows.append(row | {"circuit": not row["lacking"]})
    return pd.DataFrame(rows)


def conditions(row: dict[str, Any]) -> dict[str, bool]:
    """Return the conditions of `RULE` by name, and whether each holds."""
    return {
        "attention": row["attention"] >= EPSILON,
        "a sink that writes nothing": row["value_ratio"] <= NO_OP,
        "one or two modes": row["margin"] > 0 and row["top_two"] >= max(MOST, row["random_top_two"]),
        "queries always on": row["always_on"] >= ALWAYS_ON,
        "a key of the sink alone": row["rival"] <= RIVAL,
    }


def _only(table: pd.DataFrame, **values: int) -> pd.DataFrame:
    return table[np.logical_and.reduce([table[name] == value for name, value in values.items()])]
