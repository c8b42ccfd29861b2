"""The comparison with other means: two sides in this process, and a driver with planted answers."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

import spectral_sinks as ss

FOLDER = Path(__file__).parents[2] / "experiments" / "bench" / "peers"


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


side, compare = script("side"), script("compare")

FAKE = """
import json, sys
from pathlib import Path
out = Path(sys.argv[2])
def answer(name, content):
    (out / "part").write_text(json.dumps(content))
    (out / "part").rename(out / name)
answer("ready.json", {{"versions": {{"torch": "1"}}}})
for line in sys.stdin:
    turn, *exits = map(int, line.split())
    nll = [[1.0, 2.0 + {off}]] * (1 + len(exits))
    answer(f"turn{{turn}}.json", {{"nll": nll, "seconds": {seconds} * turn, "peak": 9.0, "loaded": 8.0}})
"""


@pytest.fixture
def planted(monkeypatch, tmp_path):
    """Let the driver run planted scripts by this Python, on a job that holds nothing."""
    monkeypatch.setattr(compare, "HERE", tmp_path)
    monkeypatch.setattr(compare, "write_job", lambda case, job: [0, 3])

    def plant(name: str, text: str) -> None:
        (tmp_path / f"{name}.py").write_text(text)
        (tmp_path / name / "bin").mkdir(parents=True, exist_ok=True)
        python = tmp_path / name / "bin" / "python"
        python.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
        python.chmod(0o755)

    plant("ours", FAKE.format(off=0, seconds=2))
    return plant


def test_hooks_by_hand_give_the_same_numbers_on_another_copy_of_the_model(tmp_path):
    case = compare.Case("sinklet", 2, 16, 2)
    assert compare.write_job(case, tmp_path) == [0, 5]
    with compare.np.load(tmp_path / "inputs.npz") as held:
        ids, basis = torch.from_numpy(held["ids"]), torch.from_numpy(held["basis"])
    assert ids.shape == (2, 16) and basis.shape[0] == ss.load().d
    inputs = side.Inputs(tmp_path / "model", ids, basis)
    with torch.no_grad():
        ours, hooks = (script(name).load(inputs)([0, 5]) for name in ("ours", "hooks"))
    assert ours.shape == (3, 2)
    assert (ours[1:] - ours[0]).abs().min() > 0.01
    assert (hooks - ours).abs().max() < 1e-5


def test_rows_have_ratios_and_a_warm_up_does_not_count(planted, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    planted("hooks", FAKE.format(off=5e-5, seconds=3))
    ours, hooks = compare.compare("sinklet", compare.CASES["sinklet"], tmp_path, 3, ("hooks",))
    assert ours["side"] == "ours" and ours["ratio"] == 1 and ours["difference"] == 0
    assert hooks["seconds"] == [3, 6, 9] and hooks["median"] == 6
    assert hooks["ratio"] == hooks["lowest"] == hooks["highest"] == 1.5
    assert hooks["difference"] == pytest.approx(5e-5)
    assert (hooks["peak_mib"], hooks["loaded_mib"], hooks["exits"]) == (9, 8, [0, 3])
    compare.show([ours, hooks])
    assert "1.50 [1.50, 1.50]" in capsys.readouterr().out


def test_another_number_stops_the_run(planted, tmp_path):
    planted("hooks", FAKE.format(off=2e-4, seconds=1))
    with pytest.raises(ss.InputError, match=r"the side hooks lies 0\.0002 nats from that of this package"):
        compare.compare("sinklet", compare.CASES["sinklet"], tmp_path, 1, ("hooks",))
    with pytest.raises(ss.InputError, match="nan nats"):
        compare.check("hooks", [[float("nan")]], [[1.0]])


def test_a_side_that_ends_says_why(planted, tmp_path):
    planted("hooks", "raise SystemExit('no such package')")
    with pytest.raises(ss.InputError, match="the side hooks ended without an answer:\nno such package"):
        compare.compare("sinklet", compare.CASES["sinklet"], tmp_path, 1, ("hooks",))
    with pytest.raises(ss.InputError, match="run make bench-peers, which makes the environments"):
        compare.compare("sinklet", compare.CASES["sinklet"], tmp_path / "absent", 1, ("hooks",))


def test_models_that_are_not_run_keep_their_rows(tmp_path):
    path = tmp_path / "bench_peers.json"
    assert compare.merged(path, [{"model": "gemma3"}]) == [{"model": "gemma3"}]
    path.write_text(json.dumps([{"model": "sinklet", "median": 1}, {"model": "gemma3", "median": 1}]))
    found = compare.merged(path, [{"model": "sinklet", "median": 2}])
    assert found == [{"model": "sinklet", "median": 2}, {"model": "gemma3", "median": 1}]


def test_every_peer_has_its_requirements():
    for name in compare.PEERS:
        lines = (FOLDER / f"{name}.txt").read_text().split()
        assert all("==" in line for line in lines) and (FOLDER / f"{name}.py").is_file()
