"""The experiment on models without BOS: what it marks, deals, removes and says, on several models."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from studies import run, study

import spectral_sinks as ss
from spectral_sinks.study import find_experiment

SCRIPT = find_experiment("no_bos").__globals__


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> ss.Study:
    return study(tiny.model(), tmp_path_factory.mktemp("no_bos"))


@pytest.fixture(scope="module")
def table(given: ss.Study) -> pd.DataFrame:
    return SCRIPT["attended"](given)


@pytest.fixture(scope="module")
def inner(given: ss.Study, table: pd.DataFrame) -> pd.DataFrame:
    return SCRIPT["candidates"](table)


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_no_bos(family: str, tmp_path: Path) -> None:
    answers = run("no_bos", study(tiny.model(family), tmp_path, draws=2))
    layer = pd.read_csv(tmp_path / "no_bos.csv")
    name = tiny.model(family).name
    assert layer["model"].unique().tolist() == [f"{name}, without BOS", f"{name}, with BOS"]
    assert layer["layer"].tolist() == [0, 1, 2, 0, 1, 2]
    pair = answers.loc["excess of dark share with BOS minus without, paired by document", "value"]
    dark, bare = (
        answers.loc[f"{name}, {way}: dark share of the most attended above their matches, mean over layers"]
        for way in ("with BOS", "without BOS")
    )
    assert pair == pytest.approx(dark["value"] - bare["value"], abs=1e-9)
    assert dark["low"] <= dark["value"] <= dark["high"]
    assert (layer["p_holm"] >= layer["p"]).all() and layer["p"].between(0, 1).all()
    assert np.allclose(layer["excess"], layer["top"] - layer["matched"], atol=0.1)
    tokens = pd.read_csv(tmp_path / "no_bos_tokens.csv")
    assert tokens["top"].sum() == pytest.approx(0.05 * tokens["pairs"].sum(), rel=0.1)
    assert len(pd.read_csv(tmp_path / "no_bos_nll.csv")) == 3
    assert (tmp_path / "no_bos.png").stat().st_size > 10_000


def test_bos_is_cut_off_and_compared(given: ss.Study, tmp_path: Path) -> None:
    bare, full = SCRIPT["cases"](given).values()
    for a, b in zip(bare.windows.rows, full.windows.rows, strict=True):
        assert torch.equal(a, b[1:]) and b[0] == tiny.BOS
    windows = ss.Windows.of_ids([row[1:] for row in given.windows.rows], given.model)
    alone = SCRIPT["cases"](
        ss.Study(given.model, windows, given.unembedding, given.embedding, tmp_path, given.draws)
    )
    assert [name.split(", ")[1] for name in alone] == ["without BOS"], "nothing to compare with"


def test_the_embedded_model_has_its_twin(tmp_path: Path) -> None:
    sinklet = ss.load()
    windows = ss.cut(ss.documents(limit=2), sinklet, length=70, per_document=1)
    spectrum = ss.read_spectrum(sinklet)
    cases = SCRIPT["cases"](ss.Study(sinklet, windows, spectrum, spectrum, tmp_path))
    assert list(cases) == ["sinklet-nobos", "sinklet, with BOS"]
    twin = cases["sinklet-nobos"]
    assert twin.unembedding.fingerprint != spectrum.fingerprint, "its own dark band"
    text = sinklet.tokenizer.decode(windows.rows[0][1:])
    assert twin.model.tokenizer.decode(twin.windows.rows[0]) == text


def test_relative_attention_is_that_of_a_loop(given: ss.Study, table: pd.DataFrame) -> None:
    """From eager maps: later queries only, over what each would give if it looked evenly; 1 where all do."""
    ids = given.windows.rows[1]
    with torch.no_grad():
        maps = tiny.plain()(ids[None], output_attentions=True).attentions
    own = table[(table["window"] == 1) & (table["layer"] == 2)].set_index("position")
    for k in (0, 5, 40):
        later = range(k + 1, len(ids))
        attention = np.mean([float(maps[2][0, :, i, k].mean()) for i in later])
        even = np.mean([1 / (i + 1) for i in later])
        assert own.loc[k, "relative"] == pytest.approx(attention / even, rel=1e-4)
    assert (own["late"] == (own.index >= 35)).all()


def test_labels_stay_in_their_stratum(inner: pd.DataFrame) -> None:
    part = inner[inner["layer"] == 1]
    drawn = [SCRIPT["shuffled"](part, seed) for seed in range(200)]
    count = part["top"].groupby(part["stratum"]).sum()
    for dealt in drawn[:20]:
        assert (pd.Series(dealt, part.index).groupby(part["stratum"]).sum() == count).all()
    assert any((dealt != part["top"]).any() for dealt in drawn)
    chance = part.groupby("stratum")["top"].transform("mean")
    assert np.mean(drawn, axis=0) == pytest.approx(chance.to_numpy(), abs=0.2), "each with the same chance"


def test_a_planted_difference_is_found_and_its_absence_too(inner: pd.DataFrame) -> None:
    rng = np.random.default_rng(0)
    noise = inner.assign(dark=rng.random(len(inner)))
    assert (SCRIPT["darkness"](noise)[0]["p_holm"] > 0.05).all()
    found, excess = SCRIPT["darkness"](noise.assign(dark=0.1 * noise["dark"] + noise["top"]))
    assert (found["p_holm"] < 0.05).all() and found["excess"].to_numpy() == pytest.approx(1, abs=0.1)
    assert found["excess"].mean() == pytest.approx(excess.mean(), abs=0.01)
    # darkness of frequent tokens, not of attended ones
    frequent = noise.assign(dark=noise["stratum"] + 0.01 * noise["dark"])
    assert SCRIPT["darkness"](frequent)[0]["excess"].abs().max() < 0.02


def test_the_band_leaves_these_tokens_only(given: ss.Study, inner: pd.DataFrame) -> None:
    effects = SCRIPT["removal"](given, inner)
    assert set(effects["kind"]) == {"most attended", "matched", "random"}
    top = inner[inner["top"] & (inner["layer"] == 2)]
    own = effects[(effects["layer"] == 2) & (effects["kind"] == "most attended")].set_index("document")
    for document in (0, 3):
        alone = ss.Windows.of_ids([given.windows.rows[document]], given.model, [document])
        places = top[top["document"] == document]["position"].tolist()
        edit = ss.remove(given.unembedding.dark(), tokens=ss.At(*places))
        direct = ss.evaluate(given.model, alone, {ss.Site("exit", 1): edit})
        assert own.loc[document, "delta_nll"] == pytest.approx(direct.delta_nll, abs=1e-5)


def test_the_verdict_follows_the_numbers() -> None:
    layer = pd.DataFrame({"model": "m", "p_holm": [0.01, 0.01], "low": [0.2, 0.3], "random_high": 0.1})
    cost = pd.DataFrame({"p_matched_holm": [0.01, 0.2], "above_matched_low": [0.1, 0.1]})
    verdict = SCRIPT["verdict"]
    assert verdict(0, layer, cost).startswith("holds: m has no sink(s)")
    assert verdict(2, layer, cost).endswith("in 1 of 2")
    assert verdict(2, layer.assign(low=[0.05, 0.3]), cost).startswith("holds partly")
    assert verdict(2, layer.assign(p_holm=0.06), cost).startswith("does not hold here")
    assert verdict(2, layer.assign(random_high=0.4), cost).startswith("does not hold here")


def test_checkpoints_in_one_table(tmp_path: Path) -> None:
    options = SCRIPT["Options"](("sinklet-nobos", "sinklet"), tmp_path, documents=2, draws=1)
    SCRIPT["main"](options)
    found = pd.read_csv(tmp_path / "no_bos_more.csv").set_index("model")
    assert found.index.tolist() == ["sinklet-nobos", "sinklet", "mean", "low", "high"]
    pair = found.loc[["sinklet-nobos", "sinklet"], "relative"]
    assert found.loc["mean", "relative"] == pytest.approx(pair.mean(), rel=1e-4)
    half = 12.706 * (pair.max() - pair.min()) / 2  # t of one degree of freedom, 0.975
    assert found.loc["high", "relative"] - pair.mean() == pytest.approx(half, rel=1e-3)
