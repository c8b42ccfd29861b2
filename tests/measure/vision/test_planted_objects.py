"""A planted object is found in every family, features are those of the model, controls are what they say."""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from PIL import Image
from support import tiny_encoders
from torch import Tensor

import spectral_sinks as ss
from spectral_sinks.measure.vision.boxes import COLUMNS, overlap

GRID = tiny_encoders.SIDE // tiny_encoders.PATCH
WIDTH, HEIGHT = 60, 40
CELL = (WIDTH // GRID, HEIGHT // GRID)
"""Pixels of the picture that a patch covers."""

PLACES = ((0, 0, 2, 2), (1, 2, 4, 4), (4, 0, 5, 3), (2, 1, 4, 4))
"""Boxes in patches."""


@functools.cache
def planted(family: str) -> ss.VisionModel:
    """Nothing is written to the stream after the embedding, which writes a patch's mean to one coordinate."""
    module = tiny_encoders.plain(family)
    layout = tiny_encoders.model(family).layout
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            gain = parameter.ndim == 1 and name.endswith(("weight", "lambda1"))
            parameter.fill_(float(gain and "patch_embed" not in name))
            if parameter.ndim == 4:
                parameter[0] = 1 / parameter[0].numel()
        last = module.get_submodule(layout.layers)[-1]
        for path in (layout.queries, layout.keys, layout.values):
            last.get_submodule(path).weight[0, 0] = 1
    settings: dict[str, Any] = {"size": {"height": 20, "width": 20}, "image_mean": [0.5] * 3}
    processor = transformers.ViTImageProcessorPil(**settings, image_std=[0.25] * 3)
    return ss.load_vision(module, processor=processor)


def in_picture(box: tuple[int, ...]) -> list[int]:
    return [edge * side for edge, side in zip(box, CELL * 2, strict=True)]


def picture(box: tuple[int, ...], ink: int = 255) -> Image.Image:
    values = np.full((HEIGHT, WIDTH, 3), 255 - ink, dtype=np.uint8)
    x0, y0, x1, y1 = in_picture(box)
    values[y0:y1, x0:x1] = ink
    return Image.fromarray(values)


@functools.cache
def pictures(folder: Path) -> ss.Images:
    for index, box in enumerate(PLACES):
        picture(box, 255 * (index % 2)).save(folder / f"{index}.png")
    return ss.images(folder)


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> ss.Images:
    return pictures(tmp_path_factory.mktemp("objects"))


GIVEN = {f"{index}.png": np.array([in_picture(box)]) for index, box in enumerate(PLACES)}


@pytest.mark.parametrize("family", ["dinov2 registers", "vit", "deit classifier", "clip", "siglip", "dinov3"])
def test_a_planted_object_is_found(family: str, shown: ss.Images) -> None:
    found = ss.vision.discover(planted(family), shown, boxes=GIVEN, draws=2)
    keys = found[found["method"] == "LOST keys"]
    assert keys[list(COLUMNS)].to_numpy().tolist() == [in_picture(box) for box in PLACES]
    assert keys["found"].all() and keys["located"].all() and np.allclose(keys["iou"].astype(float), 1)
    for row, (x0, y0, x1, y1) in zip(keys.to_dict("records"), PLACES, strict=True):
        assert row["share"] == pytest.approx((x1 - x0) * (y1 - y0) / GRID**2)
        left, top, right, bottom = in_picture((x0, y0, x1, y1))
        assert (left, top) < (row["seed_x"], row["seed_y"]) < (right, bottom)
    assert found["name"].tolist()[:4] == ["0.png"] * 3 + ["1.png"]


@pytest.mark.parametrize("features", ["queries", "values", "exit"])
def test_other_features(features: Any, shown: ss.Images) -> None:
    found = ss.vision.discover(planted("dinov2"), shown, features=features)
    assert found[list(COLUMNS)].to_numpy().tolist() == [in_picture(box) for box in PLACES]
    assert found["method"].unique().tolist() == [f"LOST {features}"]
    assert found["iou"].isna().all() and found["located"].isna().all()


def test_a_layer_that_reads_nothing_finds_nothing(shown: ss.Images) -> None:
    found = ss.vision.discover(planted("dinov2"), shown, layer=0)
    assert found[list(COLUMNS)].isna().all(axis=None) and not found["found"].any()
    exits = ss.vision.discover(planted("dinov2"), shown, layer=0, features="exit")
    assert exits["found"].all()


def test_controls(shown: ss.Images) -> None:
    found = ss.vision.discover(planted("dinov2"), shown, boxes=GIVEN, draws=5)
    whole = found[found["method"] == "whole"]
    assert whole[list(COLUMNS)].to_numpy().tolist() == [[0, 0, WIDTH, HEIGHT]] * 4
    shares = [(x1 - x0) * (y1 - y0) / GRID**2 for x0, y0, x1, y1 in PLACES]
    assert whole["iou"].tolist() == pytest.approx(shares) and not whole["located"].any()
    centred = found[found["method"] == "centred"]
    width = np.mean([x1 - x0 for x0, _, x1, _ in PLACES]) * CELL[0]
    height = np.mean([y1 - y0 for _, y0, _, y1 in PLACES]) * CELL[1]
    middle = [(WIDTH - width) / 2, (HEIGHT - height) / 2, (WIDTH + width) / 2, (HEIGHT + height) / 2]
    np.testing.assert_allclose(centred[list(COLUMNS)].to_numpy(dtype=float), [middle] * 4)
    for box, iou in zip(GIVEN.values(), centred["iou"], strict=True):
        assert iou == pytest.approx(float(overlap(middle, box)[0]))
    shuffled = found[found["method"] == "shuffled"]
    assert shuffled.groupby("document")["draw"].apply(list).tolist() == [[0, 1, 2, 3, 4]] * 4
    assert 0 < shuffled["iou"].mean() < 0.7
    levels = ss.vision.corloc(found).set_index("method")
    assert levels["mean"]["LOST keys"] == 1 and levels["mean"]["whole"] == 0
    assert levels["ahead"]["shuffled"] > 0.3 and levels["n"].tolist() == [4] * 4


def test_draws_depend_on_the_seed_and_the_image_alone(shown: ss.Images) -> None:
    model = planted("dinov2")
    one = ss.vision.discover(model, shown, boxes=GIVEN, draws=3, batch_size=1)
    pd.testing.assert_frame_equal(one, ss.vision.discover(model, shown, boxes=GIVEN, draws=3, batch_size=3))
    other = ss.vision.discover(model, shown, boxes=GIVEN, draws=3, seed=1)
    assert not one.equals(other)
    assert one[one["method"] == "LOST keys"].equals(other[other["method"] == "LOST keys"])


def test_more_than_half_is_located(shown: ss.Images) -> None:
    """Given boxes twice the size of what is found, somewhat less, and two of which the better one counts."""
    x0, y0, x1, y1 = in_picture(PLACES[0])
    half, less = [x0, y0, 2 * x1, y1], [x0, y0, 2 * x1 - 1, y1]
    for given, located in (([half], False), ([less], True), ([half, less], True)):
        found = ss.vision.discover(planted("dinov2"), [shown[0]], boxes={"0": given}, draws=0)
        assert found["located"].iloc[0] == located
        assert found["iou"].iloc[0] == pytest.approx(0.5 if not located else x1 / (2 * x1 - 1))


def test_equal_images_are_shuffled_differently(shown: ss.Images) -> None:
    given = {"0": GIVEN["0.png"], "1": GIVEN["0.png"]}
    found = ss.vision.discover(planted("dinov2"), [shown[0], shown[0]], boxes=given, draws=6)
    first, second = (part.drop(columns=["document", "name"]) for _, part in found.groupby("document"))
    shuffled = first["method"] == "shuffled"
    assert (
        first[~shuffled]
        .reset_index(drop=True)
        .equals(second[second["method"] != "shuffled"].reset_index(drop=True))
    )
    assert first[shuffled]["x0"].tolist() != second[second["method"] == "shuffled"]["x0"].tolist()


def recomputed(family: str, x: Tensor, part: str, layer: int) -> Tensor:
    """What a projection gives in a pass of transformers' own, `[images, rows, columns, d]`."""
    module, layout = tiny_encoders.plain(family), tiny_encoders.model(family).layout
    seen: list[Tensor] = []
    projection = module.get_submodule(f"{layout.layers}.{layer}").get_submodule(getattr(layout, part))
    handle = projection.register_forward_hook(lambda _, __, output: seen.append(output))
    with torch.no_grad():
        module(pixel_values=x)
    handle.remove()
    return seen[0][:, -(GRID**2) :].unflatten(1, (GRID, GRID))


@pytest.mark.parametrize("family", ["dinov2", "dinov2 registers", "vit", "deit", "clip", "siglip", "dinov3"])
@pytest.mark.parametrize("part", ["keys", "values"])
def test_features_are_the_models_own(family: str, part: Any) -> None:
    x = tiny_encoders.images(2)
    found = ss.vision.discover(tiny_encoders.model(family), x, features=part, layer=1, bias=-0.5)
    for row, features in zip(found.to_dict("records"), recomputed(family, x, part, 1), strict=True):
        expected = ss.vision.lost(features, bias=-0.5)
        assert row["share"] == expected.mask.mean()
        box = [row[key] for key in COLUMNS]
        np.testing.assert_array_equal(box, expected.in_pixels(tiny_encoders.PATCH, (20, 20)))
        assert row["seed_y"] == (expected.seed[0] + 0.5) * tiny_encoders.PATCH


def same_when_shuffled(table: pd.DataFrame, seen: Tensor, find: Any, draws: int) -> None:
    """Whether the patches' values, moved to the places that were drawn, give the same boxes again."""
    for place, values in enumerate(seen):
        random = np.random.default_rng([0, place])
        rows = table[(table["document"] == place) & (table["method"] == "shuffled")]
        for row in rows.to_dict("records"):
            moved = values.flatten(0, 1)[torch.from_numpy(random.permutation(GRID**2))]
            box = find(moved.unflatten(0, (GRID, GRID))).in_pixels(tiny_encoders.PATCH, (20, 20))
            np.testing.assert_array_equal([row[key] for key in COLUMNS], box)
        assert len(rows) == draws


def test_shuffled_features_are_the_same_elsewhere() -> None:
    """With a bias at which about half of the correlations are positive, so that each draw has its box."""
    x = tiny_encoders.images(2)
    seen = recomputed("dinov2", x, "keys", tiny_encoders.LAYERS - 1)
    flat = seen.flatten(1, 2)
    bias = -float((flat @ flat.mT).median())
    given = {str(index): [[0, 0, 8, 8]] for index in range(2)}
    found = ss.vision.discover(tiny_encoders.model(), x, boxes=given, draws=4, bias=bias)
    assert found[found["method"] == "shuffled"][list(COLUMNS)].drop_duplicates().shape[0] > 3
    same_when_shuffled(found, seen, lambda moved: ss.vision.lost(moved, bias=bias), 4)


@pytest.mark.parametrize("family", ["dinov2", "dinov2 registers", "vit", "clip"])
def test_attention_is_the_models_own(family: str) -> None:
    x = tiny_encoders.images(3)
    eager = tiny_encoders.build(family, attention="eager")
    with torch.no_grad():
        maps = eager(pixel_values=x, output_attentions=True).attentions[-1]
    seen = maps[:, :, 0, -(GRID**2) :].mean(1).unflatten(1, (GRID, GRID))
    given = {str(index): [[0, 0, 8, 8]] for index in range(3)}
    found = ss.vision.discover(tiny_encoders.model(family), x, features="attention", boxes=given, draws=2)
    first = found[found["method"] == "DINO-seg"]
    for row, attention in zip(first.to_dict("records"), seen, strict=True):
        box = [row[key] for key in COLUMNS]
        np.testing.assert_array_equal(
            box, ss.vision.dino_seg(attention).in_pixels(tiny_encoders.PATCH, (20, 20))
        )
    assert len(found) == 3 * (1 + 2 + 2)
    same_when_shuffled(found, seen, ss.vision.dino_seg, 2)


def test_interventions_act(shown: ss.Images) -> None:
    model = planted("dinov2")
    before = ss.vision.discover(model, shown)
    pd.testing.assert_frame_equal(
        before, ss.vision.discover(model, shown, interventions={ss.Site("exit"): torch.clone})
    )
    gone = ss.vision.discover(model, shown, interventions={ss.Site("exit"): torch.zeros_like})
    assert gone["x0"].isna().all()
    keys = {ss.Site("keys", model.layers - 1): torch.zeros_like}
    assert ss.vision.discover(model, shown, interventions=keys)["x0"].isna().all()
    assert (
        ss.vision.discover(model, shown, interventions=keys, features="values")
        .drop(columns="method")
        .equals(before.drop(columns="method"))
    )


def test_under_install_registers(shown: ss.Images) -> None:
    """The patches are the last tokens, whatever stands before them."""
    model = planted("dinov2")
    before = ss.vision.discover(model, shown)
    with ss.vision.install_registers(model, [], 3):
        pd.testing.assert_frame_equal(before, ss.vision.discover(model, shown))


def test_boxes_are_matched_by_name(shown: ss.Images) -> None:
    model = planted("dinov2")
    some = {"0.png": GIVEN["0.png"], "other.png": GIVEN["1.png"], "1.png": np.empty((0, 4))}
    with pytest.warns(ss.SpectralWarning, match=r"3 of 4 images have no boxes.*1\.png"):
        found = ss.vision.discover(model, shown, boxes=some, draws=1)
    assert found["located"].notna().sum() == 4 and len(found) == 4 + 3
    assert ss.vision.corloc(found)["n"].tolist() == [1] * 4
    with pytest.raises(ss.InputError, match="no boxes for any image"):
        ss.vision.discover(model, shown, boxes={"other.png": GIVEN["1.png"]})
    with pytest.raises(ss.InputError, match="no boxes for any image"):
        ss.vision.discover(model, shown, boxes={})
    for wrong in ([0, 0, 61, 40], [-1, 0, 9, 9], [5, 5, 5, 9], [0, 0, 9, float("nan")]):
        with pytest.raises(ss.InputError, match=r"0\.png is empty or lies outside of its 60 x 40"):
            ss.vision.discover(model, shown, boxes=GIVEN | {"0.png": [[0, 0, 60, 40], wrong]})


def test_boxes_of_pictures_in_folders(tmp_path: Path) -> None:
    for name in ("a/0.png", "b/0.png", "b/1.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        picture(PLACES[0]).save(tmp_path / name)
    images = ss.images(tmp_path)
    given = {"0.png": GIVEN["0.png"], "1.png": GIVEN["0.png"]}
    with pytest.warns(ss.SpectralWarning, match="2 of 3 images"):
        found = ss.vision.discover(planted("dinov2"), images, boxes=given, draws=0)
    assert found[found["located"].fillna(False)]["name"].tolist() == ["b/1.png"]


def test_figures(shown: ss.Images, tmp_path: Path) -> None:
    found = ss.vision.discover(planted("dinov2"), shown, boxes=GIVEN, draws=2)
    ss.figures.vision_boxes(shown, found, tmp_path / "boxes.png", GIVEN)
    ss.figures.vision_corloc(ss.vision.corloc(found), tmp_path / "corloc.png")
    with Image.open(tmp_path / "boxes.png") as drawn:
        colours = {colour for _, colour in drawn.convert("RGB").getcolors(2**24) or []}
    assert (0xF2, 0xB1, 0x34) in colours
    assert (tmp_path / "corloc.png").stat().st_size > 1000
    with pytest.raises(ss.InputError, match="no method 'LOST'"):
        ss.figures.vision_boxes(shown, found, tmp_path / "none.png", method="LOST")
    assert not (tmp_path / "none.png").exists()


@pytest.mark.usefixtures("unchecked")
def test_bad_input(shown: ss.Images, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ss.InputError, match="choose from keys"):
        ss.vision.discover(planted("dinov2"), shown, features="mlp")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ss.InputError, match=r"no \[CLS\]"):
        ss.vision.discover(planted("siglip"), shown, features="attention")
    with pytest.raises(ss.InputError, match="layer 3"):
        ss.vision.discover(planted("dinov2"), shown, layer=3)
    with pytest.raises(ss.InputError, match="-1 draws"):
        ss.vision.discover(planted("dinov2"), shown, draws=-1)
    with pytest.raises(ss.InputError, match="resize it first"):
        ss.vision.discover(tiny_encoders.model(), tiny_encoders.images(), size=40)
    monkeypatch.setattr(ss.VisionModel, "image_size", None)
    with pytest.raises(ss.InputError, match="give size"):
        ss.vision.discover(planted("dinov2"), shown)
    assert ss.vision.discover(planted("dinov2"), shown, size=40)["found"].all()
