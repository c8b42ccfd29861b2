"""High norms and massive activations: planted ones are found, and every size is recomputed."""

import numpy as np
import pytest
import torch
from support import tiny_models

import spectral_sinks as ss
from spectral_sinks.measure.residual.massive import (
    Residuals,
    attention_and_residuals,
    repeated_windows,
    usual_levels,
)

IDS = tiny_models.ids(4, 70, seed=3)


def planted(value: float) -> ss.LanguageModel:
    """Make token 0 carry one activation of that size, in dimension 5 of the embedding."""
    module = tiny_models.plain("llama")
    module.model.embed_tokens.weight.data[0, 5] = value
    return ss.load(module)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "olmo2"])
def test_sizes_are_those_of_the_residual_stream(family: str) -> None:
    model = tiny_models.model(family)
    windows = ss.Windows.of_ids([*IDS[:3], IDS[3, :40]], model)
    attention, found = attention_and_residuals(model, windows, batch_size=2)
    assert found.norm.shape == (4, 4, 70) and np.isnan(found.norm[3, :, 40:]).all()
    sites = [ss.Site("embedding"), *(ss.Site("exit", layer) for layer in range(3))]
    for place, row in enumerate(windows.rows):
        stream = ss.trace(model, row[None], {}, sites, readout=lambda final, read, weights: read)
        for index, site in enumerate(sites):
            x = stream[site][0].double()
            here = (place, index, slice(len(row)))
            assert np.allclose(found.norm[here], x.norm(dim=-1), rtol=1e-4)
            assert np.allclose(found.peak[here], x.abs().amax(-1), rtol=1e-4)
            assert np.array_equal(found.dimension[here], x.abs().argmax(-1))
            assert found.median[place, index] == pytest.approx(float(x.abs().median()), rel=1e-3)
    alone = ss.attention.attention_by_position(model, ss.Windows.of_ids(IDS[:3], model), length=70)
    assert np.allclose(attention.alpha[:3], alone.alpha, atol=1e-6), "and the pass is that of the model"


def test_the_published_criterion_at_its_edges() -> None:
    peak = np.array([[[100.0, 100.5, 200.0, 199.0]]], dtype=np.float32)
    flat = Residuals(peak, peak, np.zeros(peak.shape, int), np.array([[0.2]], dtype=np.float32))
    assert flat.massive().tolist() == [[[False, False, True, False]]], "above 100, and 1000 medians at least"
    small = Residuals(peak, peak, np.zeros(peak.shape, int), np.array([[0.1]], dtype=np.float32))
    assert small.massive().tolist() == [[[False, True, True, True]]]


def test_robust_scores() -> None:
    norm = np.array([[[50.0, 1.0, 2.0, 3.0, 4.0, 5.0, 18.0]]], dtype=np.float32)
    found = Residuals(norm, norm, np.zeros(norm.shape, int), np.ones((1, 1), dtype=np.float32))
    levels = found.levels(np.array([[False, True, True, True, True, True, False]]))
    assert levels.ravel() == pytest.approx([3.0, 1.4826])
    assert found.z(levels)[0, 0] == pytest.approx((norm[0, 0] - 3) / 1.4826, rel=1e-6)
    assert found.high(levels).tolist() == [[[True, *[False] * 5, True]]]
    edge = Residuals(norm - 5, norm, np.zeros(norm.shape, int), np.ones((1, 1), dtype=np.float32))
    assert not edge.high(np.array([[3.0], [1.0]]))[0, 0, 6], "13 is 10 spreads above 3, and not more"
    assert not edge.high(np.array([[6.5], [0.1]]))[0, 0, 6], "and twice 6.5"
    assert edge.high(np.array([[6.49], [0.1]]))[0, 0, 6]
    same = found.levels(np.array([[False, True, *[False] * 5]]))
    assert same[0] == 1 and same[1] > 0, "norms without any spread have z-scores too"
    tight = np.array([[3.0], [0.01]])
    assert found.high(tight).tolist() == [[[True, *[False] * 5, True]]], "z alone is not enough: 5 < 2 x 3"


