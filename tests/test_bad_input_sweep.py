"""Arbitrary input: it works, or one `InputError` says why not, with status 2 and one line for a command."""

import functools
import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support import tiny_models

import spectral_sinks as ss
from spectral_sinks import cli

WORDS = (
    "dark",
    "head",
    "middle",
    "random",
    "all",
    "none",
    "0",
    "1",
    "20",
    "21",
    "0.5",
    "-1",
    "1e999",
    "nan",
    "٣",
)
BANDS = st.one_of(
    st.text(max_size=12), st.lists(st.sampled_from([*WORDS, "-", ",", ":", " "]), max_size=6).map("".join)
)


@contextmanager
def refusals() -> Iterator[None]:
    """Let pass what the package refuses; nothing else may be raised."""
    with suppress(ss.InputError):
        yield


@functools.cache
def spectrum() -> ss.Spectrum:
    return ss.Spectrum.from_matrix(torch.randn(50, 32, generator=torch.Generator().manual_seed(0)))


@settings(max_examples=300)
@given(BANDS)
@example("1-")
@example("dark:")
@example("dark:nan")
@example("random:99999999999999999999999")
@example("9" * 5000)
@example("middle:0.9-0.4")
def test_band_specifications(text: str) -> None:
    with refusals():
        found = spectrum().subspace(text)
        assert 0 <= found.rank <= 32


@settings(max_examples=200)
@given(
    st.one_of(
        st.text(max_size=10), st.lists(st.sampled_from(["head", ":", "exit", "-1", "3", "mlp"])).map("".join)
    ),
    st.integers(),
)
@example("head:" + "9" * 5000, 0)
def test_sites(text: str, layer: int) -> None:
    with refusals():
        ss.Site.parse(text, layer).check(tiny_models.model())


VALUES = st.recursive(
    st.one_of(st.integers(), st.floats(), st.booleans(), st.text("ab[]=\"'\n ", max_size=5)),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=4,
)
FIELDS = (
    "model",
    "texts",
    "spectrum",
    "grid",
    "source",
    "limit",
    "matrix",
    "bands",
    "sites",
    "keep",
    "remove",
)


@settings(max_examples=150)
@given(
    st.one_of(
        st.binary(max_size=60),
        st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=4).map(
            lambda found: "".join(f"{key} = {json.dumps(value)}\n" for key, value in found.items()).encode()
        ),
        st.lists(
            st.tuples(
                st.sampled_from(["[texts]", "[spectrum]", "[[grid]]"]), st.sampled_from(FIELDS), VALUES
            ),
            max_size=4,
        ).map(lambda rows: "".join(f"{a}\n{b} = {json.dumps(c)}\n" for a, b, c in rows).encode()),
    )
)
def test_sweep_files(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "sweep.toml"
    path.write_bytes(content)
    with refusals():
        ss.sweeps.SweepFile.read(path)


ROWS = st.one_of(
    st.text(max_size=8),
    st.dictionaries(st.sampled_from(["text", "messages", "n"]), VALUES, max_size=2).map(json.dumps),
    VALUES.map(json.dumps),
)


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=60)
@given(
    st.one_of(st.binary(max_size=40), st.lists(ROWS, max_size=4).map(lambda rows: "\n".join(rows).encode())),
    st.sampled_from([".jsonl", ".csv", ".txt", ".jsonl.gz"]),
)
@example(b'{"text": "\\ud83d w"}', ".jsonl")
@example(b"\x1f\x8b\x08\x00", ".jsonl.gz")
def test_files_of_texts(tmp_path_factory: pytest.TempPathFactory, content: bytes, end: str) -> None:
    path = tmp_path_factory.getbasetemp() / f"texts{end}"
    path.write_bytes(content)
    with refusals():
        assert all(ss.documents(path))


COMMANDS = {
    "info": ["--revision", "--gguf-file"],
    "spectrum": ["--bands", "--matrix", "--convention"],
    "nll": ["--layer", "--controls", "--seed", "--fill", "--documents", "--length", "--remove"],
    "energy": ["--per-document", "--batch-size", "--bos"],
    "sinks": ["--epsilon", "--draws", "--figure"],
    "circuits": ["--position", "--figures"],
    "quantise": ["--bits", "--rule", "--by", "--draws", "--figure"],
    "kv-cache": ["--size", "--first", "--caches", "--length", "--texts", "--block", "--figure"],
    "vision": ["--size", "--registers", "--rule", "--limit"],
    "report": ["--out", "--draws", "--documents", "--length"],
    "explore": ["--out", "--exits", "--documents", "--text"],
    "sweep": ["--workers", "--shard", "--devices"],
    "merge": ["--json"],
    "reproduce": ["--documents", "--jobs", "--only"],
    "remote": ["--revision"],
    "verify": ["--results", "--only"],
}
ARGUMENTS = st.sampled_from(sorted(COMMANDS)).flatmap(
    lambda command: st.lists(
        st.one_of(
            st.sampled_from(COMMANDS[command]),
            st.sampled_from(
                ["0", "-1", "1.5", "x", "", "nan", "1e999", "9" * 30, "--", "--no-such", "-x", "\n"]
            ),
            st.text(max_size=6),
        ),
        max_size=5,
    ).map(lambda words: [command, *words])
)


def test_every_command_is_swept() -> None:
    assert set(COMMANDS) == set(cli.COMMANDS)


