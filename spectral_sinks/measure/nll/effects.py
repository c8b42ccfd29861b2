"""The effect of an intervention on a text: NLL, divergence from the untouched model, and the sink."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy.typing import NDArray

from spectral_sinks.data.texts import Windows
from spectral_sinks.errors import InputError
from spectral_sinks.interventions.sites import Site
from spectral_sinks.interventions.tracing import Interventions
from spectral_sinks.measure.memory import BATCH, Memory, batch_size_for, swap_groups
from spectral_sinks.measure.nll.remote_batch import RemoteBatch, open_batch
from spectral_sinks.measure.nll.replay import Batch, BatchResult, first_exit
from spectral_sinks.measure.nll.scoring import Sample, predicted
from spectral_sinks.measure.results import Result
from spectral_sinks.models.language import LanguageModel
from spectral_sinks.spectra.edits import Edit, as_edit, as_edits
from spectral_sinks.stats import Estimate, document_means, mean_interval

SAMPLED = ("nll", "baseline_nll", "delta_nll", "kl")
"""Columns that have an error of their own where a sample of the predictions is scored."""

NORMAL_95 = 1.96
"""Standard errors to either side of the mean within which 95 % of samples lie."""

EFFECT_COLUMNS = ("nll", "baseline_nll", "delta_nll", "kl", "top1_agreement", "removed_energy_share")


@dataclass(frozen=True, eq=False, repr=False)
class InterventionEffect(Result):
    """One intervention, its sites, and a table with one row per document or image."""

    name: str
    sites: tuple[Site, ...]
    ranks: tuple[int | None, ...]
    """Directions removed at each site; None for a function."""
    table: pd.DataFrame

    @property
    def rank(self) -> int | None:
        """Number of directions removed, the sum over the sites; None where one edit is a function."""
        return None if None in self.ranks else sum(rank for rank in self.ranks if rank is not None)

    @property
    def where(self) -> str:
        """The sites as text."""
        return ", ".join(map(str, self.sites))

    @property
    def headline(self) -> str:
        """The intervention and its sites."""
        return f"{self.name} at {self.where or 'no site'}"


@dataclass(frozen=True, eq=False, repr=False)
class Effect(InterventionEffect):
    """The effect of one intervention on the NLL of a text, and on the attention sink.

    `table` has one row per document: `document`, `windows`, `tokens` (the predicted ones), the columns named
    in `EFFECT_COLUMNS`, and by layer L `sink_mass_L` and `baseline_sink_mass_L` where attention was read.

    Where a sample of the predictions was scored, `predict` says how many of each window, and so do
    `table.attrs["predict"]` and the record. The table then also has `scored`, the predictions that were, and
    the standard errors that the sample costs, under `SAMPLED` with `_sampling_error` behind the name.
    """

    predict: int | None = None
    """Predictions of each window that were scored, drawn at random; None where all were."""

    @property
    def nll(self) -> float:
        """Nats per token (of an encoder: per masked token), mean over documents."""
        return float(self.table["nll"].mean())

    @property
    def baseline_nll(self) -> float:
        return float(self.table["baseline_nll"].mean())

    @property
    def delta_nll(self) -> float:
        return float(self.table["delta_nll"].mean())

    @property
    def delta_nll_interval(self) -> tuple[float, float]:
        """95 % BCa interval of the paired difference over documents."""
        return mean_interval(self.table["delta_nll"])

    def sampling_interval(self, name: str) -> tuple[float, float]:
        """Return the 95 % interval for the mean that scoring all predictions of these texts would give.

        It is about the sample of predictions alone, and not about other texts. Where all predictions were
        scored, both ends are the mean.

        Raises InputError for a name that is not in `SAMPLED`.
        """
        if name not in SAMPLED:
            raise InputError(f"{name!r} has no sampling interval: expected one of {', '.join(SAMPLED)}")
        mean, error = float(self.table[name].mean()), 0.0
        if self.predict is not None:
            errors = self.table[f"{name}_sampling_error"].to_numpy()
            error = NORMAL_95 * float(np.sqrt(np.square(errors).sum())) / len(errors)
        return mean - error, mean + error

    @property
    def sink_mass(self) -> list[float] | None:
        """Mean attention received by position 0 at T = 64 (by an encoder, over the whole window), by layer.

        None where it cannot be read.
        """
        return self._by_layer("sink_mass_")

    @property
    def baseline_sink_mass(self) -> list[float] | None:
        return self._by_layer("baseline_sink_mass_")

    def mean_sink_mass(self, first: int) -> dict[str, float]:
        """Return `sink` and `baseline_sink`: the mean sink mass over layer `first` and the layers above it.

        NaN where there is no such layer or where attention cannot be read.
        """
        above = {"sink": (self.sink_mass or [])[first:]}
        above["baseline_sink"] = (self.baseline_sink_mass or [])[first:]
        return {name: float(np.mean(part)) if part else float("nan") for name, part in above.items()}

    def _by_layer(self, prefix: str) -> list[float] | None:
        names = [name for name in self.table.columns if name.startswith(prefix)]
        values = [float(self.table[name].mean()) for name in names]
        return values if values and np.isfinite(values).all() else None

    def summary(self) -> pd.DataFrame:
        """One row: `name`, `site`, `rank`, `documents`, and the means over documents of `EFFECT_COLUMNS`.

        Each mean has its 95 % BCa interval beside it, under `_low` and `_high`.
        """
        return pd.DataFrame([self.record()])

    def record(self) -> dict[str, Any]:
        """The row of `summary` as a dictionary that JSON can hold."""
        means = [Estimate.of(self.table[number]).columns(number) for number in EFFECT_COLUMNS]
        fixed = {"name": self.name, "site": self.where, "rank": self.rank, "documents": len(self.table)}
        found = fixed | {column: value for columns in means for column, value in columns.items()}
        return found | self.sampling()

    def sampling(self) -> dict[str, Any]:
        """Return `predict` and the sampling intervals, as `NAME_sampling_low`; {} if nothing was sampled."""
        if self.predict is None:
            return {}
        found: dict[str, Any] = {"predict": self.predict}
        for name in SAMPLED:
            low, high = self.sampling_interval(name)
            found |= {f"{name}_sampling_low": low, f"{name}_sampling_high": high}
        return found

    def __repr__(self) -> str:
        """Two tables: the means over documents, and the sink mass by layer where it was read."""
        columns = ["rank", *EFFECT_COLUMNS, "delta_nll_low", "delta_nll_high", "documents"]
        lines = [
            f"{self.name} at {self.where or 'no site'} (nats per token)",
            self.summary()[columns].to_string(index=False, float_format="%.4f"),
        ]
        if self.predict is not None:
            low, high = self.sampling_interval("delta_nll")
            lines.append(
                f"sampled: {self.predict} predictions of each window were scored; all of them would give a "
                f"delta_nll from {low:.4f} to {high:.4f} (95 %)"
            )
        if self.sink_mass is not None:
            masses = pd.DataFrame([self.baseline_sink_mass, self.sink_mass], ["untouched", self.name])
            lines += ["sink mass by layer", masses.to_string(float_format="%.4f")]
        return "\n".join(lines)


def evaluate(
    model: LanguageModel,
    windows: Windows,
    interventions: Interventions,
    *,
    name: str | None = None,
    batch_size: int | None = None,
    predict: int | Sample | None = None,
) -> Effect:
    """Return the effect of one intervention: a filter, or a function, at each of its sites.

    Args:
        model: a language model.
        windows: the text.
        interventions: the edit at each site; a function maps `[batch, length, d]` to the same shape.
        name: the name of the effect; by default the names of the edits.
        batch_size: windows in a pass; None finds it by memory.
        predict: number of predictions of each window that are scored, as in `evaluate_all`.

    Raises:
        InputError: for sites that the model does not have, filters of another width, and a swap between
            windows that open with different tokens.

    """
    label = name or ", ".join(as_edit(edit).name for edit in interventions.values()) or "no-op"
    cells = {label: interventions}
    return evaluate_all(model, windows, cells, batch_size=batch_size, predict=predict)[label]


def evaluate_all(
    model: LanguageModel,
    windows: Windows,
    cells: Mapping[str, Interventions],
    *,
    batch_size: int | None = None,
    predict: int | Sample | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Effect]:
    """Return the effects of several interventions, each compared with one untouched pass per batch.

    A pass begins at the lowest site of its cell; the layers below come from the untouched pass, bit for bit.
    Sink mass is measured where attention weights can be read and all windows have 64 tokens.

    The NLL of an encoder is the mean over masked tokens, in nats per masked token. Each window is read with
    the mask token at its `masked_positions` (15 % of the tokens, never special ones, chosen by the token ids
    of the window), and the model predicts the original tokens there. KL and agreement are measured at the
    same positions, and sink mass on the masked window.

    Args:
        model: a language model.
        windows: the text.
        cells: interventions by name.
        batch_size: windows in a pass; None finds it by memory. No result depends on it, but for functions of
            one's own that mix the windows of a batch. Passes with a swap hold the windows that are paired, up
            to 16.
        predict: number of predictions of each window that are scored, drawn at random with seed 0; a `Sample`
            has a seed of its own. None scores all. The unembedding of a large vocabulary takes most of the
            time, and scores fewer then. All cells are scored at the same positions. The effects say that they
            are sampled, and have the interval that this costs (`sampling_interval`).
        progress: is called with the number of cells just done, starting again for each batch.

    Raises:
        InputError: as `evaluate` does, for an image encoder, and for a sample of fewer than two predictions.

    """
    if not isinstance(model, LanguageModel):
        raise InputError(f"{model.name} reads images: evaluate_images(model, pixels, cells)")
    sample = Sample.of(predict)
    cells = {name: as_edits(interventions) for name, interventions in cells.items()}
    for edits in cells.values():
        for site, edit in edits.items():
            check_edit(site, edit, model, windows)
    starts = {first_exit(edits) for edits in cells.values()}
    memory = Memory(model, windows.length)
    batch_size = batch_size_for(model, windows.length, batch_size)
    indices: list[int] = []
    tokens: list[int] = []
    parts: list[Table] = []
    swaps = {name: any(edit.swaps for edit in edits.values()) for name, edits in cells.items()}
    if batch_size != BATCH and len(set(swaps.values())) == 2:
        # A function may mix the windows of a batch, which must not change with the cells beside it
        apart: dict[str, Effect] = {}
        for kind in (False, True):
            some = {name: edits for name, edits in cells.items() if swaps[name] is kind}
            apart |= evaluate_all(
                model, windows, some, batch_size=batch_size, predict=sample, progress=progress
            )
        return {name: apart[name] for name in cells}
    for chosen, ids in swap_groups(windows) if any(swaps.values()) else windows.batches(batch_size):
        batch = open_batch(model, windows, chosen, ids, starts, memory, sample)
        parts.append(_columns(batch, batch.measure(list(cells.values()), progress), sample))
        indices += chosen
        tokens += [predicted(model, ids.shape[1])] * len(chosen)
    names, _ = parts[0]
    values = np.concatenate([part for _, part in parts], axis=1)
    owners = np.array([windows.document[index] for index in indices])
    _, owner, counts = np.unique(owners, return_inverse=True, return_counts=True)
    documents, means = document_means(values.swapaxes(0, 1), owners, tokens)  # [documents, cells, columns]
    summed = np.bincount(owner, tokens).astype(np.int64)
    described = {"document": documents, "windows": counts, "tokens": summed}
    effects: dict[str, Effect] = {}
    for index, (name, edits) in enumerate(cells.items()):
        table = pd.DataFrame(described | dict(zip(names, means[:, index].T, strict=True)))
        if sample is not None:
            scored = np.minimum(tokens, sample.count)
            table.insert(3, "scored", np.bincount(owner, scored).astype(np.int64))
            for column in SAMPLED:
                table[f"{column}_sampling_error"] = np.sqrt(table[f"{column}_sampling_error"] / summed)
            table.attrs["predict"] = sample.count
        ranks = tuple(edit.rank for edit in edits.values())
        effects[name] = Effect(name, tuple(edits), ranks, table, sample and sample.count)
    return effects


Table = tuple[list[str], Float[NDArray[np.float64], "cells windows columns"]]


def _columns(batch: Batch | RemoteBatch, result: BatchResult, sample: Sample | None) -> Table:
    """Return the names of all columns, and their values `[cells, windows, columns]`, for one batch."""
    base = batch.baseline
    columns = {
        "nll": result.nll,
        "baseline_nll": base.nll,
        "delta_nll": result.nll - base.nll,
        "kl": result.kl,
        "top1_agreement": result.top1_agreement,
        "removed_energy_share": result.removed_energy_share,
    }
    if sample is not None and result.variances is not None and base.variances is not None:
        # A window weighs as many tokens as it predicts, and its mean errs by what the sample leaves out
        every = predicted(batch.model, batch.ids.shape[1])
        scored = min(sample.count, every)
        factor = every * (1 / scored - 1 / every)
        varied = result.variances | {"baseline_nll": base.variances["nll"]}
        columns |= {f"{name}_sampling_error": factor * varied[name] for name in SAMPLED}
    for prefix, mass in (("sink_mass_", result.sink_mass), ("baseline_sink_mass_", base.sink_mass)):
        if mass is not None:
            columns |= {f"{prefix}{layer}": mass[..., layer] for layer in range(mass.shape[-1])}
    shape = result.nll.shape
    return list(columns), np.stack([np.broadcast_to(column, shape) for column in columns.values()], axis=-1)


def check_edit(site: Site, edit: Edit, model: LanguageModel, windows: Windows) -> None:
    """Raise InputError for an edit that is not defined at a site of this model or on these windows."""
    site.check(model)
    edit.check_width(model.d, site, model.name)
    if wrong := [i for i in sorted(edit.token_ids) if not 0 <= i < model.vocabulary]:
        raise InputError(f"token id {wrong[0]} lies outside the vocabulary of {model.vocabulary}")
    first_ids = windows.first_token_ids
    if not edit.swaps or not edit.acts_on_first(first_ids):
        return
    if len(first_ids) > 1:
        raise InputError(
            f"fill 'swap' between windows that open with {len(first_ids)} different tokens "
            "would move the sink itself: exempt position 0 with tokens='all-but-first', or open windows "
            "with BOS"
        )
    if not model.causal:
        raise InputError(
            "fill 'swap' in an encoder, whose first token reads the whole window, would move the sink "
            "itself: exempt position 0 with tokens='all-but-first'"
        )
