"""Experiments on a model that is elsewhere: the same answers, or one sentence."""

from dataclasses import replace
from pathlib import Path

import pytest
import studies
import tiny

import spectral_sinks as ss
from spectral_sinks.study import find_experiment


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> ss.Study:
    return studies.study(tiny.model(), tmp_path_factory.mktemp("study"), draws=2)


@pytest.mark.parametrize("name", ["swap", "sink_preserving", "fills", "controls", "reads"])
def test_answers_are_the_same(name: str, here: ss.Study) -> None:
    there = replace(here, model=ss.load(here.model, remote="local"))
    one, other = (studies.run(name, study)["value"] for study in (here, there))
    assert there.model.remote is not None and there.model.remote.jobs
    assert (one - other).abs().max() < 1e-6


@pytest.mark.parametrize("name", ["circuits", "designated"])
def test_what_changes_attention_is_refused(name: str, here: ss.Study, tmp_path: Path) -> None:
    there = replace(here, model=ss.load(here.model, remote="local"), out=tmp_path)
    with pytest.raises(ss.InputError, match="acts on attention in this process"):
        find_experiment(name)(there)
