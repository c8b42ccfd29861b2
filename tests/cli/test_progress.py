"""Signs of life on standard error: a line now and then, and the cost of a large text before its results."""

import time

import pytest
from support import tiny_models

import spectral_sinks as ss
from spectral_sinks.cli import progress


def test_a_line_now_and_then(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.02)
    with progress.alive("sinks"):
        time.sleep(0.1)
        progress.note("3 of 8 passes")
        time.sleep(0.1)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "spectral-sinks: sinks has run for 0 s"
    assert lines[-1] == "spectral-sinks: sinks has run for 0 s: 3 of 8 passes"
    time.sleep(0.1)
    assert capsys.readouterr().err == "", "and none after the end"


def test_a_terminal_has_bars(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.01)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with progress.alive("sinks"):
        time.sleep(0.05)
    assert capsys.readouterr().err == ""


def test_the_cost_of_a_large_text(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_models.model()
    windows = ss.cut([tiny_models.text(200)], model, length=20, per_document=None)
    progress.say_cost(model, windows, None)
    assert capsys.readouterr().err == "", "a small text is not announced"
    monkeypatch.setattr(progress, "LARGE", 200)
    progress.say_cost(model, windows, None)
    said = capsys.readouterr().err
    assert said.startswith(
        "spectral-sinks: 10 windows of 1 document, 200 tokens: the model takes about 0 s to"
    )
    assert "--per-document" in said and said.count("\n") == 1


def test_times_in_the_unit_that_reads_best() -> None:
    assert [progress.spoken(s) for s in (0.2, 90, 150, 7300)] == ["0 s", "90 s", "2 min", "2 h"]
