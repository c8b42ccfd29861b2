"""Where outliers lie and how alike they are to their neighbours: recomputed by loops on planted ones."""

from typing import Any

import numpy as np
import pytest
import torch
from support import planted_outliers, tiny_encoders

import spectral_sinks as ss
from spectral_sinks.measure.vision.outlier_positions import same_image, same_place, same_ring
from spectral_sinks.measure.vision.outlier_tokens import neighbour_cosines

IMAGES, MARKS = planted_outliers.marked(6)
ROWS = tiny_encoders.SIDE // tiny_encoders.PATCH


def found(family: str = "dinov2", images: torch.Tensor = IMAGES) -> ss.vision.Outliers:
    model = ss.load_vision(planted_outliers.plant(family))
    return ss.outliers(model, ss.pixels(images, model))


def blocks(count: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    """Marked patches stand in squares of four, off the border: two neighbours of each are alike to it."""
    images, marks = planted_outliers.marked(count, each=0)
    generator = torch.Generator().manual_seed(1)
    for image in range(count):
        y, x = (int(v) for v in torch.randint(1, ROWS - 2, (2,), generator=generator))
        marks[image, y : y + 2, x : x + 2] = True
    wide = marks.repeat_interleave(tiny_encoders.PATCH, 1).repeat_interleave(tiny_encoders.PATCH, 2)
    return torch.where(wide[:, None], torch.tensor(planted_outliers.MARK), images), marks


@pytest.mark.parametrize("family", planted_outliers.PLANTABLE)
def test_outliers_among_patches_like_them_are_said_to_be(family: str) -> None:
    images, marks = blocks()
    outliers = found(family, images)
    assert np.array_equal(outliers.member[:, 2], marks.flatten(1).numpy())
    table = ss.vision.outlier_places(outliers).set_index(["quantity", "control"])
    assert (table["images"] == 40).all()
    alike = table.loc["neighbour cosine"]
    assert alike["outliers"].to_numpy() == pytest.approx(0.5, abs=0.05)
    assert (alike["low"] > 0.3).all() and (alike["high"] < 0.7).all()
    assert list(alike.index) == ["same image", "same border distance", "same place"]
    border = table.loc[("border distance", "same image")]
    assert border["outliers"] >= 1 and border["low"] > 0 and border["low"] <= border["difference"]


def test_marks_at_random_are_not() -> None:
    images, _ = planted_outliers.marked(60)
    table = ss.vision.outlier_places(found(images=images)).set_index(["quantity", "control"])
    assert table.loc[("border distance", "same image"), "low"] < 0.15
    assert (table.loc["neighbour cosine", "difference"].abs() < 0.1).all()


def test_means_by_loops() -> None:
    outliers = found()
    outlier = outliers.member[:, 2]
    alike = np.stack([neighbour_cosines(outliers.pixels, image).ravel() for image in range(6)])
    far = [min(y, x, ROWS - 1 - y, ROWS - 1 - x) for y in range(ROWS) for x in range(ROWS)]
    pools: dict[str, Any] = {
        "same image": lambda i, p: [(i, q) for q in range(25)],
        "same border distance": lambda i, p: [(i, q) for q in range(25) if far[q] == far[p]],
        "same place": lambda i, p: [(j, p) for j in range(6)],
    }
    table = ss.vision.outlier_places(outliers).set_index(["quantity", "control"])
    for control, pool in pools.items():
        differences: list[float] = []
        for image in range(6):
            each: list[float] = []
            for patch in np.flatnonzero(outlier[image]):
                partners = [alike[j, q] for j, q in pool(image, patch) if not outlier[j, q]]
                if partners:
                    each.append(float(alike[image, patch] - np.mean(partners)))
            if each:
                differences.append(float(np.mean(each)))
        row = table.loc[("neighbour cosine", control)]
        assert row["difference"] == pytest.approx(np.mean(differences), abs=1e-12)
        assert row["images"] == len(differences)
        assert (row["low"], row["high"]) == pytest.approx(ss.stats.mean_interval(differences), abs=1e-3)


def test_a_patch_without_partners_has_none() -> None:
    value = np.arange(18.0).reshape(2, 9)
    outlier = np.zeros((2, 9), dtype=bool)
    outlier[:, 4] = True
    border = np.array([0, 0, 0, 0, 1, 0, 0, 0, 0])
    assert np.isnan(same_ring(value, outlier, border)[:, 4]).all()
    assert np.isnan(same_place(value, outlier)[:, 4]).all()
    assert same_image(value, outlier)[:, 4].tolist() == [4.0, 13.0]
    assert np.isfinite(same_place(value, outlier)[:, :4]).all()


def test_none_is_a_result_and_other_layers_are_refused() -> None:
    twin = ss.load_vision(planted_outliers.random_twin())
    none = ss.outliers(twin, ss.pixels(IMAGES, twin))
    columns = list(ss.vision.outlier_places(found()).columns)
    assert ss.vision.outlier_places(none).empty and list(ss.vision.outlier_places(none).columns) == columns
    assert ss.vision.outlier_places(found(), 0).empty
    for layer in (-2, 3):
        with pytest.raises(ss.InputError, match="has layers 0 to 2"):
            ss.vision.outlier_places(found(), layer)


def test_all_patches_outliers_have_nothing_to_compare_with() -> None:
    model = ss.load_vision(planted_outliers.plant())
    every = ss.outliers(model, ss.pixels(IMAGES, model), rule=1e-9)
    table = ss.vision.outlier_places(every)
    assert (table["images"] == 0).all() and table["difference"].isna().all()
