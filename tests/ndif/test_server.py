"""The actual NDIF server, on the CPU of this machine, against this process: `make test-ndif`."""

import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import pytest
import torch
from ndif_server import Ndif
from nnsight.schema.config import CONFIG

import spectral_sinks as ss

FILE = """
batch_size = 4
[texts]
documents = 8
length = 65
[[grid]]
layer = [0, 1, 2]
remove = ["dark", "1", "1-10"]
fill = ["zero", "swap"]
tokens = ["all", "all-but-first"]
controls = 2
"""
TOLERANCE = 1e-6
"""Of numbers up to 1; of larger ones, relative."""


@pytest.fixture(scope="module", params=["Trusting", "Careful"])
def server(request: pytest.FixtureRequest) -> Iterator[Ndif]:
    """One that runs what it is sent beside the weights, and one that keeps them apart, as NDIF does."""
    folder = Path(tempfile.mkdtemp(prefix="ndif"))  # short: Ray's sockets lie in it
    made = Ndif(folder, request.param)
    before = CONFIG.API.HOST, CONFIG.API.APIKEY
    try:
        made.start()
        CONFIG.API.HOST, CONFIG.API.APIKEY = made.host, None
        yield made
    finally:
        CONFIG.API.HOST, CONFIG.API.APIKEY = before
        made.kill()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def here() -> ss.LanguageModel:
    return ss.load(attention="eager")


def difference(one: pd.DataFrame, other: pd.DataFrame) -> float:
    numbers = one.select_dtypes("number").columns
    assert list(one.columns) == list(other.columns) and len(one) == len(other)
    return float((one[numbers] - other[numbers]).abs().max().max())


def test_preflight(server: Ndif) -> None:
    steps = list(ss.remote.preflight())
    assert len(steps) == 6 and all(step.ok for step in steps), steps


def test_nll_and_sink(server: Ndif, here: ss.LanguageModel) -> None:
    there = ss.load(remote=True)
    u = ss.read_spectrum(there)
    windows = ss.cut(ss.documents(limit=4), here, length=128)
    cells = {
        "dark": {ss.Site("exit", 0): ss.remove(u.dark())},
        "random": {ss.Site("exit", 0): ss.rnd(u.d, 6)},
        "head": {ss.Site("head", 2, 1): ss.phi(u, 1, 9)},
        "read": {ss.Site("queries", 1): ss.phi(u, 1, 9)},
        "own": {ss.Site("mlp", 1): lambda x: 0.5 * x},
    }
    for name, effect in ss.evaluate_all(here, windows, cells).items():
        found = ss.evaluate_all(there, windows, {name: cells[name]})[name]
        assert difference(effect.table, found.table) < TOLERANCE
    assert found.sink_mass is not None
    verdicts = [ss.sink_verdict(m, windows, u, draws=3).summary() for m in (here, there)]
    assert difference(*verdicts) < TOLERANCE and verdicts[0].verdict.equals(verdicts[1].verdict)
    assert difference(ss.energy(here, windows, u), ss.energy(there, windows, u)) < TOLERANCE
    assert there.remote is not None and there.remote.record()["server"]["attention"] == "eager"


@ss.remotely
def entropy(model: ss.LanguageModel, ids: torch.Tensor) -> torch.Tensor:
    """A measurement of a user's own that collects."""
    found: list[torch.Tensor] = []

    def look(call: ss.attention.AttentionCall) -> None:
        weights = call.weights()
        found.append(-torch.xlogy(weights, weights).sum(-1).mean().cpu())

    with ss.attending(model, look):
        ss.trace(model, ids, {}, readout=lambda *_: None)
    return torch.stack(found)


