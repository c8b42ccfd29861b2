"""SmolLM2-135M and Gemma 3 270M: against plain transformers in float64, and the sinks that they have."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import spectral_sinks as ss

FIRST = {"smollm2": ("The", [504]), "gemma3": ("The", [2, 818])}
"""The ids of a text: SmolLM2's file adds no BOS, and Gemma's does."""

OPENS = {"smollm2": False, "gemma3": True}


@pytest.fixture(scope="module", params=["smollm2", "gemma3"])
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def file(name: str, real_model: Callable[[str], Path]) -> Path:
    return real_model(name)


@pytest.fixture(scope="module")
def model(file: Path) -> ss.LanguageModel:
    return ss.load(file)


@pytest.fixture(scope="module")
def windows(model: ss.LanguageModel) -> ss.Windows:
    return ss.cut(ss.documents(limit=4), model, length=64, per_document=1)


@pytest.fixture(scope="module")
def spectra(file: Path) -> list[ss.Spectrum]:
    """Folded and raw: the decompositions take longer than what is measured with them."""
    return ss.read_spectra(file, use_cache=False)


def test_tokenizer_opens_as_the_file_says(name: str, model: ss.LanguageModel) -> None:
    text, ids = FIRST[name]
    assert model.tokenizer(text)["input_ids"] == ids
    assert model.opens_with_bos == OPENS[name]


def test_numbers_are_split_into_digits(model: ss.LanguageModel) -> None:
    tokenizer = model.tokenizer
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("in 1984")["input_ids"])
    assert tokens[-4:] == ["1", "9", "8", "4"]


def test_nll_is_that_of_plain_transformers(
    name: str, file: Path, model: ss.LanguageModel, windows: ss.Windows
) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, attn_implementation="sdpa"
    ).double()
    ids = torch.stack(list(windows.rows))
    with torch.no_grad():
        logits = theirs(ids).logits[:, :-1].transpose(1, 2)
    expected = torch.nn.functional.cross_entropy(logits, ids[:, 1:])
    found = ss.evaluate(model, windows, {}).baseline_nll
    assert found == pytest.approx(float(expected), abs=1e-4)


def test_bos_is_missed_where_it_was_trained(name: str, model: ss.LanguageModel) -> None:
    windows = ss.cut(ss.documents(limit=4), model, length=64, bos="never")
    found = ss.nll.compare_bos(model, windows)
    assert found is not None
    if name == "gemma3":
        assert found.worse_by > 1
        assert "--bos always" in str(found.advice)
    else:
        assert abs(found.worse_by) < 0.2
        assert found.advice is None


def test_position_0_is_the_sink(name: str, model: ss.LanguageModel, spectra: list[ss.Spectrum]) -> None:
    windows = ss.cut(ss.documents(limit=16), model, length=64, per_document=1)
    (folded,) = (spectrum for spectrum in spectra if spectrum.convention == "folded")
    found = ss.find_sinks(model, windows, folded, draws=5)
    first = next(sink for sink in found.sinks if sink.position == 0)
    assert first.documents == 16
    assert found.sink_rate.value == pytest.approx({"smollm2": 0.72, "gemma3": 0.77}[name], abs=0.08)
    assert first.dark
    assert first.dark_share.value > 0.8
    tokens = {sink.token for sink in found.sinks if sink.position is None}
    assert (" the" in tokens) == (name == "smollm2")


def test_the_convention_decides_whether_the_sink_is_dark(
    name: str, model: ss.LanguageModel, windows: ss.Windows, spectra: list[ss.Spectrum]
) -> None:
    found = ss.sink_verdict(model, windows, spectra, draws=3)
    folded, raw = (found.conventions[convention] for convention in ("folded", "raw"))
    assert found.convention == "folded"
    assert folded.share.low > max(folded.share.most, folded.others.high)
    assert raw.share.high < raw.share.most
    assert folded.share.value > 10 * raw.share.value
    assert raw.verdict == "not dark"
    # the removal of the band cuts the sink of SmolLM2 beyond random subspaces, and not that of Gemma
    assert folded.verdict == {"smollm2": "dark", "gemma3": "not dark"}[name]
    assert ("sink cut" in folded.reason) and ("dark share" in folded.reason) == (name == "smollm2")


def test_quantisation_of_the_unembedding_leaves_the_dark_band(file: Path) -> None:
    assert ss.describe(file)["quantization"] == "Q8_0"
