"""`real/dinov2_objects.py` on a tiny encoder: the composites, and what its table says of each condition."""

import io
import tarfile
from pathlib import Path

import dinov2_objects
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from support import planted_outliers

import spectral_sinks as ss

GREY, RED = (90, 90, 90), (250, 0, 0)


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> dinov2_objects.Options:
    """Red objects, grey textures, and one photograph with its box."""
    folder = tmp_path_factory.mktemp("pictures")
    with tarfile.open(folder / "objects.tar", "w") as archive:
        for name in ("red/0.png", "red/1.png", "red/2.png"):
            held = io.BytesIO()
            Image.new("RGB", (8, 8), RED).save(held, "png")
            info = tarfile.TarInfo(name)
            info.size = held.tell()
            held.seek(0)
            archive.addfile(info, held)
    photos = folder / "photos"
    photos.mkdir()
    Image.new("RGB", (64, 64), GREY).save(photos / "grey.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)).save(
        photos / "noise.png"
    )
    (folder / "boxes.csv").write_text("name,x0,y0,x1,y1\nnoise.png,0,0,60,40\n")
    return dinov2_objects.Options(
        photographs=photos,
        objects=folder / "objects.tar",
        model=planted_outliers.save(planted_outliers.plant("dinov2"), folder / "model"),
        out=folder / "out",
        textures=("grey.png",),
        boxes=folder / "boxes.csv",
        count=3,
        size=40,
        register_pictures=2,
        draws=2,
    )


def test_the_box_of_a_composite_holds_the_object_and_nothing_else(options: dinov2_objects.Options) -> None:
    _, _, textures = dinov2_objects.photographs(options)
    pictures, boxes = dinov2_objects.composites(options, textures)
    assert len(pictures) == 3 and list(boxes) == list(pictures.names)
    for name, picture in zip(pictures.names, pictures, strict=True):
        ((x0, y0, x1, y1),) = boxes[name].astype(int)
        red = np.array(picture)[..., 0] > 200
        assert red[y0:y1, x0:x1].all() and red.sum() == (x1 - x0) * (y1 - y0)
        assert 0.2 * 40 - 1 <= x1 - x0 <= 0.5 * 40 + 1


def test_the_table_says_what_a_register_changes(options: dinov2_objects.Options) -> None:
    dinov2_objects.main(options)
    table = pd.read_csv(options.out / "objects.csv")
    lost = table[table["method"].str.startswith("LOST")]
    assert len(lost) == 2 * 4 * 4, "sets, features, and conditions"
    assert set(table["method"]) - set(lost["method"]) == {"shuffled", "centred", "whole"}
    model = ss.load_vision(str(options.model))
    _, _, textures = dinov2_objects.photographs(options)
    pictures, known = dinov2_objects.composites(options, textures)
    found = ss.vision.corloc(ss.vision.discover(model, pictures, features="keys", boxes=known, size=40))
    one = lost.set_index(["set", "features", "condition"])
    assert one.loc[("composites", "keys", "original"), "mean"] == pytest.approx(found["mean"][0], abs=1e-4)
    whole = table[(table["set"] == "photographs") & (table["method"] == "whole")]
    assert (whole["mean"] == 1).all(), "the box of this photograph is all of it"
    for key, row in one[one["change"].notna()].iterrows():
        before = one.loc[(*key[:2], "original"), "mean"]
        assert row["change"] == pytest.approx(row["mean"] - before, abs=1e-4)


def test_random_neurons_are_others_of_the_same_layers(options: dinov2_objects.Options) -> None:
    model = ss.load_vision(str(options.model))
    found = dinov2_objects.conditions(model, [(0, 3), (1, 2), (1, 4)], 2)
    assert list(found) == ["original", "register", "random 1", "random 2"] and found["original"] == []
    for name in ("random 1", "random 2"):
        assert [layer for layer, _ in found[name]] == [0, 1, 1] and len(set(found[name])) == 3
        assert not set(found[name]) & {(0, 3), (1, 2), (1, 4)}
    assert found["random 1"] != found["random 2"]


def test_what_is_not_there(options: dinov2_objects.Options, tmp_path: Path) -> None:
    with pytest.raises(ss.InputError, match=r"lacks noise\.png, grey\.png, which --boxes or"):
        dinov2_objects.photographs(dinov2_objects.Options(**{**vars(options), "photographs": tmp_path}))
    with pytest.raises(ss.InputError, match="--photographs FOLDER"):
        dinov2_objects.photographs(dinov2_objects.Options())
    missing = dinov2_objects.Options(objects=tmp_path / "nowhere.tar")
    with pytest.raises(ss.InputError, match="is no tar file"):
        dinov2_objects.composites(missing, [Image.new("RGB", (8, 8))])
