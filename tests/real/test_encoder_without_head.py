"""all-MiniLM-L6-v2, a BERT without a head: against plain transformers, and the sinks that it has."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel

import spectral_sinks as ss


@pytest.fixture(scope="module")
def folder(real_model: Callable[[str], Path]) -> Path:
    return real_model("minilm")


@pytest.fixture(scope="module")
def model(folder: Path) -> ss.LanguageModel:
    return ss.load(folder)


@pytest.fixture(scope="module")
def windows(model: ss.LanguageModel) -> ss.Windows:
    return ss.cut(ss.documents(limit=4), model, length=64, per_document=1)


def test_attention_is_that_of_plain_transformers(
    folder: Path, model: ss.LanguageModel, windows: ss.Windows
) -> None:
    theirs = AutoModel.from_pretrained(folder, attn_implementation="eager")
    ids = torch.stack(list(windows.rows))
    with torch.no_grad():
        maps = theirs(ids, output_attentions=True).attentions
    found = ss.attention.attention_by_position(model, windows).alpha
    expected = torch.stack([layer.mean(2) for layer in maps], 1)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_cls_is_the_sink_and_sep_is_not(folder: Path, model: ss.LanguageModel, windows: ss.Windows) -> None:
    assert windows.opens_with_bos and windows.record["closes_with_sep"]
    alpha = ss.attention.attention_by_position(model, windows).alpha.mean((0, 2))
    assert alpha[1:5, 0].min() > 0.35 and alpha[0, 0] < 0.15
    assert alpha[:, -1].max() < 2 / 64, "twice uniform attention"
    with pytest.warns(ss.SpectralWarning, match="bands are those of the embedding"):
        spectra = ss.read_spectra(folder)
    found = ss.find_sinks(model, windows, spectra, draws=3)
    assert [sink.token for sink in found.sinks] == ["[CLS]"]


def test_an_nll_is_refused(model: ss.LanguageModel, windows: ss.Windows) -> None:
    with pytest.raises(ss.InputError, match="needs a head over the vocabulary"):
        ss.evaluate(model, windows, {})
