"""The GPU script at toy size on a CPU: its numbers, its floor, and what stops it."""

import dataclasses
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

import spectral_sinks as ss

SCRIPT = Path(__file__).parents[2] / "experiments" / "bench_gpu.py"
SPEC = importlib.util.spec_from_file_location("bench_gpu", SCRIPT)
assert SPEC is not None and SPEC.loader is not None
bench_gpu = sys.modules["bench_gpu"] = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(bench_gpu)


def test_whole_script_at_toy_size(capsys):
    rows = bench_gpu.main(bench_gpu.Options(device="cpu", quick=True))
    off = {row["name"]: row for row in rows if "difference" in row}
    assert len(off) == 2 and all(row["difference"] <= row["tolerance"] for row in off.values())
    assert off["sinklet, float32: largest difference from the CPU, nats"]["difference"] == 0
    assert next(row for row in off.values() if row["tolerance"] == 1e-2)["difference"] > 0
    timed = [row for row in rows if "ratio" in row]
    assert [row["exit"] for row in timed] == [0, 1]
    assert all(row["seconds"] > 0 and row["ratio"] > 0 for row in timed)
    assert "times the floor" in capsys.readouterr().out


def test_floor_counts_the_products_of_the_modules():
    shape = bench_gpu.TOY["random Llama, toy"]
    model = bench_gpu.random_llama(shape, torch.device("cpu"), torch.float32)
    matrices = [
        module for module in model.module.model.layers.modules() if isinstance(module, torch.nn.Linear)
    ]
    rows, predicted = shape.windows * shape.tokens, shape.windows * (shape.tokens - 1)
    layers = sum(2 * rows * module.weight.numel() for module in matrices)
    layers += shape.layers * 2 * rows * shape.tokens * shape.d
    logits = 2 * predicted * model.unembedding_weight.numel()
    cell = layers / shape.layers * 2 + logits + 4 * rows * shape.d * 3
    slow_products = bench_gpu.floor_seconds(shape, 2, 3, (1.0, float("inf")))
    assert slow_products == pytest.approx(layers + 2 * logits + shape.cells * cell)
    slow_copies = bench_gpu.floor_seconds(shape, 2, 3, (float("inf"), 1.0))
    twice = bench_gpu.floor_seconds(dataclasses.replace(shape, cells=4), 2, 3, (float("inf"), 1.0))
    assert slow_copies < twice < 2 * slow_copies


def test_wrong_number_stops_the_run(monkeypatch):
    monkeypatch.setattr(bench_gpu, "TOLERANCE", {torch.bfloat16: 1e-9})
    with pytest.raises(ss.InputError, match="nats from the CPU's numbers"):
        list(bench_gpu.numbers("sinklet", ss.DEFAULT, torch.device("cpu")))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_script_says_so():
    with pytest.raises(ss.InputError, match="torch sees no GPU here: --device cpu --quick"):
        bench_gpu.main(bench_gpu.Options())
