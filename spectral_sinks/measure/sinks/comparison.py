"""Compare interventions on a sink, each with the same intervention at random other positions (`compare`)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from spectral_sinks.data.texts import Windows
from spectral_sinks.errors import InputError, renamed_argument
from spectral_sinks.interventions.sites import Site
from spectral_sinks.measure.memory import batches, swap_groups
from spectral_sinks.measure.nll.effects import check_edit
from spectral_sinks.measure.nll.remote_batch import by_job
from spectral_sinks.measure.results import Result
from spectral_sinks.measure.sinks.edit_effects import Changes, CombinedEdit, EditEffect, measure_edits
from spectral_sinks.models.attention_capture import attending
from spectral_sinks.models.attention_sdpa import TOKENS
from spectral_sinks.models.language import LanguageModel
from spectral_sinks.remote.client import remotely
from spectral_sinks.spectra.spectrum import Spectrum
from spectral_sinks.spectra.subspace import Subspace
from spectral_sinks.stats import Estimate, document_means

UNTOUCHED = "untouched"


@dataclass(frozen=True, eq=False, repr=False)
class Comparison(Result):
    """The effects of several interventions on one model and one set of windows.

    The column `intervention` of every table holds the name of the intervention. The first is `untouched`.
    """

    table: pd.DataFrame
    """By document: `intervention`; `nll`, `delta_nll` and `kl` in nats per token; `mass`, the attention to
    all chosen positions; `unspent`, the attention that goes to no token; and `control_of`, the name of the
    intervention that this row repeats at another position, or an empty string."""
    attention: pd.DataFrame
    """By document, layer, head and chosen position: `attention` received. Controls are not listed."""
    residuals: pd.DataFrame
    """By document, site and chosen position: `norm_ratio` to the median of the tokens that are not chosen.
    With a spectrum also `dark_share`, and `other_dark_share` of the tokens that are not chosen."""

    def summary(self) -> pd.DataFrame:
        """Return one row per intervention: means over documents with 95 % intervals, `_low` and `_high`.

        `control_least` and `control_most` are the range of `delta_nll` over the control's random positions.
        """
        baseline = self.table[self.table["intervention"] == UNTOUCHED].set_index("document")
        found: list[dict[str, Any]] = []
        for name, rows in self.table[self.table["control_of"] == ""].groupby("intervention", sort=False):
            controls = self.table[self.table["control_of"] == name]
            drawn = controls.groupby("intervention")["delta_nll"].mean().to_numpy()
            row: dict[str, Any] = {"intervention": name, "documents": len(rows)}
            for column in ("nll", "delta_nll", "kl", "mass", "unspent"):
                measured = Estimate.of(rows[column])
                row |= {
                    column: measured.value,
                    f"{column}_low": measured.low,
                    f"{column}_high": measured.high,
                }
            row["baseline_nll"], row["baseline_mass"] = baseline["nll"].mean(), baseline["mass"].mean()
            row["controls"] = len(drawn)
            row["control_least"] = drawn.min() if len(drawn) else np.nan
            row["control_most"] = drawn.max() if len(drawn) else np.nan
            found.append(row)
        return pd.DataFrame(found)

    def record(self) -> dict[str, Any]:
        """Return the rows of `summary` by intervention, as a dictionary that JSON can hold."""
        return self.summary().set_index("intervention").to_dict("index")

    def __repr__(self) -> str:
        columns = [
            "intervention",
            "nll",
            "delta_nll",
            "delta_nll_low",
            "delta_nll_high",
            "kl",
            "mass",
            "unspent",
        ]
        if self.table["control_of"].any():
            columns += ["control_least", "control_most"]
        numbers = self.summary()[columns].set_index("intervention").round(4) + 0.0  # -0.0 becomes 0.0
        return numbers.to_string(float_format="%.4f")


@renamed_argument("tokens", "length")
@renamed_argument("moves", "interventions")
def compare(
    model: LanguageModel,
    windows: Windows,
    interventions: Mapping[str, Changes],
    *,
    positions: Sequence[int] = (0,),
    spectrum: Spectrum | None = None,
    controls: int = 0,
    seed: int = 0,
    length: int = TOKENS,
    batch_size: int | None = None,
) -> Comparison:
    """Measure NLL, attention and residuals under each of several interventions, and under none.

    The untouched pass runs through the same code. The attention received by position k is the mean of A[i, k]
    over the queries i after the last of `positions`, among the first `length` tokens. Summed over positions
    it is 1, together with what is unspent. With a prefix, the NLL is of the text alone.

    Args:
        model: a language model.
        windows: the text.
        interventions: interventions by name. Each is an attention edit such as `MaskKey(0)` or another
            function of an `AttentionCall`, a mapping from sites to edits, a `Prefix`, or a list of them that
            act together.
        positions: the positions whose attention and residuals are measured.
        spectrum: gives the dark tail, whose share is then measured.
        controls: number of random other positions, among the first `length` tokens, at which each
            intervention that acts at one position is repeated.
        seed: of the random positions.
        length: number of first tokens over which attention is measured; at most the length of the shortest
            window.
        batch_size: windows in a pass.

    Raises:
        InputError: for an object that is not an intervention, for sites, heads and the like that the model
            does not have, and for positions beyond the windows.

    """
    shortest = min(len(row) for row in windows.rows)
    length = min(length, shortest)
    positions = list(positions)
    if not positions or min(positions) < 0 or max(positions) >= length - 1:
        raise InputError(
            f"positions {positions}: expected some of 0 to {length - 2}, with queries after them among the "
            f"first {length} tokens"
        )
    if UNTOUCHED in interventions:
        raise InputError(f"the name {UNTOUCHED!r} is that of the pass without an intervention")
    cells = {UNTOUCHED: CombinedEdit()} | {
        name: CombinedEdit.of(changes) for name, changes in interventions.items()
    }
    origin = dict.fromkeys(cells, "")
    generator = np.random.default_rng(seed)
    # Repeat each intervention at one position at random other positions
    for name, parts in list(cells.items())[1:]:
        check_parts(parts, model, windows)
        if controls and parts.position is not None:
            taken = {parts.position, *positions, *range(parts.source + 1)}
            for q in other_positions(generator, length, controls, taken):
                cells[f"{name} | at {q}"] = parts.at_position(q)
                origin[f"{name} | at {q}"] = name

    spaces = [] if spectrum is None else [spectrum.dark()]
    places: list[int] = []
    found: dict[str, list[dict[str, Tensor]]] = {name: [] for name in cells}
    # Measure all cells on each batch, as many to a job as fit
    swaps = any(edit.swaps for parts in cells.values() for edit in parts.edits.values())
    for chosen, ids in swap_groups(windows) if swaps else batches(model, windows, batch_size):
        places += chosen

        def run(some: Sequence[CombinedEdit], ids: Tensor = ids) -> list[dict[str, Tensor]]:
            return _edited(model, ids, some, positions, length, spaces)

        for name, values in zip(cells, by_job(model, ids, list(cells.values()), run), strict=True):
            found[name].append(values)
    # Average over the windows of each document and make the tables
    owners = [windows.document[place] for place in places]
    weights = [len(windows.rows[place]) - 1 for place in places]  # predicted tokens
    documents = np.unique(owners)
    rows: list[pd.DataFrame] = []
    attention: list[pd.DataFrame] = []
    residuals: list[pd.DataFrame] = []
    sites = ["embedding", *(str(Site("exit", layer)) for layer in range(model.layers))]
    for name, parts in found.items():
        mean = {
            key: document_means(torch.cat([part[key] for part in parts]).numpy(), owners, weights)[1]
            for key in parts[0]
        }
        scalars = {key: mean[key] for key in ("nll", "delta_nll", "kl", "mass", "unspent")}
        rows.append(
            pd.DataFrame({"intervention": name, "control_of": origin[name], "document": documents} | scalars)
        )
        if origin[name]:
            continue
        axes = {"layer": range(model.layers), "head": range(model.heads), "position": positions}
        attention.append(_long(name, documents, axes, {"attention": mean["given"]}))
        columns = {"norm_ratio": mean["norm_ratio"]}
        if spectrum is not None:
            columns |= {"dark_share": mean["dark"], "other_dark_share": mean["other_dark"]}
        residuals.append(_long(name, documents, {"site": sites, "position": positions}, columns))
    return Comparison(*(pd.concat(part, ignore_index=True) for part in (rows, attention, residuals)))


def check_parts(parts: CombinedEdit, model: LanguageModel, windows: Windows) -> None:
    """Raise InputError for interventions that are not defined on this model and these windows."""
    parts.prefix.check(model)
    for site, edit in parts.edits.items():
        check_edit(site, edit, model, windows)
        if edit.swaps and len(windows) < 2:
            raise InputError("fill 'swap' takes another document: give at least two windows")
    for look in parts.attention:
        with attending(model, look):
            pass  # the attention edit checks itself on entry


def other_positions(generator: np.random.Generator, length: int, count: int, taken: set[int]) -> list[int]:
    """Draw random positions that are not taken and have queries after them.

    Raises InputError if too few are left.
    """
    free = [k for k in range(length - 1) if k not in taken]
    if len(free) < count:
        raise InputError(f"{count} controls at other positions: {len(free)} are left")
    return sorted(generator.choice(free, count, replace=False).tolist())


@remotely
def _edited(
    model: LanguageModel,
    ids: Int[Tensor, "batch length"],
    cells: Sequence[CombinedEdit],
    positions: list[int],
    length: int,
    spaces: Sequence[Subspace],
) -> list[dict[str, Tensor]]:
    """Run one batch untouched and under each intervention; return the table entries by window."""
    queries = (torch.arange(length) > max(positions)).expand(len(ids), length)
    base, reference = measure_edits(model, ids, CombinedEdit(), queries, spaces=spaces)
    passes = (
        measure_edits(model, ids, parts, queries, spaces=spaces, reference=reference)[0]
        if parts.act
        else base
        for parts in cells
    )
    return [_reduced(seen, positions, base.nll) for seen in passes]


def _reduced(seen: EditEffect, positions: list[int], untouched_nll: Tensor) -> dict[str, Tensor]:
    """Reduce one pass to the entries of the tables, by window."""
    marks = torch.zeros(len(seen.nll), seen.norms.shape[-1], dtype=torch.bool)
    marks[:, positions] = True
    together = seen.chosen(marks)
    others = seen.norms.masked_fill(marks[:, None], torch.nan).nanquantile(0.5, -1, keepdim=True)
    return {
        "nll": seen.nll,
        "delta_nll": seen.nll - untouched_nll,
        "kl": seen.kl,
        "mass": together["mass"].mean((1, 2)),
        "unspent": seen.unspent.mean((1, 2)),
        "given": seen.given[..., positions],
        "norm_ratio": seen.norms[:, :, positions] / others,
        "dark": seen.shares[:, :, positions].sum(-1),
        "other_dark": together["other_shares"].sum(-1)[..., None].expand(-1, -1, len(positions)),
    }


def _long(
    name: str, documents: NDArray[np.int64], axes: Mapping[str, Sequence[Any]], columns: Mapping[str, Any]
) -> pd.DataFrame:
    """Return a table with one row per document and point on the axes."""
    index = pd.MultiIndex.from_product([documents, *axes.values()], names=["document", *axes])
    flat = {key: np.asarray(values).reshape(-1) for key, values in columns.items()}
    return pd.DataFrame(flat, index=index).reset_index().assign(intervention=name)
