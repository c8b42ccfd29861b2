"""Pictures of every kind of file become upright RGB; what is broken is named."""

from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

import spectral_sinks as ss


def gradient(width: int = 6, height: int = 4) -> Image.Image:
    values = np.arange(width * height * 3, dtype=np.uint8).reshape(height, width, 3) * 3
    return Image.fromarray(values)


def only(path: Path) -> np.ndarray:
    return np.asarray(ss.images(path)[0])


@pytest.mark.parametrize("turn", range(1, 9))
def test_exif_turns(turn: int, tmp_path: Path) -> None:
    """Tag 0x0112 says where the top and the left of the stored rows lie."""
    want = np.asarray(gradient())
    stored = {
        1: want,
        2: want[:, ::-1],
        3: want[::-1, ::-1],
        4: want[::-1],
        5: want.transpose(1, 0, 2),
        6: np.rot90(want, 1),
        7: want[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(want, -1),
    }[turn]
    exif = Image.Exif()
    exif[0x0112] = turn
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "a.png", exif=exif)
    found = ss.images(tmp_path / "a.png")
    assert np.array_equal(np.asarray(found[0]), want)
    assert found.record["converted"] == ({} if turn == 1 else {"turned": 1})
    assert "exif" not in found[0].info or found[0].getexif().get(0x0112, 1) == 1


def test_greys(tmp_path: Path) -> None:
    grey = np.array([[0, 100], [200, 255]], dtype=np.uint8)
    Image.fromarray(grey).save(tmp_path / "l.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    Image.fromarray(grey > 127).save(tmp_path / "bits.png")
    for name, expected in (("l", grey), ("deep", grey), ("bits", (grey > 127) * np.uint8(255))):
        assert np.array_equal(only(tmp_path / f"{name}.png"), np.repeat(expected[..., None], 3, axis=2))


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    colours = np.zeros((1, 3, 4), dtype=np.uint8)
    colours[..., 0], colours[..., 3] = 100, [0, 51, 255]
    Image.fromarray(colours).save(tmp_path / "rgba.png")
    red = only(tmp_path / "rgba.png")[0]
    assert red.tolist() == [[255, 255, 255], [224, 204, 204], [100, 0, 0]]
    Image.merge("LA", [Image.new("L", (1, 1), 10), Image.new("L", (1, 1), 0)]).save(tmp_path / "la.png")
    assert only(tmp_path / "la.png").tolist() == [[[255] * 3]]
    paletted = Image.new("P", (2, 1))
    paletted.putpalette([10, 20, 30, 40, 50, 60])
    paletted.putdata([0, 1])
    paletted.save(tmp_path / "p.gif", transparency=0)
    assert only(tmp_path / "p.gif")[0].tolist() == [[255] * 3, [40, 50, 60]]
    assert ss.images(tmp_path / "rgba.png").record["converted"] == {"transparent": 1}


def test_other_colour_spaces(tmp_path: Path) -> None:
    Image.new("CMYK", (3, 2), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg", quality=100)
    found = ss.images(tmp_path / "cmyk.jpg")
    assert np.abs(np.asarray(found[0]).astype(int) - [255, 0, 0]).max() <= 3
    assert found.record["converted"] == {"CMYK": 1}


def test_the_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (2, 2), (shade, 0, 0)) for shade in (10, 200)]
    frames[0].save(tmp_path / "a.png", save_all=True, append_images=frames[1:])
    assert only(tmp_path / "a.png")[0, 0].tolist() == [10, 0, 0]


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (7, 13)])
def test_odd_sizes(size: tuple[int, int], tmp_path: Path) -> None:
    Image.new("RGB", size, (1, 2, 3)).save(tmp_path / "a.png")
    found = ss.images(tmp_path)
    assert found[0].size == size and found.record["smallest"] == found.record["largest"] == size


def folder(root: Path) -> Path:
    for label, shade in (("cat", 10), ("dog", 200)):
        (root / label).mkdir()
        for index in range(3):
            Image.new("RGB", (8, 8), (shade, index, 0)).save(root / label / f"{index}.png")
    return root


