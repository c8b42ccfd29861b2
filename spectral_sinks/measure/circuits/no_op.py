"""The no-op circuit: a head attends to a sink that writes nothing, found by a mode that is always on."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from spectral_sinks.errors import InputError
from spectral_sinks.measure.attention.by_position import Inputs
from spectral_sinks.measure.attention.capture import Position, observe, sink_positions
from spectral_sinks.measure.attention.received import EPSILON
from spectral_sinks.measure.circuits import heads as head_use
from spectral_sinks.measure.circuits import qk_detectors
from spectral_sinks.measure.circuits.bands import SinkValues, key_directions, random_shares, readings
from spectral_sinks.measure.circuits.heads import NO_OP, Found, HeadUse
from spectral_sinks.measure.circuits.qk_detectors import Detectors
from spectral_sinks.models.base import Transformer
from spectral_sinks.remote.client import remotely
from spectral_sinks.spectra.spectrum import Spectrum
from spectral_sinks.stats import mean_interval

MOST = 0.5
"""Share of the margin that the leading two modes of a no-op circuit carry at least [ours]."""

ALWAYS_ON = 0.8
"""Share of a query side's mean square that is constant, from which it is always on: its mean is twice its
standard deviation [ours]."""

RIVAL = 0.5
"""Largest key side on another key, as a share of that on the sink, up to which a mode is selective [ours]."""

RULE = (
    "a head has a no-op circuit where, in the mean over documents, its queries put at least "
    f"{EPSILON} of their attention on the sink [published], the sink value ratio is at most {NO_OP} "
    f"[published], the leading two modes of its scores carry at least {MOST} of the sink's margin and more "
    "than those of any random basis [ours], the leading mode's query side is always on (at least "
    f"{ALWAYS_ON} of its mean square is constant) [ours], and no other key has more than {RIVAL} of the "
    "sink's key side [ours]"
)
"""The rule of `no_op_circuits`."""


@dataclass(frozen=True, eq=False)
class Circuits:
    """What every head does with its sink, and which heads have a no-op circuit by `RULE`."""

    model: str
    position: Position
    """As it was given; `detectors.sinks` has the number in each window."""
    record: dict[str, Any]
    """How the windows were cut."""
    heads: pd.DataFrame
    """A row per layer and head: each quantity of `head_use` and `detectors` with `_low` and `_high`, the
    share of documents on which it is `dormant`, its most frequent `use`, `random_top_two` (the largest of the
    random bases), `modes_needed` for half of the margin, `key_dark` and `value_dark`, `circuit`, and what it
    is `lacking`."""
    use: pd.DataFrame
    """The table of `head_use`."""
    detectors: Detectors
    spectrum: Spectrum
    key_shares: Float[Tensor, "layers heads bands"]
    """Share of each band in the direction of the residual that the leading mode's key side reads."""
    value_shares: pd.DataFrame
    """A row per document, layer and head, a column per band: the same of what the sink's value writes; NaN
    where it writes nothing at all."""
    read_shares: pd.DataFrame
    """The same of what the leading mode reads at the sink, from the residual there: parts have signs and add
    up to 1."""
    sink_shares: pd.DataFrame
    """A row per document and layer: share of each band in the energy of that residual."""

    rule: ClassVar[str] = RULE

    @property
    def found(self) -> list[tuple[int, int]]:
        """Layer and head of every no-op circuit."""
        table = self.heads[self.heads["circuit"]]
        return list(zip(table["layer"].tolist(), table["head"].tolist(), strict=True))

    def summary(self) -> pd.DataFrame:
        """One row for each layer and head: the table `heads`."""
        return self.heads

    def by_layer(self) -> pd.DataFrame:
        """How much of each layer's attention goes to a sink that writes nothing: a row per `layer`.

        `mass` on the sink, mean over heads and queries, and `no_op_mass`, what of it is in heads whose value
        ratio is at most 0.2 on that document, with `_low` and `_high` over documents; `no_op_heads`, those
        that in the mean put 0.3 on such a sink, and how many of them find it by `one_or_two` detectors
        (modes that carry half of its margin).
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
        """Both sides of a head's leading two modes over the first longest window, in roots of nats.

        Columns `position`, `query_1`, `key_1`, `query_2`, `key_2`; the product of a mode's sides is its part
        of a score, up to what all keys share. Signs are such that the sink's key side is positive.
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
        """Bands of one head: `what`, `band`, `share`, `low`, `high`, `random`, `random_low`, `random_high`.

        "key direction" and "value": their energy, beside that of a random direction (its mean, r/d, and where
        95 % of draws lie). "reading": what the leading mode reads at the sink, beside what random
        directions read there on average, which is the energy of the sink's residual.
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
    batch_size: int = 16,
) -> Circuits:
    """Look at every head's use of the sink at `position`, its detectors and their bands; judge by `RULE`.

    The bridge to the dark tail, by band of the spectrum: the direction of the residual stream that the
    leading mode's key side reads (through W_K at the sink's position, with the gains of the norms on the way,
    whose scales are one number); what the sink's value writes (through W_O, with the gain of a norm after
    it); and what that mode reads at the sink from the residual there (biases left out). Four passes. Raises
    InputError for a spectrum of another width, and for a position as `head_use` does.
    """
    if spectrum.d != model.d:
        raise InputError(f"a spectrum of width {spectrum.d} for {model.name} of width {model.d}")
    seen = _seen(model, windows, spectrum, position, batch_size)
    frame = head_use.use_table(seen.use, windows.document)
    bands = tuple(str(band) for band in range(1, spectrum.count + 1))
    written, read, sink = (
        head_use.per_document(found, windows.document, bands)
        for found in (seen.values, seen.read, seen.energy)
    )
    heads = judged(frame, seen.detectors)
    heads["key_dark"] = seen.key_shares[..., -1].flatten().numpy()
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
    """What the passes behind `no_op_circuits` show, before it is put into tables."""

    use: Found
    values: Found
    detectors: Detectors
    key_shares: Float[Tensor, "layers heads bands"]
    read: Found
    energy: Found


@remotely
def _seen(
    model: Transformer, windows: Inputs, spectrum: Spectrum, position: Position, batch_size: int
) -> Seen:
    sinks = sink_positions(model, windows, position, batch_size)
    use, values = HeadUse(model, sinks), SinkValues(model, spectrum, sinks)
    observe(model, windows, [use, values], batch_size=batch_size)
    found = qk_detectors.detectors(model, windows, sinks.tolist(), batch_size=batch_size)
    directions = key_directions(model, found)
    read, energy = readings(model, windows, spectrum, directions, sinks, batch_size)
    return Seen(use.found, values.found, found, spectrum.shares(directions), read, energy)


def judged(use: pd.DataFrame, found: Detectors) -> pd.DataFrame:
    """One row per head: means with intervals, and the verdict by `RULE`."""
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
    """The parts of `RULE`, by name."""
    return {
        "attention": row["attention"] >= EPSILON,
        "a sink that writes nothing": row["value_ratio"] <= NO_OP,
        "one or two modes": row["margin"] > 0 and row["top_two"] >= max(MOST, row["random_top_two"]),
        "queries always on": row["always_on"] >= ALWAYS_ON,
        "a key of the sink alone": row["rival"] <= RIVAL,
    }


def _only(table: pd.DataFrame, **values: int) -> pd.DataFrame:
    return table[np.logical_and.reduce([table[name] == value for name, value in values.items()])]
