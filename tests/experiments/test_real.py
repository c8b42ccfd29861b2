"""The experiments on real models, run on the embedded one: their numbers, recomputed another way."""

from dataclasses import replace

import conventions
import ladders
import numpy as np
import openings
import pandas as pd
import pytest
import secondary
import spike
import torch
from real_study import RealStudy, prepare

import spectral_sinks as ss


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> RealStudy:
    made = prepare(ss.load(), "sinklet", tmp_path_factory.mktemp("real"), 4, spread=1)
    return replace(made, draws=3)


def residuals(study: RealStudy, layer: int) -> torch.Tensor:
    ids = torch.stack(list(study.windows.rows))
    with torch.no_grad():
        states = study.model.module(ids, output_hidden_states=True).hidden_states
    return states[layer + 1].double()


def test_exits_are_those_of_the_rule(study: RealStudy) -> None:
    mass = study.sink_mass.to_numpy()
    assert study.strongest == 1 + mass[1:].argmax()
    assert study.onset == np.flatnonzero(mass > 2 * ss.attention.uniform_attention())[0]
    assert study.exits == sorted({max(study.onset - 1, 0), study.strongest - 1, round(5 / 2)})
    assert study.below_sink == study.strongest - 1


def test_dark_shares_of_every_convention(study: RealStudy) -> None:
    table = conventions.shares(study)
    weight, gain = study.model.unembedding_weight.detach().double(), study.model.final_gain.double()
    folded = weight * gain
    matrices = {"raw": weight, "folded": folded, "centred": folded - folded.mean(0)}
    x = residuals(study, 2)
    for name, matrix in matrices.items():
        dark = torch.linalg.svd(matrix, full_matrices=False).Vh[study.unembedding.edges[-2] :].T
        share = (x @ dark).square().sum(-1) / x.square().sum(-1)
        rows = table[(table["layer"] == 2) & (table["convention"] == name)].sort_values("document")
        np.testing.assert_allclose(rows["share"], share[:, 0], atol=1e-4)
        np.testing.assert_allclose(rows["others"], share[:, 1:].mean(1), atol=1e-4)


def test_removals_say_what_a_hook_says(study: RealStudy) -> None:
    layer = study.below_sink
    table = conventions.removed(study, layer).set_index(["tokens", "edit", "draw"]).sort_index()
    ids = torch.stack(list(study.windows.rows))
    basis = study.spectra["raw"].dark().orthonormal().float()

    def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        changed = output.clone()
        changed[:, 0] -= changed[:, 0] @ basis @ basis.T
        return changed

    def nll() -> float:
        logits = study.model.module(ids).logits[:, :-1].double().transpose(1, 2)
        return float(torch.nn.functional.cross_entropy(logits, ids[:, 1:]))

    with torch.no_grad():
        before = nll()
        module = study.model.module.get_submodule(f"{study.model.layout.layers}.{layer}")
        handle = module.register_forward_hook(hook)
        after = nll()
        handle.remove()
    assert table.loc[("first", "raw dark", ""), "delta_nll"] == pytest.approx(after - before, abs=1e-5)
    same = table.loc[("first", "same energy")]
    folded = table.loc[("first", "folded dark", ""), "removed_energy_share"]
    assert len(same) == 3
    np.testing.assert_allclose(same["removed_energy_share"], folded, rtol=0.02)


def test_ladder_ends_at_the_dark_band(study: RealStudy) -> None:
    found = ladders.run(study)
    table = pd.read_csv(study.out / "ladders.csv")
    by = table[table["convention"] != "random"].set_index(["convention", "edit"])["delta_nll"]
    removed = study.evaluate({"x": {ss.Site("exit", study.below_sink): ss.remove(study.unembedding.dark())}})
    assert by["folded", "Phi 1:19"] == pytest.approx(removed["x"].delta_nll, abs=1e-5)
    assert by["folded", "Phi 1:4"] > by["folded", "Phi 1:16"] > by["folded", "Phi 1:19"]
    assert "the last step costs" in found.verdict


def test_neurons_add_up_to_what_the_mlp_writes(study: RealStudy) -> None:
    layer, written = spike.spike_layer(study)
    neurons = spike.contributions(study, layer)
    assert layer == written["along_carrier"].iloc[: study.below_sink + 1].argmax()
    ids, site = torch.stack(list(study.windows.rows)), ss.Site("mlp", layer)
    out = ss.trace(study.model, ids, {}, [site], readout=lambda final, read, weights: read[site][:, 0])
    bias = spike.down_projection(study, layer).bias
    assert bias is None
    assert neurons["contribution"].sum() == pytest.approx(float(out.mean(0).norm()), rel=1e-4)


def test_silencing_all_neurons_is_removing_the_mlp(study: RealStudy) -> None:
    layer = 1
    every = range(spike.down_projection(study, layer).in_features)
    found = spike.measured(study, layer, every)
    none = spike.measured(study, layer, [])
    gone = ss.evaluate(study.model, study.windows, {ss.Site("mlp", layer): torch.zeros_like})
    np.testing.assert_allclose(found["documents"] - none["documents"], gone.table["delta_nll"], atol=1e-5)
    mass = np.mean(gone.sink_mass[layer + 1 :])
    assert found["mass_above"] == pytest.approx(mass, abs=1e-5)


def test_openings_compare_the_same_tokens(study: RealStudy) -> None:
    made = openings.openings(study)
    with_bos, without = made["BOS"].rows[0], made["no BOS"].rows[0]
    assert torch.equal(with_bos[1:], without[:-1])
    found = openings.run(study)
    table = pd.read_csv(study.out / "openings.csv").pivot(index="document", columns="opening", values="nll")
    lower = ss.cut(ss.documents(limit=4), study.model, length=64, per_document=1)
    assert (table["no BOS"] > table["BOS"]).all()
    assert "the sink is the token" in found.verdict
    assert len(lower) == len(table)


def test_relative_attention_is_one_where_attention_is_uniform(study: RealStudy) -> None:
    flat = secondary.relative(study, study.windows, [Flat()])
    np.testing.assert_allclose(flat[..., :-1], 1, rtol=1e-4)


class Flat(ss.attention.AttentionEdit):
    """Attention that is spread evenly over all visible keys."""

    def changed(self, call: ss.attention.AttentionCall) -> ss.attention.AttentionCall:
        return replace(call, query=torch.zeros_like(call.query))


def test_secondary_describes_position_0_as_itself(study: RealStudy) -> None:
    ids = torch.stack(list(study.windows.rows)).numpy()
    seen = secondary.relative(study, study.windows)
    x = secondary.residuals(study, study.windows, 1)
    np.testing.assert_allclose(x[:, 0].double(), residuals(study, 0)[:, 0], atol=1e-5)
    token = int(ids[0, 5])
    row = secondary.describe(study, study.windows, ids, seen, token, "control", 1)
    assert row["occurrences"] == (ids[:, 1:32] == token).sum()
    assert -1 <= row["cosine_all"] <= 1
