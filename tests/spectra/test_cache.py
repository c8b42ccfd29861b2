"""The cache of decompositions: hits, keys, damage, folders that cannot be written, several processes."""

import errno
import multiprocessing
import warnings

import pytest
import torch

from spectral_sinks.errors import SpectralWarning
from spectral_sinks.spectra import cache
from spectral_sinks.spectra import spectrum as module
from spectral_sinks.spectra.spectrum import Spectrum


@pytest.fixture
def weight(planted):
    return planted(torch.linspace(10, 1, 24), 100).float()


@pytest.fixture
def stored(weight):
    return Spectrum.from_matrix(weight)


@pytest.fixture
def no_decomposition(monkeypatch):
    """Let any decomposition fail from here on."""

    def refuse(*_):
        raise AssertionError("decomposed again")

    return lambda: monkeypatch.setattr(module, "_decompose", refuse)


def same(a, b):
    return torch.equal(a.values, b.values) and torch.equal(a.vectors, b.vectors)


def test_a_hit_is_bit_identical_and_decomposes_nothing(weight, stored, no_decomposition):
    no_decomposition()
    hit = Spectrum.from_matrix(weight.clone(), name="W_U", bands=3, tied=True)
    assert same(hit, stored) and hit.fingerprint == stored.fingerprint
    assert (hit.matrix, hit.count, hit.tied) == ("W_U", 3, True)
    with pytest.raises(AssertionError, match="decomposed again"):
        Spectrum.from_matrix(weight, use_cache=False)


def test_a_view_has_the_key_of_its_copy(weight, stored):
    assert Spectrum.from_matrix(weight.T.contiguous().T).fingerprint == stored.fingerprint


def test_whatever_changes_the_result_changes_the_key(weight):
    changed = weight.clone()
    changed[-1, -1] += 1e-6
    gain, other = torch.rand(24) + 1, torch.rand(24) + 1
    cases = [
        (weight, "raw", None, False),
        (changed, "raw", None, False),
        (weight.double(), "raw", None, False),
        (weight.half(), "raw", None, False),
        (weight.half().view(torch.bfloat16), "raw", None, False),  # the same bytes
        (weight.reshape(200, 12), "raw", None, False),  # the same bytes
        (weight, "folded", gain, False),
        (weight, "folded", other, False),
        (weight, "centred", gain, False),
        (weight, "centred", gain, True),
    ]
    keys = {
        Spectrum.from_matrix(
            matrix, convention=convention, gain=given, centre_residual=centre, bands=5
        ).fingerprint
        for matrix, convention, given, centre in cases
    }
    assert len(keys) == len(cases)


def test_no_cache_writes_nothing(weight, cache_folder):
    Spectrum.from_matrix(weight, use_cache=False)
    assert not cache_folder.exists()


def test_default_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("SPECTRAL_SINKS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.folder() == tmp_path / "spectral_sinks"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.folder() == tmp_path / ".cache" / "spectral_sinks"


def cut(whole):
    return whole[: len(whole) // 2]


def flipped(whole):
    return whole[:-100] + bytes(b ^ 0xFF for b in whole[-100:-90]) + whole[-90:]


@pytest.mark.parametrize("damage", [cut, flipped, lambda _: b"", lambda _: b"{}"])
def test_a_damaged_file_is_reported_and_rewritten(weight, stored, cache_folder, no_decomposition, damage):
    (path,) = cache_folder.iterdir()
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    with pytest.warns(SpectralWarning, match=f"{path.name} is damaged"):
        assert same(Spectrum.from_matrix(weight), stored)
    assert path.read_bytes() == whole and list(cache_folder.iterdir()) == [path]
    no_decomposition()
    assert same(Spectrum.from_matrix(weight), stored)


def test_no_single_flipped_byte_goes_unnoticed(cache_folder):
    values, vectors = torch.tensor([2.0, 1.0]).double(), torch.eye(2).double()
    cache.store("key", values, vectors)
    (path,) = cache_folder.iterdir()
    whole = path.read_bytes()
    for place in range(len(whole)):
        for bits in (0x01, 0xFF):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ bits]) + whole[place + 1 :])
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                found = cache.find("key")
            if found is None:
                assert [w.category for w in caught] == [SpectralWarning], place
            else:  # white space of the header, say
                assert torch.equal(found[0], values) and torch.equal(found[1], vectors), place


