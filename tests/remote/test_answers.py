"""Answers of a server are read without running their code, whatever they hold."""

import collections
import io
import pickle
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zstandard
from nnsight.schema.response import ResponseModel, Status
from support import fake_ndif, tiny_models

import spectral_sinks as ss
from spectral_sinks.remote import serialization
from spectral_sinks.remote.answers import SafeBackend, read_answer, read_saved

FACTS: dict[str, Any] = {"python": "3.12"}


class Planted:
    """An object that creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@dataclass
class Mine:
    number: int


@dataclass
class Ending:
    number: int

    def __del__(self) -> None: ...


def saved(value: object, protocol: int = 2) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, pickle_protocol=protocol)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "value",
    [
        {"a": [1, 2.5, "x", None, True, b"\xff"], "b": (1j, {3}, frozenset([4]), range(3), slice(1, 2))},
        collections.Counter("aab"),
        collections.defaultdict(list, {1: [2]}),
        2**200,
    ],
    ids=str,
)
def test_values_come_back(value: object) -> None:
    packed = serialization.pack(("result", value, FACTS), packer=serialization.AnswerPacker)
    assert read_answer(packed) == ("result", value, FACTS)


def test_arrays_tensors_and_dataclasses_come_back() -> None:
    given = {
        "array": np.arange(6.0).reshape(2, 3),
        "text": np.array(["a", "bc"]),
        "scalar": np.float64(0.5),
        "tensor": torch.arange(3, dtype=torch.bfloat16),
        "dtype": torch.float16,
        "site": ss.Site("exit", 2),
        "mine": Mine(3),
        "filter": ss.rnd(8, 3),
    }
    packed = serialization.pack(("result", given, FACTS), packer=serialization.AnswerPacker)
    _, found, _ = read_answer(packed)
    assert np.array_equal(found["array"], given["array"]) and list(found["text"]) == ["a", "bc"]
    assert found["scalar"] == 0.5 and torch.equal(found["tensor"], given["tensor"])
    assert found["dtype"] is torch.float16 and found["site"] == ss.Site("exit", 2)
    assert found["mine"] == Mine(3) and isinstance(found["mine"], Mine)
    assert found["filter"].address == given["filter"].address


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_no_code_of_an_answer_runs(protocol: int, tmp_path: Path) -> None:
    path = tmp_path / "ran"
    for value in (Planted(path), [{"deep": (Planted(path),)}]):
        with pytest.raises(ss.RemoteError, match="could run code"):
            read_answer(pickle.dumps(("result", value, FACTS), protocol))
        with pytest.raises(ss.RemoteError, match="could run code"):
            read_saved(saved({"ss_result": value}, protocol), compressed=False)
        with pytest.raises(ss.RemoteError, match="could run code"):
            SafeBackend.parse(saved({"id": "a", "status": Status.COMPLETED, "data": value}, protocol))
    assert not path.exists()


def named(module: str, name: str, *arguments: object) -> bytes:
    """A pickle that calls a function by its name."""
    pushed = b"".join(pickle.dumps(each, 0).removesuffix(b".") for each in arguments)
    texts = [pickle.SHORT_BINUNICODE + bytes([len(text)]) + text.encode() for text in (module, name)]
    return b"\x80\x04" + b"".join([*texts, pickle.STACK_GLOBAL, b"(", pushed, b"tR."])


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("builtins", "eval"),
        ("builtins", "getattr"),
        ("os", "system"),
        ("nt", "system"),
        ("torch", "load"),
        ("torch.serialization", "load"),
        ("numpy", "load"),
        ("functools", "partial"),
        ("spectral_sinks", "load"),
        ("spectral_sinks.__main__", "main"),
        ("spectral_sinks.cli.__main__", "main"),
        ("spectral_sinks.files", "os.system"),
        ("spectral_sinks.remote.answers", "SafeBackend"),
        ("spectral_sinks.remote.serialization", "pack"),
        ("spectral_sinks.remote.serialization", "importlib.import_module"),
        ("spectral_sinks.sweeps.store", "Store"),
        ("spectral_sinks.models.loading", "load"),
        ("cloudpickle.cloudpickle", "_make_function"),
    ],
)
def test_names_that_an_answer_may_not_use(module: str, name: str) -> None:
    before = set(sys.modules)
    with pytest.raises(ss.RemoteError, match=r"could run code|cannot be read"):
        read_answer(named(module, name, "1"))
    assert set(sys.modules) == before, "nothing is imported"


def test_a_dataclass_is_filled_without_a_call_or_refused() -> None:
    def own(module: str, name: str) -> bytes:
        return named(serialization.__name__, "own", module, name, {"number": 1})

    for module, name in (("os", "system"), (__name__, "named"), (__name__, "Ending"), ("nowhere", "Mine")):
        with pytest.raises(ss.RemoteError, match="no dataclass of this process"):
            read_answer(own(module, name))


@pytest.mark.parametrize("data", [b"", b"x", pickle.dumps(3), pickle.dumps(("result", 1)), b"\x80\x04."])
def test_other_bytes_are_an_error_of_the_server(data: bytes) -> None:
    with pytest.raises(ss.RemoteError, match="answer of the server"):
        read_answer(data)
    for compressed in (False, True):
        with pytest.raises(ss.RemoteError, match="answer of the server"):
            read_saved(data, compressed)


def test_a_binary_frame_is_read() -> None:
    told = ResponseModel(id="a", status=Status.COMPLETED, data=b"\x00\xff", meta={"seconds": 1.0})
    assert SafeBackend.parse(told.pickle()) == told
    assert SafeBackend.parse(told.model_copy(update={"data": "url"}).model_dump_json()).data == "url"
    packed = zstandard.ZstdCompressor().compress(saved({"ss_result": b"\x00\xff"}))
    assert read_saved(packed, compressed=True) == {"ss_result": b"\x00\xff"}


def test_a_server_that_sends_code_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, path = tiny_models.save(tmp_path / "model"), tmp_path / "ran"
    fake = fake_ndif.serve(folder, monkeypatch)
    evil = pickle.dumps(("result", Planted(path), FACTS))
    for value in ({"ss_result": Planted(path)}, {"ss_result": evil}):
        monkeypatch.setattr(
            fake, "run", lambda *_, value=value: zstandard.ZstdCompressor().compress(saved(value))
        )
        with pytest.raises(ss.RemoteError, match="could run code"):
            ss.remote.examine(ss.load(folder, remote=True))
    assert not path.exists() and capsys.readouterr().out == ""


def test_nothing_is_printed_where_nnsight_debugs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`pytest -v` is such a case, since nnsight reads the arguments of the process."""
    from nnsight.schema.config import CONFIG

    folder = tiny_models.save(tmp_path / "model")
    fake_ndif.serve(folder, monkeypatch)
    monkeypatch.setattr(CONFIG.APP, "DEBUG", True)
    assert ss.remote.examine(ss.load(folder, remote=True))["dtype"] == "float32"
    assert capsys.readouterr().out == ""
