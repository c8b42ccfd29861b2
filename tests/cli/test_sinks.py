"""`spectral-sinks sinks`: what it prints is what the library returns, and what it cannot measure it says."""

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support import tiny_chats, tiny_models

import spectral_sinks as ss

Run = Callable[..., tiny_models.Ran]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save(tmp_path_factory.mktemp("checkpoint") / "model")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(tiny_models.text(90, seed) for seed in range(4)))
    return path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], checkpoint: Path, text: Path) -> Run:
    def call(*options: object) -> tiny_models.Ran:
        given = ["--text", text, "--separator", r"\n\n"]
        return tiny_models.run(capsys, "sinks", checkpoint, *given, *options)

    return call


def test_json_is_the_library_s(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "sinks.png"
    done = run("--length", 40, "--epsilon", 0.07, "--draws", 2, "--json", "--figure", path)
    assert (done.status, done.err) == (0, "") and done.out.count("\n") == 1
    record = json.loads(done.out)
    model = ss.load(checkpoint)
    windows = ss.cut([tiny_models.text(90, seed) for seed in range(4)], model, length=40)
    found = ss.find_sinks(model, windows, ss.read_spectra(model), length=40, epsilon=0.07, draws=2)
    expected = json.loads(json.dumps(found.record())) | {"model": record["model"]}
    assert expected["sinks"] and {key: record[key] for key in expected} == expected
    assert (record["documents"], record["windows"], record["first_token_ids"]) == (4, 8, [0])
    assert path.stat().st_size > 10_000
    svg = path.with_suffix(".svg")
    run("--length", 40, "--epsilon", 0.07, "--draws", 2, "--figure", svg)
    assert svg.read_text().startswith("<?xml")


def test_an_exported_rule_is_the_library_s(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    options = ("--length", 40, "--epsilon", 0.07, "--draws", 0, "--export", tmp_path / "rule")
    assert run(*options).status == 0
    model = ss.load(checkpoint)
    rule = ss.SinkRule.load(tmp_path / "rule")
    windows = ss.cut([tiny_models.text(90, seed) for seed in range(4)], model, length=40)
    spectra = ss.read_spectra(model)
    found = ss.find_sinks(model, windows, spectra, length=40, epsilon=0.07, draws=0)
    own = ss.SinkRule.learn(model, found, spectra)
    assert rule.record() | {"model": own.model} == own.record() and set(rule.dark) == {"folded", "raw"}
    ids = windows.rows[0][None]
    assert torch.equal(ss.sink_mask(model, ids, rule), ss.sink_mask(model, ids, own))
    (tmp_path / "file").write_text("")
    done = run("--length", 40, "--epsilon", 0.07, "--draws", 0, "--export", tmp_path / "file")
    assert done.status == 2 and "cannot be written" in done.err
    done = run("--length", 40, "--epsilon", 0.99, "--draws", 0, "--export", tmp_path / "none")
    assert done.status == 2 and "no sink was found" in done.err and not (tmp_path / "none").exists()


def test_tables_for_people(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    done = run("--epsilon", 0.07, "--draws", 2)
    assert done.status == 0
    for words in (
        "T = 64, epsilon = 0.07",
        "sink rate at position 0",
        "learned sink logit",
        "'<bos>'",
        "dark share",
    ):
        assert words in done.out, done.out
    assert "\x1b" not in done.out, "colours are for terminals"
    monkeypatch.setenv("COLUMNS", "80")
    lines = run("--epsilon", 0.07, "--draws", 2).out.splitlines()
    rows = lines[next(i for i, line in enumerate(lines) if "Sinks, at the layer" in line) :]
    assert all(len(line) <= 80 for line in lines)
    assert all(re.match(r" ?(\d+|'|any)", line) for line in rows if "[" in line), "a sink has one line"
    assert "no sinks" in run("--epsilon", 0.99, "--draws", 2).out


@pytest.fixture(scope="module")
def chat_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_chats.save(tmp_path_factory.mktemp("checkpoint") / "chats")


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": chat, "text": "unread"}) + "\n" for chat in CHATS))
    return path


CHATS = [
    [{"role": "user", "content": f"What is {n}?"}, {"role": "assistant", "content": "A number. " * 5}]
    for n in range(4)
]


def test_chats(
    capsys: pytest.CaptureFixture[str],
    chat_checkpoint: Path,
    chats: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    given = ["sinks", chat_checkpoint, "--text", chats, "--chat", "--epsilon", 0.07, "--draws", 2]
    record = json.loads(tiny_models.run(capsys, *given, "--json").out)
    model = ss.load(chat_checkpoint)
    windows = ss.cut(CHATS, model, chat=True, length=64)
    found = ss.find_sinks(model, windows, ss.read_spectrum(model, convention="folded"), epsilon=0.07, draws=2)
    assert record["roles"] == json.loads(json.dumps(found.by_role().to_dict("records")))
    assert {row["role"] for row in record["roles"]} == {"template", "user", "assistant"}
    assert (record["documents"], record["data_hash"]) == (4, windows.record["data_hash"])
    shown = tiny_models.run(capsys, *given).out
    for words in ("Attention by role", "share of attention", "template", "assistant", "4 documents"):
        assert words in shown, shown


def test_chats_that_are_refused(
    run: Run, capsys: pytest.CaptureFixture[str], chat_checkpoint: Path, chats: Path
) -> None:
    assert "has no chat template: take a chat model" in run("--chat").err
    given = ["sinks", chat_checkpoint, "--text", chats, "--chat"]
    done = tiny_models.run(capsys, *given, "--bos", "never")
    assert done.status == 2 and "bos 'never' for chats" in done.err and done.err.count("\n") == 1
    done = tiny_models.run(capsys, *given[:-1], "--column", "messages")
    assert done.status == 2 and "document 0 is list, expected a string (for chats" in done.err


def test_the_embedded_model(capsys: pytest.CaptureFixture[str]) -> None:
    done = tiny_models.run(capsys, "sinks", "--documents", 4, "--json")
    record = json.loads(done.out)
    assert [(s["position"], s["token"], s["dark"]) for s in record["sinks"]] == [(0, "<bos>", True)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--length", 200], "model has a context of 128"),
        (["--length", 1], "windows of 1 tokens: nothing is left"),
        (["--epsilon", 1.5], "--epsilon 1.5: give 0 to 1"),
    ],
)
def test_what_is_refused(run: Run, options: list[object], message: str) -> None:
    done = run(*options)
    assert done.status == 2 and done.out == "" and done.err.count("\n") == 1
    assert message in done.err


def test_a_text_of_one_document_and_one_of_one_token(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(warnings, "warn", lambda message, *_, **__: said.append(message))
    one = tmp_path / "one.txt"
    one.write_text(tiny_models.text(400))
    record = json.loads(run("--text", one, "--json", "--draws", 2).out)
    assert record["documents"] == record["windows"] == 6 and "intervals are over its windows" in said[0]
    one.write_text("w5")
    done = run("--text", one)
    assert done.status == 2 and "shorter than two tokens" in done.err
