"""Factors of speed other than the replay itself, each with its ratio and its effect on the results."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import sides
import torch
from cases import BATCH, CHUNK, Bench, Case
from timing import Clock, Row, in_turn, row

import spectral_sinks as ss


def deltas(effects: dict[str, ss.Effect]) -> np.ndarray:
    return np.array([effect.delta_nll for effect in effects.values()])


def compared(clock: Clock, a: str, b: str) -> str:
    """State by how much the NLL differences of two sides differ."""
    x, y = (deltas(clock.found[side]) for side in (a, b))
    return f"NLL differences move by at most {np.abs(x - y).max():.1g} nats, of up to {np.abs(y).max():.2g}"


def attention(bench: Bench) -> list[Row]:
    """Compare the fused kernel of torch, with maps of the first tokens only, with eager attention."""
    found: list[Row] = []
    for case in bench.cases:
        clock = in_turn(
            case.rounds,
            fused=lambda _, case=case: case.evaluate(case.at(0)),
            eager=lambda _, case=case: case.evaluate(case.at(0), case.eager),
        )
        note = f"cells at exit 0; {compared(clock, 'fused', 'eager')}"
        found.append(clock.row("factor: eager / fused attention", case, "eager", "fused", note=note))
    return found


def nested(bench: Bench) -> list[Row]:
    """Compare projections that nested filters share with one projection for each filter."""
    found: list[Row] = []
    for case in bench.cases:
        layer = case.model.layers - 2
        cells = {(layer, k): ss.phi(case.spectrum, 1, k) for k in range(1, 20)}
        alone = {cell: (lambda x, keep=keep: keep(x)) for cell, keep in cells.items()}
        clock = in_turn(
            max(case.rounds, 2),
            shared=lambda _, case=case, cells=cells: case.evaluate(cells),
            alone=lambda _, case=case, cells=alone: case.evaluate(cells),
        )
        note = f"Phi 1:1 to 1:19 at exit {layer}, one layer above; {compared(clock, 'shared', 'alone')}"
        found.append(clock.row("factor: each its projection / shared", case, "alone", "shared", note=note))
    return found


@contextmanager
def bfloat16_products() -> Iterator[None]:
    """Multiply float32 matrices in bfloat16 and sum in float32 inside the block, as matrix units do."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def matrix_units(bench: Bench) -> list[Row]:
    """Compare float32 products with bfloat16 products, which are faster and have the error that is stated."""
    found: list[Row] = []
    for case in bench.cases:

        def rough(_: int, case: Case = case) -> dict[str, ss.Effect]:
            with bfloat16_products():
                return case.evaluate(case.at(0))

        clock = in_turn(
            max(case.rounds, 2), float32=lambda _, case=case: case.evaluate(case.at(0)), bfloat16=rough
        )
        note = f"cells at exit 0, not the default; {compared(clock, 'bfloat16', 'float32')}"
        found.append(clock.row("factor: float32 / bfloat16 products", case, "float32", "bfloat16", note=note))
    return found


def compiled(bench: Bench) -> list[Row]:
    """Measure the gain from torch.compile, on the replay by hand with compiled layers."""
    found: list[Row] = []
    torch._dynamo.config.recompile_limit = 64  # each layer index is compiled separately
    for case in bench.cases:
        plain = sides.Replay(sides.twin(case.model), CHUNK, case.stack)
        fast = sides.Replay(sides.twin(case.model), CHUNK, case.stack, compiled=True)
        cells = case.at(0)
        try:
            began = time.perf_counter()
            fast(case.windows, cells, BATCH)
            cost = time.perf_counter() - began
        except Exception as error:  # there is no compiler, or torch cannot use it
            found.append(row("factor: replay by hand / compiled", case.name, None, note=_first_line(error)))
            continue
        clock = in_turn(
            max(case.rounds, 2),
            plain=lambda _, case=case, plain=plain, cells=cells: plain(case.windows, cells, BATCH),
            compiled=lambda _, case=case, fast=fast, cells=cells: fast(case.windows, cells, BATCH),
        )
        a, b = clock.found["plain"], clock.found["compiled"]
        gap = max(float((a[cell]["nll"] - b[cell]["nll"]).abs().max()) for cell in cells)
        note = f"cells at exit 0, compiled in {cost:.0f} s; NLL differs by at most {gap:.1g} nats; not in use"
        found.append(clock.row("factor: replay by hand / compiled", case, "plain", "compiled", note=note))
    return found


def _first_line(error: Exception) -> str:
    return f"does not compile here: {str(error).strip().splitlines()[0][:160]}"


def stopping(bench: Bench) -> list[Row]:
    """Compare random controls that stop early with a fixed design, on the same draws."""
    case, n, h = bench.embedded, 9 if bench.quick else 39, 4
    kept = (8, 16, 19)
    windows = ss.Windows.of_ids(case.windows.rows[:4], case.model)
    spent, decided, cells = 0, 0, 0
    for layer in range(case.model.layers):
        site = ss.Site("exit", layer)
        for k in kept:
            keep = ss.phi(case.spectrum, 1, k)
            named = {"observed": {site: keep}}
            named |= {f"{seed}": {site: ss.rnd(case.model.d, keep.rank, seed)} for seed in range(n)}
            effects = ss.evaluate_all(case.model, windows, named, batch_size=BATCH)
            observed, *null = deltas(effects)
            p, used = ss.stats.sequential_p(observed, lambda i, null=null: null[i], h=h, n=n)
            fixed = (ss.stats.null_rank(observed, null) + 1) / (n + 1)
            spent, cells = spent + used, cells + 1
            decided += (p <= 0.05) == (fixed <= 0.05)
    note = (
        f"stops at h = {h} of n = {n} draws (Besag & Clifford 1991): P(p <= a) <= a is kept; {spent} "
        f"draws for {n * cells}; the decision at 0.05 is that of all draws in {decided} of {cells} controls"
    )
    return [row("factor: draws of a fixed design / stopped", case.name, n * cells / spent, note=note)]


def screen(bench: Bench) -> list[Row]:
    """Compare exact values with a first-order estimate of every cell, which needs one backward pass.

    The estimate is a screen and never replaces the exact values.
    """
    case = bench.embedded
    bands = {
        (layer, j): ss.remove(case.spectrum.band(j))
        for layer in range(case.model.layers)
        for j in range(1, 21)
    }
    clock = in_turn(
        1,
        screen=lambda _: ss.nll.first_order(case.model, case.windows, case.spectrum, batch_size=BATCH),
        exact=lambda _: case.evaluate(bands | {(layer, 20 + k): f for (layer, k), f in case.filters.items()}),
    )
    estimates = clock.found["screen"].pivot(index="layer", columns="band", values="estimate").to_numpy()
    effects: dict[str, ss.Effect] = clock.found["exact"]
    single = np.array([effects[f"{layer} {j}"].delta_nll for layer, j in bands])
    ladder = np.array([effects[f"{layer} {20 + k}"].delta_nll for layer, k in case.filters])
    tails = np.array([estimates[layer, k:].sum() for layer, k in case.filters])
    note = "; ".join(
        f"{what}: Pearson {np.corrcoef(a, b)[0, 1]:.2f}, rank {np.corrcoef(_ranks(a), _ranks(b))[0, 1]:.2f}"
        for what, a, b in (("single bands", estimates.flatten(), single), ("Phi 1:k", tails, ladder))
    )
    note = f"correlation with the exact NLL differences, {note}; a screen only"
    return [clock.row("factor: exact cells / first-order screen", case, "exact", "screen", note=note)]


def _ranks(values: np.ndarray) -> np.ndarray:
    return values.argsort().argsort()
