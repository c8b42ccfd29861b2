"""Probes find what was put into tokens: class into outliers, place and pixels into the others."""

import numpy as np
import pandas as pd
import pytest
import torch
from support import planted_outliers

import spectral_sinks as ss
from spectral_sinks.measure.vision.linear_probes import patches_of, probe_tokens, token_features

GRID = (4, 5)
CLASSES = 3


def put(count: int = 180, seed: int = 0) -> pd.DataFrame:
    generator = torch.Generator().manual_seed(seed)
    patches = GRID[0] * GRID[1]
    labels = torch.arange(count) % CLASSES
    pixels = torch.randn(count, patches, 6, generator=generator)
    outlier = torch.rand(count, patches, generator=generator) < 0.2
    outlier[torch.arange(count), torch.randint(patches, (count,), generator=generator)] = True
    place = torch.eye(patches).expand(count, -1, -1)
    kind = torch.eye(CLASSES)[labels][:, None].expand(-1, patches, -1)
    local = torch.cat([place, pixels, torch.zeros_like(kind)], dim=-1)
    whole = torch.cat([torch.zeros_like(place), torch.zeros_like(pixels), kind], dim=-1)
    x = torch.where(outlier[..., None], whole, local)
    x = x + 0.01 * torch.randn(x.shape, generator=generator)
    cls = torch.randn(count, 1, x.shape[-1], generator=generator)
    return probe_tokens(torch.cat([cls, x], dim=1), outlier, pixels, GRID, labels)


def test_local_and_global_information_is_told_apart() -> None:
    table = put().set_index(["question", "tokens"])["mean"]
    assert table["position accuracy", "others"] == 1 and table["position accuracy", "outliers"] < 0.2
    assert table["position distance", "others"] == 0 and table["position distance", "outliers"] > 1
    assert table["pixel error", "others"] < 0.1 and table["pixel error", "outliers"] > 0.9
    assert table["class accuracy", "outliers"] > 0.97
    for name in ("others", "cls", "shuffled"):
        assert 0.05 < table["class accuracy", name] < 0.7
    for question in ("position accuracy", "position distance", "pixel error", "class accuracy"):
        difference = table[question, "outliers"] - table[question, "others"]
        assert table[question, "difference"] == pytest.approx(difference, abs=0.05)


def test_every_mean_has_its_interval_and_its_count() -> None:
    table = put()
    assert ((table["low"] <= table["mean"]) & (table["mean"] <= table["high"])).all()
    assert (table["images"] == 90).all()
    assert set(table["tokens"]) == {"outliers", "others", "difference", "cls", "shuffled"}


def test_on_a_model() -> None:
    images, marks = planted_outliers.marked(12)
    model = ss.load_vision(planted_outliers.plant())
    pixels = ss.pixels(images, model)
    table = ss.vision.token_probes(ss.outliers(model, pixels))
    assert set(table["question"]) == {"position accuracy", "position distance", "pixel error"}
    one = patches_of(pixels[2], 4)
    assert torch.equal(one[7], images[2, :, 4:8, 8:12].flatten())
    assert torch.equal(one[marks[2].flatten()], torch.full((2, 48), planted_outliers.MARK))
    x = token_features(model, pixels, 2, batch_size=5)
    with torch.no_grad():
        expected = planted_outliers.plant()(images).last_hidden_state
    assert torch.allclose(x, expected, atol=1e-5)


def test_bad_input() -> None:
    images, _ = planted_outliers.marked(6)
    twin = ss.load_vision(planted_outliers.random_twin())
    with pytest.raises(ss.InputError, match="no outliers"):
        ss.vision.token_probes(ss.outliers(twin, ss.pixels(images, twin)))
    model = ss.load_vision(planted_outliers.plant())
    found = ss.outliers(model, ss.pixels(images[:3], model))
    with pytest.raises(ss.InputError, match="at least four"):
        ss.vision.token_probes(found)
    with pytest.raises(ss.InputError, match="layers 0 to 2, or -1"):
        ss.vision.token_probes(ss.outliers(model, ss.pixels(images, model)), 3)
    with pytest.raises(ss.InputError, match="no outliers at layer 0"):
        ss.vision.token_probes(ss.outliers(model, ss.pixels(images, model)), 0)


def test_one_class_has_no_class_probe() -> None:
    x = torch.randn(8, 7, 5, generator=torch.Generator().manual_seed(0))
    outlier = torch.zeros(8, 6, dtype=torch.bool)
    outlier[:, 0] = True
    labels = torch.zeros(8, dtype=torch.long)
    with pytest.warns(ss.SpectralWarning, match="no class probe"):
        table = probe_tokens(x, outlier, x[:, 1:], (2, 3), labels)
    assert "class accuracy" not in set(table["question"]) and np.isfinite(table["mean"]).all()
