"""What a GPU does: the numbers against a CPU first, then the time of suffix passes over a floor.

The numbers: NLL and KL of two filters, in float32 (to 1e-4 nats) and in bfloat16 (to 1e-2), beside float32 on
the CPU. A number that is off stops the run, since the time of a wrong result says nothing.

The time: `evaluate_all` removes random subspaces at one exit, in bfloat16. The floor is what this work takes
at the rates that the device shows: the operations of its matrix products at the rate of a large bfloat16
product, or the bytes that it must move at the rate of a copy, whichever takes longer. The untouched pass is
part of both. The shapes of one and of eight billion parameters are those of Llama 3, with random weights.

The script needs the repository alone. SmolLM2 is measured as well where `experiments/real/fetch.py` has put
it. Without a GPU, `--device cpu --quick` runs everything on toy sizes.

    python experiments/bench_gpu.py --out results/bench_gpu.json
"""

import gc
import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from transformers import LlamaConfig, LlamaForCausalLM

import spectral_sinks as ss

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
"""Nats that a number may differ from the CPU's, by dtype."""

TARGET = 1.25
"""The time over the floor that is to be reached by the two large shapes."""

SMOLLM2 = Path("models/smollm2")


@dataclass(frozen=True)
class Shape:
    """The sizes of a random Llama, and of the work on it."""

    d: int
    layers: int
    wide: int
    """Width inside the MLP."""
    heads: int
    key_value_heads: int
    vocabulary: int
    windows: int = 16
    tokens: int = 256
    cells: int = 8
    target: float | None = None


SHAPES = {
    "random Llama, d 1024, 12 layers": Shape(1024, 12, 2816, 16, 16, 32000),
    "random Llama of 1 B": Shape(2048, 16, 8192, 32, 8, 128256, target=TARGET),
    "random Llama of 8 B": Shape(4096, 32, 14336, 32, 8, 128256, target=TARGET),
}

TOY = {"random Llama, toy": Shape(64, 3, 128, 4, 2, 512, windows=2, tokens=64, cells=2)}


@dataclass(frozen=True)
class Options:
    """Options of the run."""

    device: str = "cuda"
    quick: bool = False
    """Use toy sizes, to test that it runs."""
    out: Path | None = None
    """File to write the rows to, as JSON."""


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_seconds(device: torch.device, call: Any, rounds: int) -> float:
    """Return the median time of a call, after one that is not counted."""
    seconds: list[float] = []
    for turn in range(rounds + 1):
        wait(device)
        began = time.perf_counter()
        call()
        wait(device)
        if turn:
            seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def rates(device: torch.device, quick: bool) -> tuple[float, float]:
    """Return the operations a second of a large bfloat16 product, and the bytes a second of a copy."""
    size, count = (256, 2**20) if quick else (8192, 2**29)
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in "ab")
    x, y = (torch.empty(count, device=device, dtype=torch.bfloat16) for _ in "xy")
    product = median_seconds(device, lambda: a @ b, 20)
    copy = median_seconds(device, lambda: y.copy_(x), 20)
    return 2 * size**3 / product, 2 * x.nbytes / copy


def random_llama(shape: Shape, device: torch.device, dtype: torch.dtype) -> ss.LanguageModel:
    """Return a Llama with random weights, which are made on the device."""
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.d,
        intermediate_size=shape.wide,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        max_position_embeddings=shape.tokens,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            module = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    model = ss.load(module.eval().requires_grad_(False))
    model.module.set_attn_implementation("sdpa_opening")
    return model


def floor_seconds(shape: Shape, suffix: int, rank: int, rates: tuple[float, float]) -> float:
    """Return the least time of an untouched pass and of `cells` passes through the last `suffix` layers.

    A causal attention needs half of its products. The untouched pass also multiplies the probabilities with
    the unembedding, for the KL divergence. Bytes are those of the weights once a pass, and of the logits
    written and read once.
    """
    head = shape.d // shape.heads
    weights = shape.d * (2 * shape.d + 2 * shape.key_value_heads * head + 3 * shape.wide)
    unembedding = shape.d * shape.vocabulary
    rows, predicted = shape.windows * shape.tokens, shape.windows * (shape.tokens - 1)
    layer = 2 * rows * weights + 2 * rows * shape.tokens * shape.d
    logits = 2 * predicted * unembedding
    operations = shape.layers * layer + 2 * logits
    operations += shape.cells * (suffix * layer + logits + 4 * rows * shape.d * rank)
    moved = 2 * (shape.layers * weights + 2 * unembedding) + 2 * 2 * predicted * shape.vocabulary
    moved += shape.cells * (2 * (suffix * weights + unembedding) + 2 * 2 * predicted * shape.vocabulary)
    return max(operations / rates[0], moved / rates[1])


