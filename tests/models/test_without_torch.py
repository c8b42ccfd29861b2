"""A description by a process without torch: the same answers and refusals, and no torch."""

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support import tiny_models

import spectral_sinks as ss
from spectral_sinks.models.without_torch import describe_without_torch

ALL_IN_ONE = """
import io, sys
from spectral_sinks.models.without_torch import print_description
for name in sys.argv[1:]:
    sys.stdin = io.StringIO(repr({"model": name}))
    try:
        print_description()
    except Exception as error:
        print(repr((type(error).__name__,)))
heavy = ("accelerate", "datasets", "fsspec", "gguf", "nnsight", "pandas", "scipy", "torch")
print([name for name in heavy if name in sys.modules])
"""
"""A process that answers for several checkpoints, as `describe_without_torch` starts one for each."""


def changed(folder: Path, saved: Path, **entries: Any) -> str:
    """Make a checkpoint with the files of another, whose config.json has these entries instead."""
    folder.mkdir()
    for file in saved.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((saved / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | entries))
    return str(folder)


def test_a_process_without_torch_answers_as_describe_does_or_not_at_all(tmp_path: Path) -> None:
    saved = {name: tmp_path / name for name in ("gpt2", "bert")}
    for family, folder in saved.items():
        tiny_models.plain(family).save_pretrained(folder)
    tiny_models.tokenizer(opens=False).save_pretrained(saved["gpt2"])
    tiny_models.encoder_tokenizer().save_pretrained(saved["bert"])
    described = ["sinklet", *map(str, saved.values())]
    refused = [
        str(tmp_path),
        changed(tmp_path / "image", saved["bert"], model_type="vit"),
        changed(tmp_path / "code", saved["gpt2"], model_type="own", auto_map={"AutoConfig": "own.Own"}),
        changed(tmp_path / "classes", saved["bert"], architectures=["BertForSequenceClassification"]),
    ]
    unsure = [
        changed(tmp_path / "dtype", saved["gpt2"], dtype="float99"),
        changed(tmp_path / "width", saved["gpt2"], n_embd="wide"),
    ]
    ran = subprocess.run(
        [sys.executable, "-c", ALL_IN_ONE, *described, *refused, *unsure],
        capture_output=True,
        text=True,
        check=True,
    )
    *told, heavy = map(ast.literal_eval, ran.stdout.splitlines())
    assert heavy == []
    assert told[:3] == [ss.describe(name) for name in described]
    for name, said in zip(refused, told[3:7], strict=True):
        with pytest.raises(ss.InputError) as error:
            ss.describe(name)
        assert said == str(error.value)
    assert told[7:] == [("UnreadableError",)] * 2
    for name in unsure:
        with pytest.raises(ss.InputError, match="cannot be read"):
            ss.describe(name)


def test_the_process_is_started() -> None:
    assert describe_without_torch("sinklet") == ss.describe("sinklet")


def test_what_the_process_tells(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def tells(status: int, said: str) -> None:
        ran = subprocess.CompletedProcess([], status, said, "a note of a library\n")
        monkeypatch.setattr(subprocess, "run", lambda *_, **__: ran)

    tells(0, "a line of a library\n{'layers': 3}\n")
    assert describe_without_torch("sinklet") == {"layers": 3}
    assert capsys.readouterr().err == "a note of a library\n"
    tells(0, "'it is no model'\n")
    with pytest.raises(ss.InputError, match="it is no model"):
        describe_without_torch("sinklet")
    capsys.readouterr()
    tells(1, "")
    assert describe_without_torch("sinklet") is None
    assert capsys.readouterr().err == "", "describe will say it"


def test_gguf_files_need_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", None)
    (tmp_path / "model.gguf").touch()
    assert describe_without_torch(tmp_path) is None
    assert describe_without_torch(tmp_path / "model.gguf") is None
    assert describe_without_torch("some/name", gguf_file="model.gguf") is None
