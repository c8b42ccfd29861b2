"""How the time of `evaluate_all` and `find_sinks` grows, each size of a small random model doubled alone.

    OMP_NUM_THREADS=1 python experiments/bench/scaling.py --out results

It writes `bench_scaling.json`, one row for each measurement and size: the processor `seconds` at each of the
`sizes`, least over rounds; the `exponent` that fits them; and the exponent that fits the number of operations
at the same sizes (`arithmetic`). An exponent above that by more than 0.15 is marked, and is a defect to find.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

import spectral_sinks as ss

TOLERANCE = 0.15
"""How far an exponent may lie above that of the arithmetic before it is marked."""

BANDS = 8


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model and of a measurement."""

    layers: int = 4
    width: int = 256
    vocabulary: int = 4096
    windows: int = 8
    tokens: int = 64
    cells: int = 4

    @property
    def layer_operations(self) -> float:
        """Operations of one layer for all tokens: its products, and the scores and averages of attention."""
        wide = 11 * self.width // 4
        products = 2 * (4 * self.width**2 + 3 * self.width * wide)
        return self.windows * self.tokens * (products + 4 * self.tokens * self.width)

    @property
    def unembedding(self) -> float:
        """Operations of the logits of all predictions."""
        return 2 * self.windows * (self.tokens - 1) * self.vocabulary * self.width

    def filters(self) -> float:
        """Operations of `evaluate_all`; the untouched pass also multiplies probabilities and rows."""
        cell = (self.layers - 1) * self.layer_operations + self.unembedding
        return self.layers * self.layer_operations + 2 * self.unembedding + self.cells * cell

    def sinks(self) -> float:
        """Operations of the pass of `find_sinks`, which computes no logits."""
        return self.layers * self.layer_operations


def made(sizes: Sizes) -> tuple[ss.LanguageModel, ss.Windows, ss.Spectrum]:
    """Make a random Llama, random windows and the spectrum of the unembedding."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.width,
        intermediate_size=11 * sizes.width // 4,
        num_hidden_layers=sizes.layers,
        num_attention_heads=max(1, sizes.width // 64),
        max_position_embeddings=max(64, sizes.tokens),
    )
    model = ss.load(LlamaForCausalLM(config))
    model.module.set_attn_implementation("sdpa_opening")
    ids = torch.randint(0, sizes.vocabulary, (sizes.windows, sizes.tokens))
    return model, ss.Windows.of_ids(ids, model), ss.read_spectrum(model, bands=BANDS, use_cache=False)


def filters(sizes: Sizes) -> Callable[[], object]:
    model, windows, spectrum = made(sizes)
    edit = ss.remove(spectrum.dark())
    cells = {f"{index}": {ss.Site("exit", 0): edit} for index in range(sizes.cells)}
    return lambda: ss.evaluate_all(model, windows, cells)


def sinks(sizes: Sizes) -> Callable[[], object]:
    model, windows, spectrum = made(sizes)
    return lambda: ss.find_sinks(model, windows, spectrum, length=sizes.tokens, draws=2)


MEASURED: dict[str, tuple[Callable[[Sizes], Callable[[], object]], Callable[[Sizes], float]]] = {
    "evaluate_all": (filters, Sizes.filters),
    "find_sinks": (sinks, Sizes.sinks),
}
"""What is timed, and its number of operations."""


def slope(sizes: list[int], values: list[float]) -> float:
    """Return the exponent of a power law that fits values at some sizes."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def seconds(call: Callable[[], object], rounds: int) -> float:
    """Return the least processor time of a call, after one that is not timed."""
    call()
    least = math.inf
    for _ in range(rounds):
        start = time.process_time()
        call()
        least = min(least, time.process_time() - start)
    return least


def scaling(base: Sizes, doublings: int, rounds: int) -> list[dict[str, Any]]:
    """Time every measurement with each size doubled alone, and fit the exponents."""
    rows: list[dict[str, Any]] = []
    for what, (make, operations) in MEASURED.items():
        first = seconds(make(base), rounds)
        for size, value in asdict(base).items():
            steps = [replace(base, **{size: value * 2**n}) for n in range(doublings + 1)]
            sizes = [value * 2**n for n in range(doublings + 1)]
            arithmetic = slope(sizes, [operations(step) for step in steps])
            if size == "cells" and what == "find_sinks":
                continue
            times = [first, *(seconds(make(step), rounds) for step in steps[1:])]
            exponent = slope(sizes, times)
            rows.append(
                {
                    "what": what,
                    "size": size,
                    "sizes": sizes,
                    "seconds": [round(each, 3) for each in times],
                    "exponent": round(exponent, 2),
                    "arithmetic": round(arithmetic, 2),
                    "above": exponent > arithmetic + TOLERANCE,
                }
            )
            print(f"{what}, {size}: {exponent:.2f} (arithmetic {arithmetic:.2f})", flush=True)
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    table = Table("what", "size", "sizes", "seconds", "exponent", "arithmetic", "")
    for made in rows:
        cells = [", ".join(map(str, made[name])) for name in ("sizes", "seconds")]
        numbers = [f"{made[name]:.2f}" for name in ("exponent", "arithmetic")]
        table.add_row(made["what"], made["size"], *cells, *numbers, "above" if made["above"] else "")
    Console().print(table)


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for bench_scaling.json")
    parser.add_argument("--doublings", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="toy sizes, which only show that it runs")
    given = parser.parse_args(arguments)
    base = Sizes(2, 64, 256, 2, 16, 1) if given.quick else Sizes()
    rows = scaling(base, given.doublings, given.rounds)
    show(rows)
    if given.out is not None:
        given.out.mkdir(parents=True, exist_ok=True)
        path = given.out / "bench_scaling.json"
        path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return rows


if __name__ == "__main__":
    main()
