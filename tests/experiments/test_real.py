"""The experiments on real models, run on the embedded one: their numbers, recomputed another way."""

import importlib
import json
import re
from dataclasses import replace
from pathlib import Path

import conventions
import ladders
import leak
import numpy as np
import openings
import pandas as pd
import pytest
import real_study
import same_energy
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


def test_layers_are_those_of_the_exits_and_the_largest_writer(study: RealStudy) -> None:
    written: list[float] = []
    hooks = [
        layer.mlp.register_forward_hook(
            lambda _, __, output: written.append(output[:, 0].double().norm(dim=-1).mean().item())
        )
        for layer in study.model.module.model.layers
    ]
    residuals(study, 0)
    for hook in hooks:
        hook.remove()
    writer = int(np.argmax(written[: study.strongest]))
    assert study.layers == sorted({*study.exits, writer})


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


def test_the_tables_of_the_spike_are_those_of_the_library(study: RealStudy) -> None:
    given = replace(study, draws=1)
    finding = spike.run(given)
    found = ss.spike_writers(study.model, study.windows, counts=(1, 3), draws=1)
    neurons = pd.read_csv(study.out / "spike_neurons.csv")
    assert neurons["neuron"].tolist() == found.neurons["neuron"].head(100).tolist()
    assert list(neurons.columns) == spike.NEURONS
    assert list(pd.read_csv(study.out / "spike_layers.csv").columns) == spike.LAYERS
    table = pd.read_csv(study.out / "spike_silenced.csv").set_index(["count", "kind"])
    own = found.silent().set_index(["count", "kind"])
    for count in (1, 3):
        for column in ("delta_nll", "low", "high", "mass_above", "norm_ratio"):
            row, expected = (float(t.loc[(count, "largest at position 0"), column]) for t in (table, own))
            assert row == pytest.approx(expected, rel=1e-4)
    answers = pd.DataFrame(finding.answers).set_index("quantity")["value"]
    name = f"layer {found.layer} of {study.model.layers}: norm that its MLP writes at position 0"
    assert answers[name] == pytest.approx(found.neurons["contribution"].sum())
    assert finding.verdict.startswith("holds")


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
    x = real_study.residuals(study.model, study.windows, ss.Site("exit", 0))
    np.testing.assert_allclose(x[:, 0].double(), residuals(study, 0)[:, 0], atol=1e-5)
    token = int(ids[0, 5])
    row = secondary.describe(study, study.windows, ids, seen, token, "control", 1)
    assert row["occurrences"] == (ids[:, 1:32] == token).sum()
    assert -1 <= row["cosine_all"] <= 1


def test_a_sample_of_predictions_is_a_column_of_the_tables(study: RealStudy, tmp_path: Path) -> None:
    sampled = replace(study, predict=8, out=tmp_path)
    cells = {"dark": {ss.Site("exit", 4): ss.remove(study.unembedding.dark())}}
    found = sampled.evaluate(cells)["dark"]
    assert found.predict == 8
    expected = ss.evaluate(study.model, study.windows, cells["dark"], predict=8)
    assert found.delta_nll == pytest.approx(expected.delta_nll, rel=1e-6)
    sampled.save(pd.DataFrame({"delta_nll": [found.delta_nll]}), "some")
    assert pd.read_csv(tmp_path / "some.csv")["predict"].tolist() == [8]
    real = importlib.import_module("run")
    with pytest.raises(ss.InputError, match="--predict does not apply to the experiment spike: give --only"):
        real.main(real.Options(only=("ladders", "spike"), predict=8))


def test_the_defaults_of_samples_belong_to_experiments_that_can_be_sampled() -> None:
    real = importlib.import_module("run")
    for name, counts in real.SAMPLES.items():
        assert name in real.NAMES and set(counts) <= set(real.SAMPLED) <= set(real.MINUTES)


