"""The store of a sweep: what goes in comes out once, in one order; damage and other formats are found."""

import importlib
import json
import os
import shutil
import warnings
from contextlib import contextmanager

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pandas.testing import assert_frame_equal
from support import synthetic_rows

from spectral_sinks.errors import InputError, SpectralWarning
from spectral_sinks.sweeps import schema
from spectral_sinks.sweeps.schema import BY_LAYER, MEANS, SCHEMA
from spectral_sinks.sweeps.store import Store

NAMES = ["omega 3", "phi 1", "rnd 3 2", "custom"]


def named(folder):
    """What is in a folder, hidden or not, locks aside."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if ".locks" not in path.parts)


def exact(a, b):
    assert_frame_equal(a, b, check_exact=True)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


@pytest.fixture
def filled(store):
    for name in NAMES:
        store.add(name.replace(" ", "-"), synthetic_rows.rows(name))
    store.record("run", {"model": "tiny", "cells": [synthetic_rows.address(name) for name in NAMES]})
    return store


def test_rows_come_back_in_the_order_of_the_plan(filled):
    found = filled.rows()
    given = synthetic_rows.rows(*NAMES)
    assert list(found["name"]) == list(given["name"]) and list(found["window"]) == list(given["window"])
    assert_frame_equal(found[list(MEANS)], given[list(MEANS)], check_exact=True)
    for column in BY_LAYER:
        assert [list(value) for value in found[column]] == list(given[column])
    assert list(found.columns) == SCHEMA.names
    assert found["head"].isna().all() and found["layer"].eq(3).all()
    assert list(found["rank"].isna()) == [name == "custom" for name in given["name"]]
    assert {str(found[name].dtype) for name in ("layer", "head", "rank", "draw")} == {"Int32"}
    assert {str(found[name].dtype) for name in ("document", "window", "tokens")} == {"int32"}
    exact(Store(filled.folder).rows(), found)


def test_an_unplanned_cell_comes_last_by_address(store):
    for name in NAMES:
        store.add("a", synthetic_rows.rows(name))
    addresses = [synthetic_rows.address(name) for name in NAMES]
    assert list(store.rows()["cell"].unique()) == sorted(addresses)
    store.record("run", {"cells": [max(addresses)]})
    assert list(store.rows()["cell"].unique()) == [max(addresses), *sorted(addresses)[:-1]]


def test_an_empty_store(store):
    assert store.finished() == set() and store.rows().empty and store.table().empty
    assert list(store.rows().columns) == SCHEMA.names and store.manifest["runs"] == {}
    assert {"windows", "tokens", *MEANS, *BY_LAYER} < set(store.table().columns)


def test_pandas_alone_reads_the_parts(filled):
    name = next(filled.parts.iterdir()).name
    for hidden in (f".{name}.part", f".damaged-{name}", ".damaged-x.parquet"):
        (filled.parts / hidden).write_bytes(b"half")
    plain = pd.read_parquet(filled.folder / "parts")
    assert list(plain.columns) == SCHEMA.names
    plain = plain.sort_values(["cell", "window"])[[*MEANS]].reset_index(drop=True)
    ours = filled.rows().sort_values(["cell", "window"])[[*MEANS]].reset_index(drop=True)
    exact(plain, ours)


def test_finished_reads_a_part_once(filled, monkeypatch):
    expected = {(synthetic_rows.address(name), window) for name in NAMES for window in range(4)}
    assert filled.finished() == expected
    read = []
    monkeypatch.setattr(
        importlib.import_module("spectral_sinks.sweeps.store"),
        "decode",
        lambda data, name: read.append(name) or schema.decode(data, name),
    )
    added = filled.add("more", synthetic_rows.rows("more"))
    assert len(filled.finished()) == len(expected) + 4 and read == [added.name]
    added.unlink()
    assert filled.finished() == expected and read == [added.name]


def test_means_over_a_document_are_weighted_by_tokens(filled):
    table = filled.table()
    assert list(table["windows"]) == [2] * 8 and list(table["document"]) == [0, 1] * 4
    assert list(table["name"]) == [name for name in NAMES for _ in range(2)]
    for name in NAMES:
        for document in (0, 1):
            part = synthetic_rows.rows(name, windows=(2 * document, 2 * document + 1))
            (row,) = table[table["name"].eq(name) & table["document"].eq(document)].to_dict("records")
            (a, b), tokens = part.to_dict("records"), part["tokens"].sum()
            assert row["tokens"] == tokens
            for column in (*MEANS, *BY_LAYER):
                left, right = np.array(a[column]), np.array(b[column])
                mean = (left * a["tokens"] + right * b["tokens"]) / tokens
                np.testing.assert_allclose(row[column], mean, rtol=1e-12)


def test_documents_need_not_be_in_the_order_of_windows(store):
    given = synthetic_rows.rows("a").assign(document=[7, 2, 7, 2])
    store.add("a", given)
    table = store.table()
    assert list(table["document"]) == [2, 7]
    odd = given.iloc[[1, 3]]
    np.testing.assert_allclose(table["nll"][0], np.average(odd["nll"], weights=odd["tokens"]))


def test_what_one_window_lacks_the_document_lacks(store):
    given = synthetic_rows.rows("a")
    given.loc[1, "nll"] = np.nan
    given.loc[2, "sink_mass"] = None
    store.add("a", given)
    table = store.table()
    assert list(table["nll"].isna()) == [True, False] and table["kl"].notna().all()
    assert [value is None for value in table["sink_mass"]] == [False, True]
    assert all(len(value) == synthetic_rows.LAYERS for value in table["baseline_sink_mass"])


def test_models_of_several_depths(store):
    short = synthetic_rows.rows("a")
    short["sink_mass"] = [value[:2] for value in short["sink_mass"]]
    store.add("a", pd.concat([short, synthetic_rows.rows("b").assign(baseline_sink_mass=None)]))
    table = store.table().set_index("name")
    assert [len(value) for value in table["sink_mass"]["a"]] == [2, 2]
    assert [len(value) for value in table["sink_mass"]["b"]] == [synthetic_rows.LAYERS] * 2
    assert table["baseline_sink_mass"]["b"].isna().all()
    mean = np.average([*short["sink_mass"][2:]], axis=0, weights=short["tokens"][2:])
    np.testing.assert_allclose(table["sink_mass"]["a"].iloc[1], mean, rtol=1e-12)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda rows: rows.drop(columns="kl"),
        lambda rows: rows.assign(extra=1),
        lambda rows: pd.concat([rows, rows[["kl"]]], axis=1),
        lambda rows: rows.assign(window=0.5),
        lambda rows: rows.assign(window=2**31),
        lambda rows: rows.assign(cell=None),
        lambda rows: rows.assign(cell=3),
        lambda rows: rows.assign(document=None),
        lambda rows: rows.assign(nll="low"),
        lambda rows: rows.assign(sink_mass=1.0),
    ],
)
def test_rows_that_do_not_fit_are_refused(store, spoil):
    with pytest.raises(InputError, match=r"rows of a sweep.*(kl|extra|window|cell|document|nll|sink_mass)"):
        store.add("a", spoil(synthetic_rows.rows("a")))
    assert named(store.folder) == ["manifest.json", "parts"]


@pytest.mark.parametrize("unit", ["", "../a", "a/b", ".a", "a b", "é", "a" * 151, "a\n"])
def test_a_unit_is_a_file_name(store, unit):
    with pytest.raises(InputError, match="unit"):
        store.add(unit, synthetic_rows.rows("a"))
    with pytest.raises(InputError, match="unit"), store.claim(unit):
        pass


def test_the_same_rows_are_the_same_file(store):
    given = synthetic_rows.rows("rnd a", "custom b")
    first = store.add("a", given)
    again = given[given.columns[::-1]].astype({"window": "int16", "rank": "Int64", "draw": "float64"})
    again["sink_mass"] = again["sink_mass"].map(np.array)
    assert store.add("a", again.set_index(np.arange(8) * 3)) == first
    assert len(list(store.parts.iterdir())) == 1


def test_what_is_there_twice_counts_once(tmp_path):
    """The part that is read first does not decide: its name holds a checksum."""
    one, other = synthetic_rows.rows("a", "b"), synthetic_rows.rows("a", "b")
    other.loc[3, "nll"] += 1e-9
    frames = []
    for order in ("ab", "ba"):
        store = Store(tmp_path / order)
        for unit, rows in zip(order, (one, other), strict=True):
            store.add(unit, rows)
        store.add("c", pd.concat([one, one]))
        frames.append(store.rows())
        assert len(frames[-1]) == len(store.finished()) == 8
        assert list(store.table()["windows"]) == [2] * 4
    exact(*frames)
    assert frames[0]["nll"].isin(one["nll"]).all()


def two_that_differ(tmp_path, **changes):
    """Two stores that share the rows of "a", with other numbers in two of them."""
    one, other = synthetic_rows.rows("a", "b"), synthetic_rows.rows("a", "c")
    for column, values in changes.items():
        other[column] = values(other[column])
    stores = [Store(tmp_path / name) for name in ("one", "other")]
    return (
        stores,
        [store.add("u", rows) for store, rows in zip(stores, (one, other), strict=True)],
        one,
        other,
    )


def lower(column):
    return column.where(~column.index.isin([1, 2]), column - 0.5)


@pytest.mark.parametrize(
    "changes",
    [
        {"nll": lower},
        {"kl": lambda column: column + 0.1},
        {"delta_nll": lambda column: column * np.nan},
        {"tokens": lambda column: column + 1},
        {"sink_mass": lambda column: column.map(lambda value: [each + 0.1 for each in value])},
        {"sink_mass": lambda column: [None] * len(column)},
        {"baseline_sink_mass": lambda column: column.map(lambda value: value[:1])},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_different_numbers_for_one_row_are_an_error_that_names_both_parts(tmp_path, changes):
    (one, other), paths, _, _ = two_that_differ(tmp_path, **changes)
    with pytest.raises(
        InputError, match=rf"different numbers for window \d of 'a' \({next(iter(changes))}"
    ) as error:
        Store.merge([one.folder, other.folder], tmp_path / "merged")
    assert all(str(path) in str(error.value) for path in paths)
    assert not (tmp_path / "merged").exists(), "nothing is begun"
    one.add("v", pq.read_table(paths[1]).to_pandas())
    for look in (one.rows, one.table):
        with pytest.raises(InputError, match=r"different numbers .*--prefer"):
            look()
    assert len(one.finished()) == 12


@pytest.mark.parametrize("name", ["one", "other"])
@pytest.mark.parametrize("part", [False, True])
def test_a_person_decides_between_different_numbers(tmp_path, name, part):
    stores, paths, *rows = two_that_differ(tmp_path, nll=lower)
    index = ["one", "other"].index(name)
    prefer = paths[index] if part else stores[index].folder
    merged = Store.merge([store.folder for store in stores], tmp_path / "merged", prefer)
    found = merged.rows()
    assert len(found) == len(merged.finished()) == 12
    for cell, own in (("a", rows[index]), ("b", rows[0]), ("c", rows[1])):
        exact(
            found[found["name"] == cell][[*MEANS]].reset_index(drop=True),
            own[own["name"] == cell][[*MEANS]].reset_index(drop=True),
        )
    # into a folder that holds the other numbers, and among the parts of one folder
    again = Store.merge([stores[index].folder], stores[1 - index].folder, prefer)
    exact(again.rows(), found)
    exact(Store(again.folder).rows(), found)
    with pytest.raises(InputError, match="is none of the parts and folders"):
        Store.merge([store.folder for store in stores], tmp_path / "new", tmp_path / "nowhere")


def test_a_preferred_folder_that_contradicts_itself_decides_nothing(tmp_path):
    (one, other), paths, *_ = two_that_differ(tmp_path, nll=lower)
    one.add("v", pq.read_table(paths[1]).to_pandas())
    with pytest.raises(InputError, match="different numbers"):
        Store.merge([one.folder, other.folder], tmp_path / "merged", one.folder)
    merged = Store.merge([one.folder], tmp_path / "merged", paths[0])
    assert len(merged.rows()) == 12


def test_a_folder_within_a_folder_that_leads_outside_is_refused(tmp_path, filled):
    for name in ("parts", "jobs", ".locks"):
        folder = tmp_path / f"with {name}"
        folder.mkdir()
        (tmp_path / f"outside {name}").mkdir()
        (folder / "manifest.json").write_bytes((filled.folder / "manifest.json").read_bytes())
        (folder / name).symlink_to(tmp_path / f"outside {name}")
        with pytest.raises(InputError, match=rf"{name} is a link to .*outside of the results folder"):
            Store(folder)
        assert not list((tmp_path / f"outside {name}").iterdir())


def test_nothing_is_written_through_a_link(tmp_path, filled):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    for name in (".manifest.json.part", f"parts/.{next(filled.parts.iterdir()).name}.part"):
        (filled.folder / name).unlink(missing_ok=True)
        (filled.folder / name).symlink_to(victim)
    store = Store(filled.folder)
    for name in NAMES:
        store.add(name.replace(" ", "-"), synthetic_rows.rows(name))
    store.record("more", {"cells": []})
    assert victim.read_text() == "mine" and not (filled.folder / "manifest.json").is_symlink()


def test_parts_that_somebody_deleted(filled):
    shutil.rmtree(filled.parts)
    store = Store(filled.folder)
    assert store.finished() == set() and store.rows().empty
    store.add("a", synthetic_rows.rows("a"))
    assert len(store.rows()) == 4
    shutil.rmtree(filled.parts)
    store.clear()
    assert store.finished() == set()


def test_nothing_is_written_where_nothing_is_new(filled):
    before = {path: path.stat().st_mtime_ns for path in filled.folder.rglob("*")}
    run = filled.manifest["runs"]["run"]
    store = Store(filled.folder)
    store.record("run", run)
    store.record("run", {"cells": run["cells"][:2]})
    assert len(store.rows()) == 16
    assert {path: path.stat().st_mtime_ns for path in filled.folder.rglob("*")} == before


def test_a_user_who_does_not_exist():
    with pytest.raises(InputError, match="~nobody-of-that-name/x cannot be found"):
        Store("~nobody-of-that-name/x")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")
def test_a_pipe_is_not_waited_for(filled):
    pipe = filled.parts / f"u-{'0' * 32}.parquet"
    os.mkfifo(pipe)
    with pytest.warns(SpectralWarning, match=r"cannot be read \(it is not a regular file\): left there"):
        assert len(filled.rows()) == 16
    pipe.unlink()
    (filled.folder / "manifest.json").unlink()
    os.mkfifo(filled.folder / "manifest.json")
    with pytest.raises(InputError, match="it is not a regular file"):
        Store(filled.folder)


@pytest.mark.parametrize(
    "text", ['"cells": 5', '"cells": [5]', '"cells": {}', '"deep": ' + "[" * 10**5 + "]" * 10**5]
)
def test_an_odd_manifest_is_damaged(filled, text):
    path = filled.folder / "manifest.json"
    path.write_text('{"store": "spectral_sinks sweep", "format": 1, "runs": {"run": {' + text + "}}}")
    with pytest.raises(InputError, match=r"manifest\.json is damaged"):
        Store(filled.folder)


# Damage


def renamed(path):
    path.rename(path.with_name("copy.parquet"))


def exchanged(path):
    other = path.with_name(path.name.replace(path.stem[-32:], "0" * 32))
    path.rename(other)


def overwritten(table):
    """A Parquet file under its right checksum, but not one of ours."""

    def damage(path):
        sink = pa.BufferOutputStream()
        pq.write_table(table.replace_schema_metadata({schema.MARK: "1"}), sink)
        data = sink.getvalue().to_pybytes()
        path.unlink()
        path.with_name(f"a-{schema.checksum(data)}.parquet").write_bytes(data)

    return damage


def no_parquet(path):
    path.unlink()
    path.with_name(f"a-{schema.checksum(b'PAR1')}.parquet").write_bytes(b"PAR1")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "truncated"),
        (lambda path: path.write_bytes(path.read_bytes()[:100]), "truncated"),
        (lambda path: path.write_bytes(b""), "truncated"),
        (lambda path: path.write_bytes(b"PAR1" + path.read_bytes()), "checksum"),
        (renamed, "name holds no checksum"),
        (exchanged, "checksum does not match"),
        (no_parquet, "not a Parquet"),
        (overwritten(pa.table({"cell": ["a"]})), "columns"),
        (overwritten(SCHEMA.empty_table().cast(SCHEMA.set(11, SCHEMA.field(11).with_nullable(True)))), "col"),
    ],
)
def test_a_damaged_part_is_reported_set_aside_and_computed_again(filled, damage, reason):
    expected = filled.rows()
    finished = filled.finished()
    (path,) = filled.parts.glob("phi-1-*")
    damage(path)
    fresh = Store(filled.folder)
    with pytest.warns(SpectralWarning, match=rf"{reason}.*set aside as \.damaged-") as caught:
        left = fresh.finished()
    assert len(caught) == 1
    assert finished - left == {(synthetic_rows.address("phi 1"), window) for window in range(4)}
    assert len(fresh.rows()) == len(pd.read_parquet(filled.parts)) == 12  # without a word
    fresh.add("phi-1", synthetic_rows.rows("phi 1"))
    exact(Store(filled.folder).rows(), expected)


def test_rows_find_damage_after_finished_did_not(filled):
    finished = filled.finished()
    (path,) = filled.parts.glob("custom-*")
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.warns(SpectralWarning, match="truncated"):
        assert len(filled.rows()) == 12
    assert len(filled.finished()) == len(finished) - 4


@pytest.fixture(scope="module")
def part():
    data = schema.encode(synthetic_rows.rows("a"))
    return f"a-{schema.checksum(data)}.parquet", data


@given(st.data())
def test_any_altered_byte_is_found(part, data):
    name, sound = part
    place = data.draw(st.integers(0, len(sound) - 1))
    bits = data.draw(st.integers(1, 255))
    with pytest.raises(schema.Damaged):
        schema.decode(sound[:place] + bytes([sound[place] ^ bits]) + sound[place + 1 :], name)


@given(st.data())
def test_any_truncation_is_found(part, data):
    name, sound = part
    with pytest.raises(schema.Damaged):
        schema.decode(sound[: data.draw(st.integers(0, len(sound) - 1))], name)


@pytest.mark.parametrize("meanwhile", ["recomputed", "set aside"])
def test_a_part_that_another_process_just_cared_for_is_not_set_aside(filled, monkeypatch, meanwhile):
    expected = filled.rows()
    (path,) = filled.parts.glob("custom-*")
    sound, alone = path.read_bytes(), filled._alone
    path.write_bytes(b"")

    @contextmanager
    def waiting():
        with alone():
            path.write_bytes(sound) if meanwhile == "recomputed" else path.unlink(missing_ok=True)
            yield

    monkeypatch.setattr(filled, "_alone", waiting)
    found = filled.rows()  # without a word
    exact(found, expected if meanwhile == "recomputed" else expected[expected["name"] != "custom"])
    assert not list(filled.parts.glob(".damaged*"))


def test_a_part_that_cannot_be_read_is_reported(filled):
    (path,) = filled.parts.glob("custom-*")
    path.unlink()
    path.mkdir()
    with pytest.warns(SpectralWarning, match="cannot be read.*left there"):
        assert len(filled.rows()) == 12


# Folders and formats


@pytest.mark.parametrize("format", [0, 2, "1.5", None])
def test_another_format_is_refused(filled, format):
    manifest = filled.manifest | {"format": format}
    (filled.folder / "manifest.json").write_text(json.dumps(manifest))
    before = named(filled.folder)
    for open_it in (lambda: Store(filled.folder), lambda: Store.merge([filled.folder], "out"), filled.rows):
        with pytest.raises(InputError, match=f"format {format} .*reads format 1.*another folder"):
            open_it()
    assert named(filled.folder) == before


def test_a_part_of_another_format_is_refused_and_left_alone(filled, monkeypatch):
    monkeypatch.setattr(schema, "FORMAT", 2)
    path = filled.add("later", synthetic_rows.rows("later"))
    monkeypatch.undo()
    for read in (filled.rows, filled.finished, Store(filled.folder).finished):
        with pytest.raises(InputError, match=r"later-.*format 2"):
            read()
    (filled.folder / "manifest.json").unlink()
    with pytest.raises(InputError, match="format 2"):
        Store(filled.folder)
    assert path.exists() and not (filled.folder / "manifest.json").exists()


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    (tmp_path / ".hidden").write_text("")
    with pytest.raises(InputError, match=r"thesis\.tex"):
        Store(tmp_path)
    with pytest.raises(InputError, match="Not a directory"):
        Store(tmp_path / "thesis.tex")
    assert named(tmp_path) == [".hidden", "thesis.tex"]
    (tmp_path / "manifest.json").write_text('{"model": "another"}')
    with pytest.raises(InputError, match="does not belong to a sweep"):
        Store(tmp_path)
    with pytest.raises(InputError, match="no sweep results"):
        Store(tmp_path / "none", create=False)
    assert not (tmp_path / "none").exists()


def test_other_files_may_lie_beside_the_results(filled):
    (filled.folder / "report.html").write_text("")
    assert len(Store(filled.folder).rows()) == 16


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"store": "spectral_sinks sweep", "format": 1, "runs": [1]}']
)
def test_a_damaged_manifest_says_what_to_do(filled, text):
    path = filled.folder / "manifest.json"
    rows = filled.rows().sort_values(["cell", "window"], ignore_index=True)
    path.write_text(text)
    with pytest.raises(InputError, match=r"damaged.*delete it|does not belong to a sweep"):
        Store(filled.folder)
    path.unlink()
    with pytest.warns(SpectralWarning, match=r"manifest\.json was gone"):
        store = Store(filled.folder)
    exact(store.rows(), rows)


def test_runs_merge_into_the_manifest(store):
    store.record("b", {"model": "tiny", "cells": ["x", "y"]})
    store.record("a", {"model": "big", "cells": ["z"]})
    store.record("b", {"seconds": 3, "cells": ["y", "w"]})
    runs = json.loads((store.folder / "manifest.json").read_text())["runs"]
    assert list(runs) == ["a", "b"] and runs == store.manifest["runs"]
    assert runs["b"] == {"model": "tiny", "seconds": 3, "cells": ["x", "y", "w"]}


def test_clear_removes_what_the_store_made(filled):
    (filled.folder / "report.html").write_text("")
    (filled.parts / "notes.txt").write_text("")
    (path,) = filled.parts.glob("custom-*")
    (filled.parts / f".{path.name}.part").write_text("")
    path.write_bytes(b"")
    with pytest.warns(SpectralWarning):
        filled.rows()
    Store(filled.folder).clear()
    assert named(filled.folder) == ["manifest.json", "parts", "parts/notes.txt", "report.html"]
    store = Store(filled.folder)
    assert store.finished() == set() and store.manifest["runs"] == {}


# Shards


PLAN = {"run": {"model": "tiny", "cells": [synthetic_rows.address(name) for name in NAMES]}}


def single(folder):
    store = Store(folder)
    for name in NAMES:
        store.add(name.replace(" ", "-"), synthetic_rows.rows(name, windows=range(6)))
    store.record("run", PLAN["run"])
    return store


SHARDS = {
    "by cell": [[("a", NAMES[::2], range(6))], [("b", NAMES[1::2], range(6))]],
    "by window": [[("a", NAMES, range(3))], [("b", NAMES, range(3, 6))]],
    "overlapping": [
        [("a", NAMES[:3], range(6)), ("c", NAMES, range(2))],
        [("b", NAMES[2:], range(6)), ("c", NAMES, range(2)), ("a", NAMES[:1], range(4))],
        [],
    ],
}


@pytest.mark.parametrize("shards", SHARDS.values(), ids=SHARDS)
@pytest.mark.parametrize("backwards", [False, True])
def test_merged_shards_equal_a_single_process(tmp_path, shards, backwards):
    folders = []
    for place, units in enumerate(shards):
        store = Store(tmp_path / f"shard {place}")
        store.record("run", PLAN["run"])
        for unit, names, windows in units:
            store.add(unit, synthetic_rows.rows(*names, windows=windows))
        folders.insert(0 if backwards else place, store.folder)
    whole = single(tmp_path / "single")
    merged = Store.merge(folders, tmp_path / "merged")
    exact(merged.rows(), whole.rows())
    exact(merged.table(), whole.table())
    assert merged.finished() == whole.finished() and merged.manifest == whole.manifest
    names = named(merged.folder)
    exact(Store.merge([whole.folder, *folders, merged.folder], tmp_path / "merged").rows(), whole.rows())
    assert set(names) < set(named(merged.folder))


def test_a_merge_passes_over_damage_and_refuses_what_is_no_store(tmp_path, filled):
    (path,) = filled.parts.glob("custom-*")
    path.write_bytes(path.read_bytes() + b"PAR1")
    with pytest.warns(SpectralWarning, match="damaged"):
        merged = Store.merge([filled.folder], tmp_path / "merged")
    assert len(merged.rows()) == 12
    with pytest.raises(InputError, match="no sweep results"):
        Store.merge([filled.folder, tmp_path / "none"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_is_said_of_a_sound_store(filled):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Store.merge([filled.folder], filled.folder).table()
