"""The ladder's table against effects evaluated one by one; files that are written whole or not at all."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from support import tiny_models

import spectral_sinks as ss
from spectral_sinks.experiments import Finding, _together, _verdicts
from spectral_sinks.files import atomic_write

SITE = ss.Site("exit", 0)


@pytest.fixture(scope="module")
def model() -> ss.LanguageModel:
    return tiny_models.model()


@pytest.fixture(scope="module")
def windows(model: ss.LanguageModel) -> ss.Windows:
    return ss.Windows.of_ids(tiny_models.ids(4, 66), model)


@pytest.fixture(scope="module")
def spectra(model: ss.LanguageModel) -> tuple[ss.Spectrum, ss.Spectrum]:
    u, e = (
        ss.read_spectrum(model, matrix, bands=4, use_cache=False) for matrix in ("unembedding", "embedding")
    )
    return u, e


@pytest.fixture(scope="module")
def table(
    model: ss.LanguageModel, windows: ss.Windows, spectra: tuple[ss.Spectrum, ss.Spectrum]
) -> pd.DataFrame:
    calls: list[int] = []
    made = ss.sweeps.ladder(
        model, windows, SITE, *spectra, random_at=(2, 3, 9), draws=3, progress=calls.append
    )
    assert sum(calls) == 4 + 4 + 3 + 2 * 3, "one batch of every cell"
    return made


def test_its_rows(table: pd.DataFrame) -> None:
    found = set(zip(table["filter"], table["kept"], strict=True))
    expected = {(f, k) for f in ("Phi", "Psi") for k in (1, 2, 3, 4)}
    assert found == expected | {("Omega", k) for k in (1, 2, 3)} | {("Rnd", 2), ("Rnd", 3)}
    assert set(table["site"]) == {"exit"} and set(table["layer"]) == {0} and set(table["n"]) == {4}
    by = table.set_index(["filter", "kept"])
    assert by.loc[("Phi", 3), "rank"] == by.loc[("Rnd", 3), "rank"] == 8
    assert by.loc[("Omega", 1), "rank"] == 16
    for name in ("Phi", "Psi"):
        assert by.loc[(name, 4), "mean"] == 0 and by.loc[(name, 4), "removed_energy_share"] == 0
    assert (by.loc["Phi", "removed_energy_share"].diff().dropna() < 0).all(), "less and less is removed"


def test_a_row_is_an_effect(
    table: pd.DataFrame,
    model: ss.LanguageModel,
    windows: ss.Windows,
    spectra: tuple[ss.Spectrum, ss.Spectrum],
) -> None:
    u, e = spectra
    by = table.set_index(["filter", "kept"])
    for key, chosen in {
        ("Phi", 2): ss.phi(u, 1, 2),
        ("Psi", 2): ss.psi(u, e, 2),
        ("Omega", 2): ss.omega(u, 2),
    }.items():
        effect, row = ss.evaluate(model, windows, {SITE: chosen}), by.loc[key]
        assert effect.sink_mass is not None and effect.baseline_sink_mass is not None
        assert row["mean"] == pytest.approx(effect.delta_nll)
        assert (row["low"], row["high"]) == pytest.approx(effect.delta_nll_interval)
        assert row["sink"] == pytest.approx(np.mean(effect.sink_mass[1:])), "of the layers above"
        assert row["baseline_sink"] == pytest.approx(np.mean(effect.baseline_sink_mass[1:]))
    drawn = [ss.evaluate(model, windows, {SITE: ss.rnd(32, 16, seed)}) for seed in range(3)]
    deltas, row = [effect.delta_nll for effect in drawn], by.loc[("Rnd", 2)]
    assert (row["least"], row["mean"], row["most"]) == pytest.approx(
        (min(deltas), np.mean(deltas), max(deltas))
    )
    sinks = [np.mean(effect.sink_mass[1:]) for effect in drawn if effect.sink_mass]
    assert (row["sink_least"], row["sink"], row["sink_most"]) == pytest.approx(
        (min(sinks), np.mean(sinks), max(sinks))
    )


def test_above_the_last_layer_there_is_no_sink(
    model: ss.LanguageModel, windows: ss.Windows, spectra: tuple[ss.Spectrum, ss.Spectrum]
) -> None:
    table = ss.sweeps.ladder(model, windows, ss.Site("exit", 2), *spectra, random_at=(2,), draws=2)
    assert table["sink"].isna().all() and table["baseline_sink"].isna().all()


def test_a_file_is_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    with atomic_write(path) as temporary:
        temporary.write_text("old")
        assert not path.exists()
    assert path.read_text() == "old"

    def stopped() -> None:
        with atomic_write(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_the_manifest_gathers_runs_on_the_same_things_alone(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    assert _together(path, {"model": "a"}, ["bos"]) == ["bos"]
    path.write_text(json.dumps({"model": "a", "experiments": ["bos", "sink"]}))
    assert _together(path, {"model": "a"}, ["spectrum"]) == ["spectrum", "sink", "bos"]
    assert _together(path, {"model": "b"}, ["spectrum"]) == ["spectrum"]
    path.write_text("{")
    assert _together(path, {"model": "a"}, ["bos"]) == ["bos"]


def test_verdicts_of_runs_are_gathered_in_order(tmp_path: Path) -> None:
    path = tmp_path / "verdicts.csv"
    assert _verdicts(path, [Finding([], "bos")], ["bos"]).empty
    first = _verdicts(path, [Finding([], "sink", verdict="holds: so")], ["sink"])
    first.to_csv(path, index=False)
    both = _verdicts(path, [Finding([], "bos", verdict="holds partly: here")], ["sink", "bos"])
    assert list(both["experiment"]) == ["sink", "bos"] and both["verdict"].iloc[0] == "holds: so"
    assert list(_verdicts(path, [Finding([], "bos", verdict="no")], ["bos"])["experiment"]) == ["bos"]
    again = _verdicts(path, [Finding([], "sink", verdict="does not hold here: no")], ["sink"])
    assert list(again["verdict"]) == ["does not hold here: no"]
