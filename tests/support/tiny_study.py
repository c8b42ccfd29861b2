"""A study of a tiny model, and its answers: what the tests of experiments run on."""

from pathlib import Path

import numpy as np
import pandas as pd

import spectral_sinks as ss
from spectral_sinks.experiments import find_experiment
from support import tiny_models


def study(model: ss.LanguageModel, out: Path, tokens: int = 70, draws: int = 3) -> ss.experiments.Study:
    rows = tiny_models.ids(4, tokens, seed=1)
    spectra = [ss.read_spectrum(model, name) for name in ("unembedding", "embedding")]
    return ss.experiments.Study(model, ss.Windows.of_ids(rows, model), spectra[0], spectra[1], out, draws)


def run(name: str, given: ss.experiments.Study) -> pd.DataFrame:
    answers = pd.DataFrame(find_experiment(name)(given).answers)
    assert np.isfinite(answers["value"]).all()
    return answers.set_index("quantity")
