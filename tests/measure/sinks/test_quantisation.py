"""The quantisation report: every number recomputed with plain transformers, NumPy and SciPy."""

import copy
import json
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.linalg
import torch
from support import tiny_models
from support.planted_sinks import sinking
from torch import Tensor

import spectral_sinks as ss
from spectral_sinks.spectra import FakeQuantiser

SITES = [ss.Site("embedding"), ss.Site("exit", 1)]


@pytest.fixture(scope="module")
def planted() -> Any:
    """A sink whose carrier is channel 0, which the final norm multiplies by 0.1."""
    model, _, windows = sinking(20, gain=0.1)
    spectra = [ss.read_spectrum(model, convention=name, bands=20) for name in ("folded", "raw")]
    rule = ss.SinkRule.learn(model, ss.find_sinks(model, windows, spectra, draws=0), spectra)
    report = ss.sinks.quantisation_report(
        model, windows, rule, spectra, sites=SITES, draws=2, alone=[SITES[1]], batch_size=2
    )
    return model, windows, rule, spectra, report


def rows(report: ss.sinks.QuantisationReport, **of: Any) -> pd.DataFrame:
    table = report.table
    for name, value in of.items():
        table = table[table[name] == value]
    return table


def nll(module: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits = module(ids).logits[:, :-1].double().transpose(1, 2)
    return torch.nn.functional.cross_entropy(logits, ids[:, 1:], reduction="none").mean(1)


def hooked(model: ss.LanguageModel, ids: Tensor, edits: dict[int, Any]) -> Tensor:
    """The NLL with functions at hidden states: 0 is the embedding, l + 1 the exit of layer l."""
    inner: Any = model.module
    places = [inner.model.embed_tokens, *inner.model.layers]
    handles = [
        places[index].register_forward_hook(
            lambda _, __, output, edit=edit: (
                (edit(output[0]), *output[1:]) if isinstance(output, tuple) else edit(output)
            )
        )
        for index, edit in edits.items()
    ]
    try:
        return nll(inner, ids)
    finally:
        for handle in handles:
            handle.remove()


def rounded(x: Tensor, bits: int, kept: Tensor) -> Tensor:
    """Rounding per text by NumPy, with some values kept."""
    values = torch.where(kept, 0, x).double().numpy()
    step = np.abs(values).max((1, 2), keepdims=True) / (2 ** (bits - 1) - 1)
    return torch.where(kept, x, torch.from_numpy(np.round(values / step) * step).float())


def test_errors_and_costs_are_those_of_plain_hooks(planted: Any) -> None:
    model, windows, rule, _, report = planted
    ids = torch.stack(windows.rows)
    with torch.no_grad():
        states = model.module(ids, output_hidden_states=True).hidden_states
    assert rule.channels(SITES[1])[0] == 0 and report.sink_tokens == pytest.approx(1 / 64)
    before = nll(model.module, ids)
    for kind in ("nothing", "sink tokens", "massive channels", "both"):
        kept = {}
        for index, site in ((0, SITES[0]), (2, SITES[1])):
            mask = torch.zeros(ids.shape, dtype=torch.bool)
            mask[:, 0] = kind in ("sink tokens", "both")
            channel = torch.zeros(model.d, dtype=torch.bool)
            channel[rule.channels(site)] = kind in ("massive channels", "both")
            kept[index] = mask[..., None] | channel
        for bits in (8, 4):
            found = rows(report, what="activations", bits=bits, per="tensor", spared=kind)
            relative = [
                (rounded(states[index], bits, kept[index]) - states[index]).double().square().sum(-1)
                / states[index].double().square().sum(-1)
                for index in kept
            ]
            np.testing.assert_allclose(found["error"], torch.stack(relative).mean((0, 2)), rtol=1e-3)
            edits = {
                index: (lambda x, bits=bits, mask=mask: rounded(x, bits, mask))
                for index, mask in kept.items()
            }
            cost = hooked(model, ids, edits) - before
            np.testing.assert_allclose(found["delta_nll"], cost, atol=2e-4)


def test_where_the_error_lies(planted: Any) -> None:
    model, windows, _, _, report = planted
    ids = torch.stack(windows.rows)
    with torch.no_grad():
        x = model.module(ids, output_hidden_states=True).hidden_states[2]
    none = torch.zeros(1, dtype=torch.bool)
    lost = (rounded(x, 8, none) - x).double().square().sum(-1)
    found = report.by_site().set_index(["bits", "per", "site"]).loc[(8, "tensor", "exit 1")]
    assert found["sink_share"] == pytest.approx(float(lost[:, 0].sum() / lost.sum()), rel=1e-3)
    relative = lost / x.double().square().sum(-1)
    assert found["error_others"] == pytest.approx(float(relative[:, 1:].mean()), rel=1e-3)
    alone = hooked(model, ids, {2: lambda x: rounded(x, 8, none)}) - nll(model.module, ids)
    assert found["delta_nll"] == pytest.approx(float(alone.mean()), abs=1e-4)
    assert len(report.by_site()) == 2 * 2 * 2


def test_a_site_that_is_only_quantised_alone_has_a_row(planted: Any) -> None:
    model, windows, rule, spectra, report = planted
    found = ss.sinks.quantisation_report(
        model, windows, rule, spectra[0], sites=SITES[:1], draws=0, alone=[SITES[1]]
    ).by_site()
    assert found["site"].tolist() == [str(SITES[0])] * 4 + [str(SITES[1])] * 4
    last = found.tail(4).set_index(["bits", "per"])
    expected = report.by_site().set_index(["site", "bits", "per"]).loc[str(SITES[1])]
    np.testing.assert_allclose(last["delta_nll"], expected["delta_nll"][last.index], atol=1e-6)
    assert last["error_sinks"].isna().all()


def test_as_many_random_tokens_and_channels_are_spared(planted: Any) -> None:
    *_, report = planted
    table = report.table.set_index(["what", "bits", "per", "spared"])
    for kind in ("random tokens", "random channels"):
        assert sorted(set(table.loc[("activations", 4, "token", kind), "draw"])) == [0, 1]
    errors = report.errors[report.errors["spared"] == "random tokens"].set_index(["tokens"])
    assert (errors.loc["sinks", "error"] > 0).all(), "the sinks are not among them"
    summary = report.summary().set_index(["what", "bits", "per", "spared"])
    assert len(summary) == 4 * (6 + 3)
    plain, tokens, drawn = (
        summary.loc[("activations", 8, "tensor", kind)]
        for kind in ("nothing", "sink tokens", "random tokens")
    )
    assert tokens["error"] < 0.2 * plain["error"], "the planted sink makes the step"
    assert drawn["error_least"] <= drawn["error"] <= drawn["error_most"]
    assert drawn["error_least"] > 0.9 * plain["error"]
    assert json.dumps(report.record())


def test_quantised_weights_are_those_of_a_model_that_holds_them(planted: Any) -> None:
    model, windows, rule, _, report = planted
    ids = torch.stack(windows.rows)
    changed: Any = copy.deepcopy(model.module)
    own = model.module.lm_head.weight.detach()
    kept = torch.zeros(1, own.shape[1], dtype=torch.bool)
    kept[:, rule.channels()] = True
    for kind, mask in (("nothing", torch.zeros_like(kept)), ("massive channels", kept)):
        weight = rounded(own[None], 4, mask)[0]
        with torch.no_grad():
            changed.lm_head.weight.copy_(weight)
        found = rows(report, what="unembedding", bits=4, per="tensor", spared=kind)
        np.testing.assert_allclose(found["nll"], nll(changed, ids), atol=1e-5)
        error = float((weight - own).double().square().sum() / own.double().square().sum())
        np.testing.assert_allclose(found["error"], error, rtol=1e-5)
        angles = report.angles.set_index(["bits", "per", "spared", "convention", "band"])
        gain = model.module.model.norm.weight.detach().double()
        for convention, factor in (("raw", torch.ones_like(gain)), ("folded", gain)):
            bases = [np.linalg.svd((w.double() * factor).numpy())[2] for w in (own, weight)]
            for band, part in (("dark", slice(-2, None)), ("first", slice(0, 2))):
                expected = scipy.linalg.subspace_angles(*(basis[part].T for basis in bases))
                row = angles.loc[(4, "tensor", kind, convention, band)]
                assert row["largest_angle"] == pytest.approx(np.degrees(expected[0]), rel=1e-4)
                assert row["rotated"] == pytest.approx(float(np.mean(np.sin(expected) ** 2)), rel=1e-4)
    assert (report.angles["rank"] == 2).all() and (report.angles["random"] == 1 - 2 / 40).all()


def test_many_bits_change_nothing_and_the_model_stays(planted: Any) -> None:
    model, windows, rule, spectra, _ = planted
    weight = model.module.lm_head.weight
    report = ss.sinks.quantisation_report(model, windows, rule, spectra[0], bits=(24,), sites=SITES, draws=0)
    assert model.module.lm_head.weight is weight
    assert report.alone.empty and "delta_nll" not in report.by_site()
    assert report.table["error"].max() < 1e-11 and report.table["delta_nll"].abs().max() < 1e-5
    assert report.angles["rotated"].max() < 1e-9
    assert set(report.table["spared"]) == {"nothing", "sink tokens", "massive channels", "both"}


def test_a_model_without_massive_channels_spares_tokens_alone() -> None:
    model, spectrum, windows = sinking(20)
    rule = ss.SinkRule.learn(model, ss.find_sinks(model, windows, spectrum, draws=0))
    assert not rule.channels(), "the carrier is a random direction"
    report = ss.sinks.quantisation_report(
        model, windows, rule, spectrum, sites=SITES[1:], bits=(8,), per=("tensor",), draws=1
    )
    assert list(report.summary()["spared"]) == ["nothing", "sink tokens", "random tokens", "nothing"]
    assert report.channels == {"exit 1": [], "unembedding": []}


@pytest.mark.parametrize("family", ["qwen2", "bert"])
def test_tied_weights_windows_of_two_lengths_and_an_encoder(family: str) -> None:
    model = tiny_models.model(family)
    longer, shorter = tiny_models.ids(2, 64), tiny_models.ids(2, 50, seed=3)
    windows = ss.Windows.of_ids([*longer, *shorter], model, (0, 0, 1, 2))
    spectrum = ss.read_spectrum(model)
    found = ss.find_sinks(model, ss.Windows.of_ids(longer, model), spectrum, epsilon=0.01, draws=0)
    rule = ss.SinkRule.learn(model, found)
    options: Any = {"sites": [ss.Site("exit", 0)], "bits": (4,), "by": "place", "draws": 0}
    report = ss.sinks.quantisation_report(model, windows, rule, spectrum, **options)
    one = ss.evaluate(model, windows, {ss.Site("exit", 0): FakeQuantiser(4)})
    own = rows(report, what="activations", per="tensor", spared="nothing")
    np.testing.assert_allclose(own["delta_nll"], one.table["delta_nll"], atol=1e-7)
    assert own["document"].tolist() == [0, 1, 2] and model.tied
    weights = rows(report, what="unembedding", per="tensor", spared="nothing")
    assert (weights["delta_nll"] != 0).all()
    np.testing.assert_allclose(weights["nll"] - weights["delta_nll"], one.table["baseline_nll"], atol=1e-6)


def test_what_has_no_answer_is_refused(planted: Any) -> None:
    model, windows, rule, spectra, _ = planted
    ids = torch.stack(windows.rows)
    ids[:, 0] = 5  # without the token that is the sink
    without = ss.Windows.of_ids(ids, model)
    other = tiny_models.model()
    for given, options, said in (
        ((model, windows), {"bits": (1,)}, "1 bits: give 2 to 24"),
        ((model, windows), {"bits": ()}, "give at least one"),
        ((model, windows), {"draws": -1}, "-1 draws"),
        ((model, windows), {"sites": [ss.Site("mlp", 0)]}, "knows the embedding and the exits"),
        ((model, windows), {"alone": [ss.Site("exit", 3)]}, "knows the embedding and the exits"),
        ((model, without), {}, "marks no token of these windows by norm"),
        ((other, ss.Windows.of_ids(tiny_models.ids(2, 9), other)), {}, "learn a rule on it"),
    ):
        with pytest.raises(ss.InputError, match=said):
            ss.sinks.quantisation_report(*given, rule, spectra, **options)
    embedding = ss.read_spectrum(model, "embedding")
    with pytest.raises(ss.InputError, match="give that of the unembedding"):
        ss.sinks.quantisation_report(model, windows, rule, embedding)


@pytest.mark.usefixtures("unchecked")
def test_one_kind_of_steps_need_not_be_a_list(planted: Any) -> None:
    model, windows, rule, spectra, report = planted
    per: Any = "token"
    found = ss.sinks.quantisation_report(
        model, windows, rule, spectra, bits=(8,), per=per, sites=SITES, draws=2, batch_size=2
    )
    expected = rows(report, bits=8, per="token").reset_index(drop=True)
    pd.testing.assert_frame_equal(found.table, expected)