def timed(
    name: str, model: ss.LanguageModel, shape: Shape, rates: tuple[float, float], rounds: int
) -> Iterator[dict[str, Any]]:
    """Time `evaluate_all` at the exit of the first layer and at half of the depth, over the floor."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.vocabulary, (shape.windows, shape.tokens), generator=generator)
    windows, rank = ss.Windows.of_ids(ids, model), max(1, shape.d // 20)
    drawn = [ss.rnd(shape.d, rank, seed).to(model.device, torch.float32) for seed in range(shape.cells)]
    for layer in dict.fromkeys((0, shape.layers // 2)):
        cells = {str(seed): {ss.Site("exit", layer): edit} for seed, edit in enumerate(drawn)}
        seconds = median_seconds(
            model.device,
            lambda cells=cells: ss.evaluate_all(model, windows, cells, batch_size=shape.windows),
            rounds,
        )
        least = floor_seconds(shape, shape.layers - 1 - layer, rank, rates)
        ratio = seconds / least
        yield {
            "name": name,
            "exit": layer,
            "cells": shape.cells,
            "tokens": shape.windows * shape.tokens,
            "seconds": round(seconds, 4),
            "floor": round(least, 4),
            "ratio": round(ratio, 3),
            "target": shape.target,
            "reached": None if shape.target is None else ratio <= shape.target,
        }


def shape_of(model: ss.LanguageModel) -> Shape:
    """Return the shape of a loaded Llama."""
    config = model.config
    return Shape(
        model.d,
        model.layers,
        config.intermediate_size,
        model.heads,
        config.num_key_value_heads,
        model.vocabulary,
    )


def numbers(name: str, source: Any, device: torch.device) -> Iterator[dict[str, Any]]:
    """Compare the NLL and the KL of every document on the device with those of the CPU in float32.

    Raises InputError for a number that is off by more than `TOLERANCE`.
    """
    model = ss.load(source, device="cpu", dtype=torch.float32)
    windows = ss.cut(ss.documents(limit=4), model, length=128, per_document=1)
    spectrum, middle = ss.read_spectrum(model), model.layers // 2
    edits = {"dark": ss.remove(spectrum.dark()), "random": ss.rnd(model.d, spectrum.dark().rank, 0)}
    cells = {kind: {ss.Site("exit", middle): edit} for kind, edit in edits.items()}
    right = ss.evaluate_all(model, windows, cells)
    del model
    for dtype, tolerance in TOLERANCE.items():
        there = ss.load(source, device=str(device), dtype=dtype)
        found = ss.evaluate_all(there, windows, cells)
        off = max(
            float((found[kind].table[column] - right[kind].table[column]).abs().max())
            for kind in cells
            for column in ("baseline_nll", "nll", "kl")
        )
        yield {
            "name": f"{name}, {str(dtype).removeprefix('torch.')}: largest difference from the CPU, nats",
            "difference": off,
            "tolerance": tolerance,
        }
        if off > tolerance:
            raise ss.InputError(f"{name} in {dtype} on {device} is {off:.2g} nats from the CPU's numbers")
        del there
        gc.collect()


def main(options: Options) -> list[dict[str, Any]]:
    """Run the comparison and the timings, print them, and return the rows.

    Raises InputError where there is no such device, or where a number is wrong.
    """
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise ss.InputError("torch sees no GPU here: --device cpu --quick tests this script without one")
    torch.backends.cuda.matmul.allow_tf32 = False
    device = torch.device(options.device)
    what = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    real = SMOLLM2.is_dir() and not options.quick
    rows = list(numbers("sinklet", ss.DEFAULT, device))
    if real:
        rows += numbers("SmolLM2-135M", SMOLLM2, device)
    found = rates(device, options.quick)
    rows.append({"name": "bfloat16 product, operations a second", "rate": found[0]})
    rows.append({"name": "copy, bytes a second", "rate": found[1]})
    rounds = 1 if options.quick else 5
    if real:
        model = ss.load(SMOLLM2, device=str(device), dtype=torch.bfloat16)
        rows += timed("SmolLM2-135M", model, shape_of(model), found, rounds)
        del model
    for name, shape in (TOY if options.quick else SHAPES).items():
        gc.collect()
        model = random_llama(shape, device, torch.bfloat16)
        rows += timed(name, model, shape, found, rounds)
        del model
    print(what, *(line(row) for row in rows), sep="\n")
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        record = {"device": what, "versions": ss.sweeps.versions(), "rows": rows}
        options.out.write_text(json.dumps(record, indent=1) + "\n")
    return rows


def line(row: dict[str, Any]) -> str:
    """Return a row as a sentence."""
    if "rate" in row:
        return f"{row['name']}: {row['rate']:.3g}"
    if "difference" in row:
        return f"{row['name']}: {row['difference']:.2g} (at most {row['tolerance']:g})"
    target = "" if row["target"] is None else f" (at most {row['target']}: {row['reached']})"
    work = f"{row['cells']} cells at exit {row['exit']}, {row['tokens']} tokens"
    return f"{row['name']}, {work}: {row['seconds']:.3f} s, {row['ratio']:.2f} times the floor{target}"


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except ss.InputError as error:
        print(error, file=sys.stderr)
        sys.exit(1)
