"""Images in tar files and data sets are those of the folder, and are decoded one at a time."""

import io
import tarfile
import weakref
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import transformers
from PIL import Image
from support import tiny_encoders

import spectral_sinks as ss
from spectral_sinks.data import images as reading
from spectral_sinks.data import pixels as preparing


def png(shade: int, size: tuple[int, int] = (6, 4)) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", size, (shade, 10, 20)).save(data, "png")
    return data.getvalue()


def packed(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def folder(root: Path) -> Path:
    for label in ("cat", "dog"):
        (root / label).mkdir(parents=True)
        for index in range(3):
            (root / label / f"{index}.png").write_bytes(png(60 * index + (label == "dog")))
    return root


def same(a: ss.Images, b: ss.Images) -> bool:
    return a.record["data_hash"] == b.record["data_hash"] and all(
        np.array_equal(np.asarray(x), np.asarray(y)) for x, y in zip(a, b, strict=True)
    )


def test_a_tar_of_folders(tmp_path: Path) -> None:
    known = ss.images(folder(tmp_path / "folder"))
    path = tmp_path / "all.tar"
    with tarfile.open(path, "w") as archive:
        archive.add(tmp_path / "folder", arcname=".")
    found = ss.images(path)
    assert same(found, known) and found.names == known.names
    assert found.labels == known.labels and found.label_names == ("cat", "dog")
    assert ss.images(path, limit=2).names == ("cat/0.png", "dog/0.png")
    # a folder of tar files is read as one
    (tmp_path / "shards").mkdir()
    path.rename(tmp_path / "shards" / "0.tar")
    assert same(ss.images(tmp_path / "shards"), known)


def test_a_shard_of_webdataset(tmp_path: Path) -> None:
    files = {"a/0.png": png(1), "a/0.cls": b"7\n", "a/1.seg.png": png(2), "a/1.cls": b"3", "a/1.json": b"{}"}
    found = ss.images(packed(tmp_path / "shard.tar", files))
    assert found.names == ("a/0.png", "a/1.seg.png")
    assert found.label_names == ("3", "7") and found.labels == (1, 0)
    # one sample without a class leaves the images unlabelled
    assert ss.images(packed(tmp_path / "less.tar", files | {"a/2.png": png(3)})).labels is None


def test_broken_tars(tmp_path: Path) -> None:
    good = packed(tmp_path / "a.tar", {"0.png": png(1), "note.txt": b"text"})
    assert ss.images(good).names == ("0.png",)
    (tmp_path / "b.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(ss.InputError, match="cannot be read as a tar file"):
        ss.images(tmp_path / "b.tar")
    with tarfile.open(tmp_path / "c.tar.gz", "w:gz") as archive:
        archive.add(good)
    with pytest.raises(ss.InputError, match="is compressed"):
        ss.images(tmp_path / "c.tar.gz")
    with pytest.raises(ss.InputError, match="holds no images"):
        ss.images(packed(tmp_path / "d.tar", {"note.txt": b"text"}))
    with pytest.warns(ss.SpectralWarning, match=r"1.png"):
        found = ss.images(packed(tmp_path / "e.tar", {"0.png": png(1), "1.png": png(2)[:40]}))
    assert found.names == ("0.png",)
    with pytest.raises(ss.InputError, match=r"none.tar does not exist"):
        ss.images("none.tar")


def test_data_sets_on_disk(tmp_path: Path) -> None:
    known = ss.images(folder(tmp_path / "folder"))
    made: Any = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "folder"), split="train")
    made.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"test": made}).save_to_disk(tmp_path / "splits")
    made.to_parquet(str(tmp_path / "parquet" / "test-0.parquet"))
    for given in (
        ss.images(tmp_path / "saved"),
        ss.images(tmp_path / "splits", split="test"),
        ss.images(tmp_path / "parquet"),
        ss.images(tmp_path / "parquet" / "test-0.parquet"),
    ):
        assert same(given, known) and given.labels == known.labels
        assert given.label_names == ("cat", "dog") and given.names[:2] == ("0.png", "1.png")
    assert ss.images(tmp_path / "saved", limit=4).labels == (0, 1, 0, 1)
    # rows that were chosen or moved keep their own names and classes
    chosen = ss.images(made.select([5, 0]))
    assert chosen.labels == (1, 0) and np.asarray(chosen[0])[0, 0, 0] == 121
    with pytest.raises(ss.InputError, match="no split 'train'; it has test"):
        ss.images(tmp_path / "splits")
    with pytest.raises(ss.InputError, match="2 data sets, a, b: give one"):
        ss.images(datasets.DatasetDict({"a": made, "b": made}))
    (tmp_path / "saved" / "state.json").write_text("{")
    with pytest.raises(ss.InputError, match="cannot be read as a saved data set"):
        ss.images(tmp_path / "saved")
    (tmp_path / "a.parquet").write_bytes(b"none")
    with pytest.raises(ss.InputError, match="cannot be read as a data set"):
        ss.images(tmp_path / "a.parquet")


def test_few_pictures_of_many_are_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """10 000 pictures are read, and no more than a batch of them is in memory at any time."""
    alive = most = 0
    upright = reading.upright

    def counted(image: Image.Image) -> tuple[Image.Image, list[str]]:
        nonlocal alive, most
        made, how = upright(image)
        alive += 1
        most = max(most, alive)
        weakref.finalize(made, dead)
        return made, how

    def dead() -> None:
        nonlocal alive
        alive -= 1

    monkeypatch.setattr(reading, "upright", counted)
    monkeypatch.setattr(reading, "SHOWN", 10**6)
    content = png(5, (2, 2))
    path = packed(tmp_path / "many.tar", {f"{index:05}.png": content for index in range(10_000)})
    found = ss.images(path)
    assert len(found) == 10_000 and most <= 3
    assert all(callable(raw) for raw in found.raw)
    # nothing is kept of what the model reads beyond the limit either
    side = tiny_encoders.SIDE
    sides = {"height": side, "width": side}
    processor = transformers.ViTImageProcessorPil(size=sides)
    model = ss.load_vision(tiny_encoders.build("dinov2"), processor=processor)
    few = ss.images(path, limit=300)
    monkeypatch.setattr(preparing, "KEPT", 10 * 3 * side * side * 4)
    read = ss.pixels(few, model)
    assert sum(len(places) for places, _ in read.batches(8)) == 300
    assert most <= 10 and len(read._kept) == 10
