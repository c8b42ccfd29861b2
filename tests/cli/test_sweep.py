"""`spectral-sinks sweep` and `merge`: what they print and leave behind is what the library returns."""

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import tiny_models

import spectral_sinks as ss

CELLS, WINDOWS = 6, 4


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    checkpoint = tiny_models.save(folder / "model")
    text = folder / "text.jsonl"
    text.write_text(
        "".join(json.dumps({"text": tiny_models.text(80, seed)}) + "\n" for seed in range(WINDOWS))
    )
    path = folder / "bands.toml"
    path.write_text(
        f'model = "{checkpoint}"\nbatch_size = 2\n[texts]\ntext = "{text}"\nlength = 66\n'
        '[[grid]]\nlayer = [0, 1, 2]\nremove = "dark"\ncontrols = 1\n'
    )
    return path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], file: Path) -> Callable[..., tiny_models.Ran]:
    return lambda *arguments: tiny_models.run(capsys, "sweep", file, *arguments)


@pytest.fixture
def found(run: Callable[..., tiny_models.Ran]) -> Callable[..., Any]:
    """Run with --json; the one object that it prints."""

    def call(*arguments: object) -> Any:
        ran = run(*arguments, "--json")
        assert (ran.status, ran.err) == (0, "") and ran.out.count("\n") == 1
        return json.loads(ran.out, parse_constant=pytest.fail)

    return call


def test_a_dry_run(run: Any, found: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    planned = found("--dry-run")
    assert (planned["cells"], planned["windows"], planned["units"]) == (CELLS, WINDOWS, 3 * 2)
    assert planned["floor"] > 0 and planned["forwards"] > 0 and planned["layers"] == 3
    assert found("--dry-run", "--shard", "1/3")["units"] == 2
    shown = run("--dry-run")
    assert shown.status == 0 and "6 cells x 4 windows in 6 units" in " ".join(shown.out.split())
    assert list(tmp_path.iterdir()) == [tmp_path / "cache"], "nothing but the cached spectrum is written"
    found("--shard", "1/3")
    assert found("--dry-run")["units"] == 4, "what is missing"
    assert found("--dry-run", "--fresh")["units"] == 6
    assert len(ss.sweeps.Store(tmp_path / "runs" / "bands").finished()) == 2 * 2 * 2


def test_a_run_and_another(
    run: Any, found: Any, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first = found()
    assert first["out"] == "runs/bands", "by default"
    assert (first["computed"], first["found"]) == (CELLS * WINDOWS, 0) and first["of_floor"] > 0
    done = ss.sweep(file, tmp_path / "library")
    assert ss.sweeps.Store("runs/bands").rows().equals(done.store.rows())
    assert first["cells"] == json.loads(json.dumps(done.summary().to_dict("records")))
    assert first["cells"][0]["draw"] is None and first["cells"][1]["draw"] == 0
    second = found("--resume")
    assert (second["computed"], second["found"], second["of_floor"]) == (0, CELLS * WINDOWS, None)
    assert second["cells"] == first["cells"]
    fresh = found("--fresh", "--out", "runs/bands")
    assert fresh["computed"] == CELLS * WINDOWS
    shown = " ".join(run("--out", "runs/bands").out.split())
    assert "all 24 cells x windows are in runs/bands" in shown and "24 were there" in shown
    assert "exit 0: Rnd 2 (seed 0)" in shown and "6 cells in runs/bands" in shown
    again = " ".join(run("--fresh").out.split())
    assert "6 cells x 4 windows in 6 units" in again and "times the floor" in again


def test_shards_and_merge(found: Any, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, folders = tmp_path / "whole", [tmp_path / "1", tmp_path / "2"]
    found("--out", whole)
    for folder in folders:
        found("--out", folder, "--shard", f"{folder.name}/2")
    ran = tiny_models.run(capsys, "merge", tmp_path / "merged", *folders, "--json")
    expected = {"out": str(tmp_path / "merged"), "cells": CELLS, "rows": CELLS * WINDOWS}
    assert (ran.status, ran.err, json.loads(ran.out)) == (0, "", expected)
    assert ss.sweeps.Store(tmp_path / "merged").rows().equals(ss.sweeps.Store(whole).rows())
    assert found("--out", tmp_path / "merged")["computed"] == 0
    shown = tiny_models.run(capsys, "merge", tmp_path / "merged", folders[0])
    assert shown.status == 0 and "24" in shown.out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shard", "2"], "shard '2': expected i/n, such as 1/4"),
        (["--shard", "a/b"], "shard 'a/b': expected i/n"),
        (["--shard", "1/4/2"], "shard '1/4/2'"),
        (["--shard", "0/4"], "shard 0/4: expected 1/4 to 4/4"),
        (["--shard", "5/4", "--fresh"], "shard 5/4: expected 1/4 to 4/4"),
        (["--shard", "5/4", "--dry-run"], "shard 5/4"),
        (["--resume", "--fresh"], "give --resume or --fresh, not both"),
        (["--workers", "2", "--dask", "tcp://127.0.0.1:1"], "give --workers or --dask, not both"),
        (["--workers", "-1"], "--workers -1: give at least 0"),
        (["--devices", "cpu"], "--devices are assigned to workers: give --workers as well"),
        (["--workers", "1", "--devices", "nowhere:0"], "device 'nowhere:0' cannot be used"),
    ],
)
def test_bad_options(run: Any, tmp_path: Path, options: list[str], message: str) -> None:
    ran = run("--out", tmp_path / "out", *options)
    assert ran.status == 2 and ran.out == ""
    assert ran.err.startswith("spectral-sinks: error: ") and ran.err.count("\n") == 1
    assert message in ran.err and not (tmp_path / "out").exists()


def test_bad_files_and_folders(
    capsys: pytest.CaptureFixture[str], file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bad.toml").write_text("[[grid]]\nlayers = 3")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    out = tmp_path / "out"
    for arguments, message in (
        (["sweep", tmp_path / "no.toml"], "no.toml cannot be read: No such file"),
        (["sweep", tmp_path / "bad.toml", "--out", out], "bad.toml: grid.0.layers is not known here: "),
        (["sweep", file, "--out", tmp_path / "other"], "holds other things than sweep results"),
        (["sweep", file, "--out", tmp_path / "bad.toml"], "bad.toml cannot be read as a folder"),
        (["sweep", file, "--out", tmp_path / "bad.toml", "--dry-run"], "cannot be read as a folder"),
        (["merge", out, tmp_path / "nowhere"], "nowhere holds no sweep results"),
        (["merge", out], "folders"),
    ):
        ran = tiny_models.run(capsys, *arguments)
        assert ran.status == 2 and message in ran.err, ran.err
    assert not out.exists()

    mkdir = Path.mkdir

    def refuse(path: Path, *arguments: Any, **options: Any) -> None:
        if path.is_relative_to(out):
            raise PermissionError(errno.EACCES, "Permission denied")
        mkdir(path, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", refuse)
    ran = tiny_models.run(capsys, "sweep", file, "--out", out)
    assert ran.status == 2 and "read-only (Permission denied): give a folder that can be written" in ran.err


@pytest.mark.parametrize("command", ["sweep", "merge"])
def test_help(capsys: pytest.CaptureFixture[str], command: str) -> None:
    ran = tiny_models.run(capsys, command, "--help")
    assert ran.status == 0 and "--json" in ran.out and ("--shard" in ran.out) == (command == "sweep")