@pytest.mark.parametrize(
    "spoil",
    [
        lambda values, vectors: (values, vectors[:, ::2].contiguous()),
        lambda values, vectors: (values[:-1], vectors),
        lambda values, vectors: (values.float(), vectors.float()),
        lambda values, vectors: (values.long(), vectors.long()),
        lambda values, vectors: (values * torch.nan, vectors),
        lambda values, vectors: (-values, vectors),
        lambda values, vectors: (values.flip(0), vectors),
        lambda values, vectors: (values, vectors * torch.nan),
        lambda values, vectors: (values, vectors * 1.001),
        lambda values, vectors: (values, torch.randn(24, 24, dtype=torch.float64)),
        lambda values, vectors: (values, vectors.roll(1, 1) * (torch.arange(24) > 0)),
        lambda values, vectors: (values[:0], vectors[:0, :0]),
    ],
)
def test_a_right_checksum_of_wrong_content_is_damage(weight, stored, cache_folder, spoil):
    """Whoever wrote the file can write its checksum as well."""
    values, vectors = (tensor.contiguous() for tensor in spoil(stored.values, stored.vectors))
    (path,) = cache_folder.iterdir()
    cache.store(path.stem, values, vectors)
    with pytest.warns(SpectralWarning, match=r"is damaged \(its? .*computed again"):
        assert same(Spectrum.from_matrix(weight), stored)


def test_a_stranger_file_is_passed_over(cache_folder):
    cache_folder.mkdir()
    tensors = {"values": torch.ones(2), "vectors": torch.eye(2)}
    for content, metadata in [(tensors, None), (tensors, {"checksum": "0"}), ({"values": torch.ones(2)}, {})]:
        cache.save_file(content, cache_folder / "key.safetensors", metadata)
        with pytest.warns(SpectralWarning, match="damaged"):
            assert cache.find("key") is None


@pytest.mark.parametrize("below", ["file/cache", "n" * 300])
def test_a_folder_that_cannot_be_made(weight, tmp_path, monkeypatch, below):
    reference = Spectrum.from_matrix(weight, use_cache=False)
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("SPECTRAL_SINKS_CACHE", str(tmp_path / below))
    with pytest.warns(SpectralWarning, match="not cached.*SPECTRAL_SINKS_CACHE") as caught:
        assert same(Spectrum.from_matrix(weight), reference)
    assert len(caught) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_full_disk(weight, cache_folder, monkeypatch):
    def fill(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    reference = Spectrum.from_matrix(weight, use_cache=False)
    monkeypatch.setattr(cache, "save_file", fill)
    with pytest.warns(SpectralWarning, match="not cached.*No space left"):
        assert same(Spectrum.from_matrix(weight), reference)
    assert list(cache_folder.iterdir()) == []


def test_a_reader_never_sees_half_a_file(weight, monkeypatch):
    """Read in the middle of a write, over nothing first and over an older file then."""
    seen, save = [], cache.save_file

    def slowly(tensors, path, metadata):
        path.write_bytes(b"half")
        seen.append(cache.find("key"))
        save(tensors, path, metadata)

    monkeypatch.setattr(cache, "save_file", slowly)
    old, new, vectors = torch.ones(3).double(), torch.zeros(3).double(), torch.eye(3).double()
    cache.store("key", old, vectors)
    cache.store("key", new, vectors)
    assert seen[0] is None and torch.equal(seen[1][0], old)
    assert torch.equal(cache.find("key")[0], new)


def test_several_processes_at_once(weight, cache_folder, no_decomposition):
    reference = Spectrum.from_matrix(weight, use_cache=False)
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        results = pool.map(Spectrum.from_matrix, [weight] * 24, chunksize=1)
        assert all(same(result, reference) for result in results)
    assert [path.name for path in cache_folder.iterdir()] == [f"{reference.fingerprint}.safetensors"]
    no_decomposition()
    assert same(Spectrum.from_matrix(weight), reference)
