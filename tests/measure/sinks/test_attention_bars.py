"""Attention bars against transformers' own maps, loops, and planted tables."""

import copy
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from support import tiny_models

import spectral_sinks as ss
from spectral_sinks.measure.sinks import attention_bars
from spectral_sinks.measure.sinks.attention_bars import later_attention, strata

IDS = tiny_models.ids(4, 40, seed=5)


def by_hand(attention: np.ndarray) -> np.ndarray:
    """Mean and variance over later queries of one map `[tokens, tokens]`, key by key."""
    size = len(attention)
    found = np.full((size, 2), np.nan)
    for key in range(size - 1):
        column = [attention[query, key] for query in range(key + 1, size)]
        found[key] = np.mean(column), np.var(column)
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "gpt_oss", "mistral"])
def test_received_against_transformers(family: str) -> None:
    model, owner = tiny_models.model(family), [0, 0, 1, 2]
    u = ss.read_spectrum(model, bands=5)
    spans = {"dark": u.dark(0.2), "random": ss.random_subspace(32, 3)}
    table = ss.sinks.received(model, ss.Windows.of_ids(IDS, model, owner), spans, batch_size=3)
    assert len(table) == 4 * 3 * 40 and not table.duplicated(["window", "layer", "position"]).any()
    with torch.no_grad():
        output = tiny_models.plain(family)(IDS, output_attentions=True, output_hidden_states=True)
    for (window, layer), part in table.groupby(["window", "layer"]):
        expected = by_hand(output.attentions[layer][window].double().mean(0).numpy())
        assert np.allclose(part[["attention", "variance"]], expected, atol=1e-7, equal_nan=True)
        x = output.hidden_states[layer][window].double()
        assert np.allclose(part["norm"], x.norm(dim=-1), rtol=1e-5)
        for name, span in spans.items():
            assert np.allclose(part[name], span.share(x).sqrt(), atol=1e-5)
        assert part["token"].tolist() == IDS[window].tolist()
        assert set(part["document"]) == {owner[window]}


@pytest.mark.parametrize("attention", ["sdpa", "sdpa_opening"])
def test_other_attention_is_read_through_eager_and_put_back(attention: str) -> None:
    model = ss.load(copy.deepcopy(tiny_models.build()), tokenizer=tiny_models.tokenizer())
    model.module.set_attn_implementation(attention)
    windows, spans = ss.Windows.of_ids(IDS, model), {"dark": ss.random_subspace(32, 3)}
    before = ss.evaluate(model, windows, {}).nll
    table = ss.sinks.received(model, windows, spans)
    assert model.config._attn_implementation == attention
    assert ss.evaluate(model, windows, {}).nll == before
    eager = ss.sinks.received(tiny_models.model(), ss.Windows.of_ids(IDS, tiny_models.model()), spans)
    assert np.allclose(table["attention"], eager["attention"], atol=1e-6, equal_nan=True)
    with pytest.raises(ss.InputError, match="width 16"):
        ss.sinks.received(model, windows, {"x": ss.random_subspace(16, 2)})
    assert model.config._attn_implementation == attention


def test_it_is_put_back_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ss.load(tiny_models.build(attention="sdpa"))
    windows = ss.Windows.of_ids(IDS, model)

    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("no luck")

    monkeypatch.setattr(attention_bars, "trace", fails)
    with pytest.raises(RuntimeError, match="no luck"):
        ss.sinks.received(model, windows, {"x": ss.random_subspace(32, 2)})
    assert model.config._attn_implementation == "sdpa"


def test_a_planted_bar_and_a_planted_flicker() -> None:
    maps = torch.zeros(1, 2, 10, 10)
    maps[:, :, :, 0] = 0.5
    maps[0, :, 4:, 3] = 0.3  # a bar: every later query gives it 0.3
    maps[0, 0, 4::2, 2] = 0.6  # two heads, every second query: mean 0.15 over heads and queries
    found = later_attention(maps)[0]
    assert found[3].tolist() == pytest.approx([0.3, 0.0], abs=1e-7)
    assert found[2, 0] == pytest.approx(0.3 * 3 / 7, abs=1e-6)
    assert found[2, 1] > 0.01 and torch.isnan(found[9]).all()


