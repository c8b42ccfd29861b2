"""`spectral-sinks quantise`: what it prints is what the library returns."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from support import tiny_models

import spectral_sinks as ss

Run = Callable[..., tiny_models.Ran]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*options: object) -> tiny_models.Ran:
        few = ["--documents", 2, "--per-document", 1, "--draws", 1]
        return tiny_models.run(capsys, "quantise", *few, *options)

    return call


def test_json_is_the_library_s(run: Run, tmp_path: Path) -> None:
    model = ss.load()
    spectra = ss.read_spectra(model)
    texts = ss.documents(limit=4)
    others = ss.cut(texts[2:], model, length=64, per_document=1)
    rule = ss.SinkRule.learn(model, ss.find_sinks(model, others, spectra, draws=0), spectra)
    rule.save(tmp_path / "rule")
    figure = tmp_path / "quantise.png"
    done = run("--bits", "4", "--rule", tmp_path / "rule", "--figure", figure, "--json")
    assert (done.status, done.err) == (0, "") and done.out.count("\n") == 1
    record = json.loads(done.out)
    windows = ss.cut(texts[:2], model, length=64, per_document=1)
    report = ss.sinks.quantisation_report(model, windows, rule, spectra, bits=(4,), draws=1)
    expected = json.loads(json.dumps(report.record()))
    for name in ("rows", "by_site", "angles"):
        assert len(record[name]) == len(expected[name])
        for row, other in zip(record[name], expected[name], strict=True):
            assert row == pytest.approx({k: v if v == v else None for k, v in other.items()}, abs=1e-6)
    assert record["channels"] == report.channels and record["documents"] == 2
    assert figure.stat().st_size > 20_000


def test_the_rule_is_learned_on_the_text_without_another(run: Run) -> None:
    done = run("--bits", 8, "--alone")
    assert done.status == 0, done.err
    assert (
        "int8 per tensor  sink tokens" in done.out and "dark folded" in done.out and "NLL alone" in done.out
    )
    assert max(map(len, done.out.splitlines())) <= 80


def test_bad_input_is_one_sentence(run: Run, tmp_path: Path) -> None:
    for options, said in (
        (("--bits", "1"), "1 bits: give 2 to 24"),
        (("--bits", "eight"), "--bits 'eight': give numbers of bits"),
        (("--bits", ""), "--bits '': give numbers of bits"),
        (("--rule", tmp_path), "holds no rule"),
        (("--figure", "x.doc"), "x.doc"),
        (("--by", "name"), "choose from"),
    ):
        done = run(*options)
        assert done.status == 2 and said in done.err and done.err.count("\n") == 1, done.err