def test_an_experiment_whose_tables_are_there_is_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.import_module("run")
    monkeypatch.setattr(real, "fetch", lambda names, _: {name: "sinklet" for name in names})
    monkeypatch.setattr(real, "expected", lambda name: {"model": name})
    options = real.Options(("smollm2",), ("spectrum", "lens"), tmp_path, documents=3, draws=2)
    assert real.unfinished("smollm2", options) == ["spectrum", "lens"]
    _, _, seconds = real.run_one("smollm2", "spectrum", options)
    assert seconds > 0 and len(pd.read_csv(tmp_path / "smollm2/spectrum_summary.csv"))
    assert real.unfinished("smollm2", options) == ["lens"]
    for other in ({"draws": 3}, {"documents": 4}):
        assert real.unfinished("smollm2", replace(options, **other)) == ["spectrum", "lens"]
    path = tmp_path / "smollm2/spectrum.json"
    path.write_text(path.read_text()[:-20])
    assert real.unfinished("smollm2", options) == ["spectrum", "lens"]


def test_controls_of_the_same_energy(study: RealStudy) -> None:
    """The draws take the energy of the band, at the same tokens, and the lens is that of the library."""
    found = same_energy.run(study)
    chosen = pd.read_csv(study.out / "same_energy_components.csv")
    costliest = chosen.loc[chosen["delta_nll"].idxmax()]
    site = ss.Site(costliest["site"], int(costliest["layer"]))
    alone = study.evaluate({"x": {site: ss.remove(study.unembedding.dark())}})["x"]
    table = pd.read_csv(study.out / "same_energy_output.csv").set_index(["tokens", "edit"]).sort_index()
    assert table.loc[("all", "dark"), "delta_nll"].item() == pytest.approx(alone.delta_nll, rel=1e-4)
    for tokens in same_energy.WHERE:
        energy = table.loc[(tokens, "dark"), "removed_energy_share"].item()
        np.testing.assert_allclose(
            table.loc[(tokens, "same energy"), "removed_energy_share"], energy, rtol=0.02
        )
        assert (table.loc[(tokens, "same rank"), "rank"] == study.unembedding.dark().rank).all()

    read = pd.read_csv(study.out / "same_energy_lens.csv").set_index(["layer", "edit"]).sort_index()
    last, count = study.model.layers - 1, study.unembedding.count
    rows = ss.residual.band_lens(study.model, study.windows, {"U": study.unembedding}, alone=False)
    nll = rows.groupby(["layer", "band"])["nll"].mean()
    for layer in (last // 2, last):
        risen = nll[layer, count - 1] - nll[layer, count]
        assert read.loc[(layer, "dark"), "delta_nll"].item() == pytest.approx(risen, rel=1e-3, abs=1e-4)
        energy = read.loc[(layer, "dark"), "removed_energy_share"].item()
        np.testing.assert_allclose(
            read.loc[(layer, "same energy"), "removed_energy_share"], energy, rtol=0.02
        )

    beyond = [row["value"] > most for row, most in zip(found.answers, drawn_most(table, read), strict=True)]
    word = "holds" if all(beyond) else "holds partly" if any(beyond) else "does not hold here"
    assert found.verdict.startswith(f"{word}: ") and f"at {sum(beyond)} of 5 places" in found.verdict


def drawn_most(table: pd.DataFrame, read: pd.DataFrame) -> list[float]:
    most = [table.loc[(tokens, "same energy"), "delta_nll"].max() for tokens in same_energy.WHERE]
    layers = read.index.get_level_values("layer").unique()
    return most + [read.loc[(layer, "same energy"), "delta_nll"].max() for layer in layers]


def test_what_leaks_is_one_of_two_parts_of_what_a_random_subspace_takes(study: RealStudy) -> None:
    dark, x = study.unembedding.dark(), residuals(study, study.below_sink)
    p = dark.basis.double() @ dark.basis.double().T
    made = leak.edits(study, x)
    for seed in range(study.draws):
        basis = ss.random_subspace(dark.d, dark.rank, seed).basis.double()
        r = basis @ basis.T
        for name, taken in (("random", r), ("dark part", r @ p), ("other part", r @ (torch.eye(dark.d) - p))):
            torch.testing.assert_close(made[f"{name}|{seed}"](x), x - x @ taken.T, rtol=1e-6, atol=1e-6)
    shrunk = made["dark shrunk|"](x)
    lost = (x.square().sum(-1) - shrunk.square().sum(-1)) / x.square().sum(-1)
    assert lost.mean().item() == pytest.approx(dark.rank / dark.d, rel=1e-6)
    torch.testing.assert_close(shrunk - shrunk @ p, x - x @ p)
    cosine = torch.nn.functional.cosine_similarity(shrunk @ p, x @ p, dim=-1)
    torch.testing.assert_close(cosine, torch.ones_like(cosine))
    with pytest.raises(ss.InputError, match=r"the dark band has 0\.000 of the energy"):
        leak.edits(study, x - x @ p)

    found = leak.run(study)
    table = pd.read_csv(study.out / "leak.csv").set_index(["place", "edit", "draw"])["delta_nll"].sort_index()
    site = ss.Site("exit", study.below_sink)
    for tokens, place in (("all", "all tokens"), ("first", "first token")):
        alone = study.evaluate(
            {"x": {site: ss.remove(ss.random_subspace(dark.d, dark.rank, 1), tokens=tokens)}}
        )
        expected = pytest.approx(alone["x"].delta_nll, rel=1e-4, abs=1e-6)
        assert table[f"exit {site.layer}, {place}", "random", 1] == expected
    last = study.model.layers - 1
    lens = same_energy.lens(study, last)
    lens = lens[lens["edit"] == "same rank"]["delta_nll"].to_numpy()
    np.testing.assert_allclose(table[f"lens at exit {last}", "random"], lens, rtol=1e-3, atol=1e-5)
    assert len(found.answers) == 12


@pytest.mark.parametrize(
    ("part", "rest", "shrunk", "word"),
    [
        (3.0, 0.5, 0.1, "holds: "),
        (1.9, 0.5, 0.1, "does not hold here: "),
        (3.0, 2.5, 0.1, "does not hold here: "),
        (3.0, 0.5, 2.5, "does not hold here: "),
    ],
)
def test_a_leak_explains_what_its_parts_explain(part: float, rest: float, shrunk: float, word: str) -> None:
    cost = {"random": (2.0, 6.0), "dark part": (part, part), "other part": (0.1, rest)}
    rows = [{"edit": edit, "delta_nll": value} for edit, values in cost.items() for value in values]
    rows.append({"edit": "dark shrunk", "delta_nll": shrunk, "low": 0.0, "high": 3.0})
    assert leak.verdict([leak.compare(pd.DataFrame(rows), "somewhere")]).startswith(word)


RESULTS = Path(__file__).parents[2] / "results"
ROW = re.compile(
    r"^\|.* `(?P<name>\w+)` \| (?P<smollm2>[^|]+) \| (?P<gemma3>[^|]+) \|(?P<embedded>.*)\|$", re.M
)


def test_the_page_has_the_verdicts_of_the_tables() -> None:
    """A star marks a reading of tables whose experiment has no rule for a verdict."""
    page = (RESULTS / "real" / "README.md").read_text().split("## ")[1]
    rows = list(ROW.finditer(page))
    assert len(rows) == page.count("\n| ") - 1 > 15
    for row in rows:
        for folder in ("smollm2", "gemma3"):
            path, shown = RESULTS / "real" / folder / f"{row['name']}.json", row[folder]
            if not path.is_file():
                assert shown == "not run", row["name"]
            elif stated := json.loads(path.read_text())["verdict"]:
                assert stated.startswith(f"{shown}:"), row["name"]
            else:
                assert re.fullmatch(r"(holds|holds partly|does not hold here)\*", shown), row["name"]
    embedded = pd.read_csv(RESULTS / "verdicts.csv").set_index("experiment")["verdict"]
    for row in rows:
        for name, word, star in re.findall(r"`(\w+)` ([a-z ]+)(\*?)", row["embedded"]):
            assert (name in embedded) != bool(star)
            assert star or re.search(rf"\b{word.strip()}( \(|:)", embedded[name]), name
