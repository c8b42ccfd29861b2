"""Benchmarks: every number is a ratio of two sides that run in turn, in one process, on the same inputs.

`make bench` writes `bench.json`, a list of rows, and prints it. A row has `name`, `model`, `ratio` (wall
time, median over rounds), `target` and `reached` (null if there is no target), `note`, `threads`, the
`seconds` of each side, and `ratio_cpu`, the same ratio of processor time, which other programs disturb less.
The benchmarks on a GPU run only where there is one.
"""

import argparse
import gc
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import factors
import numpy as np
import sides
import torch
from cases import BATCH, CHUNK, Bench, Case, random_llama
from spectra import spectra
from timing import Row, in_turn, peak, row, show
from torch import Tensor
from torch.nn.functional import cross_entropy

import spectral_sinks as ss


def one_pass(bench: Bench) -> list[Row]:
    """Compare one filtered pass through `trace` with a hand-written hook on an unwrapped model."""
    return [made for case in bench.cases for made in passes(case, 5 if bench.quick else 11)]


def passes(case: Case, rounds: int) -> list[Row]:
    layer = case.model.layers // 2
    keep = ss.phi(case.spectrum, 1, 15)
    basis, kept = sides.thin(keep, case.model.unembedding_weight)
    found: list[Row] = []

    def hook(module: Any, inputs: Any, output: Tensor) -> Tensor:
        x = output.to(basis.dtype)
        inside = (x @ basis) @ basis.T
        return (inside if kept else x - inside).to(output.dtype)

    def nll(logits: Tensor, ids: Tensor) -> Tensor:
        each = cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        return each.view(len(ids), -1).mean(1)

    for count in dict.fromkeys((len(case.ids), 1)):
        ids = case.ids[:count]

        def ours(_: int, ids: Tensor = ids) -> Tensor:
            return ss.trace(
                case.model,
                ids,
                {ss.Site("exit", layer): keep},
                readout=lambda final, read, weights: nll(case.model.unembed(final), ids),
            )

        @torch.no_grad()
        def hooked(_: int, ids: Tensor = ids) -> Tensor:
            handle = case.plain.model.layers[layer].register_forward_hook(hook)
            final = case.plain.model(ids, use_cache=False).last_hidden_state
            handle.remove()
            return nll(case.plain.lm_head(final).float(), ids)

        clock = in_turn(rounds if count > 1 else 2 * rounds, ours=ours, hook=hooked)
        gap = float((clock.found["ours"][0] - clock.found["hook"][0]).abs().max())
        note = f"{count} x {ids.shape[1]} tokens, filter and NLL; results differ by {gap:.1g} nats"
        target = case.pass_target if count == len(case.ids) else None
        name = "one filtered pass / hook" + ("" if target else ", one window")
        found.append(clock.row(name, case, "ours", "hook", target, note=note))
    return found


def full_ladder(bench: Bench) -> list[Row]:
    """Compare the ladder over layers and bands with suffix replay by hand, two naive loops, and the floor."""
    return [made for case in bench.cases for made in ladders(case)]


def ladders(case: Case) -> list[Row]:
    replay = sides.Replay(sides.twin(case.model), CHUNK, case.stack)
    some = case.at(case.model.layers - 1)

    def cells(turn: int) -> dict[sides.Cell, ss.Filter]:
        return case.filters if turn >= 0 else some

    clock = in_turn(
        case.rounds,
        ours=lambda turn: case.evaluate(cells(turn)),
        replay=lambda turn: replay(case.windows, cells(turn), BATCH),
        naive=lambda turn: sides.naive(case.model, case.windows, cells(turn), BATCH),
        eager=lambda turn: sides.naive(case.eager, case.windows, cells(turn), BATCH),
        floor=Floor(case),
    )
    filtered = sum(keep.rank > 0 for keep in some.values())
    for times in (clock.wall, clock.cpu):
        times["floor"] = [time * filtered / Floor.COLUMNS for time in times["floor"]]
    ours, theirs = clock.found["ours"], clock.found["replay"]
    columns = {"nll": "nll", "kl": "kl", "top1": "top1_agreement", "removed": "removed_energy_share"}
    gaps = {
        name: max(
            float(np.abs(ours[f"{layer} {k}"].table[column].to_numpy() - rows[name].cpu().numpy()).max())
            for (layer, k), rows in theirs.items()
        )
        for name, column in columns.items()
    }
    size = f"{case.model.layers} layers x {len(case.kept)} of 20 bands kept, {len(case.windows)} x "
    size += f"{case.windows.length} tokens, {case.rounds} rounds"
    same = ", ".join(f"{name} {gap:.1g}" for name, gap in gaps.items())
    floor = "floor: for each cell the layers above its site, norm, unembedding and NLL of an unwrapped model"
    return [
        clock.row(
            "naive loop, same attention / ladder",
            case,
            "naive",
            "ours",
            1.7,
            True,
            note=size,
        ),
        clock.row("naive loop, eager attention / ladder", case, "eager", "ours", note=size),
        clock.row("ladder / replay by hand", case, "ours", "replay", 1.1, note=f"the same rows up to {same}"),
        clock.row("ladder / floor", case, "ours", "floor", 1.25, note=floor),
    ]


