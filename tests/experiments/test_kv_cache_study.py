"""The experiment on caches: its tables say what the caches themselves say."""

from pathlib import Path

import pytest
import torch
from support import tiny_models

import spectral_sinks as ss
from spectral_sinks.experiments import find_experiment

PARTS = find_experiment("kv_cache").__globals__


def test_each_cache_is_measured_and_compared_with_the_first_four_and_a_window(tmp_path: Path) -> None:
    model, ids = tiny_models.model("llama"), tiny_models.ids(2, 128)
    positions, caches = PARTS["measure"](model, ids, 40, 64)
    by = caches.set_index("cache")
    assert len(by) == 14 and set(by["kind"]) == {"entries", "integers"}
    direct = (
        ss.nll.cached_nll(model, ids, ss.nll.KVCache(model, 40, bits=4), block=64).nll[:, 63:].double().mean()
    )
    plain = ss.nll.cached_nll(model, ids, ss.nll.KVCache(model, 40), block=64)
    assert by.loc["int4", "nll"] == pytest.approx(float(direct))
    assert by.loc["int4", "more"] == pytest.approx(
        float(direct - plain.nll[:, 63:].double().mean()), abs=1e-9
    )
    assert by.loc["first 4 + window", "more"] == 0
    assert by.loc["first 4 + window", "bytes"] == plain.nbytes / 2 == 3 * 2 * 2 * 40 * model.head_size * 4
    assert (by["bytes"].drop("all entries") < by.loc["all entries", "bytes"]).all()
    edges = positions[positions["cache"] == "window"][["start", "stop"]].to_numpy().tolist()
    assert edges == [[1, 32], [32, 64], [64, 128]]
    ss.figures.kv_cache(positions, caches, tmp_path / "kv_cache.png")
    assert (tmp_path / "kv_cache.png").stat().st_size > 10_000


def test_streams_are_articles_after_the_opening() -> None:
    model = ss.load()
    ids = PARTS["streams"](model, True, 2, 200)
    assert ids.shape == (2, 200) and (ids[:, 0] == model.bos).all()
    assert not (ids[:, 1:] == model.bos).any()
    last = ss.cut([ss.documents()[-1]], model, bos="never", length=64)
    assert torch.equal(ids[0, 1:65], last.rows[0])
    with pytest.raises(ss.InputError, match="read fewer streams"):
        PARTS["streams"](model, True, 1000, 10**6)
