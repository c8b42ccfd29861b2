"""Pictures that keep their shape give, image by image, the numbers that each gives alone."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from support import tiny_encoders

import spectral_sinks as ss
from spectral_sinks import stats
from spectral_sinks.data.pixels import own_grid

PATCH, SIDE = tiny_encoders.PATCH, tiny_encoders.SIDE
SIZES = ((40, 20), (40, 20), (20, 40), (21, 19), (300, 2))
"""Width and height of the pictures."""


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Intervals are tested elsewhere."""
    monkeypatch.setattr(stats, "mean_interval", lambda v: (np.nan, np.nan))


def load(family: str) -> ss.VisionModel:
    processor = transformers.ViTImageProcessorPil(size={"height": SIDE, "width": SIDE})
    return ss.load_vision(tiny_encoders.build(family), processor=processor)


def pictures(sizes: Any = SIZES) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3)).astype(np.uint8)) for w, h in sizes]


def test_grids() -> None:
    assert own_grid(1.0, 5) == (5, 5)
    assert own_grid(2.0, 5) == (4, 7) and own_grid(0.5, 5) == (7, 4)
    assert own_grid(44 / 31, 37) == (31, 44)
    assert own_grid(10_000.0, 5) == (1, 25) and own_grid(1e-4, 5) == (25, 1)


def test_what_is_read_and_what_is_shown() -> None:
    model = load("dinov2")
    read = ss.pixels(pictures(), model, size=SIDE, shape="own")
    assert list(read.grids) == [(4, 7), (4, 7), (7, 4), (5, 5), (1, 25)]
    assert read.lengths == [29, 29, 29, 26, 26] and read.length == 29 and not read.alike
    assert read[0].shape == (3, 4 * PATCH, 7 * PATCH)
    assert [places for places, _ in read.batches(8)] == [[0, 1], [2], [3], [4]]
    assert read.record["grids"] == {"7 x 4": 2, "4 x 7": 1, "5 x 5": 1, "25 x 1": 1}
    assert read.record["stretched"] == pytest.approx(150 / 25 - 1)
    assert read.record["rows"] is None and read.picture(0).size == (40, 20)
    with pytest.raises(ss.InputError, match="4 shapes"):
        _ = read.grid
    # all of one shape are one grid
    alike = ss.pixels(pictures(SIZES[:2]), model, size=SIDE, shape="own")
    assert alike.grid == (4, 7) and alike.record["width"] == 7 * PATCH


def test_sizes_are_rounded_and_said() -> None:
    model = load("dinov2")
    with pytest.warns(ss.SpectralWarning, match="size 22 is no multiple .* resized to 24"):
        read = ss.pixels(pictures(), model, size=22)
    assert read.grid == (6, 6)
    with pytest.warns(ss.SpectralWarning, match="the last 2 columns and 1 rows of pixels are not read"):
        ss.pixels(torch.zeros(1, 3, 21, 22), model)
    with pytest.raises(ss.InputError, match="a tensor is read as it is"):
        ss.pixels(torch.zeros(1, 3, 20, 20), model, shape="own")
    with pytest.raises(ss.InputError, match="patches of 4 x 4"):
        ss.pixels(pictures(), model, size=3)


def test_what_the_model_sees_of_a_cropped_picture() -> None:
    model = load("dinov2")
    crop = {"height": 8, "width": 8}
    model.processor.do_center_crop, model.processor.crop_size = True, crop
    model.processor.do_resize = False
    (picture,) = pictures([(16, 12)])
    read = ss.pixels([picture], model)
    assert np.abs(np.asarray(read.picture(0), int) - np.asarray(picture)[2:10, 4:12]).max() <= 1


def test_pictures_of_any_mode_are_read_as_files_are(tmp_path: Path) -> None:
    model = load("dinov2")
    grey = Image.fromarray(np.arange(400, dtype=np.uint8).reshape(20, 20))
    grey.save(tmp_path / "a.png")
    assert torch.equal(ss.pixels([grey], model)[0], ss.pixels(ss.images(tmp_path), model)[0])


