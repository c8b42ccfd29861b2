"""Sinks and the use of heads in bidirectional encoders: means over all queries, from eager maps."""

import copy

import pytest
import torch
from support import tiny_models

import spectral_sinks as ss


@pytest.mark.parametrize("family", tiny_models.ENCODERS)
def test_attention_and_head_use_are_those_of_eager_maps(family: str) -> None:
    plain, ids = tiny_models.plain(family), tiny_models.ids(3, 40)
    model = ss.load(copy.deepcopy(plain))
    windows = ss.Windows.of_ids(ids, model)
    with torch.no_grad():
        maps = torch.stack(
            plain(ids, output_attentions=True).attentions, 1
        )  # window, layer, head, query, key
    seen = ss.attention.attention_by_position(model, windows, length=40)
    assert torch.allclose(torch.from_numpy(seen.alpha).float(), maps.mean(3), atol=1e-5)
    found = ss.find_sinks(model, windows, ss.read_spectrum(model), length=40, draws=2)
    assert found.sink_rate.value == pytest.approx(float((maps.mean(3)[..., 0] > 0.3).float().mean()))

    position = 39
    use = ss.head_use(model, windows, position).set_index(["document", "layer", "head"])
    others = torch.arange(40) != position
    column = maps[:, :, :, others, position]
    expected = column.sum(3) / (column > 0).sum(3)  # of the queries that see it: ModernBERT has local layers
    for document, layer, head in [(0, 0, 0), (2, 1, 3), (1, 2, 2)]:
        value = use.loc[(document, layer, head), "attention"]
        assert value == pytest.approx(float(expected[document, layer, head]), abs=1e-5)


@pytest.mark.parametrize("family", tiny_models.ENCODERS)
def test_a_random_encoder_has_no_circuit(family: str) -> None:
    model = ss.load(tiny_models.plain(family))
    windows = ss.Windows.of_ids(tiny_models.ids(3, 40), model)
    assert ss.no_op_circuits(model, windows, ss.read_spectrum(model), 39).found == []


def test_windows_of_different_lengths() -> None:
    """Behind the end of a shorter window the others count alone, and what is even depends on the length."""
    model, ids = tiny_models.model("bert"), tiny_models.ids(3, 40)
    rows = [ids[0], ids[1, :20], ids[2]]
    spectrum = ss.read_spectrum(model, bands=8)
    found = ss.find_sinks(model, ss.Windows.of_ids(rows, model), spectrum, epsilon=0.02, draws=2)
    with torch.no_grad():
        alpha = [
            torch.stack(tiny_models.plain("bert")(row[None], output_attentions=True).attentions)
            for row in rows
        ]
    above = [(maps.mean(-2) > 0.02).float().mean((0, 1, 2)) for maps in alpha]
    expected = torch.stack([above[0], above[2]]).mean(0)
    expected[:20] = torch.stack([above[0][:20], above[1], above[2][:20]]).mean(0)
    assert found.rates()["mean"].to_numpy() == pytest.approx(expected.numpy(), abs=1e-6)
    first = next(sink for sink in found.sinks if sink.position == 0)
    late = next(sink for sink in found.sinks if sink.position is not None and sink.position >= 20)
    assert first.uniform_mass == pytest.approx((1 / 40 + 1 / 20 + 1 / 40) / 3)
    assert late.uniform_mass == pytest.approx(1 / 40)
