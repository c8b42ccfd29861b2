"""A sweep in a folder: the numbers of `evaluate_all`, and every cell once whatever happens on the way."""

import io
import json
import pickle
import random
import signal
import threading
import time
import warnings
from dataclasses import asdict
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from support import small_sweeps, tiny_models

import spectral_sinks as ss
from spectral_sinks.sweeps import cost, definition, run

EXIT = ss.Site("exit", 1)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> ss.sweeps.Done:
    """The sweep in one go."""
    return ss.sweep(small_sweeps.sweep(), tmp_path_factory.mktemp("whole") / "out")


@pytest.fixture(scope="module")
def processes() -> BaseContext:
    return small_sweeps.fast()


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Cell and batch of all that is measured, in order."""
    found: list[tuple[str, int]] = []
    measure = definition.Sweep.measure

    def noted(self: ss.Sweep, unit: definition.Unit) -> pd.DataFrame:
        found.extend((self.addresses[cell], unit.batch) for cell in unit.cells)
        return measure(self, unit)

    monkeypatch.setattr(definition.Sweep, "measure", noted)
    return found


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Files of a folder with their times and contents."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_it_is_evaluate_all(whole: ss.sweeps.Done) -> None:
    cells = {cell.name: cell.edits for cell in whole.sweep.cells}
    effects = ss.evaluate_all(tiny_models.model(), small_sweeps.windows(), cells, batch_size=3)
    table, summary = whole.table, whole.summary().set_index("name")
    assert list(table["name"]) == [name for name in cells for _ in range(4)]
    for name, effect in effects.items():
        found = table[table["name"] == name]
        assert list(found["document"]) == [0, 1, 2, 3] and list(found["windows"]) == [2, 1, 1, 1]
        assert list(found["tokens"]) == list(effect.table["tokens"])
        for number in small_sweeps.NUMBERS:
            assert np.abs(found[number].to_numpy() - effect.table[number].to_numpy()).max() < 1e-6
        for prefix in ("sink_mass", "baseline_sink_mass"):
            mass = effect.table[[f"{prefix}_{layer}" for layer in range(3)]].to_numpy()
            assert np.abs(np.stack(list(found[prefix])) - mass).max() < 1e-6
        row = summary.loc[name]
        assert row["delta_nll"] == pytest.approx(effect.delta_nll, abs=1e-6)
        interval = row["delta_nll_low"], row["delta_nll_high"]
        assert interval == pytest.approx(effect.delta_nll_interval, abs=1e-6)
        assert (row["rank"], row["documents"]) == (effect.rank, 4)


def test_what_a_row_says_of_its_cell() -> None:
    s = small_sweeps.spectrum()
    described = {
        name: definition.describe_cell(ss.sweeps.Cell(name, edits, draw))
        for name, draw, edits in (
            ("none", None, {}),
            ("head", 3, {ss.Site("head", 2, 1): ss.remove(s.band(4)).at("first")}),
            (
                "two",
                None,
                {
                    ss.Site("mlp", 2): ss.rnd(32, 3).filled(ss.Noise()).at([5]),
                    ss.Site("exit", 0): ss.remove(s.dark()),
                },
            ),
            ("custom", None, {EXIT: small_sweeps.Fixed(0.5)}),
        )
    }
    keys = ("site", "layer", "head", "filter", "rank", "fill", "at", "draw")
    assert {name: tuple(row[key] for key in keys) for name, row in described.items()} == {
        "none": ("", None, None, "", 0, "", "", None),
        "head": ("head", 2, 1, "remove band 4", 8, "zero", "first", 3),
        "two": (
            "exit + mlp",
            0,
            None,
            "remove dark + Rnd 3 (seed 0)",
            11,
            "zero + noise",
            "all + some",
            None,
        ),
        "custom": ("exit", 1, None, "custom", None, "", "", None),
    }


def test_a_second_run_finds_all(whole: ss.sweeps.Done, measured: list[Any]) -> None:
    before = snapshot(whole.store.folder)
    done = ss.sweep(small_sweeps.sweep(), whole.store.folder)
    assert measured == [] and (done.report.computed, done.report.found) == (0, 36 * 5)
    assert done.table.equals(whole.table) and done.report.of_floor is None
    after = snapshot(whole.store.folder)
    assert {name: data for name, (_, data) in after.items()} == {n: data for n, (_, data) in before.items()}


class Stop:
    """What raises after some units."""

    def __init__(self, patch: pytest.MonkeyPatch, after: int, error: BaseException) -> None:
        measure, self.left = definition.Sweep.measure, after

        def stopping(this: ss.Sweep, unit: definition.Unit) -> pd.DataFrame:
            self.left -= 1
            if self.left < 0:
                raise error
            return measure(this, unit)

        patch.setattr(definition.Sweep, "measure", stopping)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("in a unit"), ss.InputError("of ours")])
def test_an_interruption_costs_only_what_was_unfinished(
    whole: ss.sweeps.Done, out: Path, error: BaseException, measured: list[Any]
) -> None:
    made = small_sweeps.sweep()
    with pytest.MonkeyPatch.context() as patch:
        Stop(patch, 3, error)
        with pytest.raises(type(error)) as stopped:  # kept: a notebook keeps the last traceback as well
            ss.sweep(made, out)
    assert stopped.value is error
    finished = ss.sweeps.Store(out).finished()
    done_units = made.units[:3]
    assert len(finished) == sum(map(made.size, done_units)) == len(ss.sweeps.Store(out).rows())
    again = [(made.addresses[cell], unit.batch) for unit in made.units[3:] for cell in unit.cells]
    measured.clear()
    began = time.perf_counter()
    done = ss.sweep(made, out)
    assert measured == again, "what is missing, and in order"
    assert time.perf_counter() - began < 30, "no claim was left behind"
    assert (done.report.computed, done.report.found) == (36 * 5 - len(finished), len(finished))
    assert done.store.rows().equals(whole.store.rows())


def test_a_finished_sweep_is_shown_from_a_folder_that_cannot_be_written(
    whole: ss.sweeps.Done, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ss.sweeps.Store, "_alone", lambda _: pytest.fail("it writes"))
    again = ss.sweep(small_sweeps.sweep(), whole.store.folder, say=lambda _: None)
    assert again.report.computed == 0 and again.table.equals(whole.table)


def test_fresh_begins_again(whole: ss.sweeps.Done, out: Path, measured: list[Any]) -> None:
    ss.sweep(small_sweeps.sweep(), out)
    first = len(measured)
    done = ss.sweep(small_sweeps.sweep(), out, fresh=True)
    assert len(measured) == 2 * first and done.report.found == 0
    other = ss.sweep(small_sweeps.sweep({"other": {EXIT: ss.rnd(32, 3)}}), out, fresh=True)
    assert len(other.store.rows()) == 5 and len(other.store.manifest["runs"]) == 1


def test_nothing_is_touched_where_something_is_wrong(out: Path, whole: ss.sweeps.Done) -> None:
    """A fresh run with a wrong shard once emptied the folder before it said so."""
    before = snapshot(whole.store.folder)
    nameless = small_sweeps.sweep({"nameless": {EXIT: lambda x: x}})
    wrong: list[tuple[Any, dict[str, Any], str]] = [
        (small_sweeps.sweep(), {"shard": (0, 2)}, "shard 0/2: expected 1/2 to 2/2"),
        (small_sweeps.sweep(), {"shard": (3, 2)}, "shard 3/2"),
        (small_sweeps.sweep(), {"shard": (1, 0)}, "shard 1/0: expected 1/1"),
        (small_sweeps.sweep(), {"workers": -1}, "-1 workers"),
        (small_sweeps.sweep(), {"devices": ["cpu"]}, "0 workers for devices cpu"),
        (small_sweeps.sweep(), {"workers": 1, "devices": ["nowhere:1"]}, "device 'nowhere:1' cannot be used"),
        (small_sweeps.sweep(), {"workers": 1, "executor": run.Serial()}, "workers or an executor, not both"),
        (nameless, {}, "no content address"),
        (out.parent / "no.toml", {}, "cannot be read"),
    ]
    for what, options, message in wrong:
        with pytest.raises(ss.InputError, match=message):
            ss.sweep(what, whole.store.folder, fresh=True, **options)
        with pytest.raises(ss.InputError, match=message):
            ss.sweep(what, out, **options)
    assert snapshot(whole.store.folder) == before and not out.exists()


def test_an_extended_sweep_computes_what_is_new(out: Path, measured: list[Any]) -> None:
    s = small_sweeps.spectrum()
    cells = {f"band {j}": {EXIT: ss.remove(s.band(j))} for j in (1, 2, 3)}
    first = ss.sweep(small_sweeps.sweep(cells), out)
    measured.clear()
    more = {"new": {EXIT: ss.remove(s.band(4))}} | cells | {"site": {ss.Site("mlp", 1): ss.remove(s.dark())}}
    done = ss.sweep(small_sweeps.sweep(more, batch_size=2), out)  # other batches, same cells
    assert {cell for cell, _ in measured} == {done.sweep.addresses[0], done.sweep.addresses[4]}
    assert (done.report.computed, done.report.found) == (2 * 5, 3 * 5)
    assert list(done.summary()["name"]) == list(more)
    table = done.table
    same = table[table["name"].isin([*cells])].reset_index(drop=True)
    assert same.equals(first.table), "rows of before, bit for bit"
    old = ss.sweep(small_sweeps.sweep(cells), out)
    assert old.table.equals(first.table), "a sweep shows its own cells alone"
    assert len(old.store.manifest["runs"]) == 2


def test_a_batch_of_which_some_windows_are_there_is_completed(out: Path) -> None:
    cells = {"one": {EXIT: ss.rnd(32, 3)}}
    first = ss.sweep(small_sweeps.sweep(cells, batch_size=2), out, shard=(1, 3))
    assert 0 < first.report.computed < 3
    done = ss.sweep(small_sweeps.sweep(cells, batch_size=5), out)
    assert (done.report.computed, done.report.found) == (5, 0), "as a whole, one batch"
    assert sorted(done.store.rows()["window"]) == [0, 1, 2, 3, 4], "and no window counts twice"


def test_a_swap_is_found_again_whatever_the_batch_size(out: Path) -> None:
    cells = {
        "swap": {EXIT: ss.rnd(32, 4).filled(ss.Swap())},
        "zero": {EXIT: ss.rnd(32, 4)},
    }
    ss.sweep(small_sweeps.sweep(cells), out)
    done = ss.sweep(small_sweeps.sweep(cells, batch_size=5), out)
    assert (done.report.computed, done.report.found) == (0, 10)
    fresh = ss.sweep(small_sweeps.sweep(cells, batch_size=1), out.parent / "fresh")
    assert fresh.table.equals(done.table), "bit for bit"


def test_shards_merged_are_the_whole(
    whole: ss.sweeps.Done, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = small_sweeps.sweep()
    shards = [made.shard(i, 3) for i in (1, 2, 3)]
    assert sorted(unit.name for shard in shards for unit in shard) == sorted(u.name for u in made.units)
    folders = [out / str(i) for i in (3, 1, 2)]
    done = [ss.sweep(made, folder, shard=(int(folder.name), 3)) for folder in folders]
    assert sum(each.report.computed for each in done) == 36 * 5
    merged = ss.sweeps.Store.merge(folders, out / "merged")
    assert merged.rows().equals(whole.store.rows()), "bit for bit"
    assert merged.manifest == whole.store.manifest
    found = ss.sweep(made, merged.folder)
    assert found.report.computed == 0 and found.table.equals(whole.table)


def test_a_shard_may_be_empty(out: Path) -> None:
    made = small_sweeps.sweep({"one": {EXIT: ss.rnd(32, 3)}})
    done = ss.sweep(made, out, shard=(5, 5))
    assert (done.report.computed, done.report.found) == (0, 0)
    assert len(done.table) == len(done.summary()) == 0


def test_a_damaged_part_is_computed_again(whole: ss.sweeps.Done, out: Path, measured: list[Any]) -> None:
    made = small_sweeps.sweep()
    ss.sweep(made, out)
    victim = made.units[2]
    (part,) = (out / "parts").glob(f"{victim.name}-*.parquet")
    part.write_bytes(part.read_bytes()[:-7])
    measured.clear()
    with pytest.warns(ss.SpectralWarning, match="is damaged"):
        done = ss.sweep(made, out)
    assert measured == [(made.addresses[cell], victim.batch) for cell in victim.cells]
    assert done.report.computed == made.size(victim)
    assert done.store.rows().equals(whole.store.rows())


def test_two_processes_share_the_work(whole: ss.sweeps.Done, processes: Any, out: Path) -> None:
    """Every unit is computed by one of them alone: as many parts as units, and none is found twice."""
    ss.sweeps.Store(out)
    both = [processes.Process(target=small_sweeps.run, args=(out, 1, 0.02)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [0, 0]
    assert len(list((out / "parts").glob("*.parquet"))) == 20 * 2
    alone = ss.sweep(small_sweeps.sweep(small_sweeps.scaled(20)), out.parent / "alone")
    found = ss.sweep(small_sweeps.sweep(small_sweeps.scaled(20)), out)
    assert found.report.computed == 0
    small_sweeps.rows_agree(found.store.rows(), alone.store.rows())


def test_a_unit_in_other_hands_is_waited_for(out: Path, whole: ss.sweeps.Done) -> None:
    made = small_sweeps.sweep()
    store = ss.sweeps.Store(out)
    rows = whole.store.rows()

    def finish(unit: definition.Unit) -> None:
        places = made.batches[unit.batch][0]
        cells = [made.addresses[i] for i in unit.cells]
        with store.claim(unit.name) as mine:
            assert mine
            held.set()
            time.sleep(0.5)
            if unit is made.units[0]:  # the other is left: its process was killed
                theirs = rows[rows["cell"].isin(cells) & rows["window"].isin(places)]
                store.add(unit.name, theirs)

    for unit, computed in ((made.units[0], 36 * 5 - made.size(made.units[0])), (made.units[1], 0)):
        held = threading.Event()
        other = threading.Thread(target=finish, args=(unit,))
        other.start()
        held.wait()
        done = ss.sweep(made, out)
        other.join()
        assert done.report.computed == computed and done.report.found == 36 * 5 - computed
        small_sweeps.rows_agree(done.store.rows(), rows)


def test_killed_at_random_moments(whole: ss.sweeps.Done, processes: Any, tmp_path: Path) -> None:
    """Nothing finished is lost, nothing is there twice, and the end is that of a run without a kill."""

    def finish(process: Any) -> int:
        process.start()
        process.join(120)
        return process.exitcode

    draw, kills, sweeps, partial = random.Random(0), 0, 0, set[int]()
    while kills < 12:
        sweeps += 1
        out, finished, code = tmp_path / str(sweeps), 0, None
        while code != 0:
            if kills < 12:
                dies = (out, draw.randint(1, 12), draw.uniform(0, 0.02))
                code = finish(processes.Process(target=small_sweeps.run_until_killed, args=dies))
            else:
                code = finish(processes.Process(target=small_sweeps.run, args=(out,)))
            assert code in (0, -signal.SIGKILL)
            if code:
                kills += 1
                rows, before = ss.sweeps.Store(out, create=False).rows(), finished
                finished = len(rows)
                assert before < finished == len(ss.sweeps.Store(out).finished()), "what was finished stays"
                assert not rows.duplicated(["cell", "window"]).any()
                partial.add(finished)
        small_sweeps.rows_agree(ss.sweeps.Store(out).rows(), whole.store.rows())
        parts = [path.name for path in (out / "parts").iterdir()]
        assert len(parts) == 36 * 2, "every unit was written once, and no half file is left"
    assert len(partial - {36 * 5}) >= 3, partial


def test_a_kill_before_the_first_unit_leaves_nothing_in_the_way(
    whole: ss.sweeps.Done, processes: Any, out: Path
) -> None:
    draw = random.Random(1)
    for _ in range(4):
        process = processes.Process(target=small_sweeps.run, args=(out,))
        process.start()
        process.join(draw.uniform(0, 0.3))
        process.kill()
        process.join()
    small_sweeps.rows_agree(ss.sweep(small_sweeps.sweep(), out).store.rows(), whole.store.rows())


def test_the_report(out: Path) -> None:
    said: list[str] = []
    done = ss.sweep(small_sweeps.sweep(small_sweeps.scaled(4, 0.02)), out, say=said.append)
    report = done.report
    assert (report.computed, report.found) == (4 * 5, 0)
    assert 0 < report.worker_seconds < report.seconds
    assert report.worker_seconds > 4 * 2 * 0.02, "pauses included"
    assert report.of_floor is not None and report.of_floor > 0
    assert said[0].startswith("4 cells x 5 windows in 2 units: ") and "GiB beside the weights" in said[0]
    assert str(report).startswith("20 cells x windows in ") and str(report).endswith(" times the floor")
    again = ss.sweep(small_sweeps.sweep(small_sweeps.scaled(4)), out, say=said.append)
    assert said[1:] == [f"all 20 cells x windows are in {out}"]
    assert (again.report.computed, again.report.found, again.report.of_floor) == (0, 20, None)
    assert "0 cells x windows in 0.0 seconds, 20 were there" in str(again.report)


def test_progress_begins_with_what_is_there(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the rate would count what an earlier run did."""
    shown: list[tuple[int, int]] = []

    class Bar(run.tqdm):
        def __init__(self, *_: Any, **options: Any) -> None:
            super().__init__(**options | {"disable": False, "file": io.StringIO()})
            shown.append((self.initial, self.total))

        def update(self, n: float | None = 1) -> bool | None:
            shown.append((int(self.n + (n or 0)), self.total))
            return super().update(n)

    ss.sweep(small_sweeps.sweep(small_sweeps.scaled(4)), out)
    monkeypatch.setattr(run, "tqdm", Bar)
    monkeypatch.setattr(definition, "CELLS_PER_UNIT", 1)
    ss.sweep(small_sweeps.sweep(small_sweeps.scaled(6)), out)
    assert shown[0] == (20, 30) and shown[-1][0] in (27, 28)
    assert [n for n, _ in shown] == sorted(n for n, _ in shown)


