"""Outliers that were planted are found: those patches, from that layer on, and no others."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from support import planted_outliers, tiny_encoders
from support.planted_outliers import PLANTABLE
from torch import Tensor

import spectral_sinks as ss

IMAGES, MARKS = planted_outliers.marked()


def planted(family: str = "dinov2", **options: Any) -> tuple[ss.VisionModel, ss.Pixels]:
    model = ss.load_vision(planted_outliers.plant(family, **options))
    return model, ss.pixels(IMAGES, model)


@pytest.mark.parametrize("family", PLANTABLE)
@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("rule", ["robust", 100.0])
def test_exactly_the_marked_patches_are_found(family: str, layer: int, rule: Any) -> None:
    model, pixels = planted(family, layer=layer)
    found = ss.outliers(model, pixels, rule=rule)
    marks = MARKS.flatten(1).numpy()
    for site in range(model.layers + 1):
        assert np.array_equal(found.member[:, site], marks & (site > layer))
    assert found.onset_layer == layer and found.strongest == layer
    shares = found.summary().set_index("layer")
    assert shares.loc[layer, "share"] == pytest.approx(marks.mean())
    assert shares.loc[layer, "low"] <= marks.mean() <= shares.loc[layer, "high"]
    assert (shares["images"] == [0] * (layer + 1) + [5] * (model.layers - layer)).all()
    rows = found.table
    assert set(rows["layer"]) == set(range(layer, model.layers))
    here = rows[rows["layer"] == layer]
    assert here[["image", "row", "column"]].to_numpy().tolist() == MARKS.nonzero().tolist()
    assert np.array_equal(found.frequency(layer), MARKS.double().mean(0).numpy())
    assert {"cls", "reg1"} & set(shares.columns) == {"cls", "reg1"} & set(model.prefix)


@pytest.mark.parametrize("family", PLANTABLE)
def test_the_random_twin_has_none(family: str) -> None:
    model = ss.load_vision(planted_outliers.random_twin(family))
    found = ss.outliers(model, ss.pixels(IMAGES, model))
    assert not found.member.any() and found.onset_layer is None and found.strongest is None
    assert found.table.empty
    record = found.record()
    assert record["outlier_share"] == 0 and record["outlier_share_interval"] is None


@pytest.mark.parametrize("family", tiny_encoders.FAMILIES)
def test_norms_are_those_of_transformers(family: str) -> None:
    """Recomputed by hooks on the untouched model, fp64; the robust rule by hand."""
    plain = tiny_encoders.plain(family)
    model, pixels = tiny_encoders.model(family), tiny_encoders.pixels(family, 5)
    seen: list[Tensor] = []
    handles = [
        block.register_forward_hook(lambda _, given, out: seen.extend([given[0], out]))
        for block in plain.get_submodule(model.layout.layers)
    ]
    with torch.no_grad():
        plain(tiny_encoders.images(5))
    for handle in handles:
        handle.remove()
    expected = torch.stack([seen[0], *seen[1::2]], dim=1).double().norm(dim=-1).numpy()
    found = ss.outliers(model, pixels, batch_size=5)
    np.testing.assert_allclose(found.norm, expected, rtol=1e-6)
    for site in range(model.layers + 1):
        values = expected[:, site, len(model.prefix) :].ravel()
        median = np.median(values)
        spread = 1.4826 * np.median(np.abs(values - median))
        outside = (values > median + 10 * spread) & (values > 2 * median)
        assert np.array_equal(found.member[:, site].ravel(), outside)


def test_order_and_batches_do_not_matter() -> None:
    model, pixels = planted()
    whole, single = ss.outliers(model, pixels), ss.outliers(model, pixels, batch_size=1)
    np.testing.assert_allclose(whole.norm, single.norm, rtol=1e-5)
    order = [3, 0, 5, 1, 4, 2]
    turned = ss.outliers(model, ss.pixels(IMAGES[order], model))
    assert np.array_equal(turned.member, whole.member[order])
    assert turned.onset_layer == whole.onset_layer


def test_onset_over_checkpoints() -> None:
    steps = {
        0: planted_outliers.random_twin(),
        10: planted_outliers.plant(layer=2),
        20: planted_outliers.plant(layer=0),
    }
    models = [(step, ss.load_vision(module)) for step, module in steps.items()]
    table = ss.vision.outlier_onset(models, ss.pixels(IMAGES, models[0][1]))
    share = table.pivot_table(index="step", columns="layer", values="share")
    assert isinstance(share, pd.DataFrame) and share.shape == (3, 4)
    assert (share.to_numpy() > 0).tolist() == [[False] * 4, [False] * 3 + [True], [False] + [True] * 3]
    with pytest.raises(ss.InputError, match="no checkpoints"):
        ss.vision.outlier_onset([], ss.pixels(IMAGES, models[0][1]))


def test_images_of_one_colour_and_one_image() -> None:
    model, _ = planted()
    flat = ss.outliers(model, ss.pixels(torch.zeros(2, 3, 20, 20), model))
    assert not flat.member.any()
    one = ss.outliers(model, ss.pixels(IMAGES[:1], model))
    assert np.array_equal(one.member[0, 2], MARKS[0].flatten().numpy())
    assert np.isnan(one.summary()["low"]).all()


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("rule", ["best", -1.0, 0])
def test_other_rules_are_refused(rule: Any) -> None:
    model, pixels = planted()
    with pytest.raises(ss.InputError, match="rule"):
        ss.outliers(model, pixels, rule=rule)
    assert (ss.outliers(model, pixels, rule="published").cutoff == 150).all()
