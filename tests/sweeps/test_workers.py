"""Units of work in other processes: the same rows, shared weights, and workers that die."""

import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import (
    BrokenExecutor,
    CancelledError,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
)
from functools import partial
from pathlib import Path
from typing import Any

import cloudpickle
import psutil
import pytest
import torch
from support import small_sweeps, tiny_models

import spectral_sinks as ss
from spectral_sinks.sweeps import definition, run, workers

EXIT = ss.Site("exit", 1)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> ss.sweeps.Done:
    return ss.sweep(small_sweeps.sweep(), tmp_path_factory.mktemp("whole") / "out")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pools whose processes start at once."""
    context = small_sweeps.fast()
    monkeypatch.setattr(torch.multiprocessing, "get_context", lambda _: context)
    return context


def free(out: Path, made: ss.Sweep) -> None:
    """Check that nobody has a claim."""
    store = ss.sweeps.Store(out)
    for unit in made.units:
        with store.claim(unit.name) as mine:
            assert mine


def test_a_pool_of_spawned_processes(whole: ss.sweeps.Done, out: Path) -> None:
    """Bit for bit what this process computes."""
    done = ss.sweep(small_sweeps.sweep(), out, workers=1)
    assert done.report.computed == 36 * 5
    assert done.store.rows().equals(whole.store.rows())
    assert done.table.equals(whole.table)


def test_weights_are_shared(quick: Any) -> None:
    """What this process writes into a weight is seen by both workers: there is one copy of it."""
    made = ss.Sweep.of(ss.load(tiny_models.build()), small_sweeps.windows(), small_sweeps.scaled(2))
    with workers.pool(made, 2) as executor:
        seen = set[int]()
        for value in (7.0, -3.0):
            made.model.unembedding_weight.data[3, 5] = value
            found = [executor.submit(small_sweeps.peek, made.key).result() for _ in range(4)]
            assert all(look[:3] == (True, value, "cpu") for look in found)
            seen |= {pid for *_, pid in found}
    assert os.getpid() not in seen


def test_devices_are_dealt_in_turn(quick: Any) -> None:
    """No GPU was at hand: "meta" stands for the second device."""
    made = small_sweeps.sweep(small_sweeps.scaled(2))
    where: dict[int, str] = {}
    with workers.pool(made, 2, ["cpu", "meta"]) as executor:
        while len(where) < 2:
            for look in [executor.submit(small_sweeps.peek, made.key) for _ in range(4)]:
                *_, device, pid = look.result()
                assert where.setdefault(pid, device) == device
    assert sorted(where.values()) == ["cpu", "meta"]
    assert made.model.device.type == "cpu"


def test_a_sweep_on_faked_devices(whole: ss.sweeps.Done, quick: Any, out: Path) -> None:
    """No GPU was at hand: two numbers of the CPU stand for two of them."""
    done = ss.sweep(small_sweeps.sweep(), out, workers=2, devices=["cpu:0", "cpu:1"])
    assert done.store.rows().equals(whole.store.rows())


def test_threads_are_shared_out() -> None:
    threads = torch.get_num_threads()
    turns = multiprocessing.get_context("spawn").SimpleQueue()
    turns.put(None)
    try:
        workers._adopt("key", small_sweeps.sweep(small_sweeps.scaled(1)), turns, 3)
        assert torch.get_num_threads() == 3 and set(workers._SWEEPS) >= {"key"}
    finally:
        torch.set_num_threads(threads)
        workers._SWEEPS.clear()
        turns.close()


def test_a_killed_worker_costs_its_unfinished_units(quick: Any, out: Path) -> None:
    made = small_sweeps.sweep(small_sweeps.scaled(30, 0.02))
    pools: list[ProcessPoolExecutor] = []

    def make() -> Executor:
        pools.append(workers.pool(made, 2))
        return pools[-1]

    def kill() -> None:
        while not list(out.glob("parts/*.parquet")):
            time.sleep(0.01)
        os.kill(next(iter(pools[0]._processes)), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(definition, "CELLS_PER_UNIT", 1)
        done = run.run(made, ss.sweeps.Store(out), make, workers.Adopted(made.key), in_flight=4)
    killer.join()
    assert len(pools) == 2, "made again once"
    assert done.report.computed == 30 * 5 == len(done.store.rows())
    assert len(list(out.glob("parts/*.parquet"))) == 30 * 2, "nothing is computed twice"
    alone = ss.sweep(small_sweeps.sweep(small_sweeps.scaled(30)), out.parent / "alone")
    small_sweeps.rows_agree(done.store.rows(), alone.store.rows())


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_with_the_process_that_made_them(signum: signal.Signals, out: Path) -> None:
    middle = small_sweeps.fast().Process(target=small_sweeps.run_with_workers, args=(out,))
    middle.start()
    assert middle.pid is not None
    while not list(out.glob("parts/*.parquet")):
        assert middle.is_alive()
        time.sleep(0.05)
    made = psutil.Process(middle.pid).children(recursive=True)
    assert len(made) >= 2
    os.kill(middle.pid, signum)
    middle.join()
    _, left = psutil.wait_procs(made, timeout=600)
    for process in left:
        process.kill()
    assert not left


class Broken(Executor):
    """Breaks after some units, in one of the two ways there are, as a pool does whose worker was killed."""

    def __init__(self, good: int, at_submit: bool = False, error: type[Exception] = BrokenExecutor) -> None:
        self.good, self.at_submit, self.error = good, at_submit, error

    def submit(self, fn: Callable[..., Any], /, *args: Any, **_: Any) -> Future[Any]:
        self.good -= 1
        if self.good >= 0:
            return workers.Serial().submit(fn, *args)
        if self.at_submit:
            raise self.error("a worker died")
        future: Future[Any] = Future()
        future.set_exception(self.error("a worker died"))
        return future


@pytest.mark.parametrize("at_submit", [False, True])
def test_workers_that_always_die(whole: ss.sweeps.Done, out: Path, at_submit: bool) -> None:
    made: list[Broken] = []

    def make(good: int) -> Executor:
        made.append(Broken(good, at_submit))
        return made[-1]

    what = small_sweeps.sweep()
    with pytest.raises(ss.InputError, match="died 4 times in a row without finishing anything") as refused:
        run.run(what, ss.sweeps.Store(out), partial(make, 0))
    assert "fewer workers or a smaller batch_size" in str(refused.value) and len(made) == 4
    free(out, what)
    done = run.run(what, ss.sweeps.Store(out), partial(make, 1))
    assert len(made) == 4 + len(what.units), "one unit each: that is progress"
    assert done.store.rows().equals(whole.store.rows())


@pytest.mark.parametrize(
    ("at_submit", "error"), [(False, BrokenExecutor), (True, BrokenExecutor), (False, CancelledError)]
)
def test_an_executor_that_breaks(
    whole: ss.sweeps.Done, out: Path, at_submit: bool, error: type[Exception]
) -> None:
    """One that was given cannot be made again: the sweep says so, and goes on with another."""
    what = small_sweeps.sweep()
    with pytest.raises(ss.InputError, match=r"the executor broke .* start another") as kept:
        ss.sweep(what, out, executor=Broken(3, at_submit, error), in_flight=1)
    assert "died" in str(kept.value)
    assert len(ss.sweeps.Store(out).finished()) == sum(map(what.size, what.units[:3]))
    free(out, what)
    done = ss.sweep(what, out, executor=workers.Serial())
    assert done.report.found == sum(map(what.size, what.units[:3]))
    assert done.store.rows().equals(whole.store.rows())


def test_threads(whole: ss.sweeps.Done, out: Path) -> None:
    with ThreadPoolExecutor(3) as executor:
        done = ss.sweep(small_sweeps.sweep(), out, executor=executor)
    assert done.store.rows().equals(whole.store.rows())


def test_a_pool_of_ones_own(whole: ss.sweeps.Done, out: Path) -> None:
    """The sweep is sent with each unit and unpacked once; functions without a module are sent too."""
    with ProcessPoolExecutor(1, small_sweeps.fast()) as executor:
        done = ss.sweep(small_sweeps.sweep(), out, executor=executor)
        assert done.store.rows().equals(whole.store.rows())

        def half(x: torch.Tensor) -> torch.Tensor:
            return x / 2

        half.address = "scaled by 0.5"  # pyright: ignore[reportFunctionMemberAccess]
        found = ss.sweep(small_sweeps.sweep({"half": {EXIT: half}}), out, executor=executor)
        fixed = ss.sweep(small_sweeps.sweep({"half": {EXIT: small_sweeps.Fixed(0.5)}}), out.parent / "fixed")
        assert found.table.equals(fixed.table)
        for edits in ({EXIT: half}, {EXIT: ss.rnd(32, 2).filled(half)}):  # pyright: ignore
            with pytest.raises(ss.InputError, match="'half' cannot be sent to worker processes"):
                ss.sweep(small_sweeps.sweep({"half": edits}), out, workers=1)


def test_a_function_that_raises(quick: Any, out: Path) -> None:
    """Its own error arrives from wherever it ran, and what was claimed is free."""
    cells = {**small_sweeps.scaled(2, layer=0), "bad": {ss.Site("mlp", 2): small_sweeps.Failing(9)}}
    what = small_sweeps.sweep(cells)
    message = r"failed at \(\d, 66, 32\)"
    for options in ({}, {"executor": ThreadPoolExecutor(1)}, {"workers": 1}):
        with pytest.raises(ValueError, match=message):
            ss.sweep(what, out, **options)
        free(out, what)
    done = ss.sweep(small_sweeps.sweep(small_sweeps.scaled(2, layer=0)), out)
    assert done.report.found > 0, "what was finished before is there"


class File:
    """A source whose file may be another by now."""

    key = "file"

    def __init__(self, *made: ss.Sweep) -> None:
        self.made = list(made)

    def prepare(self) -> ss.Sweep:
        return self.made.pop(0)


def test_a_worker_sees_that_its_sweep_is_another() -> None:
    """A long-lived worker made its sweep from files that changed: its rows would be of other cells."""
    old, new = (small_sweeps.sweep(small_sweeps.scaled(n)) for n in (1, 2))
    workers._SWEEPS["file"] = old
    assert len(workers.work(File(new), new.units[0])[0]) == 2 * 2
    assert workers._SWEEPS["file"] is new
    other = ss.Sweep.of(
        tiny_models.model("qwen2"), small_sweeps.windows(), small_sweeps.scaled(2), batch_size=3
    )
    smaller = ss.Sweep.of(
        tiny_models.model(),
        ss.Windows.of_ids(tiny_models.ids(2, 66), tiny_models.model()),
        small_sweeps.scaled(1),
    )
    for made in (other, smaller, old):
        workers._SWEEPS.clear()
        with pytest.raises(ss.InputError, match="other weights, other texts or another version"):
            workers.work(File(made), new.units[-1])


def test_the_same_cells_on_another_model_object_run_there() -> None:
    """A model may have moved to another device: its address is the same, its sweep is not."""
    one = small_sweeps.sweep(small_sweeps.scaled(2))
    two = ss.Sweep.of(
        ss.load(tiny_models.build()), small_sweeps.windows(), small_sweeps.scaled(2), batch_size=3
    )
    assert one.key == two.key
    for made in (one, two):
        workers.work(workers.Held(made), made.units[0])
        assert [*workers._SWEEPS.values()] == [made]


def test_a_sweep_travels(whole: ss.sweeps.Done) -> None:
    for dumps in (pickle.dumps, cloudpickle.dumps):
        found = pickle.loads(dumps(whole.sweep))
        assert "addresses" in vars(found), "weights are not hashed again"
        assert (found.addresses, found.key, found.units) == (
            whole.sweep.addresses,
            whole.sweep.key,
            whole.sweep.units,
        )
    held = workers.Held(whole.sweep)
    sent = pickle.loads(pickle.dumps(held))
    assert sent.key == held.key and sent.prepare().key == whole.sweep.key
    with pytest.raises(RuntimeError, match="started without its sweep"):
        workers.Adopted("key").prepare()


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_a_model_travels(family: str) -> None:
    model = tiny_models.model(family)
    found = pickle.loads(pickle.dumps(model))
    assert torch.equal(
        tiny_models.logits(found, tiny_models.ids(), {}), tiny_models.logits(model, tiny_models.ids(), {})
    )
    assert found.fingerprint == model.fingerprint and found.tied == model.tied
    assert found.reads_attention and not found.module.training
    assert found.config.to_dict() == model.config.to_dict()
    assert (found.name, found.layout) == (model.name, model.layout)
    assert found.tokenizer("w7 w8")["input_ids"] == [0, 7, 8]
    assert not [name for name, tensor in found.module.state_dict().items() if tensor.is_meta]


def test_a_model_travels_with_its_attention_and_dtype() -> None:
    module = tiny_models.build(attention="sdpa").bfloat16()
    module.set_attn_implementation("sdpa_opening")
    found = pickle.loads(pickle.dumps(ss.load(module)))
    assert found.config._attn_implementation == "sdpa_opening" and found.dtype == torch.bfloat16
    assert found.tokenizer is None


def test_a_model_on_several_devices_stays() -> None:
    """No GPU was at hand: the map of accelerate is faked."""
    module = tiny_models.build()
    module.hf_device_map = {"model.layers.0": 0, "model.layers.1": 1}
    with pytest.raises(ss.InputError, match="spread over several devices by its device_map"):
        pickle.dumps(ss.load(module))
    module.hf_device_map = {"": "cpu"}
    pickle.dumps(ss.load(module))