SETTINGS = (
    "model_type",
    "architectures",
    "hidden_size",
    "vocab_size",
    "num_attention_heads",
    "is_decoder",
    "tie_word_embeddings",
    "pad_token_id",
    "text_config",
    "quantization_config",
    "auto_map",
    "num_hidden_layers",
    "layer_types",
    "rope_parameters",
    "dtype",
    "attn_implementation",
)
CHANGES = st.dictionaries(st.sampled_from(SETTINGS), VALUES, min_size=1, max_size=2)


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=30)
@given(st.one_of(st.binary(max_size=20), CHANGES))
@example({"architectures": [None]})
@example({"quantization_config": []})
@example({"text_config": 3})
@example({"auto_map": "x"})
@example({"model_type": []})
@example({"pad_token_id": 10**9})
def test_configurations(checkpoint: Path, change: bytes | dict[str, Any]) -> None:
    path = checkpoint / "config.json"
    before = path.read_text()
    written = change if isinstance(change, bytes) else json.dumps(json.loads(before) | change).encode()
    path.write_bytes(written)
    try:
        for use in (ss.describe, functools.partial(ss.read_spectrum, use_cache=False), ss.load):
            with refusals():
                use(checkpoint)
    finally:
        path.write_text(before)


@pytest.mark.parametrize(
    "arguments",
    [
        ["sinks", "--figure", "x.png"],
        ["circuits", "--figures", "made"],
        ["sweep", "sweep.toml", "--out", "made"],
        ["verify", "--results", "made", "--only", "x"],
    ],
    ids=lambda words: words[0],
)
def test_what_is_refused_leaves_nothing_behind(
    arguments: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sweep.toml").write_text(
        "model = 'no-model'\n[[grid]]\nremove = 'dark'\n[texts]\nsource = 3\n"
    )
    given = arguments if arguments[0] in ("sweep", "verify") else [arguments[0], "no-model", *arguments[1:]]
    done = tiny_models.run(capsys, *given)
    assert (done.status, done.out) == (2, "") and done.err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sweep.toml"]


@settings(max_examples=40)
@given(ARGUMENTS)
def test_command_lines(arguments: list[str]) -> None:
    """A command line reaches its command, or is refused before anything is loaded."""
    reached: list[Any] = []
    stubs = {name: (kind, reached.append) for name, (kind, _) in cli.COMMANDS.items()}
    status: Any = 0
    with (
        patch.object(cli, "COMMANDS", stubs),
        redirect_stdout(io.StringIO()) as out,
        redirect_stderr(io.StringIO()) as said,
    ):
        try:
            cli.main(arguments)
        except SystemExit as stopped:
            status = stopped.code
    line = said.getvalue()
    if reached:
        assert status == 0 and isinstance(reached[0], stubs[arguments[0]][0])
    elif status == 0:
        assert "usage: spectral-sinks" in out.getvalue(), "help"
    else:
        assert status == 2 and out.getvalue() == ""
        assert line.startswith("spectral-sinks: error: ") and line.count("\n") == 1
        assert "<class" not in line and "Traceback" not in line


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save(tmp_path_factory.mktemp("checkpoint") / "model")


Run = Callable[..., tiny_models.Ran]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sinks", "--draws", "-1"], "--draws -1: give 0 to 10000"),
        (["sinks", "--draws", "10000000"], "--draws 10000000: give 0 to 10000"),
        (["nll", "--documents", "-3"], "--documents -3: give at least 1"),
        (["nll", "--remove", "dark", "--controls", "-3"], "--controls -3: give 0 to 10000"),
        (["nll", "--remove", ""], "--remove '' names no bands: give such as 1-8,20"),
        (["nll", "--keep", " "], "--keep ' ' names no bands"),
        (["nll", "--remove", "dark", "--seed", "-1"], "--seed -1: give 0 to 4294967295"),
        (["sinks", "--epsilon", "nan"], "--epsilon nan: give 0 to 1"),
        (["sinks", "--figure", "x.foo"], "x.foo is not a name for a figure: let it end in one of .png, .pdf"),
        (["sinks", "--figure", "no/such/folder/x.png"], "no/such/folder is not a folder: make it"),
        (["circuits", "--position", "-1"], "--position -1: give at least 0"),
        (["nll", "--layer", "x"], "--layer: 'x' is not a whole number: see spectral-sinks nll --help"),
        (["energy", "--per-document", "1.5"], "--per-document: '1.5' is not a whole number"),
        (["nll", "--layer", "1.5"], "--layer: '1.5' is not a whole number"),
        (["sinks", "--epsilon", "x"], "--epsilon: 'x' is not a number"),
        (["nll", "--layer"], "--layer needs a value: see spectral-sinks nll --help"),
        (["nll", "--lyer", "3"], "(perhaps --layer is meant)"),
        (["nll", "--fill", "foo"], "--fill 'foo': choose from 'zero', 'mean', 'swap', 'noise'"),
        (["nll", "--epsilon", "1"], "the command does not take --epsilon, 1: see spectral-sinks nll"),
        (["nl"], "there is no command 'nl': choose from info, spectrum, nll"),
        ([], "no command is given: choose from info"),
        (["sweep"], "PATH is missing (A TOML file with model"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_a_newcomer_types(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    done = tiny_models.run(capsys, *arguments)
    assert (done.status, done.out) == (2, "") and done.err.count("\n") == 1
    assert message in done.err and done.err.startswith("spectral-sinks: error: ")


@pytest.mark.filterwarnings("ignore:the text is one document")
def test_sinks_without_a_control(capsys: pytest.CaptureFixture[str], checkpoint: Path) -> None:
    text = f"text:{tiny_models.text(200)}"
    given = ["sinks", checkpoint, "--text", text, "--epsilon", 0.05, "--draws", 0]
    record = json.loads(tiny_models.run(capsys, *given, "--json").out)
    assert record["sinks"]
    for sink in record["sinks"]:
        assert sink["dark"] is None and sink["random_dark_share"] == [None, None]
        assert 0 <= sink["dark_share"] <= 1
    assert "no control" in tiny_models.run(capsys, *given).out
