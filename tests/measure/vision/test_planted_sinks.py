"""Sinks of images: the planted kind of token and nothing else, numbers as recomputed from eager maps."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import planted_vision_circuits, tiny_encoders
from support.planted_vision_circuits import ANY, CASES, HEAD, HEADS, LAYER, eager

import spectral_sinks as ss
from spectral_sinks import stats
from spectral_sinks.spectra.subspace import random_subspace


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Intervals are tested elsewhere."""
    monkeypatch.setattr(stats, "mean_interval", lambda v: (float(np.min(v)), float(np.max(v))))


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_vision_planted_sink_is_found(family: str, kind: str) -> None:
    model, pixels, at = planted_vision_circuits.made(family, kind)
    found = ss.vision_sinks(model, pixels)
    images = range(len(pixels))
    (sink,) = found.sinks
    assert (sink.token, sink.layer, sink.onset_layer, sink.share_of_documents) == (kind, LAYER, LAYER, 1.0)
    assert sink.position == (None if kind == "patch" else at[0])
    expected = np.zeros_like(found.members)
    expected[images, at] = True
    assert np.array_equal(found.members, expected)
    table = found.by_kind().set_index("kind")
    count = 25 if kind == "patch" else 1
    rate = 1 / (model.layers * HEADS)
    assert table.loc[kind, "any_rate"] == pytest.approx(rate)
    assert table.loc[kind, "sink_rate"] == pytest.approx(rate / count)
    others = table.drop(index=[kind, "sink patch"])
    assert (others["any_rate"] == 0).all() and (others["share_of_images"] == 0).all()
    heads = found.by_head().set_index(["kind", "layer", "head"])
    row = heads.loc[("sink patch" if kind == "patch" else kind, LAYER, HEAD)]
    assert (row["mass"] > 0.9).all() and (row["weighted"] < 0.3).all() and (row["value_ratio"] < 0.05).all()
    assert np.allclose(row["mass"], row["largest"]) and np.allclose(row["uniform"], 1 / pixels.length)
    layers = found.by_layer()
    assert layers["no_op_mass"].idxmax() == LAYER
    assert layers.loc[LAYER, "no_op_mass"] == pytest.approx(row["mass"].mean() / HEADS, rel=0.05)
    assert (layers.drop(index=LAYER)["no_op_mass"] == 0).all() or kind != "patch"
    patches = found.patches().set_index("rule")
    assert (
        patches.loc["absolute", "per_image"]
        == patches.loc["absolute", "share_of_images"]
        == (kind == "patch")
    )
    assert patches.loc["relative", "times_uniform"] == pytest.approx(0.3 * 64)
    assert sink.norm_ratio.value == pytest.approx(float(ratio(found, at).mean()), rel=1e-6)


def ratio(found: ss.vision.VisionSinks, at: list[int]) -> Any:
    """Norm of the sink's residual that its layer reads, in medians of the other patches."""
    norm = found.residuals.norm[:, LAYER]
    first = len(found.prefix)
    usual = [
        np.median([n for k, n in enumerate(row) if k >= first and k != s])
        for row, s in zip(norm, at, strict=True)
    ]
    return norm[range(len(at)), at] / usual


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_vision_planted_sink_is_lost_in_the_randomised_twin(family: str, kind: str) -> None:
    model, pixels, _ = planted_vision_circuits.made(family, kind)
    found = ss.vision_sinks(planted_vision_circuits.twin(model), pixels)
    assert found.sinks == () and not found.members.any() and found.onset_layer is None
    assert (found.by_layer()["mass"] == 0).all() and (found.patches()["per_image"] == 0).all()
    assert found.record()["sinks"] == []


