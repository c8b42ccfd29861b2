"""Running out of memory: each allocator's error, where it arises, what is tried instead, and one real one.

And what a measurement holds at most, beside a plain pass.
"""

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import tiny_models
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import spectral_sinks as ss
from spectral_sinks.measure import memory
from spectral_sinks.measure.nll import replay

IDS = tiny_models.ids(5, 66, seed=2)
EXIT, MLP = ss.Site("exit", 0), ss.Site("mlp", 2)
COLUMNS = ["nll", "kl", "top1_agreement", "removed_energy_share", "sink_mass_0", "sink_mass_1", "sink_mass_2"]


def caused() -> BaseException:
    error = ValueError("a layer failed")
    error.__cause__ = MemoryError()
    return error


ERRORS: list[Callable[[], BaseException]] = [
    lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
    MemoryError,
    caused,
    lambda: RuntimeError(
        "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried "
        "to allocate 274877906944 bytes. Error code 12 (Cannot allocate memory)"
    ),
    lambda: RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 4096 bytes."),
    lambda: RuntimeError("MPS backend out of memory (MPS allocated: 18.00 GB)"),
    lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    lambda: RuntimeError("std::bad_alloc"),
]


class Fault:
    """Memory for so many rows at one place of a pass."""

    def __init__(self, make: Callable[[], BaseException], limit: int) -> None:
        self.make, self.limit = make, limit
        self.tall: list[int] = []
        """Rows of each attempt that failed."""
        self.seen: list[int] = []

    def check(self, x: Tensor) -> Tensor:
        self.seen.append(len(x))
        if len(x) > self.limit:
            self.tall.append(len(x))
            raise self.make()
        return x