def test_folders_are_classes(tmp_path: Path) -> None:
    found = ss.images(folder(tmp_path))
    assert found.label_names == ("cat", "dog") and found.labels == (0, 0, 0, 1, 1, 1)
    assert found.names[0] == "cat/0.png" and len(found) == 6
    assert ss.images(tmp_path / "cat").labels is None
    Image.new("RGB", (8, 8)).save(tmp_path / "loose.png")
    assert ss.images(tmp_path).labels is None


def test_a_limit_takes_classes_in_turn(tmp_path: Path) -> None:
    found = ss.images(folder(tmp_path), limit=4)
    assert found.names == ("cat/0.png", "dog/0.png", "cat/1.png", "dog/1.png")
    assert found.labels == (0, 1, 0, 1)


def test_lists_and_pictures(tmp_path: Path) -> None:
    folder(tmp_path)
    (tmp_path / "list.txt").write_text("cat/1.png\n\ndog/2.png\n")
    listed = ss.images(tmp_path / "list.txt", labels=["a", "b"])
    assert listed.names == ("cat/1.png", "dog/2.png") and listed.labels == (0, 1)
    paths = ss.images([tmp_path / "cat/1.png", tmp_path / "dog/2.png"])
    pictures = ss.images([*paths])
    assert paths.record["data_hash"] == listed.record["data_hash"] == pictures.record["data_hash"]
    assert ss.images([tmp_path / "cat/0.png"]).record["data_hash"] != paths.record["data_hash"]


def test_a_data_set(tmp_path: Path) -> None:
    made = datasets.load_dataset("imagefolder", data_dir=str(folder(tmp_path)), split="train")
    by_row, by_folder = ss.images(made), ss.images(tmp_path)
    assert by_row.label_names == by_folder.label_names and by_row.labels == by_folder.labels
    assert by_row.record["data_hash"] == by_folder.record["data_hash"]
    assert len(ss.images(made, limit=2)) == 2
    with pytest.raises(ss.InputError, match="no column of images"):
        ss.images(made.remove_columns("image"))


@pytest.mark.parametrize("kind", ["truncated", "empty", "text", "float"])
def test_broken_files_are_named(kind: str, tmp_path: Path) -> None:
    gradient().save(tmp_path / "good.png")
    bad = tmp_path / ("bad.tiff" if kind == "float" else "bad.jpg")
    if kind == "float":
        Image.fromarray(np.ones((2, 2), dtype=np.float32)).save(bad)
    else:
        gradient(64, 64).save(bad)
        bad.write_bytes({"truncated": bad.read_bytes()[:400], "empty": b"", "text": b"no image"}[kind])
    with pytest.warns(ss.SpectralWarning, match=bad.name):
        found = ss.images(tmp_path)
    assert found.names == ("good.png",) and list(found.record["broken"]) == [bad.name]
    with pytest.raises(ss.InputError, match=bad.name):
        ss.images(tmp_path, broken="refuse")
    with pytest.warns(ss.SpectralWarning, match=bad.name), pytest.raises(ss.InputError, match="no images"):
        ss.images(bad)


def test_a_bomb_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gradient(64, 64).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ss.InputError, match=r"a.png.*bomb"):
        ss.images(tmp_path, broken="refuse")


@pytest.mark.usefixtures("unchecked")
def test_bad_input(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("text")
    with pytest.raises(ss.InputError, match="holds no images"):
        ss.images(tmp_path)
    with pytest.raises(ss.InputError, match="does not exist"):
        ss.images(tmp_path / "none")
    with pytest.raises(ss.InputError, match="choose 'skip'"):
        ss.images(tmp_path, broken="ignore")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ss.InputError, match="limit 0"):
        ss.images(tmp_path, limit=0)
    with pytest.raises(ss.InputError, match="2 labels for 1 images"):
        ss.images([gradient()], labels=[0, 1])
    with pytest.raises(ss.InputError, match="expected a path"):
        ss.images([3])
    with pytest.raises(ss.InputError, match="no images"):
        ss.images([])
