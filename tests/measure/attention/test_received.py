"""Attention received against its definition on the weights that transformers returns."""

import numpy as np
import pytest
import torch
from support import tiny_models

import spectral_sinks as ss

IDS = tiny_models.ids(4, 80, seed=5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "gpt_oss"])
@pytest.mark.parametrize(("position", "tokens"), [(0, 64), (0, 10), (3, 64)])
def test_by_head_against_the_definition(family: str, position: int, tokens: int) -> None:
    model, owner = tiny_models.model(family), [0, 0, 1, 2]
    table = ss.attention_by_head(
        model, ss.Windows.of_ids(IDS, model, owner), position, length=tokens, batch_size=3
    )
    with torch.no_grad():
        maps = tiny_models.plain(family)(IDS, output_attentions=True).attentions
    assert len(table) == 3 * 3 * 4
    for row in table.itertuples():
        alphas = [
            np.mean([float(maps[row.layer][text, row.head, i, position]) for i in range(position, tokens)])
            for text in range(4)
            if owner[text] == row.document
        ]
        assert row.attention == pytest.approx(np.mean(alphas), abs=1e-6)


def test_sink_mass_is_the_mean_over_heads() -> None:
    model = tiny_models.model()
    windows = ss.Windows.of_ids(IDS, model)
    table = ss.attention_by_head(model, windows)
    mass = ss.evaluate(model, windows, {}, batch_size=3).sink_mass
    assert mass == pytest.approx(table.groupby("layer")["attention"].mean().tolist(), abs=1e-6)


def test_rows_with_a_learned_sink_sum_to_less_than_one() -> None:
    model = tiny_models.model("gpt_oss")
    maps = ss.trace(model, IDS, {}, readout=lambda final, read, weights: weights, attention=True)
    sums = torch.stack(maps).sum(-1)
    assert (sums < 0.999).any() and (sums > 0).all()
    mass = ss.evaluate(model, ss.Windows.of_ids(IDS, model), {}).sink_mass
    assert mass is not None and all(0 < m < 1 for m in mass)


def test_sdpa_has_no_weights_to_read() -> None:
    fast = ss.load(tiny_models.build(attention="sdpa"))
    assert not fast.reads_attention
    windows = ss.Windows.of_ids(IDS, fast)
    effect = ss.evaluate(fast, windows, {ss.Site("exit", 1): ss.rnd(32, 2)})
    assert effect.sink_mass is None and effect.baseline_sink_mass is None
    eager = tiny_models.model()
    same = ss.evaluate(eager, ss.Windows.of_ids(IDS, eager), {ss.Site("exit", 1): ss.rnd(32, 2)})
    assert effect.nll == pytest.approx(same.nll, abs=1e-5)
    with pytest.raises(ss.InputError, match="'sdpa' attention; load it with attention='eager'"):
        ss.attention_by_head(fast, windows)


def test_a_window_that_is_too_short() -> None:
    model = tiny_models.model()
    with pytest.raises(ss.InputError, match="taken over 64 tokens, the window is shorter"):
        ss.attention_by_head(model, ss.Windows.of_ids(IDS[:, :63], model))


def test_uniform_attention_and_the_rate() -> None:
    uniform = torch.ones(1, 2, 64, 64).tril()
    uniform /= uniform.sum(-1, keepdim=True)
    for position in (0, 5):
        alpha = uniform[0, 0, position:, position].mean()
        assert ss.attention.uniform_attention(position) == pytest.approx(float(alpha))
    assert round(ss.attention.uniform_attention(), 4) == 0.0741
    received = torch.tensor([[[0.3, 0.30001], [0.9, 0.0]]])
    assert ss.attention.sink_rate(received) == 0.5, "strictly above 0.3"
    assert ss.attention.sink_rate(received, 0.0) == 0.75
