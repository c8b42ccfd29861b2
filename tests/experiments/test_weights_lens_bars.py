"""The experiments on weights, lens, E-dark against U-dark, and bars, run on models of several kinds."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.linalg
import torch
from support import tiny_models
from support.tiny_study import run, study

import spectral_sinks as ss


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_oss"])
def test_weights(family: str, tmp_path: Path) -> None:
    answers = run("weights", study(tiny_models.model(family), tmp_path))
    table = pd.read_csv(tmp_path / "weights.csv")
    sums = table.groupby(["part", "layer", "unit", "convention"])["share"].sum()
    assert np.allclose(sums, 1, atol=1e-4)
    dark = pd.read_csv(tmp_path / "weights_dark.csv")
    raw = dark[dark["convention"] == "raw"]
    assert raw["share"].is_monotonic_decreasing, "ranked"
    assert (raw["random_low"] <= raw["random_high"]).all()
    assert answers.loc["readers: dark share, mean over matrices", "value"] == pytest.approx(
        raw[~raw["writes"]]["share"].mean(), rel=1e-4
    )
    assert ("W_gate: share of its matrices darker than all random subspaces" in answers.index) == (
        family != "gpt2"
    )
    assert (tmp_path / "weights.png").stat().st_size > 10_000


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_lens(family: str, tmp_path: Path) -> None:
    given = study(tiny_models.model(family), tmp_path, 20)
    answers = run("lens", given)
    nll = ss.evaluate(given.model, given.windows, {}).nll
    assert answers.loc["exit 2: NLL of the logit lens, all bands", "value"] == pytest.approx(nll, abs=1e-4)
    table = pd.read_csv(tmp_path / "lens.csv")
    assert len(table) == 3 * 2 * 4 * 20
    assert (tmp_path / "lens.png").stat().st_size > 10_000


def test_removals_are_those_of_evaluate(tmp_path: Path) -> None:
    answers = run("eu_dark", study(tiny_models.model(), tmp_path))
    table = pd.read_csv(tmp_path / "eu_dark.csv").set_index(["name", "layer"])
    assert table.loc[("union", 0), "rank"] == 4 and table.loc[("U-dark", 0), "rank"] == 2
    site = {ss.Site("exit", 1): ss.remove(ss.read_spectrum(tiny_models.model(), "embedding").dark())}
    windows = ss.Windows.of_ids(tiny_models.ids(4, 70, seed=1), tiny_models.model())
    direct = ss.evaluate(tiny_models.model(), windows, site)
    assert table.loc[("E-dark", 1), "delta_nll"] == pytest.approx(direct.delta_nll, abs=1e-5)
    assert direct.sink_mass is not None and direct.baseline_sink_mass is not None
    assert table.loc[("E-dark", 1), "sink_next"] == pytest.approx(direct.sink_mass[2], abs=1e-5)
    assert table.loc[("E-dark", 1), "sink_before"] == pytest.approx(direct.baseline_sink_mass[2], abs=1e-5)
    assert answers.index.str.contains("sink mass").any()
    assert (tmp_path / "eu_dark.png").stat().st_size > 10_000


def test_without_attention_weights_there_is_no_sink_and_no_complaint(tmp_path: Path) -> None:
    model = ss.load(tiny_models.build(attention="sdpa"), tokenizer=tiny_models.tokenizer())
    answers = run("eu_dark", study(model, tmp_path, 20))
    assert not answers.index.str.contains("sink mass").any()
    assert pd.read_csv(tmp_path / "eu_dark.csv")["sink_cut"].isna().all()


@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
def test_a_tied_model_has_one_tail(family: str, tmp_path: Path) -> None:
    assert tiny_models.model(family).tied
    answers = run("eu_dark", study(tiny_models.model(family), tmp_path, 20))
    assert len(answers) == 1 and answers["value"].iloc[0] == pytest.approx(1)


def test_a_tied_model_has_two_tails_with_the_gain_folded_in(tmp_path: Path) -> None:
    model = tiny_models.model("qwen2")
    folded = ss.read_spectrum(model, convention="folded")
    made = replace(study(model, tmp_path, 20), unembedding=folded, draws=2)
    vars(made)["exits"] = [0, 1]
    ss.experiments.find_experiment("eu_dark")(made)
    table = pd.read_csv(tmp_path / "eu_dark.csv")
    assert set(table["layer"]) == {0, 1} and {"U-dark", "E-dark", "union"} <= set(table["name"])
    angles = pd.read_csv(tmp_path / "eu_dark_angles.csv")
    expected = scipy.linalg.subspace_angles(
        folded.dark().orthonormal().double(),
        ss.read_spectrum(model, "embedding").dark().orthonormal().double(),
    )
    np.testing.assert_allclose(np.arccos(angles["cosine"].clip(upper=1)), np.sort(expected), atol=1e-3)


@pytest.mark.parametrize(("family", "named"), [("gpt2", True), ("mistral", False)])
def test_bars(family: str, named: bool, tmp_path: Path) -> None:
    model = tiny_models.model(family) if named else ss.load(tiny_models.build(family))
    run("bars", study(model, tmp_path))
    levels = pd.read_csv(tmp_path / "bars.csv")
    assert set(levels["tokens"]) == {"bars", "matched", "rest"}
    tokens = pd.read_csv(tmp_path / "bars_tokens.csv")
    shown = tokens["text"].astype(str).str.startswith("w")
    assert shown.mean() > 0.9 if named else not shown.any()
    assert (tmp_path / "bars.png").stat().st_size > 10_000


def test_bars_find_what_is_planted(tmp_path: Path) -> None:
    """Keys grow with the dark component and no query looks away: attended tokens are the dark ones."""
    module = tiny_models.build("llama", seed=3)
    u = ss.read_spectrum(ss.load(module))
    dark = u.dark().basis.float()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for block in module.model.layers:
            block.self_attn.q_proj.weight.zero_()
            block.self_attn.q_proj.bias = torch.nn.Parameter(torch.zeros(32))
            block.self_attn.q_proj.bias[6::8] = (
                6.0  # a slow pair of the rotary embedding: position hardly acts
            )
            block.self_attn.k_proj.weight.zero_()
            block.self_attn.k_proj.weight[6::8] = 3 * dark[:, 0]
        table = module.model.embed_tokens.weight
        table += 0.6 * torch.randn(tiny_models.VOCABULARY, 1, generator=generator).abs() @ dark[:, :1].T
    model = ss.load(module, tokenizer=tiny_models.tokenizer())
    windows = ss.Windows.of_ids(tiny_models.ids(6, 60, seed=2), model)
    found = ss.sinks.received(model, windows, {"dark": u.dark(), "light": u.band(3)})
    found = found[(found["layer"] == 0) & (found["position"].between(1, 50))]
    marked = ss.sinks.mark_bars(found)
    bars = ss.sinks.matched(found, marked, "dark")
    assert (bars["dark"] - bars["control"]).mean() > 0.1
    assert ss.stats.rank_correlation(found["attention"], found["dark"], [found["position"]]) > 0.4
    assert ss.stats.rank_correlation(found["attention"], found["light"], [found["position"]]) < 0.2