class Floor:
    """The work that cannot be saved: the layers above each exit and the head, done `COLUMNS` times."""

    COLUMNS = 3

    def __init__(self, case: Case) -> None:
        self.case = case
        self.options: dict[str, Any] = {}
        self.x = torch.empty(0)
        handle = case.plain.model.layers[0].register_forward_pre_hook(self._see, with_kwargs=True)
        with torch.no_grad():
            case.plain.model(case.ids, use_cache=False)
        handle.remove()

    def _see(self, module: Any, inputs: tuple[Tensor], options: dict[str, Any]) -> None:
        self.x, self.options = inputs[0], options

    @torch.no_grad()
    def __call__(self, turn: int) -> list[Tensor]:
        plain, targets = self.case.plain, self.case.ids[:, 1:].flatten().split(CHUNK)
        found: list[Tensor] = []
        for layer in [*range(self.case.model.layers)] * self.COLUMNS:
            x = self.x
            for above in plain.model.layers[layer + 1 :]:
                x = above(x, **self.options)
            rows = plain.model.norm(x)[:, :-1].flatten(0, 1).split(CHUNK)
            for part, hit in zip(rows, targets, strict=True):
                logits = plain.lm_head(part).float()
                wanted, most = logits.gather(-1, hit[:, None])[:, 0], logits.amax(-1)
                found.append(most + logits.sub_(most[:, None]).exp_().sum(-1).log() - wanted)
        return found


def growth(bench: Bench) -> list[Row]:
    """Measure time and resident memory for once, twice, four and eight times the cells."""
    case = bench.embedded
    base, times, steps = 20, 1 if bench.quick else 2, (1, 2, 4, 8)
    layer, d = 2, case.model.d
    drawn = {seed: ss.rnd(d, d // 4, seed) for seed in range(8 * base)}
    wall: dict[int, list[float]] = {step: [] for step in steps}
    cpu: dict[int, list[float]] = {step: [] for step in steps}
    memory: dict[int, float] = dict.fromkeys(steps, 0.0)
    for turn in range(-1, times):
        for step in steps[:1] if turn < 0 else steps[:: -1 if turn % 2 else 1]:
            cells = {(layer, seed): drawn[seed] for seed in range(step * base)}
            gc.collect()
            with peak() as most:
                began, used = time.perf_counter(), time.process_time()
                case.evaluate(cells)
                if turn >= 0:
                    wall[step].append(time.perf_counter() - began)
                    cpu[step].append(time.process_time() - used)
            if turn == 0:  # in growing order, since memory that an allocator keeps would hide later growth
                memory[step] = most[0]

    def slopes(seconds: dict[int, list[float]]) -> list[float]:
        least = {step: statistics.median(each) for step, each in seconds.items()}
        return [least[step] / step / least[1] for step in steps[1:]]

    worst = max(slopes(wall))
    seconds = {f"{step}x": round(statistics.median(each), 4) for step, each in wall.items()}
    note = f"1x is {base} random filters at one exit; below 1 because all share one untouched pass"
    linear = row(
        "time per cell, worst of 8x, 4x and 2x / 1x", case.name, worst, seconds=seconds, note=note, target=1.1
    )
    linear |= {"ratio_cpu": round(max(slopes(cpu)), 3)}
    flat = row("resident memory, 8x / 1x", case.name, memory[8] / memory[1], target=1.05)
    flat |= {"megabytes": {f"{step}x": round(value) for step, value in memory.items()}}
    return [linear, flat | {"note": "peak while each ran, in growing order"}]


def gpu(bench: Bench) -> list[Row]:
    """Measure the pass and the ladder on a GPU, in bfloat16 at d 4096 and 32 layers, with absolute times."""
    name = "random Llama, d 4096, 32 layers, bfloat16"
    if not torch.cuda.is_available():
        return [row("GPU: pass and ladder", name, None, note="no GPU here: not run")]
    model, windows = random_llama(4096, 32, 256, 16, device="cuda", dtype=torch.bfloat16)
    case = Case(name, model, windows, (10, 19), 2, 1.05)
    return [made | {"name": f"GPU: {made['name']}"} for made in [*passes(case, 11), *ladders(case)]]


BENCHMARKS: dict[str, Callable[[Bench], list[Row]]] = {
    "pass": one_pass,
    "ladder": full_ladder,
    "growth": growth,
    "attention": factors.attention,
    "nested": factors.nested,
    "bfloat16": factors.matrix_units,
    "compile": factors.compiled,
    "stopping": factors.stopping,
    "screen": factors.screen,
    "spectra": spectra,
    "gpu": gpu,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder of bench.json")
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, help="run only these, and write nothing")
    parser.add_argument(
        "--quick", action="store_true", help="use small sizes, to test that it runs, and write nothing"
    )
    given = parser.parse_args()
    bench, rows = Bench(given.quick), list[Row]()
    for name in given.only or BENCHMARKS:
        began = time.monotonic()
        rows += BENCHMARKS[name](bench)
        print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
    show(rows)
    if not given.only and not given.quick:
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / "bench.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=ss.SpectralWarning)
    main()