@pytest.mark.parametrize(("value", "massive"), [(2000.0, True), (90.0, False), (0.2, False)])
def test_a_planted_activation(value: float, massive: bool) -> None:
    model = planted(value)
    table = ss.residual.massive_activations(model, ss.Windows.of_ids(IDS, model, [0, 0, 1, 1]))
    entry = table[table["layer"] == -1]
    assert (table["massive"].any(), len(entry) > 0) == (massive, value > 1)
    if value > 1:
        assert entry["position"].unique().tolist() == [0] and entry["token"].unique().tolist() == [0]
        assert len(entry) == 4 and entry["document"].tolist() == [0, 0, 1, 1]
        assert (entry["dimension"] == 5).all() and entry["high_norm"].all()
        assert entry["activation"].to_numpy() == pytest.approx(value)
        weight = model.embedding_weight[IDS[0, :64]].detach()
        assert entry["median_ratio"].iloc[0] == pytest.approx(value / float(weight.abs().median()), rel=1e-5)
        usual = model.embedding_weight[IDS[:, 1:64]].detach().norm(dim=-1).flatten().double().numpy()
        middle = np.median(usual)
        spread = 1.4826 * np.median(np.abs(usual - middle))
        norm = float(model.embedding_weight[0].detach().norm())
        assert entry["norm_ratio"].to_numpy() == pytest.approx(norm / middle, rel=1e-5)
        assert entry["z"].to_numpy() == pytest.approx((norm - middle) / spread, rel=1e-4)
        windows = ss.Windows.of_ids(IDS[:, :64], model)
        _, sizes = attention_and_residuals(model, windows)
        for row in table.itertuples():
            here = (row.window, row.layer + 1)
            norms = sizes.norm[:, row.layer + 1, 1:]
            ratio = sizes.norm[here][row.position] / np.median(norms)
            assert row.norm_ratio == pytest.approx(ratio, rel=1e-4)
            ratio = sizes.peak[here][row.position] / sizes.median[here]
            assert row.median_ratio == pytest.approx(ratio, rel=1e-4)
        assert set(table["layer"]) > {-1}


def test_windows_of_one_token_are_measured_against_others() -> None:
    model = planted(2000.0)
    equal = torch.zeros(64, dtype=torch.long)
    windows = ss.Windows.of_ids([equal, *IDS[:2, :64]], model)
    assert repeated_windows(windows).tolist() == [True, False, False]
    half = torch.arange(2, 66)
    half[:32] = 9
    assert repeated_windows(
        ss.Windows.of_ids([half, half.clone().index_fill(0, torch.tensor([3]), 1)], model)
    ).tolist() == [True, False]
    mixed, varied = (
        usual_levels(model, *attention_and_residuals(model, ss.Windows.of_ids(rows, model)))
        for rows in ([equal, *IDS[:2, :64]], IDS[:2, :64])
    )
    assert mixed == pytest.approx(varied, rel=1e-4), "what repeats is left out"
    random = torch.randint(model.vocabulary, (63,), generator=torch.Generator().manual_seed(0))
    alone, drawn = (
        usual_levels(model, *attention_and_residuals(model, ss.Windows.of_ids([row], model)))
        for row in (equal, torch.cat([equal[:1], random]))
    )
    assert alone == pytest.approx(drawn, rel=1e-4), "random tokens after the window's own first one"
    for rows in ([equal, *IDS[:2, :64]], [equal]):
        attention, residuals = attention_and_residuals(model, ss.Windows.of_ids(rows, model))
        levels = usual_levels(model, attention, residuals)
        assert residuals.high(levels)[0, 0].all(), "every copy has the norm, though no copy stands out"
        assert levels[0, 0] < 2, "of tokens in other windows, or random ones where there are none"


def test_what_every_token_has_is_massive_and_of_no_high_norm() -> None:
    module = tiny_models.plain("llama")
    module.model.embed_tokens.weight.data[:, 5] = 2000.0
    model = ss.load(module)
    windows = ss.Windows.of_ids(IDS[:, :64], model, [0, 0, 1, 1])
    table = ss.residual.massive_activations(model, windows)
    entry = table[table["layer"] == -1]
    assert len(entry) == 4 * 64 and entry["massive"].all() and not entry["high_norm"].any()
    found = ss.find_sinks(model, windows, ss.read_spectrum(model, bands=8), draws=2)
    assert found.record()["massive_documents"] == 2
