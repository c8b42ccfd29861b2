"""GGUF files: the same model as the one that was written, its tokenizer's flags, and what is refused."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from support.gguf_files import byte_vocabulary, small_gemma3, small_llama, write_gguf
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import spectral_sinks as ss
from spectral_sinks.models.gguf import GgufFile, VocabularyReader
from spectral_sinks.models.spectra import quantization_noise

MAKERS = {
    "llama": small_llama,
    "untied": lambda: small_llama(tie_word_embeddings=False),
    "gemma3": small_gemma3,
}
IDS = torch.arange(3, 23).view(1, -1)


@pytest.mark.parametrize("name", MAKERS)
def test_the_model_of_a_file_is_the_model_that_was_written(name: str, tmp_path: Path) -> None:
    written = MAKERS[name]()
    loaded = ss.load(write_gguf(tmp_path / "x.gguf", written))
    torch.testing.assert_close(loaded.module(IDS).logits, written(IDS).logits, rtol=0, atol=0)
    assert loaded.tied == (name != "untied")
    assert loaded.dtype == torch.float32


def test_a_quantised_file_is_what_transformers_reads_from_it(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "x.gguf", small_llama(), stored=GGMLQuantizationType.Q8_0)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="x.gguf", dtype=torch.float32)
    loaded = ss.load(file)
    torch.testing.assert_close(loaded.module(IDS).logits, theirs(IDS).logits, rtol=0, atol=0)
    assert not loaded.module.is_quantized
    loaded.module.save_pretrained(tmp_path / "saved")
    assert torch.equal(
        ss.load(tmp_path / "saved", tokenizer=loaded.tokenizer).unembedding_weight, loaded.unembedding_weight
    )


@pytest.mark.parametrize("shown", [True, False])
def test_the_progress_bar_of_a_file_obeys_the_switch_of_transformers(
    shown: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = write_gguf(tmp_path / "x.gguf", small_llama())
    before = logging.is_progress_bar_enabled()
    (logging.enable_progress_bar if shown else logging.disable_progress_bar)()
    try:
        ss.load(file)
    finally:
        (logging.enable_progress_bar if before else logging.disable_progress_bar)()
    assert ("GGUF tensors" in capfd.readouterr().err) == shown


def test_the_dtype_is_the_one_that_is_asked_for(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "x.gguf", small_llama(), stored=GGMLQuantizationType.Q8_0)
    assert ss.load(file, dtype="bfloat16").dtype == torch.bfloat16


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("convention", ["raw", "folded", "centred"])
def test_spectrum_of_the_file_is_that_of_the_model(name: str, convention: Any, tmp_path: Path) -> None:
    written = MAKERS[name]()
    file = write_gguf(tmp_path / "x.gguf", written, stored=GGMLQuantizationType.Q8_0)
    weight = ss.load(file).unembedding_weight.double()
    gain = written.model.norm.weight.double() + (name == "gemma3")
    if convention != "raw":
        weight = weight * gain
    if convention == "centred":
        weight = weight - weight.mean(0)
    found = ss.read_spectrum(file, convention=convention, use_cache=False)
    np.testing.assert_allclose(found.values, torch.linalg.svdvals(weight).detach(), rtol=1e-7)


def test_the_spectrum_builds_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_gguf(tmp_path / "x.gguf", small_llama())

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was built")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    assert ss.read_spectrum(file, use_cache=False).d == 32


@pytest.mark.parametrize(
    ("flags", "first", "last"),
    [
        ({}, 259, 20),  # llama.cpp opens no byte-level text by default
        ({"add_bos_token": False}, 259, 20),
        ({"add_bos_token": True}, 1, 20),
        ({"pre": "llama-bpe"}, 1, 20),
        ({"pre": "llama-bpe", "add_bos_token": False}, 259, 20),
        ({"add_bos_token": True, "add_eos_token": True}, 1, 2),
    ],
)
def test_tokenizer_opens_and_closes_as_the_file_says(
    flags: dict[str, Any], first: int, last: int, tmp_path: Path
) -> None:
    file = write_gguf(tmp_path / "x.gguf", small_llama(), **flags)
    model = ss.load(file)
    ids = model.tokenizer("ab2")["input_ids"]
    assert (ids[0], ids[-1]) == (first, last)
    assert model.opens_with_bos == (first == 1) == ss.describe(file)["opens_with_bos"]
    assert ss.cut("ab" * 9, model, length=8).opens_with_bos == (first == 1)


def test_pre_tokenizer_is_the_one_of_the_file(tmp_path: Path) -> None:
    tokens = byte_vocabulary()
    for pre, parts in (("gpt-2", ["12"]), ("smollm", ["1", "2"]), ("refact", ["1", "2"])):
        model = ss.load(write_gguf(tmp_path / f"{pre}.gguf", small_llama(), pre=pre))
        assert [tokens[i] for i in model.tokenizer("12")["input_ids"]] == parts


def test_an_unknown_pre_tokenizer_is_said(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "x.gguf", small_llama(), pre="chess")
    with pytest.warns(ss.SpectralWarning, match="'chess', which is not known here"):
        ss.load(file)


def test_description_names_the_quantisation_of_each_kind_of_tensor(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "x.gguf", small_llama(), stored=GGMLQuantizationType.Q8_0)
    found = ss.describe(file)
    assert found["quantization"] == "Q8_0"
    assert found["quantizations"]["attn_q"] == "Q8_0"
    assert found["quantizations"]["attn_norm"] == "F32"
    assert (found["layers"], found["d_model"], found["vocabulary"], found["tied"]) == (2, 32, 261, True)
    assert ss.describe()["quantization"] is None


def test_dequantised_tensor_is_within_half_a_step_of_the_written_one(tmp_path: Path) -> None:
    written = small_llama()
    file = GgufFile(write_gguf(tmp_path / "x.gguf", written, stored=GGMLQuantizationType.Q8_0))
    weight = written.model.embed_tokens.weight.detach()
    step = weight.abs().view(len(weight), -1, 32).amax(-1, keepdim=True) / 127
    error = (file.tensor("token_embd.weight") - weight).abs().view(len(weight), -1, 32)
    rounded = weight.abs().view(len(weight), -1, 32) * 2**-11  # the step itself is stored in half precision
    assert (error <= 0.5 * step + 1.01 * rounded).all()


def test_a_folder_with_one_file_needs_no_name_and_with_several_it_does(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", small_llama())
    assert ss.load(tmp_path).layers == 2
    write_gguf(tmp_path / "b.gguf", small_llama(num_hidden_layers=3))
    with pytest.raises(ss.InputError, match=r"several GGUF files \(a.gguf, b.gguf\): name one"):
        ss.load(tmp_path)
    assert ss.load(tmp_path, gguf_file="b.gguf").layers == 3
    assert ss.describe(tmp_path, gguf_file="b.gguf")["layers"] == 3
    assert ss.read_spectrum(tmp_path, gguf_file="a.gguf", use_cache=False).d == 32
    with pytest.raises(ss.InputError, match=r"holds no file 'c\.gguf'"):
        ss.load(tmp_path, gguf_file="c.gguf")
    small_llama().save_pretrained(tmp_path)
    assert ss.load(tmp_path).name == str(tmp_path)  # a Hugging Face checkpoint comes first


def test_long_arrays_are_left_out_and_short_ones_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_gguf(tmp_path / "x.gguf", small_llama())
    whole = {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}
    assert whole == GgufFile(file).metadata
    monkeypatch.setattr("spectral_sinks.models.gguf.LONG", 100)
    short = GgufFile(file)
    assert short.metadata == {
        name: value
        for name, value in whole.items()
        if name not in ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type")
    }
    torch.testing.assert_close(short.tensor("output_norm.weight"), small_llama().model.norm.weight.data)
    read = VocabularyReader(file).fields
    assert {name: field.contents() for name, field in read.items()} == whole
    assert isinstance(read["tokenizer.ggml.tokens"].parts[-1], memoryview)
    assert ss.load(file).vocabulary == len(byte_vocabulary())
    assert gguf.GGUFReader.__module__.startswith("gguf")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.02, 0.5, 0.999])
def test_a_truncated_file_is_refused_in_one_sentence(share: float, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "x.gguf", small_llama())
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    for act in (ss.load, ss.describe, ss.read_spectrum):
        with pytest.raises(ss.InputError, match=r"truncated or damaged|is not a GGUF file") as caught:
            act(file)
        assert "\n" not in str(caught.value)


def test_what_is_not_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(ss.InputError, match="is not a GGUF file"):
        ss.load(tmp_path / "x.gguf")
    with pytest.raises(ss.InputError, match="does not exist"):
        ss.load(tmp_path / "y.gguf")


def test_an_unknown_architecture_is_refused_in_one_sentence(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "x.gguf", small_llama(), architecture="rwkv7")
    with pytest.raises(ss.InputError, match="'rwkv7', which transformers cannot read from GGUF"):
        ss.load(file)


def test_a_part_of_a_split_file_is_refused_and_the_missing_part_named(tmp_path: Path) -> None:
    first = write_gguf(tmp_path / "m-00001-of-00002.gguf", small_llama(), split_count=2)
    with pytest.raises(ss.InputError, match=r"2 parts, and m-00002-of-00002\.gguf is missing"):
        ss.load(first)
    write_gguf(tmp_path / "m-00002-of-00002.gguf", small_llama(), split_count=2)
    with pytest.raises(ss.InputError, match="llama-gguf-split --merge"):
        ss.load(tmp_path)


def test_a_gguf_file_is_not_for_a_server(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "x.gguf", small_llama())
    for given in ({"model": file}, {"model": "a/b", "gguf_file": "x.gguf"}):
        with pytest.raises(ss.InputError, match="in this process alone"):
            ss.load(**given, remote=True)


def test_a_configuration_beside_a_gguf_file_is_no_checkpoint(tmp_path: Path) -> None:
    small_llama().config.save_pretrained(tmp_path)
    write_gguf(tmp_path / "x.gguf", small_llama(num_hidden_layers=3))
    assert ss.load(tmp_path).layers == 3


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_step_is_that_of_the_rounding_that_was_made(kind: str, tmp_path: Path) -> None:
    written = small_llama(vocab_size=200, hidden_size=128)
    stored = GGMLQuantizationType[kind]
    file = GgufFile(write_gguf(tmp_path / "x.gguf", written, stored=stored))
    error = file.tensor("token_embd.weight") - written.model.embed_tokens.weight.detach()
    step = file.steps("token_embd.weight")
    assert step is not None
    uniform = (step.square().mean() / 12).sqrt()
    assert float(error.square().mean().sqrt() / uniform) == pytest.approx(1, abs=0.1)


def test_quantisation_noise_of_a_file(tmp_path: Path) -> None:
    written = small_llama(hidden_size=64)
    angles = {}
    for kind in ("Q4_0", "Q8_0", "F32"):
        file = write_gguf(tmp_path / f"{kind}.gguf", written, stored=GGMLQuantizationType[kind])
        spectrum = ss.read_spectrum(file, convention="folded", use_cache=False)
        noise = quantization_noise(file, spectrum)
        assert noise is not None
        assert noise.smallest == spectrum.values[-1]
        angles[kind] = noise.largest_angle
    assert angles["Q4_0"] > 5 * angles["Q8_0"] > 25 * angles["F32"]
    assert quantization_noise(ss.DEFAULT, spectrum) is None


def test_a_type_without_even_spacing_has_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = GgufFile(write_gguf(tmp_path / "x.gguf", small_llama()))
    monkeypatch.setattr(GgufFile, "quantization", lambda *_: "IQ4_NL")
    assert file.steps("token_embd.weight") is None
