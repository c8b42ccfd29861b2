"""The experiments on swaps, sink-preserving filters, fills, controls and reads, on several models."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from support import tiny_models
from support.tiny_study import run, study

import spectral_sinks as ss
from spectral_sinks.experiments import find_experiment


def table(path: Path) -> pd.DataFrame:
    found = pd.read_csv(path)
    assert np.isfinite(found["mean"]).all()
    return found


def test_swap(tmp_path: Path) -> None:
    given = study(tiny_models.model("gpt2"), tmp_path)
    answers = run("swap", given)
    steps = table(tmp_path / "swap_steps.csv")
    assert set(steps["setting"]) == {"with BOS", "without BOS"}
    assert "swap" not in set(steps[steps["setting"] == "without BOS"]["way"]), "position 0 is exempt there"
    last = steps[(steps["setting"] == "with BOS") & (steps["step"] == "last step")].set_index(
        ["layer", "way"]
    )
    u, site = given.unembedding, ss.Site("exit", 1)
    for way, edit in {
        "zero": ss.phi(u, 1, 19),
        "zero, first token": ss.phi(u, 1, 19).at("first"),
        "swap": ss.phi(u, 1, 19).filled(ss.Swap()),
    }.items():
        direct = ss.evaluate(given.model, given.windows, {site: edit})
        assert last.loc[(1, way), "mean"] == pytest.approx(direct.delta_nll, abs=1e-5)
    idle = answers[answers.index.str.contains("swap of position 0 alone")]
    assert len(idle) == 1 and idle["value"].iloc[0] < 1e-5
    assert (tmp_path / "swap.png").stat().st_size > 10_000


def test_sink_preserving(tmp_path: Path) -> None:
    given = study(tiny_models.model(), tmp_path)
    run("sink_preserving", given)
    costs = table(tmp_path / "sink_preserving.csv")
    kept = costs[(costs["kind"] == "tail kept") & (costs["where"] == "exit 0")]
    row = kept[kept["deleted"] == 3].iloc[0]
    d, tail = tiny_models.D, given.unembedding.dark().rank
    edit = ss.remove(given.unembedding.directions(d - tail - 3, d - tail, "three above the tail"))
    direct = ss.evaluate(given.model, given.windows, {ss.Site("exit", 0): edit})
    assert row["mean"] == pytest.approx(direct.delta_nll, abs=1e-5)

    saved = pd.read_csv(tmp_path / "sink_preserving_saved.csv")
    dropped = costs[(costs["kind"] == "tail dropped") & (costs["where"] == "exit 0")].set_index("deleted")
    first = saved[(saved["where"] == "exit 0") & (saved["against"] == "tail dropped")].iloc[0]
    assert first["mean"] == pytest.approx(
        dropped.loc[first["deleted"], "mean"] - kept.set_index("deleted").loc[first["deleted"], "mean"],
        abs=1e-5,
    )
    within = pd.read_csv(tmp_path / "sink_preserving_within.csv")
    assert ((within["low"] <= within["mean"]) & (within["mean"] <= within["high"])).all()
    plans = pd.read_csv(tmp_path / "sink_preserving_schedules.csv")
    chosen = plans[~plans["kind"].str.startswith("random")]
    assert (chosen["chosen_at"] <= chosen["budget"] + 1e-9).all(), (
        "no schedule beyond its budget where chosen"
    )
    assert (tmp_path / "sink_preserving.png").stat().st_size > 10_000


def test_fills(tmp_path: Path) -> None:
    given = study(tiny_models.model("qwen2"), tmp_path)
    answers = run("fills", given)
    rows = table(tmp_path / "fills.csv")
    layer, u = int(rows["layer"].iloc[0]), given.unembedding
    site = ss.Site("exit", layer)
    mean = ss.Mean(ss.mean_residual(given.model, given.windows, site))
    direct = ss.evaluate(given.model, given.windows, {site: ss.phi(u, 1, 19).filled(mean)})
    key = f"exit {layer}: last band, fill mean"
    assert answers.loc[key, "value"] == pytest.approx(direct.delta_nll, abs=1e-5)
    assert (rows.groupby(["layer", "fill"])["kept"].nunique() == 19).all(), "the whole ladder"
    assert (tmp_path / "fills.png").stat().st_size > 10_000


def test_controls(tmp_path: Path) -> None:
    given = study(tiny_models.model(), tmp_path)
    run("controls", given)
    rows = table(tmp_path / "controls.csv")
    dark = rows[rows["control"] == "dark"].set_index(["layer", "tokens"])["removed_energy_share"]
    for (layer, tokens), draws in rows[rows["control"] == "same energy"].groupby(["layer", "tokens"]):
        assert np.allclose(draws["removed_energy_share"], dark[(layer, tokens)], rtol=0.02)
    idle = rows[rows["control"] == "no-op"]
    assert len(idle) and (idle["mean"].abs() < 1e-5).all()
    tests = pd.read_csv(tmp_path / "controls_tests.csv")
    assert (tests["p_null"] >= 1 / 4).all(), "three draws"
    assert (tests["p_sign_flip_holm"] >= tests["p_sign_flip"]).all()
    assert (tmp_path / "controls.png").stat().st_size > 10_000


@pytest.mark.parametrize("family", ["llama", "olmo2"])
def test_reads(family: str, tmp_path: Path) -> None:
    given = study(tiny_models.model(family), tmp_path)
    run("reads", given)
    rows = table(tmp_path / "reads.csv").set_index(["site", "place", "draw"])
    dark = ss.remove(given.unembedding.dark())
    direct = ss.evaluate(given.model, given.windows, {ss.Site("keys", 1): dark})
    assert rows.loc[("keys", "layer 1", "dark"), "mean"] == pytest.approx(direct.delta_nll, abs=1e-5)
    left = (direct.table["sink_mass_1"] / direct.table["baseline_sink_mass_1"]).mean()
    assert rows.loc[("keys", "layer 1", "dark"), "sink_left"] == pytest.approx(left, abs=1e-5)
    assert (tmp_path / "reads.png").stat().st_size > 10_000


def test_the_verdicts_follow_the_numbers() -> None:
    saved = pd.DataFrame({"against": ["a", "a", "b"], "low": [0.1, -0.1, 0.2], "mean": 0.3})
    script = {name: find_experiment(name).__globals__ for name in ("sink_preserving", "fills", "swap")}
    assert script["sink_preserving"]["verdict"](saved).startswith("holds partly: at equal rank")
    assert script["sink_preserving"]["verdict"](saved.assign(low=0.1)).startswith("holds: ")
    assert script["sink_preserving"]["verdict"](saved.assign(low=-1)).startswith("does not hold here")
    assert script["fills"]["verdict"]({(0, "zero"): True, (0, "mean"): False}).endswith(
        "under zero at exit 0"
    )

    ways = ["zero", "zero, first token", "swap"]
    step = pd.DataFrame({"mean": [0.2, 0.1, 0.05], "low": [0.1, 0.05, 0.01]}, index=ways)
    spread = pd.DataFrame({"max": [0.1, 0.05, 0.06]}, index=ways)
    judged = script["swap"]["judged"]
    assert judged(step, spread, "swap").startswith("holds partly"), "the swapped step is not gone"
    assert judged(step.assign(low=[0.1, 0.05, -0.01]), spread, "swap").startswith("holds (")
    assert judged(step, spread + 1, "swap").startswith("does not hold here")