@pytest.fixture(scope="module", autouse=True)
def quick_collection() -> Iterator[None]:
    """Spare the collections after each failure all that is there before."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def model() -> ss.LanguageModel:
    return ss.load(tiny_models.plain())


@pytest.fixture
def windows(model: ss.LanguageModel) -> ss.Windows:
    return ss.Windows.of_ids(IDS, model)


@pytest.fixture
def fail(model: ss.LanguageModel, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Fault]]:
    with ExitStack() as stack:

        def at(place: str, make: Callable[[], BaseException], limit: int) -> Fault:
            fault = Fault(make, limit)
            if place == "inside":
                layer = model.module.get_submodule(model.layout.layers)[2].mlp

                def entered(_: Any, args: tuple[Tensor]) -> None:
                    fault.check(args[0])

                stack.callback(layer.register_forward_pre_hook(entered).remove)
            elif place == "readout":
                for name in ("score", "untouched"):
                    whole = getattr(replay, name)

                    def checked(m: Any, final: Tensor, *rest: Any, whole: Any = whole) -> Any:
                        return whole(m, fault.check(final), *rest)

                    monkeypatch.setattr(replay, name, checked)
            else:
                applied = replay.apply_and_measure

                def edited(edit: Any, x: Tensor, *rest: Any) -> Any:
                    return applied(edit, fault.check(x), *rest)

                monkeypatch.setattr(replay, "apply_and_measure", edited)
            return fault

        yield at


def cells() -> dict[str, dict[ss.Site, Any]]:
    spectrum = ss.read_spectrum(tiny_models.model(), bands=8)
    dark = ss.remove(spectrum.dark())
    return {
        **{f"exit {k}": {EXIT: ss.remove(spectrum.band(k))} for k in range(1, 5)},
        "swap": {EXIT: dark.filled(ss.Swap())},
        "mask": {MLP: dark.at(IDS > 40)},
        "ids": {MLP: dark.at([5, 9, 30, 31]), ss.Site("exit", 1): dark},
        "noise": {ss.Site("embedding"): dark.filled(ss.Noise())},
        "nothing": {},
    }


@pytest.fixture(scope="module")
def ample() -> dict[str, ss.Effect]:
    model = tiny_models.model()
    return ss.evaluate_all(model, ss.Windows.of_ids(IDS, model), cells())


def same(found: dict[str, ss.Effect], expected: dict[str, ss.Effect]) -> None:
    assert list(found) == list(expected)
    for name, effect in found.items():
        for column in COLUMNS:
            np.testing.assert_allclose(
                effect.table[column],
                expected[name].table[column],
                atol=1e-6,
                rtol=0,
                err_msg=f"{name} {column}",
            )


@pytest.mark.parametrize("make", ERRORS)
@pytest.mark.parametrize("place", ["inside", "readout"])
def test_each_error_halves(
    model: ss.LanguageModel,
    windows: ss.Windows,
    ample: dict[str, ss.Effect],
    fail: Callable[..., Fault],
    make: Callable[[], BaseException],
    place: str,
) -> None:
    fault = fail(place, make, 12)
    same(ss.evaluate_all(model, windows, cells()), ample)
    assert fault.tall and max(fault.seen[-3:]) <= 12


@pytest.mark.parametrize("limit", [1, 2, 5, 9])
@pytest.mark.parametrize("place", ["inside", "readout"])
def test_any_room_gives_the_same(
    model: ss.LanguageModel,
    windows: ss.Windows,
    ample: dict[str, ss.Effect],
    fail: Callable[..., Fault],
    place: str,
    limit: int,
) -> None:
    fault = fail(place, MemoryError, limit)
    done: list[int] = []
    same(ss.evaluate_all(model, windows, cells(), progress=done.append), ample)
    assert fault.tall and sum(done) == len(cells())


@pytest.mark.parametrize(
    ("limit", "failed"), [(24, [25]), (12, [25]), (5, [25, 10]), (3, [5]), (2, [5]), (1, [5, 2])]
)
def test_the_limit_found_is_kept(
    model: ss.LanguageModel, windows: ss.Windows, fail: Callable[..., Fault], limit: int, failed: list[int]
) -> None:
    """In later parts, later cells and later batches, nothing taller is tried again."""
    fault = fail("inside", MemoryError, limit)
    twice = ss.Windows.of_ids(torch.cat([IDS, IDS]), model)
    spectrum = ss.read_spectrum(model, bands=8)
    stack = {str(k): {EXIT: ss.remove(spectrum.band(k))} for k in range(1, 6)}
    ss.evaluate_all(model, twice, stack, batch_size=5)
    assert fault.tall == failed
    last = fault.seen[fault.seen.index(failed[-1]) + 1 :]
    assert max(last) <= limit


def test_an_edit_at_the_exit_may_fail_too(
    model: ss.LanguageModel, windows: ss.Windows, ample: dict[str, ss.Effect], monkeypatch: pytest.MonkeyPatch
) -> None:
    applied, calls = replay.apply_and_measure, list[int]()

    def once(*args: Any) -> Any:
        calls.append(1)
        if len(calls) in (2, 5, 9):
            raise MemoryError
        return applied(*args)

    monkeypatch.setattr(replay, "apply_and_measure", once)
    same(ss.evaluate_all(model, windows, cells()), ample)


def test_what_a_failed_attempt_removed_does_not_count(
    model: ss.LanguageModel, windows: ss.Windows, fail: Callable[..., Fault]
) -> None:
    """It got as far as the exit, twice in all, and to the MLP once: the mean is over the two sites."""
    stack = {str(k): {ss.Site("exit", 1): ss.rnd(32, 2, k), MLP: ss.rnd(32, 20, k)} for k in range(2)}
    expected = ss.evaluate_all(model, windows, stack)
    fault = fail("inside", MemoryError, 9)
    same(ss.evaluate_all(model, windows, stack), expected)
    assert fault.tall == [10]


@pytest.mark.parametrize("place", ["inside", "readout", "edit"])
def test_not_even_one_window(
    model: ss.LanguageModel, windows: ss.Windows, fail: Callable[..., Fault], place: str
) -> None:
    fault = fail(place, MemoryError, 0)
    with pytest.raises(ss.InputError, match="one window does not fit into the memory of cpu: give shorter"):
        ss.evaluate(model, windows, {MLP: ss.rnd(32, 4)})
    assert fault.tall[-1] == 1, "down to one row"
    with pytest.raises(ss.InputError, match="one window does not fit"):
        ss.evaluate(model, ss.Windows.of_ids(IDS[:1], model), {MLP: ss.rnd(32, 4)})


@pytest.mark.parametrize("rows", [2, 62])
def test_what_acts_on_whole_batches_asks_for_smaller_ones(
    model: ss.LanguageModel,
    windows: ss.Windows,
    fail: Callable[..., Fault],
    monkeypatch: pytest.MonkeyPatch,
    rows: int,
) -> None:
    """Where the batch has failed, and not where it is merely larger than a pass is planned."""
    monkeypatch.setattr(memory, "TOKENS", {"cpu": rows * IDS.shape[1]})
    swap = {MLP: ss.rnd(32, 4).filled(ss.Swap())}
    custom = {MLP: lambda x: x.roll(1, 0)}
    expected = ss.evaluate(model, windows, custom, batch_size=3)
    fail("readout", MemoryError, 3)
    same({"": ss.evaluate(model, windows, custom, batch_size=3)}, {"": expected})
    with pytest.raises(
        ss.InputError,
        match=r"'custom' at mlp 2 acts on whole batches, and a batch of 5 .* a smaller batch_size",
    ):
        ss.evaluate(model, windows, custom, batch_size=5)
    for batch_size in (3, 5):  # a swap pairs all five windows, whatever the batch
        with pytest.raises(
            ss.InputError,
            match=r"'Rnd 4 \(seed 0\)' at mlp 2 acts on whole batches, and a batch of 5 .* shorter windows",
        ):
            ss.evaluate(model, windows, swap, batch_size=batch_size)
    ss.evaluate(model, windows, {EXIT: ss.rnd(32, 4).filled(ss.Swap())}, batch_size=5)  # swaps beforehand


@pytest.mark.parametrize(
    "error",
    [ValueError("no"), RuntimeError("shape '[5]' is invalid"), ss.InputError("x"), KeyError("memory")],
)
@pytest.mark.parametrize("place", ["inside", "readout", "edit"])
def test_other_errors_come_through_unchanged(
    model: ss.LanguageModel, windows: ss.Windows, fail: Callable[..., Fault], place: str, error: Exception
) -> None:
    fault = fail(place, lambda: error, 4)
    with pytest.raises(type(error)) as caught:
        ss.evaluate(model, windows, {MLP: ss.rnd(32, 4)})
    assert caught.value is error and len(fault.tall) == 1, "and nothing is tried again"
    fault.limit = 99
    ss.evaluate(model, windows, {MLP: ss.rnd(32, 4)})


def test_what_is_an_allocators_error() -> None:
    assert all(memory.out_of_memory(make()) for make in ERRORS)
    for other in (
        ValueError("out of memory"),
        RuntimeError("no memory format"),
        OSError(12, "x"),
        KeyError(),
    ):
        assert not memory.out_of_memory(other)


def test_rows_are_planned_from_what_is_free(model: ss.LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free", lambda device: 10**12)
    assert memory.Memory(model, 64).rows == memory.TOKENS["cpu"] // 64
    assert memory.Memory(model, 8192).rows == 1
    each = memory.row_bytes(model, 64)
    monkeypatch.setattr(memory, "free", lambda device: int(7.5 * each / memory.SHARE))
    assert memory.Memory(model, 64).rows == 7
    monkeypatch.setattr(memory, "free", lambda device: 0)
    assert memory.Memory(model, 64).rows == 1
    fast = ss.load(tiny_models.build(attention="sdpa"))
    assert memory.row_bytes(model, 128) > memory.row_bytes(fast, 128) > 64 * 4 * model.d


REAL = """
import json, resource, sys
import torch
from support import tiny_models
import spectral_sinks as ss
from spectral_sinks.measure.memory import Memory
from spectral_sinks.measure.nll.replay import Batch

