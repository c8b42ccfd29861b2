"""The experiments on masks, clean directions, writers and heads, on the embedded model."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from support.tiny_study import run

import spectral_sinks as ss
from spectral_sinks.experiments import find_experiment


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> ss.experiments.Study:
    model = ss.load()
    windows = ss.cut(ss.documents(limit=3), model, length=64, per_document=1)
    spectra = [ss.read_spectrum(model, name) for name in ("unembedding", "embedding")]
    return ss.experiments.Study(model, windows, *spectra, tmp_path_factory.mktemp("use"), 2)


def test_unseen_documents_are_others(study: ss.experiments.Study) -> None:
    unseen = study.unseen(times=2)
    assert len(unseen) == 6 and unseen.length == 64 and unseen.opens_with_bos
    own = {tuple(row.tolist()) for row in study.windows.rows}
    assert not own & {tuple(row.tolist()) for row in unseen.rows}
    assert study.sink_rule.positions == (0,) and set(study.sink_rule.dark) == {"folded", "raw"}


def test_masks(study: ss.experiments.Study) -> None:
    answers = run("masks", study)
    rule, ids = study.sink_rule, torch.stack(study.windows.rows)
    with torch.no_grad():
        states = study.model.module(ids, output_hidden_states=True).hidden_states
    x = states[rule.index()].double().flatten(0, 1)
    energy = (x - x.mean(0)).square().sum(1)
    share = energy.view(3, 64)[:, 0].sum() / energy.sum()
    name = f"{rule.site}: share of the variance that they hold"
    assert answers.loc[name, "value"] == pytest.approx(float(share), rel=1e-4)
    values = torch.linalg.svdvals(x - x.mean(0)).square()
    table = pd.read_csv(study.out / "masks_residuals.csv").set_index("tokens")
    assert table.loc["all", "first_component"] == pytest.approx(float(values[0] / values.sum()), rel=1e-4)
    assert len(table.loc["random"]) == 2


def test_writers_and_pruning(study: ss.experiments.Study) -> None:
    answers = run("writers", study)
    found = ss.spike_writers(study.model, study.windows, counts=(1,), draws=1)
    assert answers.loc["cosine of it with the carrier", "value"] == pytest.approx(found.cosine)
    pruned = run("pruning", replace(study, draws=1))
    table = pd.read_csv(study.out / "pruning.csv").set_index(["order", "removed"])
    every = ss.evaluate(
        study.model,
        study.windows,
        {ss.Site("attention", layer): torch.zeros_like for layer in range(study.model.layers)},
    )
    assert table.loc[("attention", 24), "delta_nll"] == pytest.approx(every.delta_nll, rel=1e-4)
    assert len(pruned) == 3 * 3


def test_steering(study: ss.experiments.Study, tmp_path: Path) -> None:
    answers = run("steering", replace(study, draws=1, out=tmp_path))
    shares = pd.read_csv(tmp_path / "steering_shares.csv").set_index(["vector", "part"])
    assert answers.loc["raw vector: share in carrier", "value"] == pytest.approx(
        shares.loc[("raw", "carrier"), "share"], rel=1e-4
    )
    table = pd.read_csv(tmp_path / "steering.csv")
    assert np.isfinite(table["delta_nll"]).all() and set(table["dose"]) == {1.0, 2.0}


def test_quantisation(study: ss.experiments.Study) -> None:
    experiment: Any = find_experiment("quantisation")
    found = experiment(replace(study, draws=1), alone=())
    answers = pd.DataFrame(found.answers).set_index("quantity")
    assert np.isfinite(answers["value"]).all() and answers.index.is_unique
    rounded = ss.spectra.FakeQuantiser(8)
    sites = [ss.Site("embedding"), *(ss.Site("exit", layer) for layer in range(study.model.layers))]
    effect = ss.evaluate(study.model, study.windows, dict.fromkeys(sites, rounded))
    name = "activations, int8 per tensor, nothing spared: NLL difference"
    assert answers.loc[name, "value"] == pytest.approx(effect.delta_nll, abs=1e-6)
    assert found.verdict.startswith("holds: int8 with one step per tensor costs")
    assert len(pd.read_csv(study.out / "quantisation_angles.csv")) == 4 * 3 * 4
    assert study.figure("quantisation").stat().st_size > 20_000