def table(windows: int = 6, length: int = 80, layers: int = 4, seed: int = 0) -> pd.DataFrame:
    """Random attention that falls with position, with a sink from layer 1."""
    draw = np.random.default_rng(seed)
    window, layer, position = (x.ravel() for x in np.indices((windows, layers, length)))
    attention = draw.random(len(window)) / (position + 1)
    sink = position == 0
    attention[sink] = np.where(layer[sink] >= 1, 0.5, 0.05)
    return pd.DataFrame(
        {
            "document": window // 2,
            "window": window,
            "layer": layer,
            "position": position,
            "token": np.where(sink, tiny_models.BOS, draw.integers(2, 30, len(window))),
            "attention": attention,
            "variance": draw.random(len(window)) * 0.01,
            "dark": draw.random(len(window)),
        }
    )


def test_candidates() -> None:
    model, rows = tiny_models.model(), table()
    rows.loc[(rows["position"] == 20) & (rows["window"] == 3), "token"] = tiny_models.BOS
    kept = ss.sinks.candidates(rows, model)
    assert set(kept["layer"]) == {1, 2, 3}, "layer 0 has no sink yet"
    assert kept["position"].min() == 1 and kept["position"].max() == 79 - 9, "an eighth of 80 is left out"
    assert not (kept["token"] == tiny_models.BOS).any()
    assert len(kept) == 3 * (6 * 70 - 1)
    short = ss.sinks.candidates(table(length=12), model)
    assert short["position"].max() == 7, "at least the last four"
    with pytest.raises(ss.InputError, match="more than 6 tokens"):
        ss.sinks.candidates(table(length=5), model)
    assert set(ss.sinks.candidates(rows, ss.load(tiny_models.build()))["token"]) >= {tiny_models.BOS}, (
        "no BOS is known"
    )


def test_bars_by_quantile() -> None:
    rows = ss.sinks.candidates(table(), tiny_models.model())
    marked = ss.sinks.mark_bars(rows, 0.2, 0.25)
    for _, part in rows.groupby("layer"):
        high = part["attention"] > np.quantile(part["attention"], 0.8)
        least = part["variance"][high] <= np.quantile(part["variance"][high], 0.25)
        assert set(part.index[high][least]) == set(part.index[marked[part.index]])
    assert marked.mean() == pytest.approx(0.05, abs=0.01)
    assert ss.sinks.mark_bars(rows, 0.2, 1.0).mean() == pytest.approx(0.2, abs=0.01)
    for wrong in ((0.0, 0.5), (1.0, 0.5), (0.1, 0.0), (0.1, 1.5)):
        with pytest.raises(ss.InputError, match="expected shares"):
            ss.sinks.mark_bars(rows, *wrong)


def test_matched_rows_share_layer_place_and_frequency() -> None:
    rows = ss.sinks.candidates(table(), tiny_models.model())
    marked, groups = ss.sinks.mark_bars(rows), strata(rows)
    for _, part in rows.groupby(groups):
        assert part["layer"].nunique() == 1
        width = -(-(rows["position"].max() + 1) // 16)
        assert part["position"].max() - part["position"].min() < width
        assert part["position"].max() < 2 * part["position"].min() + width
    found = ss.sinks.matched(rows, marked, "dark")
    assert set(found.index) <= set(rows.index[marked])
    for index, row in found.iterrows():
        others = rows[(groups == groups[index]) & ~marked]
        assert row["control"] == pytest.approx(others["dark"].mean())


def test_position_and_frequency_alone_leave_no_excess() -> None:
    rows = ss.sinks.candidates(table(windows=40), tiny_models.model())
    late = rows.assign(dark=1 / rows["position"])  # dark by position alone: early tokens are bars, and dark
    marked = ss.sinks.mark_bars(late)
    plain = late[marked]["dark"].mean() - late[~marked]["dark"].mean()
    found = ss.sinks.matched(late, marked, "dark")
    assert plain > 0.05 and abs((found["dark"] - found["control"]).mean()) < 0.15 * plain
    dark = rows.assign(dark=rows["dark"] + marked)  # planted: bars are darker by 1
    found = ss.sinks.matched(dark, marked, "dark")
    assert (found["dark"] - found["control"]).mean() == pytest.approx(1, abs=0.1)