def test_a_plan_writes_nothing(whole: ss.sweeps.Done, out: Path) -> None:
    made = small_sweeps.sweep()
    before = snapshot(whole.store.folder)
    assert ss.sweeps.plan(made, whole.store.folder).units == 0
    assert snapshot(whole.store.folder) == before
    for shard, units in ((None, len(made.units)), ((1, 2), -(-len(made.units) // 2))):
        planned = ss.sweeps.plan(made, out, shard=shard)
        assert planned.units == units and planned.windows == 5
    assert not out.exists()
    out.mkdir()
    assert ss.sweeps.plan(made, out).cells == 36, "an empty folder is as good as none"
    assert list(out.iterdir()) == []
    (out / "notes.txt").write_text("not ours")
    with pytest.raises(ss.InputError, match="holds no sweep results"):
        ss.sweeps.plan(made, out)
    with pytest.raises(ss.InputError, match="holds other things"):
        ss.sweep(made, out)


def test_a_plan_counts_what_is_missing(out: Path) -> None:
    ss.sweep(small_sweeps.sweep(small_sweeps.scaled(3)), out)
    planned = ss.sweeps.plan(small_sweeps.sweep(small_sweeps.scaled(5)), out)
    assert (planned.cells, planned.units, planned.windows) == (2, 2, 5)


@pytest.mark.usefixtures("unchecked")
def test_what_it_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts by hand: a layer takes 2 s and the head 3 s for a window, so a pass takes 9 s."""
    now = [0.0]

    class Clocked:
        def __init__(
            self, model: Any, windows: Any, places: list[int], ids: Any, starts: Any, memory: Any, sample: Any
        ) -> None:
            self.places, self.memory = places, memory
            assert starts == {-1, 0, 2, None}, "residuals for the cells and for the head"

        def measure(self, cells: list[dict[ss.Site, Any]]) -> None:
            (cell,) = cells
            (site,) = cell
            layers = 3 if site.kind == "embedding" else 2 - site.layer
            now[0] += len(self.places) * (2 * layers + 3)

    monkeypatch.setattr(cost, "Batch", Clocked)
    monkeypatch.setattr(definition, "open_batch", Clocked)
    monkeypatch.setattr(cost.time, "perf_counter", lambda: now[0])
    s = small_sweeps.spectrum()
    cells = {
        "from the last exit": {ss.Site("exit", 2): ss.remove(s.band(1))},  # the head alone: 3
        "from exit 0": {ss.Site("exit", 0): ss.remove(s.band(1))},  # two layers: 7
        "from below layer 1": {ss.Site("mlp", 1): ss.remove(s.band(1))},  # resumes at exit 0: 7
        "from the beginning": {ss.Site("embedding"): ss.remove(s.band(1))},  # 9
        "both": {ss.Site("exit", 2): ss.remove(s.band(1)), ss.Site("mlp", 0): ss.remove(s.band(1))},  # 9
        "nothing": {EXIT: ss.phi(s, 1, 4)},  # 0
    }
    made = small_sweeps.sweep(cells)
    assert [*made.starts] == [2, 0, 0, -1, -1, None]
    found, speed = cost.estimate(made, made.units)
    assert (speed.layer_seconds, speed.head_seconds) == pytest.approx((2, 3))
    assert (found.cells, found.windows, found.layers) == (6, 5, 3)
    assert (found.layer_seconds, found.head_seconds) == pytest.approx((2, 3))
    assert found.floor == pytest.approx(5 * (3 + 7 + 7 + 9 + 9))
    assert found.forwards == pytest.approx((3 + 7 + 7 + 9 + 9) / 9)
    assert found.units == len(made.units) == 4 * 2, "four places to begin, two batches"
    one_batch, _ = cost.estimate(made, tuple(unit for unit in made.units if unit.batch == 0))
    assert one_batch.floor == pytest.approx(len(made.batches[0][0]) * 35)
    assert "6 cells x 5 windows in 8 units: 3.9 forward passes over the text, about 2.9 minutes" in str(found)
    assert found.bytes > 4 * 198 * 32 * 4, "the residuals of four exits"


def test_the_batch_of_the_estimate_serves_the_first_unit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One untouched pass for each batch, whether or not the cost is estimated first."""
    opened: list[tuple[int, ...]] = []
    original = definition.open_batch

    def counted(model: Any, windows: Any, indices: Any, *rest: Any) -> Any:
        opened.append(tuple(indices))
        return original(model, windows, indices, *rest)

    monkeypatch.setattr(definition, "open_batch", counted)
    said: list[str] = []
    made = small_sweeps.sweep()
    done = ss.sweep(made, tmp_path / "out", say=said.append)
    assert len(said) == 1 and done.report.of_floor is not None
    assert opened == [tuple(indices) for indices, _ in made.batches]
    again = ss.sweep(small_sweeps.sweep(), tmp_path / "again")
    small_sweeps.rows_agree(done.store.rows(), again.store.rows())


def test_a_run_says_what_it_waits_for(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = small_sweeps.sweep(small_sweeps.scaled(1))
    store = ss.sweeps.Store(out)
    monkeypatch.setattr(run, "PATIENCE", -1.0)
    monkeypatch.setattr(run, "CLAIM_POLL", 0.0)
    with store.claim(made.units[0].name) as mine, warnings.catch_warnings():
        assert mine
        warnings.simplefilter("error", ss.SpectralWarning)
        with pytest.raises(
            ss.SpectralWarning, match=rf"waits for .*{made.units[0].name}.*must be resumed or stopped"
        ):
            ss.sweep(made, out)


def test_a_restart_does_not_measure_its_cost_again(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[str] = []
    original = cost._measured
    monkeypatch.setattr(cost, "_measured", lambda sweep, where: timed.append(where) or original(sweep, where))
    said: list[str] = []
    first = ss.sweep(small_sweeps.sweep(), out, shard=(1, 2), say=said.append)
    (run,) = first.store.manifest["runs"].values()
    assert len(timed) == 1 and run["speed"]["where"] == timed[0]
    planned = ss.sweeps.plan(small_sweeps.sweep(), out)
    done = ss.sweep(small_sweeps.sweep(), out, say=said.append)
    assert len(timed) == 1 and done.report.of_floor is not None and str(planned) == said[1]
    assert isinstance(planned, ss.sweeps.Cost) and planned.layer_seconds == run["speed"]["layer_seconds"]
    # another sweep of the same model in the folder, and what makes a speed another
    ss.sweep(small_sweeps.sweep(small_sweeps.scaled(1)), out, say=said.append)
    assert len(timed) == 1
    monkeypatch.setattr(cost.platform, "node", lambda: "another machine")
    ss.sweep(small_sweeps.sweep(small_sweeps.scaled(2)), out, say=said.append)
    assert len(timed) == 2


@pytest.mark.parametrize(
    "speed",
    [5, {}, {"layer_seconds": "1", "head_seconds": 1.0}, {"layer_seconds": -1.0}, {"head_seconds": 0.0}],
)
def test_a_speed_that_is_none_is_measured(speed: object) -> None:
    right = {"where": "here", "layer_seconds": 1.0, "head_seconds": 2.0}
    assert cost.Speed.kept({"a": {}, "b": {"speed": right}}, "here") == cost.Speed("here", 1.0, 2.0)
    assert cost.Speed.kept({"a": {"speed": right}}, "elsewhere") is None
    spoilt = right | speed if isinstance(speed, dict) and speed else speed
    assert cost.Speed.kept({"a": {"speed": spoilt}}, "here") is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 seconds"), (119, "119.0 seconds"), (120, "2.0 minutes"), (9000, "2.5 hours")],
)
def test_durations(seconds: float, text: str) -> None:
    assert cost.duration(seconds) == text


def test_units_begin_low_and_hold_cells_of_one_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    made = small_sweeps.sweep()
    assert len({unit.name for unit in made.units}) == len(made.units)
    for unit in made.units:
        assert (
            len({made.starts[cell] for cell in unit.cells}) == 1
            and len(unit.cells) <= definition.CELLS_PER_UNIT
        )
    measured = [(unit.batch, cell) for unit in made.units for cell in unit.cells]
    assert sorted(measured) == sorted((b, cell) for b in (0, 1) for cell in made.distinct)
    order = [(unit.batch, made.starts[unit.cells[0]]) for unit in made.units]
    assert order == sorted(order)  # pyright: ignore[reportArgumentType]
    monkeypatch.setattr(definition, "UNIT_OPERATIONS", {"cpu": 1.0})
    assert all(len(unit.cells) == 1 for unit in small_sweeps.sweep().units), "a large model has small units"


def test_the_manifest(whole: ss.sweeps.Done) -> None:
    (key,) = whole.store.manifest["runs"]
    found = whole.store.manifest["runs"][key]
    assert key == whole.sweep.key
    assert found["cells"] == [whole.sweep.addresses[cell] for cell in whole.sweep.distinct]
    assert found["weights"] == tiny_models.model().fingerprint and found["windows"]["documents"] == 4
    assert json.loads(json.dumps(found)) == found


def test_a_report_is_plain_data(whole: ss.sweeps.Done) -> None:
    json.dumps(asdict(whole.report))
    summary = whole.summary()
    assert list(summary["name"]) == [cell.name for cell in whole.sweep.cells]
    json.dumps(summary.to_dict("records"))


def test_a_sample_of_predictions_is_marked_and_is_another_cell(tmp_path: Path) -> None:
    cells = small_sweeps.scaled(2) | {"swap": {EXIT: ss.remove(small_sweeps.spectrum().dark(), ss.Swap())}}
    whole = ss.sweep(small_sweeps.sweep(cells), tmp_path / "out")
    sampled = small_sweeps.sweep(cells, predict=16)
    done = ss.sweep(sampled, tmp_path / "out")
    assert done.report.computed == whole.report.computed > 0, "no cell is taken for that of all predictions"
    again = ss.sweep(small_sweeps.sweep(cells, predict=16), tmp_path / "out")
    assert again.report.computed == 0
    other = ss.Sweep.of(sampled.model, sampled.windows, cells, predict=ss.nll.Sample(16, seed=1))
    assert not {*other.addresses} & {*sampled.addresses}
    # the numbers of evaluate_all, whose documents weigh all predicted tokens
    effects = ss.evaluate_all(sampled.model, sampled.windows, cells, predict=16)
    for name, effect in effects.items():
        rows = done.table[done.table["name"] == name].set_index("document")
        for column in ("nll", "delta_nll", "kl"):
            expected = effect.table.set_index("document")[column]
            assert rows[column].to_numpy() == pytest.approx(expected.loc[rows.index].to_numpy(), abs=1e-6)
    # marked in every form, and in none that scored all
    assert done.table.attrs["predict"] == done.summary().attrs["predict"] == done.record()["predict"] == 16
    assert done.sweep.manifest()["predict"] == {"count": 16, "seed": 0}
    assert "predict" not in {*whole.table.attrs, *whole.record(), *whole.sweep.manifest()}
    with pytest.raises(ss.InputError, match="predict 1: give at least 2"):
        small_sweeps.sweep(cells, predict=1)


def test_a_worker_makes_the_same_sample() -> None:
    sampled = small_sweeps.sweep(small_sweeps.scaled(1), predict=16)
    copy = pickle.loads(pickle.dumps(sampled))
    assert copy.predict == sampled.predict and copy.key == sampled.key
    unit = sampled.units[0]
    pd.testing.assert_frame_equal(copy.measure(unit), sampled.measure(unit))