model = ss.load(tiny_models.build(intermediate_size=16384, num_hidden_layers=2))
ids = tiny_models.ids(12, 128)
windows = ss.Windows.of_ids(ids, model)
sites = [ss.Site("embedding"), ss.Site("mlp", 1), ss.Site("exit", 0), ss.Site("exit", 1)]
cells = [{site: ss.rnd(32, 8, seed)} for seed, site in enumerate(sites)]

def measure(rows):
    memory = Memory(model, 128)
    memory.rows = rows
    batch = Batch(model, windows, range(12), ids, [0, 1], memory)
    found = batch.measure(cells)
    return memory.rows, [found.nll.tolist(), found.kl.tolist(), found.sink_mass.tolist()]

_, expected = measure(1)
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 120 * 2**20,) * 2)
rows, found = measure(24)
print(json.dumps([rows, found, expected]))
"""


def test_a_real_shortage() -> None:
    """Some rows of a layer 16 384 wide in 120 MiB: 8 MiB an activation and window."""
    tests = Path(tiny_models.__file__).parents[1]
    straight = {"MALLOC_MMAP_THRESHOLD_": str(2**20), "OMP_NUM_THREADS": "1"}  # what is freed is given back
    ran = subprocess.run(
        [sys.executable, "-c", REAL],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (tests, tests.parent))), **straight},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    rows, found, expected = json.loads(ran.stdout)
    assert 1 <= rows < 12, "twelve windows at once did not fit"
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


TOKENS, WIDTH, LAYERS = 384, 512, 32
SITES = [ss.Site("embedding"), *(ss.Site("exit", layer) for layer in range(LAYERS))]
STREAM = LAYERS * TOKENS * WIDTH * 4
"""Bytes of the residuals at all exits."""


def taken(run: Callable[[], object], folder: Path) -> int:
    """Return the most bytes that tensors made by `run` took at once, by PyTorch's record of allocations.

    It is the same each time: what the process holds besides, and what its allocator keeps, do not count.
    """
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    trace = folder / "trace.json"
    record.export_chrome_trace(str(trace))
    events = [
        event["args"] for event in json.loads(trace.read_text())["traceEvents"] if event["name"] == "[memory]"
    ]
    before = events[0]["Total Allocated"] - events[0]["Bytes"]
    return max(event["Total Allocated"] for event in events) - before


def test_no_measurement_holds_the_residuals_of_all_layers(tmp_path: Path) -> None:
    """They are reduced where they arise, and what is kept of them does not keep them in memory."""
    sizes: dict[str, Any] = {
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "max_position_embeddings": TOKENS,
    }
    narrow: dict[str, Any] = {"num_key_value_heads": 1, "intermediate_size": 32, "vocab_size": 2 * WIDTH}
    model = ss.load(tiny_models.build(attention="sdpa", **sizes, **narrow))
    ids = tiny_models.ids(1, TOKENS)
    windows = ss.Windows.of_ids(ids, model)
    spectrum = ss.read_spectrum(model, bands=2, use_cache=False)
    short = ss.Windows.of_ids(ids[:, :8], model)
    ss.find_sinks(model, short, spectrum, length=8, draws=2)  # what the first call loads is not of the pass
    ss.energy(model, short, spectrum)

    def plain() -> None:
        with torch.no_grad():
            model.module.model(ids, use_cache=False)

    found = {
        "find_sinks": taken(
            lambda: ss.find_sinks(model, windows, spectrum, length=TOKENS, draws=2), tmp_path
        ),
        "energy": taken(lambda: ss.energy(model, windows, spectrum), tmp_path),
    }
    most = taken(plain, tmp_path) + STREAM / 2
    assert max(found.values()) < most, f"{found} of {most:.0f}"
    held = taken(lambda: ss.trace(model, ids, {}, SITES, readout=lambda final, read, weights: None), tmp_path)
    assert held > STREAM, "residuals that are held would show"
