"""The benchmark of scaling: its exponents on planted times, its operations, and the script at toy size."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

SCRIPT = Path(__file__).parents[2] / "experiments" / "bench" / "scaling.py"
SPEC = importlib.util.spec_from_file_location("scaling", SCRIPT)
assert SPEC is not None and SPEC.loader is not None
scaling = sys.modules["scaling"] = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(scaling)

TOY = scaling.Sizes(2, 64, 256, 2, 16, 1)


def test_a_planted_power_law_gives_its_exponent():
    assert scaling.slope([4, 8, 16], [3 * n**1.3 for n in (4, 8, 16)]) == pytest.approx(1.3)


def test_the_operations_are_those_that_torch_counts():
    model, windows, _ = scaling.made(TOY)
    ids = torch.stack(windows.rows)
    model.module.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        model.module.base_model(ids, use_cache=False)
    # the counter also counts the product that makes the angles of the rotary embedding
    assert counted.get_total_flops() == pytest.approx(TOY.sinks(), rel=1e-2)
    twice = replace(TOY, cells=2)
    assert twice.filters() - TOY.filters() == pytest.approx(TOY.layer_operations + TOY.unembedding)


def test_the_whole_script_at_toy_size(capsys, tmp_path):
    rows = scaling.main(["--quick", "--doublings", "1", "--rounds", "1", "--out", str(tmp_path)])
    assert [row["size"] for row in rows if row["what"] == "evaluate_all"] == list(vars(TOY))
    assert all(min(row["seconds"]) >= 0 for row in rows)
    assert (tmp_path / "bench_scaling.json").is_file()
    assert "arithmetic" in capsys.readouterr().out
