"""Reading one tensor by byte range equals safetensors' own reader."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from spectral_sinks import InputError
from spectral_sinks.models import checkpoint as source
from spectral_sinks.models.checkpoint import Source
from spectral_sinks.models.remote_tensor import read_header, read_tensor


class Counting:
    """A binary file that counts the bytes read from it."""

    def __init__(self, path):
        self.file, self.count = path.open("rb"), 0

    def read(self, size):
        self.count += size
        return self.file.read(size)

    def seek(self, place):
        self.file.seek(place)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()


@pytest.fixture
def shard(tmp_path):
    tensors = {
        "big": torch.randn(300, 200),
        "head": torch.randn(7, 5).to(torch.bfloat16),
        "half": torch.randn(3, 4).half(),
        "whole": torch.arange(6),
    }
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, {"format": "pt"})
    return path


@pytest.mark.parametrize("name", ["big", "head", "half"])
def test_one_tensor_equals_the_library_and_reads_no_other(shard, name):
    expected = load_file(shard)[name]
    with Counting(shard) as stream:
        assert torch.equal(read_tensor(stream, name), expected)
    header = int.from_bytes(shard.read_bytes()[:8], "little") + 8
    assert stream.count == header + expected.numel() * expected.element_size()


def test_header_lists_tensors_alone(shard):
    with shard.open("rb") as stream:
        assert set(read_header(stream)) == {"big", "head", "half", "whole"}


def test_what_cannot_be_read_is_said(shard, tmp_path):
    with shard.open("rb") as stream, pytest.raises(InputError, match="stored as I64"):
        read_tensor(stream, "whole")
    cut = tmp_path / "cut"
    cut.write_bytes(shard.read_bytes()[:-1000])
    with cut.open("rb") as stream, pytest.raises(InputError, match="ends after"):
        [read_tensor(stream, name) for name in ("big", "head", "half")]
    broken = tmp_path / "broken"
    broken.write_bytes(b"\x05" + bytes(7) + b"hello")
    with broken.open("rb") as stream, pytest.raises(InputError, match="header is not JSON"):
        read_header(stream)


def test_a_hub_source_reads_ranges_of_files_it_has_not_cached(shard, monkeypatch):
    opened = []

    def remote(name, revision, file):
        opened.append((name, revision, file))
        return Counting(shard)

    monkeypatch.setattr(source, "open_remote", remote)
    monkeypatch.setattr(source, "try_to_load_from_cache", lambda *_, **__: None)
    monkeypatch.setattr(source.HfApi, "file_exists", lambda *_, **__: True)
    monkeypatch.setattr(Source, "file", lambda *_: None)
    hub = Source("someone/model", revision="abc")
    assert torch.equal(hub.tensor("head"), load_file(shard)["head"])
    assert opened == [("someone/model", "abc", "model.safetensors")] * 2
