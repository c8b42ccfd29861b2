"""Experiments side by side give what they give one after the other."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import psutil
import pytest
from support import tiny_models, tiny_study

import spectral_sinks as ss
from spectral_sinks import experiments


def test_side_by_side_gives_the_tables_of_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiments, "EXPERIMENTS", ("spectrum", "weights"))
    ended: list[str] = []
    beside = ss.reproduce(
        out=tmp_path / "beside", documents=2, jobs=2, progress=lambda found: ended.append(found.name)
    )
    ss.reproduce(ss.load(), out=tmp_path / "alone", documents=2)
    assert [found.name for found in beside] == ["spectrum", "weights"] == sorted(ended)
    assert all(found.seconds > 0 for found in beside)
    tables = sorted(path.name for path in (tmp_path / "alone").glob("*.csv"))
    assert tables == sorted(path.name for path in (tmp_path / "beside").glob("*.csv"))
    assert {"spectrum_summary.csv", "weights.csv", "weights_summary.csv"} <= set(tables)
    for name in tables:
        pd.testing.assert_frame_equal(
            *(pd.read_csv(tmp_path / side / name) for side in ("beside", "alone")), rtol=1e-4
        )
    assert set(pd.read_csv(tmp_path / "alone" / "weights_summary.csv")["convention"]) == {"raw"}
    manifests = [json.loads((tmp_path / side / "manifest.json").read_text()) for side in ("beside", "alone")]
    assert manifests[0] == manifests[1] and manifests[0]["experiments"] == ["spectrum", "weights"]


@pytest.mark.parametrize(
    ("name", "tables"),
    [
        ("bos", ["bos", "bos_bands"]),
        ("sink", ["sink_removal"]),
        ("circuits", ["circuits"]),
        ("several", ["several_tokens", "several_dark", "several_curve"]),
        ("no_bos", ["no_bos", "no_bos_tokens", "no_bos_nll"]),
        ("across", ["across"]),
    ],
)
def test_a_table_with_a_dark_share_names_its_convention(name: str, tables: list[str], tmp_path: Path) -> None:
    model = tiny_models.model()
    given = replace(
        tiny_study.study(model, tmp_path, draws=2), unembedding=ss.read_spectrum(model, convention="folded")
    )
    tiny_study.run(name, given)
    for table in tables:
        assert set(pd.read_csv(tmp_path / f"{table}.csv")["convention"]) == {"folded"}, table


def test_an_error_of_an_experiment_reaches_the_caller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model of one layer has no exit below its sink."""
    monkeypatch.setattr(experiments, "EXPERIMENTS", ("reads",))
    folder = tmp_path / "model"
    tiny_models.build(num_hidden_layers=1).save_pretrained(folder)
    tiny_models.tokenizer().save_pretrained(folder)
    with pytest.raises(ss.InputError, match="has one layer"):
        ss.reproduce(str(folder), tmp_path / "out", documents=2, jobs=2)


def test_fewer_than_one_job_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ss.InputError, match="0 jobs"):
        ss.reproduce(out=tmp_path, jobs=0)


@pytest.mark.parametrize(
    ("busy", "gigabytes", "jobs"), [(0, 64, 8), (5, 64, 3), (8, 64, 1), (0, 3.2, 3), (0, 0.1, 1)]
)
def test_jobs_are_the_idle_cores_that_the_memory_can_serve(
    monkeypatch: pytest.MonkeyPatch, busy: int, gigabytes: float, jobs: int
) -> None:
    monkeypatch.setattr(experiments.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    percent = [97.0] * busy + [3.0] * (8 - busy)
    monkeypatch.setattr(psutil, "cpu_percent", lambda interval, percpu: percent)
    memory = SimpleNamespace(available=int(gigabytes * 2**30))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    assert experiments.idle_jobs(tiny_models.model()) == jobs


def test_a_table_holds_no_formulas(tmp_path: Path) -> None:
    given = pd.DataFrame(
        {"text": ["=1+1", "-2+3", "+x", "@y", "\tz", "plain", None], "value": [-1.5, 2, 3, 4, 5, 6, np.nan]}
    )
    study = ss.experiments.Study.__new__(ss.experiments.Study)
    object.__setattr__(study, "out", tmp_path)
    assert study.save(given, "table") is given and given["text"][0] == "=1+1", (
        "the table itself is not changed"
    )
    found = pd.read_csv(tmp_path / "table.csv")
    assert list(found["text"][:6]) == ["'=1+1", "'-2+3", "'+x", "'@y", "'\tz", "plain"]
    assert found["text"].isna()[6] and found["value"].equals(given["value"])