@pytest.mark.parametrize("family", ANY)
def test_vision_tables_are_those_of_eager_maps(family: str) -> None:
    """With a threshold low enough that sinks are many and differ between images."""
    pixels = tiny_encoders.pixels(family)
    found = ss.vision_sinks(tiny_encoders.model(family), pixels, epsilon=0.06, batch_size=2)
    maps, norms = eager(family, tiny_encoders.images())
    first = len(found.prefix)
    alpha = torch.stack(maps, 1).detach().mean(-2)
    written = torch.stack(norms, 1).detach()
    ratios = written / written.mean(-1, keepdim=True)
    share = alpha * written / (alpha * written).sum(-1, keepdim=True)
    assert np.allclose(found.weighted, share, atol=1e-6)
    sinks = torch.zeros(3, pixels.length, dtype=torch.bool)
    for image in range(3):
        for token in range(pixels.length):
            sinks[image, token] = any(
                float(alpha[image, layer, head, token]) > 0.06 for layer in range(3) for head in range(4)
            )
    assert np.array_equal(found.members, sinks) and 0 < sinks[:, first:].float().mean() < 1
    table = found.by_head().set_index(["kind", "document", "layer", "head"]).sort_index()
    for place, kind in enumerate(found.prefix):
        part = table.loc[kind]
        assert np.allclose(part["mass"], alpha[..., place].flatten(), atol=1e-6)
        assert np.allclose(part["value_ratio"], ratios[..., place].flatten(), rtol=1e-4)
    for image in range(3):
        here = [k for k in range(first, pixels.length) if sinks[image, k]]
        part = table.loc[("sink patch", image)]
        assert (part["tokens"] == len(here)).all()
        assert np.allclose(part["mass"], alpha[image][..., here].sum(-1).flatten(), atol=1e-6)
        above = (alpha[image][..., here] > 0.06).double().mean(-1).flatten()
        assert not here or np.allclose(part["above"], above)
    no_op = (alpha * (sinks[:, None, None] & (ratios <= 0.2))).sum(-1).mean((0, 2))
    layers = found.by_layer()
    assert np.allclose(layers["no_op_mass"], no_op, atol=1e-6)
    assert np.allclose(layers["mass"], (alpha * sinks[:, None, None]).sum(-1).mean((0, 2)), atol=1e-6)
    whole = table.loc[[*found.prefix, "patch"]].groupby(["document", "layer", "head"])["mass"].sum()
    assert np.allclose(whole, 1, atol=1e-5), "prefix and patches receive all there is"
    assert found.maps(1, 2).shape == (3, 5, 5)
    assert np.allclose(found.maps(1, 2)[0, 3, 1], alpha[0, 1, 2, first + 16], atol=1e-6)
    assert np.allclose(found.maps(2), alpha[:, 2, :, first:].mean(1).view(3, 5, 5), atol=1e-6)


@pytest.mark.parametrize("kind", ["reg3", "patch"])
def test_vision_planted_sink_is_as_dark_as_its_residual(kind: str) -> None:
    model, pixels, at = planted_vision_circuits.made("dinov2 registers", kind)
    spectrum = planted_vision_circuits.spectrum()
    (sink,) = ss.vision_sinks(model, pixels, spectrum, draws=3).sinks
    x = torch.stack(list(pixels))
    site = ss.Site("exit", LAYER - 1)
    read = ss.trace(model, x, {}, [site], readout=lambda _, read, __: read[site]).double()
    first, dark = len(model.prefix), spectrum.dark()
    patches = [[k for k in range(first, pixels.length) if k != s or kind != "patch"] for s in at]
    shares = torch.stack([dark.share(read[i, s]) for i, s in enumerate(at)])
    others = torch.stack([dark.share(read[i, rest]).mean() for i, rest in enumerate(patches)])
    assert sink.dark_share.value == pytest.approx(float(shares.mean()), abs=1e-5)
    assert sink.other_dark_share.value == pytest.approx(float(others.mean()), abs=1e-5)
    drawn = [
        float(
            torch.stack(
                [random_subspace(model.d, dark.rank, seed).share(read[i, s]) for i, s in enumerate(at)]
            ).mean()
        )
        for seed in range(3)
    ]
    assert sink.dark_share.least == pytest.approx(min(drawn), abs=1e-5)
    assert sink.dark_share.most == pytest.approx(max(drawn), abs=1e-5)


def test_vision_record_is_json_and_figures_are_drawn(tmp_path: Path) -> None:
    model, pixels, _ = planted_vision_circuits.made("dinov2 registers", "patch")
    found = ss.vision_sinks(model, pixels, planted_vision_circuits.spectrum(), draws=2)
    record = json.loads(json.dumps(found.record(), allow_nan=False))
    assert record["tokens_per_image"] == pixels.length and record["sinks"][0]["token"] == "patch"
    assert record["total_sink_mass"] > 2 * record["uniform_total_sink_mass"]
    bare = ss.vision_sinks(model, pixels).record()
    assert not any("dark" in key for key in bare["sinks"][0])
    ss.figures.vision_sinks(found.by_head(), tmp_path / "heads.png")
    maps = [found.maps(layer) for layer in range(3)]
    images = torch.stack(list(pixels)).numpy()
    titles = ["layer 0", "layer 1", "layer 2"]
    ss.figures.attention_maps(images, maps, titles, 1 / found.length, tmp_path / "maps.png")
    assert (tmp_path / "heads.png").stat().st_size > 5000 and (tmp_path / "maps.png").stat().st_size > 5000


def test_vision_sinks_of_what_they_cannot_be_asked() -> None:
    model, pixels = tiny_encoders.model(), tiny_encoders.pixels()
    with pytest.raises(ss.InputError, match="epsilon"):
        ss.vision_sinks(model, pixels, epsilon=1.5)
    with pytest.raises(ss.InputError, match="width 64"):
        ss.vision_sinks(model, pixels, planted_vision_circuits.spectrum())


def test_vision_massive_activations_are_told_by_kind() -> None:
    """A register of a hundred times the others' norm, and no patch."""
    model, pixels, _ = planted_vision_circuits.made("dinov2 registers", "patch")
    with torch.no_grad():
        model.tower.embeddings.register_tokens[0, 1] *= 100
    table = ss.residual.massive_activations(model, pixels)
    high = table[table["high_norm"] & (table["layer"] == -1)]
    assert set(high["position"]) == set(high["token"]) == {2} and set(high["document"]) == set(range(6))
