"""Heads go in the order of what was planted, and each cost is that of the model without them."""

import copy
import json
from typing import Any

import numpy as np
import pytest
import torch
from support.planted_circuits import HEAD, HEADS, LAYER, made

import spectral_sinks as ss


@pytest.fixture(scope="module")
def planted() -> Any:
    model, windows = made("llama")
    return model, windows, ss.sinks.head_removal(model, windows, draws=2, counts=(1, 5, 12), batch_size=3)


def test_the_planted_no_op_head_goes_first(planted: Any) -> None:
    _, _, found = planted
    heads = found.heads.set_index(["layer", "head"])
    assert heads["attention"].idxmax() == heads["no_op"].idxmax() == (LAYER, HEAD)
    assert len(heads) == 3 * HEADS
    assert (heads["to_sink_logit"] == 0).all()
    expected = heads["attention"] * np.maximum(1 - heads["value_ratio"], 0)
    np.testing.assert_allclose(heads["no_op"], expected)
    summary = found.summary().set_index(["order", "removed"])
    assert abs(summary.loc[("no-op", 1), "delta_nll"]) < 0.01, "it writes nothing"
    assert len(summary) == 4 * 3 and json.dumps(found.record())
    assert found.within((1e9,))["heads"].tolist() == [12.0] * 4


@pytest.mark.parametrize("predict", [None, 5])
@pytest.mark.parametrize("family", ["llama grouped", "gpt2", "gemma2", "gpt_neox"])
def test_costs_and_norms_are_those_of_weights_set_to_zero(family: str, predict: int | None) -> None:
    model, windows = made(family)
    found = ss.sinks.head_removal(model, windows, orders=("weights",), counts=(2,), predict=predict)
    assert found.predict == predict and found.record().get("predict") == predict
    first = found.heads.sort_values("weight").head(2)
    ids = torch.stack(windows.rows)

    def nll(module: Any) -> torch.Tensor:
        with torch.no_grad():
            logits = module(ids).logits[:, :-1].double().transpose(1, 2)
        each = torch.nn.functional.cross_entropy(logits, ids[:, 1:], reduction="none")
        if predict is None:
            return each.mean(1)
        drawn = [
            np.random.default_rng((0, i)).choice(len(row), 5, replace=False) for i, row in enumerate(each)
        ]
        return torch.stack([row[some].mean() for row, some in zip(each, drawn, strict=True)])

    changed: Any = copy.deepcopy(model.module)
    with torch.no_grad():
        for layer, head in zip(first["layer"], first["head"], strict=True):
            columns = model.head_columns(layer, head)
            path = f"{model.layout.layers}.{layer}.{model.layout.attention_projection}"
            weight = changed.get_submodule(path).weight
            (weight[columns] if family == "gpt2" else weight[:, columns]).zero_()
    np.testing.assert_allclose(found.table["delta_nll"], nll(changed) - nll(model.module), atol=1e-5)


def test_how_many_go_is_counted_by_draw(planted: Any) -> None:
    _, _, found = planted
    within = found.within((0.0, 1e9)).set_index(["order", "budget"])
    random = found.table[found.table["order"] == "random"]
    means = random.groupby(["draw", "removed"])["delta_nll"].mean().unstack()
    expected = [max([0, *row.index[row <= 0]]) for _, row in means.iterrows()]
    assert within.loc[("random", 0.0), "heads"] == pytest.approx(np.mean(expected))
    assert within.loc[("random", 0.0), ["least", "most"]].tolist() == [min(expected), max(expected)]
    low, high = within.loc[("weights", 1e9), ["low", "high"]]
    assert low == high == 12


def test_what_has_no_answer_is_refused(planted: Any) -> None:
    model, windows, _ = planted
    for options, said in (
        ({"position": 3}, "no sink at position 3"),
        ({"counts": (13,)}, "13 heads: .* has 12"),
        ({"counts": (0,)}, "0 heads"),
        ({"position": 50}, "position 50"),
    ):
        with pytest.raises(ss.InputError, match=said):
            ss.sinks.head_removal(model, windows, draws=1, **options)


@pytest.mark.usefixtures("unchecked")
def test_an_unknown_order_is_refused(planted: Any) -> None:
    model, windows, _ = planted
    orders: Any = ("size",)
    with pytest.raises(ss.InputError, match="choose from attention, no-op, weights, random"):
        ss.sinks.head_removal(model, windows, orders=orders)


def test_attention_to_a_learned_logit_is_attention_that_writes_nothing() -> None:
    """One head of a gpt-oss gives nearly all of its attention to its logit, and goes first."""
    model, windows = made("gpt_oss")
    with torch.no_grad():
        model.module.model.layers[0].self_attn.sinks[1] = 12.0
    found = ss.sinks.head_removal(model, windows, orders=("no-op",), counts=(1,))
    heads = found.heads.set_index(["layer", "head"])
    assert heads["no_op"].idxmax() == (0, 1) and heads.loc[(0, 1), "to_sink_logit"] > 0.99
    assert abs(found.table["delta_nll"]).max() < 1e-3
    assert heads.loc[(LAYER, HEAD), "no_op"] > 0.9, "the planted no-op head is the next"


@pytest.mark.usefixtures("unchecked")
def test_numbers_and_orders_that_are_named_twice_count_once(planted: Any) -> None:
    model, windows, _ = planted
    orders: Any = "weights"
    found = ss.sinks.head_removal(model, windows, orders=orders, counts=(2, 1, 2))
    assert found.table["order"].unique().tolist() == ["weights"]
    assert found.summary()["removed"].tolist() == [2, 1] and len(found.within()) == 3
    twice = ss.sinks.head_removal(model, windows, orders=("weights", "weights"), counts=(2, 1))
    assert twice.table.equals(found.table)
    for options in ({"counts": ()}, {"orders": ()}, {"orders": ("random",), "draws": 0}, {"draws": -1}):
        nothing: Any = options
        with pytest.raises(ss.InputError, match="nothing would be removed"):
            ss.sinks.head_removal(model, windows, **nothing)
