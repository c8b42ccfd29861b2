"""Bad input: status 2, one line on standard error that helps, nothing on standard output, nothing left."""

import errno
import functools
import json
import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import tiny_models

import spectral_sinks as ss
from spectral_sinks import cli
from spectral_sinks.models import checkpoint as source
from spectral_sinks.spectra import cache

Run = Callable[..., tiny_models.Ran]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    return functools.partial(tiny_models.run, capsys)


@pytest.fixture
def refused(run: Run) -> Callable[..., str]:
    """Run what must be refused; the message."""

    def call(*arguments: object) -> str:
        done = run(*arguments)
        assert done.status == 2 and done.out == ""
        assert done.err.startswith("spectral-sinks: error: ") and done.err.count("\n") == 1
        return done.err.removeprefix("spectral-sinks: error: ").strip()

    return call


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save(tmp_path_factory.mktemp("checkpoint") / "model")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint to spoil."""
    return tiny_models.save(tmp_path / "spoiled")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(tiny_models.text(80, seed) for seed in range(4)))
    return path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layer", "1", "--remove", "21"], "bands 21 to 21: the spectrum has bands 1 to 20"),
        (["--layer", "1", "--keep", "0-3"], "bands 0 to 3: the spectrum has bands 1 to 20"),
        (["--layer", "1", "--keep", "8-3"], "bands 8 to 3"),
        (["--layer", "1", "--remove", "darkest"], "'darkest' in 'darkest' is not a band specification: use "),
        (["--layer", "1", "--remove", "random:33"], "a random subspace of rank 33: expected 0 to 32"),
        (["--layer", "1", "--remove", "dark:1.5"], "dark 1.5"),
        (["--layer", "1", "--remove", "dark", "--keep", "1"], "--keep or --remove, not both"),
        (["--layer", "3", "--remove", "dark"], "has layers 0 to 2"),
        (["--layer", "-1", "--remove", "dark"], "has layers 0 to 2"),
        (["--layer", "1", "--remove", "dark", "--site", "head:4"], "has heads 0 to 3"),
        (["--layer", "1", "--remove", "dark", "--site", "nowhere"], "choose from embedding, queries"),
        (["--layer", "1", "--remove", "dark", "--site", "head"], "Site('head', layer, head)"),
        (["--layer", "1", "--remove", "dark", "--tokens", "some"], "choose from all, first, all-but-first"),
        (["--layer", "1", "--remove", "dark", "--tokens", "ids:x"], "expected ids:5,13"),
        (
            ["--layer", "1", "--remove", "dark", "--tokens", "ids:97"],
            "token id 97 lies outside the vocabulary of 97",
        ),
        (["--layer", "1", "--remove", "dark", "--fill", "swap", "--bos", "never"], "tokens='all-but-first'"),
        (["--remove", "dark", "--length", "30"], "name one with --layer"),
        (["--length", "129"], "windows of 129 tokens"),
        (["--length", "1"], "nothing is left to predict"),
        (["--length", "2"], "nothing is left to predict"),
        (["--bands", "33"], "give 1 to 32 bands"),
        (["--bands", "0"], "give 1 to 32 bands"),
        (["--batch-size", "0"], "batch"),
        (["--per-document", "0"], "--per-document 0: give at least 1"),
        (["--documents", "0"], "document"),
        (["--dtype", "float33"], "float33"),
        (["--device", "abacus"], "abacus"),
        (["--device", "meta"], "device 'meta' holds no weights"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_option_that_cannot_be(
    refused: Callable[..., str], checkpoint: Path, text: Path, arguments: list[str], message: str
) -> None:
    given = ["--text", text, "--separator", "\n\n", *arguments]
    assert message in refused("nll", checkpoint, *given)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the text is empty"),
        (" \n\n ", "the text is empty"),
        ("w5", "shorter than two tokens: 'w5'"),
        ("<bos> w5", "contains '<bos>', which the tokenizer of"),
        (b"\xff\xfe\x00w5", "is not UTF-8 text"),
    ],
)
def test_a_text_that_cannot_be(
    refused: Callable[..., str], checkpoint: Path, tmp_path: Path, content: str | bytes, message: str
) -> None:
    path = tmp_path / "my text.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert message in refused("nll", checkpoint, "--text", path)
    assert message in refused("energy", checkpoint, "--text", path)


@pytest.mark.parametrize(
    "arguments",
    [
        ("info", "~no user/x"),
        ("nll", "sinklet", "--text", "~no user/x"),
        ("vision", "~no user/x", "."),
    ],
)
def test_the_home_of_nobody(refused: Callable[..., str], arguments: Sequence[str]) -> None:
    assert refused(*arguments).startswith("~no user/x cannot be found: ")


def test_images_in_the_home_of_nobody() -> None:
    for read in (ss.images, ss.vision.read_boxes):
        with pytest.raises(ss.InputError, match="no user/x cannot be found"):
            read("~no user/x")


def test_a_message_that_repeats_a_long_value(refused: Callable[..., str]) -> None:
    assert len(refused("nll", "--documents", "1" * 5000)) < 700


def test_what_a_figure_cannot_be_written_over(refused: Callable[..., str], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    for name in ("pipe.png", "folder.png"):
        message = refused("sinks", "--documents", 2, "--figure", tmp_path / name)
        assert message == f"{tmp_path / name} is not a regular file: give another name for the figure"


def test_an_error_of_the_system_names_the_file(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "table.csv")

    monkeypatch.setitem(cli.COMMANDS, "info", (cli.Info, full))
    assert refused("info") == "table.csv: No space left on device"


def test_texts_that_are_not_there(refused: Callable[..., str], checkpoint: Path, tmp_path: Path) -> None:
    assert "the text is empty" in refused("nll", checkpoint, "--text", "")
    assert "does not exist" in refused("nll", checkpoint, "--text", tmp_path / "a text.txt")
    itself = refused("nll", checkpoint, "--text", "What is this")
    assert itself == "What is this does not exist: give a text itself in a list, or to a command as text:..."
    assert "is a folder" in refused("nll", checkpoint, "--text", tmp_path)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"body": "w5 w6 w7"}\n')
    assert "no column 'text'; columns: body" in refused("nll", checkpoint, "--text", rows)
    rows.write_text('{"text": "w5 w')
    assert "cannot be read as json" in refused("nll", checkpoint, "--text", rows)


def test_a_folder_that_is_no_checkpoint(refused: Callable[..., str], tmp_path: Path, text: Path) -> None:
    for command in (["info"], ["spectrum"], ["nll"], ["energy"]):
        assert "config.json" in refused(*command, tmp_path) or "no weights" in refused(*command, tmp_path)
    assert "is a file: give the folder" in refused("info", text)


def test_a_checkpoint_without_weights(refused: Callable[..., str], folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    for command in ("spectrum", "nll", "energy"):
        assert "holds no weights: expected model.safetensors" in refused(command, folder)


@pytest.mark.filterwarnings("ignore:the text is one document")
def test_a_pickled_checkpoint_is_refused_unless_allowed(
    refused: Callable[..., str], run: Run, folder: Path, text: Path
) -> None:
    weights = load_file(folder / "model.safetensors")
    expected = run("spectrum", folder, "--json").out
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    for command in ("spectrum", "nll", "energy"):
        message = refused(command, folder)
        assert "only pickled weights" in message and "--allow-pickle" in message
    with pytest.raises(ss.InputError, match="allow_pickle=True"):
        ss.load(folder)
    assert run("spectrum", folder, "--json", "--allow-pickle").out == expected
    done = run("nll", folder, "--text", text, "--layer", "0", "--remove", "dark", "--allow-pickle", "--json")
    assert done.status == 0 and json.loads(done.out)["rank"] == 2


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(refused: Callable[..., str], folder: Path, value: float) -> None:
    path, name = folder / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    weights = load_file(path)
    weights[name].view(-1)[3] = value
    save_file(weights, path, {"format": "pt"})
    assert f"{name} holds 1 NaN or Inf of 1536 values" in refused("nll", folder)
    weights["lm_head.weight"].view(-1)[3] = value
    save_file(weights, path, {"format": "pt"})
    assert "unembedding holds 1 NaN or Inf" in refused("spectrum", folder)


def test_a_checkpoint_that_runs_code_of_its_own(refused: Callable[..., str], run: Run, folder: Path) -> None:
    (folder / "own.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")
    own = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": own}))
    for command in ("info", "nll", "energy"):
        message = refused(command, folder)
        assert "runs code of its own" in message and "--trust-remote-code" in message
    assert run("spectrum", folder, "--json").status == 0, "one tensor is read, no code is needed"
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("content", ["{", "[]", '{"model_type": "no-such-family"}', "{}"])
def test_a_broken_configuration(refused: Callable[..., str], folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    for command in ("info", "nll", "spectrum"):
        assert "config" in refused(command, folder).lower()


@pytest.mark.filterwarnings("ignore:the text is one document")
def test_a_tokenizer_without_bos(refused: Callable[..., str], run: Run, folder: Path, text: Path) -> None:
    tiny_models.tokenizer(bos=False).save_pretrained(folder)
    assert "has no BOS token: use" in refused("nll", folder, "--text", text, "--bos", "always")
    found = json.loads(run("nll", folder, "--text", text, "--json").out)
    assert not found["opens_with_bos"] and found["first_token_ids"] != [0]


def test_what_only_the_library_can_be_given() -> None:
    model = tiny_models.model()
    for ids, message in (
        ([[0, 97]], "token id 97 lies outside the vocabulary of 97"),
        ([[0, -1]], "token id -1 lies outside"),
        ([[0]], "at least two tokens"),
        ([], "at least one"),
        ([[0] * 129], "context of 128"),
    ):
        with pytest.raises(ss.InputError, match=message):
            ss.Windows.of_ids(ids, model)
    bare = ss.load(tiny_models.build())
    with pytest.raises(ss.InputError, match="without a tokenizer"):
        ss.cut("w5 w6", bare)


def test_names_that_no_hub_knows(refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no-such-owner/no-such-model" in refused("info", "no-such-owner/no-such-model-1")
    assert "neither a folder nor a valid hub id" in refused("info", "./no/such/folder")
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and never answers
        monkeypatch.setattr(
            huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}"
        )
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(source, "TIMEOUT", 0.3)
        assert "the hub cannot be reached" in refused("nll", "no-such-owner/no-such-model-1")


@pytest.mark.filterwarnings("default")
def test_a_cache_that_cannot_be_written_costs_a_warning(
    run: Run, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPECTRAL_SINKS_CACHE", str(tmp_path / "file" / "cache"))
    done = run("spectrum", checkpoint, "--json")
    assert done.status == 0 and json.loads(done.out)["d_model"] == 32
    assert (
        done.err.startswith("spectral-sinks: warning: the spectrum is not cached")
        and done.err.count("\n") == 1
    )
    full = tmp_path / "full"
    monkeypatch.setenv("SPECTRAL_SINKS_CACHE", str(full))
    monkeypatch.setattr(cache, "save_file", half_written)
    done = run("spectrum", checkpoint, "--json")
    assert done.status == 0 and "No space left on device" in done.err
    assert list(full.iterdir()) == []


def half_written(tensors: Any, path: Path, *_: Any, **__: Any) -> None:
    Path(path).write_text("half")
    raise OSError(28, "No space left on device")


def test_a_full_disk_leaves_nothing_half_written(
    refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as disk:
        disk.setattr(pd.DataFrame, "to_csv", half_written)
        assert "No space left on device" in refused(
            "reproduce", "--only", "spectrum", "--out", tmp_path / "a"
        )
    assert list((tmp_path / "a").iterdir()) == []
    with monkeypatch.context() as disk:
        disk.setattr("matplotlib.figure.Figure.savefig", half_written)
        assert "No space left on device" in refused(
            "reproduce", "--only", "spectrum", "--out", tmp_path / "b"
        )
    left = {path.name for path in (tmp_path / "b").iterdir()}
    assert left <= {"spectrum_values.csv", "spectrum_alignment.csv"}


def test_where_results_cannot_go(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        assert str(tmp_path / "file") in refused("reproduce", "--only", "spectrum", "--out", out)
    assert (tmp_path / "file").read_text() == "mine"
    message = refused("reproduce", "--only", "nothing", "--out", tmp_path / "new")
    assert "no experiment 'nothing': choose from spectrum" in message and not (tmp_path / "new").exists()


def test_a_filter_of_another_width(checkpoint: Path) -> None:
    model = ss.load(checkpoint)
    wide = ss.Spectrum(torch.eye(40, dtype=torch.float64), torch.arange(40, 0, -1.0))
    with pytest.raises(ss.InputError, match=r"width 40, .* has width 32"):
        ss.evaluate(
            model, ss.Windows.of_ids(tiny_models.ids(), model), {ss.Site("exit", 0): ss.remove(wide.dark())}
        )
    with pytest.raises(ss.InputError, match="width 40"):
        tiny_models.logits(model, tiny_models.ids(), {ss.Site("exit", 0): ss.remove(wide.dark())})
