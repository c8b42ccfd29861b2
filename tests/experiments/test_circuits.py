"""The experiment on no-op circuits: a random model has none, and the table is that of the public call."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from support import tiny_models
from support.tiny_study import run, study

import spectral_sinks as ss


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_circuits(family: str, tmp_path: Path) -> None:
    given = study(tiny_models.model(family), tmp_path)
    answers = run("circuits", given)
    direct = ss.no_op_circuits(given.model, given.windows, given.unembedding)
    table = pd.read_csv(tmp_path / "circuits.csv")
    assert len(table) == given.model.layers * given.model.heads, "no twin of another model"
    assert np.allclose(table["attention"], direct.heads["attention"], atol=1e-5)
    assert answers.iloc[0]["value"] == len(direct.found) == 0
    assert (tmp_path / "circuits.png").stat().st_size > 10_000
