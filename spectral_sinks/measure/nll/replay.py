"""Suffix replay: the effects of many cells on one batch of windows.

The layers below the lowest site of a cell compute what they compute in the untouched model. So a pass for a
cell begins at the exit below that site, with the residual of one untouched pass. Cells that begin at the same
exit are stacked along the batch axis and share passes, as many as fit into memory.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from spectral_sinks.data.texts import Windows
from spectral_sinks.errors import InputError
from spectral_sinks.interventions.sites import Site
from spectral_sinks.interventions.tracing import Interventions, Resume, deepest, trace
from spectral_sinks.measure.attention.received import attention_received, from_others
from spectral_sinks.measure.memory import SHARE, Memory, free, out_of_memory
from spectral_sinks.measure.nll.scoring import Reference, Sample, predicted, score, untouched
from spectral_sinks.models.attention_sdpa import TOKENS
from spectral_sinks.models.language import LanguageModel
from spectral_sinks.models.masked_lm import masked_ids
from spectral_sinks.spectra.edits import Edit, EditFunction, as_edit, as_edits
from spectral_sinks.spectra.incremental import Nested

VERSION = 1
"""To be raised when a number of this module changes its meaning, or its value beyond rounding."""

VARIED = ("nll", "delta_nll", "kl")
"""Numbers whose variance over a sample of predictions is measured."""

Column = Float[NDArray[np.float64], "cells windows"]


@dataclass(frozen=True)
class BatchResult:
    """Numbers by cell and window, `[cells, windows]`: means over the predicted tokens; NLL and KL in nats."""

    nll: Column
    kl: Column
    top1_agreement: Column
    removed_energy_share: Column
    """Share of the energy that the edits remove, mean over the tokens and sites on which they act."""
    sink_mass: Float[NDArray[np.float64], "cells windows layers"] | None
    """Attention received by position 0, mean over heads, among the first 64 tokens (in an encoder, over the
    whole window)."""
    variances: dict[str, Column] | None = None
    """Of a sample of predictions, the variances of "nll", "delta_nll" and "kl" over them; otherwise None."""


@dataclass(frozen=True)
class PassResult:
    """The numbers of one pass: `[rows]` each, where rows are cells x windows.

    `received` has one `[rows]` for each layer that ran.
    """

    nll: Tensor
    kl: Tensor
    agrees: Tensor
    received: list[Tensor]
    variances: dict[str, Tensor]
    """Over the predictions of a sample, as in `BatchResult`; none where all are scored."""


def first_exit(edits: Interventions) -> int | None:
    """The layer from whose exit a pass can begin, -1 for the beginning; None where nothing changes."""
    if all(as_edit(edit).rank == 0 for edit in edits.values()):
        return None
    lowest = min(edits, key=lambda site: site.rank)
    return lowest.layer if lowest.kind == "exit" else lowest.layer - 1


def reads_sink(model: LanguageModel, windows: Windows) -> bool:
    """Whether sink mass is measured: attention weights can be read, and all windows have 64 tokens."""
    return model.reads_attention and all(len(row) >= TOKENS for row in windows.rows)


class Batch:
    """One batch of windows, its untouched pass, and the measurement of cells on it.

    `truth` holds the token ids of the windows, and `ids` those that the model reads: an encoder reads some of
    them masked.
    """

    def __init__(
        self,
        model: LanguageModel,
        windows: Windows,
        indices: Sequence[int],
        ids: Int[Tensor, "batch tokens"],
        starts: Collection[int | None] = (),
        memory: Memory | None = None,
        attention: bool | None = None,
        sample: Sample | None = None,
        drawn_as: Sequence[int] = (),
    ) -> None:
        """Make the untouched pass.

        Args:
            model: a language model in this process.
            windows: all windows of the measurement; masks of filters refer to them.
            indices: which of the windows the batch holds.
            ids: their token ids.
            starts: the exits at which cells will begin. The untouched pass keeps the residuals there, as many
                as fit into memory; any other exit costs another pass.
            memory: how many rows fit; shared between the batches of a measurement.
            attention: whether to measure sink mass; by default where it can be measured.
            sample: the predictions of each window that are scored; by default all are.
            drawn_as: the indices of the windows by which the sample is drawn, if not `indices`.

        """
        self.model, self.indices, self.truth = model, list(indices), ids.to(model.device)
        self.ids = self.truth if model.causal else masked_ids(model, self.truth)
        self.windows = windows
        reads = reads_sink(model, windows) if attention is None else attention
        self.attention = reads and partial(_received, model)
        self.predicted, self.chosen = predicted(model, ids.shape[1]), None
        if sample is not None:
            self.chosen = sample.drawn_each(drawn_as or self.indices, self.predicted)
            self.predicted = self.chosen.shape[1]
        self.memory = memory or Memory(model, ids.shape[1])
        self._starts = sorted({layer for layer in starts if layer is not None and layer >= 0})
        self.baseline, self._reference, self._residuals = self._untouched()

    def __len__(self) -> int:
        return len(self.indices)

    def measure(
        self, cells: Sequence[Interventions], progress: Callable[[int], None] | None = None
    ) -> BatchResult:
        """Measure cells; those that begin at the same exit share passes, as many as fit into memory.

        `progress` is called with the number of cells just done. Raises InputError where memory is too short
        for a cell that needs the whole batch at once: a swap does, and a user's function may.
        """
        bound = [for_batch(edits, self.indices, len(self.windows)) for edits in cells]
        # Group the cells by the exit at which they begin
        by_start: dict[int | None, list[int]] = {}
        for index, edits in enumerate(bound):
            by_start.setdefault(first_exit(edits), []).append(index)
        shape = (len(cells), len(self))
        base = self.baseline
        layers = 0 if base.sink_mass is None else base.sink_mass.shape[-1]
        nll, kl, agrees, removed = (np.zeros(shape) for _ in range(4))
        mass = np.zeros((*shape, layers))
        names = () if self.chosen is None else VARIED
        variances = {name: np.zeros(shape) for name in names}
        for first in sorted(by_start, key=lambda layer: -1 if layer is None else layer):
            indices = by_start[first]
            if first is None:  # nothing changes: the numbers of the untouched pass
                nll[indices], agrees[indices] = base.nll, 1.0
                if base.variances is not None:
                    variances["nll"][indices] = base.variances["nll"]
                if base.sink_mass is not None:
                    mass[indices] = base.sink_mass
                if progress is not None:
                    progress(len(indices))
                continue
            chosen = [bound[index] for index in indices]
            columns, removed[indices], above = self._suffix(first, chosen, progress)
            nll[indices], kl[indices], agrees[indices] = columns[:3]
            for name, column in zip(names, columns[3:], strict=True):
                variances[name][indices] = column
            if base.sink_mass is not None:
                # The layers below the exit did not run: theirs is the sink mass of the untouched pass
                below = np.broadcast_to(base.sink_mass[0], (len(indices), len(self), layers))
                mass[indices] = np.concatenate([below[..., : layers - above.shape[-1]], above], axis=-1)
        return BatchResult(nll, kl, agrees, removed, mass if layers else None, variances or None)

    def _chosen(self, rows: slice) -> Tensor | None:
        return None if self.chosen is None else self.chosen[rows]

    def _fitting(self, layers: Sequence[int]) -> list[Site]:
        """Return the first of some exits, as many as have residuals that fit into memory together."""
        each = self.ids.numel() * self.model.d * self.model.dtype.itemsize
        fit = max(1, int(SHARE * free(self.model.device) / 2 / each))
        return [Site("exit", layer) for layer in layers[:fit]]

    def _untouched(self) -> tuple[BatchResult, Reference, dict[int, Tensor]]:
        """Make the untouched pass: the baseline, the reference, and the residuals `[batch, length, d]`."""
        model, exits = self.model, self._fitting(self._starts)

        def run(a: int, b: int) -> tuple[Tensor, Reference, dict[Site, Tensor], list[Tensor]]:
            truth = self.truth[a:b]

            def readout(
                final: Tensor, read: dict[Site, Tensor], weights: list[Tensor]
            ) -> tuple[Tensor, Reference, dict[Site, Tensor], list[Tensor]]:
                scores, reference = untouched(model, final, truth, self._chosen(slice(a, b)))
                return scores.nll, reference, read, weights

            return trace(model, self.ids[a:b], {}, exits, readout=readout, attention=self.attention)

        parts = self.memory.parts(len(self), 1, run)
        each = torch.cat([part[0].double() for part in parts])
        self._nll = each
        nll = _columns([each.mean(1)], 1)
        received = [torch.cat(layer).cpu() for layer in zip(*(part[3] for part in parts), strict=True)]
        mass = torch.stack(received, -1).numpy()[None] if received else None
        zero = np.zeros_like(nll)
        sampled = self.chosen is not None
        spread = (_columns([_variance(each)], 1), zero, zero)
        variances: dict[str, Column] = dict(zip(map(str, VARIED), spread, strict=True))
        baseline = BatchResult(nll, zero, np.ones_like(nll), zero, mass, variances if sampled else None)
        return baseline, Reference.joined([part[1] for part in parts]), _joined([part[2] for part in parts])

    def _residual(self, layer: int) -> Tensor:
        """Return the residual `[batch, length, d]` at an exit of the untouched pass.

        Where it was not kept, another pass computes it, together with those of higher exits that fit.
        """
        if layer not in self._residuals:
            self._residuals.clear()
            exits = self._fitting([layer, *(other for other in self._starts if other > layer)])

            def run(a: int, b: int) -> dict[Site, Tensor]:
                def readout(
                    final: Tensor, read: dict[Site, Tensor], weights: list[Tensor]
                ) -> dict[Site, Tensor]:
                    return read

                return trace(self.model, self.ids[a:b], {}, exits, readout=readout, last=deepest(exits))

            self._residuals = _joined(self.memory.parts(len(self), 1, run))
        return self._residuals[layer]

    def _suffix(
        self, first: int, cells: list[dict[Site, Edit]], progress: Callable[[int], None] | None
    ) -> tuple[list[Column], Column, NDArray[np.float64]]:
        """Run the layers above an exit (-1: all of them) under each cell.

        Returns NLL, KL, agreement and any variances; the removed energy, `[cells, windows]` as these; and the
        sink mass of the layers that ran, `[cells, windows, layers]`.
        """
        size = len(self)
        exit = Site("exit", first)
        nest = Nested(self._residual(first)) if first >= 0 else None
        shares: list[list[Tensor]] = [[] for _ in cells]

        def run(a: int, b: int) -> PassResult:
            for share in shares[a:b]:
                share.clear()  # an attempt that ran out of memory may have left some
            # Edit the residual at the exit itself, once for each cell, and stack the cells
            residuals = None
            if nest is not None:
                entries = [self._entry(first, nest, cells[i], shares[i]) for i in range(a, b)]
                residuals = torch.cat(entries) if len(entries) > 1 else entries[0]  # [cells x batch, T, d]
            inner = [{s: e for s, e in cell.items() if s != exit} for cell in cells[a:b]]
            # A single cell whose batch does not fit is cut by windows where its edits allow it
            if b - a == 1 and self.memory.rows < size and all(edit.per_window for edit in inner[0].values()):
                result = self._by_rows(first, residuals, inner[0], shares[a])
            elif b - a == 1 and self.memory.rows < size:
                result = self._whole(first, residuals, inner[0], shares[a])
            else:
                result = self._run(first, residuals, inner, shares[a:b], slice(0, size))
            if progress is not None:
                progress(b - a)
            return result

        parts = self.memory.parts(len(cells), size, run)
        count = len(cells)
        columns = [
            _columns([getattr(part, name) for part in parts], count) for name in ("nll", "kl", "agrees")
        ]
        columns += [_columns([p.variances[name] for p in parts], count) for name in parts[0].variances]
        removed = np.stack([torch.stack(share).mean(0).double().numpy() for share in shares])
        above = [
            torch.cat(layer).view(count, size) for layer in zip(*(p.received for p in parts), strict=True)
        ]
        mass = torch.stack(above, -1).numpy() if above else np.zeros((count, size, 0))
        return columns, removed, mass

    def _entry(self, first: int, nest: Nested, cell: dict[Site, Edit], shares: list[Tensor]) -> Tensor:
        """Return the residual `[batch, length, d]` at the exit in a cell, edited if the cell acts there."""
        residual = self._residual(first)
        edit = cell.get(Site("exit", first))
        if edit is None:
            return residual
        out, share = apply_and_measure(edit, residual, self.ids, nest)
        shares.append(share)
        return out

    def _by_rows(
        self, first: int, residuals: Tensor | None, edits: dict[Site, Edit], shares: list[Tensor]
    ) -> PassResult:
        """Run one cell whose batch does not fit, some of its windows at a time."""

        def run(a: int, b: int) -> tuple[PassResult, list[Tensor]]:
            own: list[Tensor] = []
            part = for_batch(edits, range(a, b), len(self))
            cut = None if residuals is None else residuals[a:b]
            return self._run(first, cut, [part], [own], slice(a, b)), own

        parts = self.memory.parts(len(self), 1, run)
        shares.extend(torch.cat(site) for site in zip(*(own for _, own in parts), strict=True))
        results = [result for result, _ in parts]
        received = [torch.cat(layer) for layer in zip(*(part.received for part in results), strict=True)]
        nll, kl, agrees = (
            torch.cat([getattr(part, name) for part in results]) for name in ("nll", "kl", "agrees")
        )
        names = results[0].variances
        variances = {name: torch.cat([part.variances[name] for part in results]) for name in names}
        return PassResult(nll, kl, agrees, received, variances)

    def _whole(
        self, first: int, residuals: Tensor | None, edits: dict[Site, Edit], shares: list[Tensor]
    ) -> PassResult:
        """Run one cell that needs the whole batch at once, though the batch may not fit."""
        try:
            return self._run(first, residuals, [edits], [shares], slice(0, len(self)))
        except Exception as error:
            if not out_of_memory(error):
                raise
            site, edit = next((site, edit) for site, edit in edits.items() if not edit.per_window)
            raise InputError(
                f"{edit.name!r} at {site} acts on whole batches, and a batch of {len(self)} windows does "
                f"not fit into memory: give {'shorter windows' if edit.swaps else 'a smaller batch_size'}"
            ) from None

    def _run(
        self,
        first: int,
        residuals: Tensor | None,
        cells: list[dict[Site, Edit]],
        shares: list[list[Tensor]],
        rows: slice,
    ) -> PassResult:
        """Run one pass with the cells side by side along the batch axis, each edit acting on its own rows.

        `residuals` is `[cells x windows, length, d]`, and `rows` selects windows of the batch.
        """
        model, ids = self.model, self.ids[rows]
        size = len(ids)
        reference = self._reference
        if size < len(self):
            reference = reference.windows(rows.start, rows.stop, self.predicted)

        def stacked(site: Site) -> EditFunction:
            def edit(x: Tensor) -> Tensor:  # [cells x windows, length, d]
                pieces = list(x.split(size))
                for index, edits in enumerate(cells):
                    if site in edits:
                        pieces[index], share = apply_and_measure(edits[site], pieces[index], ids)
                        shares[index].append(share)
                return torch.cat(pieces) if len(pieces) > 1 else pieces[0]

            return edit

        sites = dict.fromkeys(site for edits in cells for site in edits)
        repeated, truth = (x[rows].repeat(len(cells), 1) for x in (self.ids, self.truth))
        chosen = self._chosen(rows)
        chosen = None if chosen is None else chosen.repeat(len(cells), 1)

        def readout(final: Tensor, read: dict[Site, Tensor], weights: list[Tensor]) -> PassResult:
            scores = score(model, final, truth, reference, chosen)
            assert scores.kl is not None and scores.agrees is not None
            nll, kl, agrees = (x.double().mean(1).cpu() for x in (scores.nll, scores.kl, scores.agrees))
            varied: dict[str, Tensor] = {}
            if chosen is not None:
                each = scores.nll.double()
                change = each - self._nll[rows].to(each.device).repeat(len(cells), 1)
                for name, values in zip(VARIED, (each, change, scores.kl.double()), strict=True):
                    varied[name] = _variance(values).cpu()
            return PassResult(nll, kl, agrees, [layer.cpu() for layer in weights], varied)

        return trace(
            model,
            repeated,
            {site: stacked(site) for site in sites},
            readout=readout,
            attention=self.attention,
            resume=None if residuals is None else Resume(first, residuals),
        )


def for_batch(edits: Interventions, rows: Sequence[int], total: int) -> dict[Site, Edit]:
    """Return the edits of a cell for some windows, or images, out of `total`; masks are cut to them."""
    return {site: edit.for_windows(rows, total) for site, edit in as_edits(edits).items()}


def apply_and_measure(
    edit: Edit,
    x: Float[Tensor, "batch length d"],
    ids: Int[Tensor, "batch length"],
    nest: Nested | None = None,
) -> tuple[Float[Tensor, "batch length d"], Float[Tensor, "batch"]]:
    """Return the edited residual, and the share of energy removed, mean over the edited tokens, by window."""
    return edit.apply_and_measure(x, ids, nest)


def _joined(parts: list[dict[Site, Tensor]]) -> dict[int, Tensor]:
    """Residuals `[batch, length, d]` by layer, from those of consecutive windows."""
    return {site.layer: torch.cat([part[site] for part in parts]) for site in parts[0]}


def _received(
    model: LanguageModel, weights: Float[Tensor, "batch heads tokens tokens"]
) -> Float[Tensor, "batch"]:
    """Attention received by position 0, mean over heads, `[batch]`."""
    return attention_received([from_others(model, weights)], causal=model.causal)[:, 0].double().mean(-1)


def _variance(values: Float[Tensor, "windows predictions"]) -> Float[Tensor, "windows"]:
    """Return the variance of the predictions of each window; 0 for a single one, which is not drawn."""
    return values.var(1) if values.shape[1] > 1 else torch.zeros_like(values[:, 0])


def _columns(parts: list[Tensor], cells: int) -> Column:
    return torch.cat(parts).double().cpu().view(cells, -1).numpy()
