"""The experiment on caches: its caches are those that it names, and its text is what was not trained on."""

from pathlib import Path

import pytest
from support import tiny_models

import spectral_sinks as ss
from spectral_sinks.experiments import find_experiment

PARTS = find_experiment("kv_cache").__globals__


def test_each_cache_is_measured_and_compared_with_the_first_four_and_a_window(tmp_path: Path) -> None:
    model, ids = tiny_models.model("llama"), tiny_models.ids(2, 128)
    costs = ss.nll.compare_caches(model, ids, PARTS["settings"](40), base=PARTS["BASE"])
    by = costs.table.set_index("cache")
    assert len(by) == 14 and list(costs.settings) == list(by.index)
    assert set(by.index[by["kind"] == "control"]) == {"all entries", "window", "random", "first 4 + random"}
    coarse = ss.nll.cached_nll(model, ids, ss.nll.KVCache(model, 40, bits=4))
    plain = ss.nll.cached_nll(model, ids, ss.nll.KVCache(model, 40))
    late = [float(read.nll[:, 63:].double().mean()) for read in (coarse, plain)]
    assert by.loc["int4", "nll"] == pytest.approx(late[0])
    assert by.loc["int4", "more"] == pytest.approx(late[0] - late[1], abs=1e-9)
    assert by.loc["int4", "early"] == pytest.approx(float(coarse.nll[:, :39].double().mean()))
    assert by.loc["first 4 + window", "more"] == 0
    assert by.loc["first 4 + window", "nbytes"] == plain.nbytes / 2 == 3 * 2 * 2 * 40 * model.head_size * 4
    assert (by["nbytes"].drop("all entries") < by.loc["all entries", "nbytes"]).all()
    positions = costs.positions
    edges = positions[positions["cache"] == "window"][["start", "stop"]].to_numpy().tolist()
    assert edges == [[1, 32], [32, 64], [64, 128]]
    bounded = costs.table[costs.table["cache"] != "all entries"]
    ss.figures.cache_costs(positions, bounded, costs.base, tmp_path / "kv_cache.png")
    assert (tmp_path / "kv_cache.png").stat().st_size > 10_000


def test_the_base_is_one_of_the_caches() -> None:
    model, ids = tiny_models.model("llama"), tiny_models.ids(2, 64)
    with pytest.raises(ss.InputError, match=r"base 'windows': choose from all, window"):
        ss.nll.compare_caches(model, ids, {"all": {}, "window": {"size": 20}}, base="windows")
    costs = ss.nll.compare_caches(model, ids, {"all": {}, "window": {"size": 20}})
    assert (costs.base, costs.table["more"].iloc[0]) == ("all", 0)
