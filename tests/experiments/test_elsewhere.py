"""Experiments on a model that is elsewhere: the same answers, or one sentence."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support import tiny_models, tiny_study

import spectral_sinks as ss
from spectral_sinks.experiments import find_experiment


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> ss.experiments.Study:
    return tiny_study.study(tiny_models.model(), tmp_path_factory.mktemp("study"), draws=2)


@pytest.mark.parametrize("name", ["weights", "swap", "fills", "reads", "circuits", "designated", "no_bos"])
def test_answers_are_the_same(name: str, here: ss.experiments.Study) -> None:
    there = replace(here, model=ss.load(here.model, remote="local"))
    one, other = (tiny_study.run(name, study)["value"] for study in (here, there))
    assert there.model.remote is not None and there.model.remote.jobs
    assert (one - other).abs().max() < 1e-6


def test_a_measurement_of_an_experiments_own_is_the_same(here: ss.experiments.Study, tmp_path: Path) -> None:
    several = find_experiment("several").__globals__
    site, cells = ss.Site("exit", 0), [((), {}), ((ss.attention.MaskKey(0),), {}), ((), {})]
    cells[2] = ((), {site: ss.remove(here.unembedding.dark())})
    there = ss.load(here.model, remote="local")
    for cell in cells:
        one, other = (several["observe"](model, here.windows, cell) for model in (here.model, there))
        assert one.keys() == other.keys()
        assert all(np.abs(one[name] - other[name]).max() < 1e-6 for name in one)
