"""The experiment on models without BOS: what it marks, deals, removes and says, on several models."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from support import tiny_models
from support.tiny_study import run, study

import spectral_sinks as ss
from spectral_sinks.experiments import find_experiment

SCRIPT = find_experiment("no_bos").__globals__


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> ss.experiments.Study:
    return study(tiny_models.model(), tmp_path_factory.mktemp("no_bos"))


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_no_bos(family: str, tmp_path: Path) -> None:
    answers = run("no_bos", study(tiny_models.model(family), tmp_path, draws=2))
    layer = pd.read_csv(tmp_path / "no_bos.csv")
    name = tiny_models.model(family).name
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


def test_bos_is_cut_off_and_compared(given: ss.experiments.Study, tmp_path: Path) -> None:
    bare, full = SCRIPT["cases"](given).values()
    for a, b in zip(bare.windows.rows, full.windows.rows, strict=True):
        assert torch.equal(a, b[1:]) and b[0] == tiny_models.BOS
    windows = ss.Windows.of_ids([row[1:] for row in given.windows.rows], given.model)
    alone = SCRIPT["cases"](
        ss.experiments.Study(given.model, windows, given.unembedding, given.embedding, tmp_path, given.draws)
    )
    assert [name.split(", ")[1] for name in alone] == ["without BOS"], "nothing to compare with"


def test_the_embedded_model_has_its_twin(tmp_path: Path) -> None:
    sinklet = ss.load()
    windows = ss.cut(ss.documents(limit=2), sinklet, length=70, per_document=1)
    spectrum = ss.read_spectrum(sinklet)
    cases = SCRIPT["cases"](ss.experiments.Study(sinklet, windows, spectrum, spectrum, tmp_path))
    assert list(cases) == ["sinklet-nobos", "sinklet, with BOS"]
    twin = cases["sinklet-nobos"]
    assert twin.unembedding.fingerprint != spectrum.fingerprint, "its own dark band"
    text = sinklet.tokenizer.decode(windows.rows[0][1:])
    assert twin.model.tokenizer.decode(twin.windows.rows[0]) == text


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