def test_sinks_circuits_and_moves(server: Ndif, here: ss.LanguageModel) -> None:
    there = ss.load(remote=True)
    u, w = ss.read_spectrum(there), ss.cut(ss.documents(limit=4), here, length=128)
    one, other = (ss.find_sinks(model, w, u, draws=3) for model in (here, there))
    assert difference(one.by_head(), other.by_head()) < TOLERANCE and one.sinks
    pairs = zip(one.sinks, other.sinks, strict=True)
    assert all(abs(a.dark_share.value - b.dark_share.value) < TOLERANCE for a, b in pairs)
    moves = {"masked": ss.attention.MaskKey(0), "dark": {ss.Site("exit", 0): ss.remove(u.dark())}}

    def moved(model: ss.LanguageModel) -> pd.DataFrame:
        with ss.attending(model, ss.attention.MaskKey(0)):
            return ss.evaluate(model, w, {ss.Site("exit", 0): ss.remove(u.dark())}).table

    measures: dict[str, Callable[[ss.LanguageModel], pd.DataFrame]] = {
        "attending": moved,
        "compare": lambda model: ss.compare(model, w, moves, controls=1, spectrum=u).table,
        "designate": lambda model: ss.designate(model, w, 5, controls=1, draws=2, spectrum=u).tried,
        "circuits": lambda model: ss.no_op_circuits(model, w, u).heads.drop(columns="reading_dark"),
        "own": lambda model: pd.DataFrame({"entropy": entropy(model, w.rows[0][None])}),
    }
    for name, measure in measures.items():
        if server.actor == "Careful":
            with pytest.raises(ss.InputError, match="use a server that trusts you"):
                measure(there)
        else:
            assert difference(measure(here), measure(there)) < TOLERANCE, name


def test_a_sweep_survives_the_death_of_the_server(server: Ndif, tmp_path: Path) -> None:
    file = tmp_path / "sweep.toml"
    file.write_text(FILE)
    prepared = ss.sweeps.SweepFile.read(file).prepare()
    prepared.model.module.set_attn_implementation("eager")  # as at the server: kernels round differently
    local = ss.sweep(prepared, tmp_path / "local")
    from spectral_sinks.measure.nll import remote_batch as distant
    from spectral_sinks.sweeps import remote_jobs as jobs

    distant.CELLS_PER_JOB = 8
    jobs.FORGOTTEN = 5.0
    out = tmp_path / "afar"
    sweep = ss.sweeps.SweepFile.read(file).at("ndif")
    failed: list[BaseException] = []

    def run() -> None:
        try:
            ss.sweep(sweep, out, in_flight=2)
        except ss.RemoteError as error:
            failed.append(error)

    running = threading.Thread(target=run)
    running.start()
    deadline = time.monotonic() + 120
    while len(list(out.glob("parts/*.parquet"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    server.kill()
    running.join(timeout=300)
    assert failed and "cannot be reached" in str(failed[0]), failed
    done = {path.name: path.read_bytes() for path in out.glob("parts/*.parquet")}
    assert 2 <= len(done) < len(local.sweep.units) * 3
    server.start()
    time.sleep(6)  # what the dead server had in hand counts as lost by now
    found = ss.sweep(sweep, out)
    assert done.items() <= {path.name: path.read_bytes() for path in out.glob("parts/*.parquet")}.items()
    by = ["name", "document"]
    one, other = (each.table.drop(columns="cell").sort_values(by) for each in (local, found))
    assert not other.duplicated(by).any() and len(one) == len(other)
    one, other = one.reset_index(drop=True), other.reset_index(drop=True)
    assert (one[by] == other[by]).all().all()
    numbers = ["nll", "baseline_nll", "delta_nll", "kl", "removed_energy_share"]
    size = one[numbers].abs().clip(lower=1)
    assert ((one[numbers] - other[numbers]).abs() / size).max().max() < TOLERANCE
    assert (
        one["sink_mass"].map(list).map(max) - other["sink_mass"].map(list).map(max)
    ).abs().max() < TOLERANCE
    assert ss.sweeps.collect(out) and {note.state for note in ss.sweeps.jobs(out)} <= {"done", "lost"}