@pytest.mark.parametrize("family", ["dinov2", "vit classifier", "dinov3", "siglip"])
def test_each_image_alone(family: str) -> None:
    model = load(family)
    every = pictures()
    read = ss.pixels(every, model, size=SIDE, shape="own")
    found, outliers = ss.vision_sinks(model, read, epsilon=0.05), ss.outliers(model, read, rule=6.0)
    shared = ss.outliers(model, read, rule=6.0, measured=found)
    assert np.allclose(shared.norm, outliers.norm, rtol=1e-5, equal_nan=True)
    share: list[float] = []
    for place, picture in enumerate(every):
        one = ss.pixels([picture], model, size=SIDE, shape="own")
        alone = ss.vision_sinks(model, one, epsilon=0.05)
        tokens = one.length
        assert np.allclose(found.attention.alpha[place, ..., :tokens], alone.attention.alpha[0], atol=1e-6)
        assert np.isnan(found.attention.alpha[place, ..., tokens:]).all()
        assert np.allclose(found.map(place, 1), alone.maps(1)[0], atol=1e-6)
        assert np.allclose(found.value_ratio[place, ..., :tokens], alone.value_ratio[0], rtol=1e-4)
        assert np.array_equal(found.members[place, :tokens], alone.members[0])
        mass = found.by_head().query("document == @place")["mass"].to_numpy()
        assert np.allclose(mass, alone.by_head()["mass"], atol=1e-6)
        single = ss.outliers(model, one, rule=6.0)
        assert np.allclose(outliers.map(place, 2), single.map(0, 2), rtol=1e-5)
        share.append(single.summary()["share"].iloc[-1])
    assert outliers.summary()["share"].iloc[-1] == pytest.approx(np.mean(share))
    layers = found.by_layer()
    to = [f"to_{name}" for name in (*model.prefix, "top_patch", "other_patches")]
    assert np.allclose(layers[to].sum(axis=1), 1, atol=1e-5)
    with pytest.raises(ss.InputError, match="4 shapes"):
        found.maps(0)
    with pytest.raises(ss.InputError, match="4 shapes"):
        ss.vision.outlier_places(outliers)


def test_circuits_and_effects_of_several_shapes() -> None:
    model = load("dinov2 classifier")
    read = ss.pixels(pictures(), model, size=SIDE, shape="own")
    spectrum = ss.read_spectrum(model, "embedding")
    circuits = ss.no_op_circuits(model, read, spectrum, "patch")
    assert len(circuits.heads) == model.layers * model.heads
    first = ss.no_op_circuits(
        model, ss.pixels(pictures()[:1], model, size=SIDE, shape="own"), spectrum, "patch"
    )
    mine = circuits.use.query("document == 0")["attention"].to_numpy()
    assert np.allclose(mine, first.use["attention"], atol=1e-6)
    effect = ss.evaluate_images(model, read, {"zero": {ss.Site("exit", 0): lambda x: 0.5 * x}})["zero"]
    for place, picture in enumerate(pictures()):
        one = ss.pixels([picture], model, size=SIDE, shape="own")
        alone = ss.evaluate_images(model, one, {"zero": {ss.Site("exit", 0): lambda x: 0.5 * x}})["zero"]
        assert effect.table["kl"][place] == pytest.approx(alone.table["kl"][0], rel=1e-4, abs=1e-9)


def test_registers_of_several_shapes() -> None:
    model = load("dinov2")
    read = ss.pixels(pictures(), model, size=SIDE, shape="own")
    neurons = [(0, 3), (1, 5)]
    changed = ss.vision.register_repair(model, read, neurons, draws=1)
    maps = ss.vision.register_maps(model, read, neurons)
    assert [row.shape for row in maps["norm after"]] == list(read.grids)
    largest = changed.query("state == 'repaired' and layer == 2 and measure == 'largest norm'")["mean"]
    assert float(largest.iloc[0]) == pytest.approx(np.mean([row.max() for row in maps["norm after"]]))


def test_boxes_follow_the_shape() -> None:
    """The box of an object is in pixels of the picture, at whatever shape the model reads it."""
    model = load("dinov2")
    sizes = ((84, 48), (48, 84))
    made = pictures(sizes)
    table = ss.vision.discover(model, ss.images(made), size=SIDE, shape="own", draws=1)
    for row in table.to_dict("records"):
        width, height = sizes[row["document"]]
        rows, columns = ss.pixels([made[row["document"]]], model, size=SIDE, shape="own").grid
        if np.isfinite(row["x0"]):
            for edge, side, count in (("x0", width, columns), ("x1", width, columns), ("y1", height, rows)):
                assert row[edge] * count / side == pytest.approx(round(row[edge] * count / side))
            assert row["x1"] <= width and row["y1"] <= height
        assert (row["seed_x"] * columns / width) % 1 == pytest.approx(0.5)
