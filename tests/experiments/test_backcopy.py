"""Bigram-Backcopy: a model whose head has a known job, and what the tools say of it (Guo et al. 2024)."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask
from transformers.pytorch_utils import Conv1D

import spectral_sinks as ss
from spectral_sinks.models.attention_sdpa import whole_maps

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
WINDOWS = 24


def opened(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, EXPERIMENTS / "training" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def script() -> Any:
    return opened("train_backcopy")


@pytest.fixture(scope="module")
def experiment(script: Any) -> Any:
    """The experiment on three layers, which imports the script."""
    return opened("backcopy")


@pytest.fixture(scope="module")
def folders(script: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One layer, trained by the script with softmax and with ReLU attention."""
    found = {name: tmp_path_factory.mktemp(name) for name in ("softmax", "relu")}
    for name, folder in found.items():
        script.main(script.Recipe(out=folder, attention=name))
    return found


@pytest.fixture(scope="module")
def softmax(folders: dict[str, Path]) -> ss.LanguageModel:
    return ss.load(folders["softmax"])


@pytest.fixture(scope="module")
def relu(folders: dict[str, Path]) -> ss.LanguageModel:
    return ss.load(folders["relu"])


def held_out(script: Any, model: ss.LanguageModel, folder: Path) -> ss.Windows:
    recipe = script.Recipe(out=folder)
    ids = script.text(script.chain(recipe), WINDOWS, recipe.window, torch.Generator().manual_seed(7))
    return ss.Windows.of_ids(list(ids), model)


def returned(model: ss.LanguageModel, windows: ss.Windows) -> Tensor:
    """The maps that the transformers model itself returns, `[windows, tokens, tokens]`."""
    with torch.no_grad():
        return model.module(torch.stack(list(windows.rows)), output_attentions=True).attentions[0][:, 0]


def split(script: Any, maps: Tensor, windows: ss.Windows) -> dict[str, float]:
    """Mean attention to BOS and to the token before, by trigger queries and by others."""
    triggers = script.is_trigger(torch.stack(list(windows.rows)))[:, 2:]
    bos, before = maps[:, 2:, 0], maps.diagonal(-1, 1, 2)[:, 1:]
    return {
        "bos, trigger": float(bos[triggers].mean()),
        "bos, other": float(bos[~triggers].mean()),
        "before, trigger": float(before[triggers].mean()),
        "before, other": float(before[~triggers].mean()),
    }


def seen(model: ss.LanguageModel, windows: ss.Windows) -> list[ss.attention.AttentionCall]:
    calls: list[ss.attention.AttentionCall] = []
    with ss.attending(model, calls.append), torch.no_grad():
        model.module(torch.stack(list(windows.rows)))
    return calls


def test_the_text_copies_after_triggers_and_follows_the_chain_elsewhere(script: Any, tmp_path: Path) -> None:
    recipe = script.Recipe(out=tmp_path, vocabulary=8)
    moves = script.chain(recipe)
    ids = script.text(moves, 2000, 40, torch.Generator().manual_seed(0))
    counts = np.zeros((8, 8))
    for row in ids.tolist():
        assert row[0] == script.BOS and script.BOS not in row[1:] and row[1] not in script.TRIGGERS
        for before, last, token in zip(row, row[1:], row[2:], strict=False):
            if last in script.TRIGGERS:
                assert token == before
            else:
                counts[last, token] += 1
    plain = [token for token in range(4, 8)]
    shares = counts[plain] / counts[plain].sum(1, keepdims=True)
    assert np.abs(shares - moves[plain].numpy()).max() < 0.02
    assert shares[:, list(script.TRIGGERS)].sum(1) == pytest.approx(recipe.triggers, abs=0.02)
    again = script.text(moves, 2000, 40, torch.Generator().manual_seed(0))
    assert torch.equal(ids, again)


@pytest.mark.parametrize("kind", ["softmax", "relu"])
def test_both_learn_the_task(script: Any, folders: dict[str, Path], kind: str) -> None:
    recipe = script.Recipe(out=folders[kind], attention=kind)
    trained = script.evaluate(ss.load(folders[kind]).module, recipe)
    untrained = script.evaluate(script.build(recipe).eval(), recipe)
    assert trained["nll_after_triggers"] < 0.05 and trained["excess_nll_elsewhere"] < 0.05
    assert untrained["nll_after_triggers"] > 3 and untrained["excess_nll_elsewhere"] > 0.5


def test_the_head_is_dormant_on_others_and_active_on_triggers(
    script: Any, folders: dict[str, Path], softmax: ss.LanguageModel
) -> None:
    windows = held_out(script, softmax, folders["softmax"])
    (call,) = seen(softmax, windows)
    maps = call.weights()[:, 0]
    assert (maps - returned(ss.load(folders["softmax"], attention="eager"), windows)).abs().max() < 1e-5
    use = split(script, maps, windows)
    assert use["bos, other"] > 0.9 and use["bos, trigger"] < 0.1
    assert use["before, trigger"] > 0.9 and use["before, other"] < 0.1
    untrained = ss.load(script.build(script.Recipe(out=folders["softmax"])))
    control = split(script, seen(untrained, windows)[0].weights()[:, 0], windows)
    assert max(control.values()) < 0.15


def test_bos_is_the_sink_and_has_the_smallest_value(
    script: Any, folders: dict[str, Path], softmax: ss.LanguageModel
) -> None:
    windows = held_out(script, softmax, folders["softmax"])
    found = ss.find_sinks(softmax, windows, ss.read_spectrum(softmax), draws=3)
    (sink,) = found.sinks
    assert sink.position == 0 and sink.share_of_documents == 1 and found.sink_rate.value == 1
    alpha = ss.attention.attention_by_position(softmax, windows).alpha
    assert sink.attention_mass.value == pytest.approx(alpha[..., 0].mean()) and alpha[..., 0].mean() > 0.7
    by_head = ss.attention_by_head(softmax, windows)["attention"]
    assert by_head.to_numpy() == pytest.approx(alpha[:, 0, 0, 0], abs=1e-5)

    norms = seen(softmax, windows)[0].value[:, 0].norm(dim=-1)
    ids = torch.stack(list(windows.rows))
    by_token = {token: float(norms[ids == token].mean()) for token in ids.unique().tolist()}
    assert min(by_token, key=lambda token: by_token[token]) == script.BOS
    assert by_token[script.BOS] < 0.8 * float(np.median(list(by_token.values())))


def test_relu_attention_has_no_sink_and_the_tools_say_what_they_read(
    script: Any, folders: dict[str, Path], relu: ss.LanguageModel
) -> None:
    assert relu.own_attention == script.RELU
    windows = held_out(script, relu, folders["relu"])
    maps = returned(relu, windows)
    use = split(script, maps, windows)
    assert max(use["bos, other"], use["bos, trigger"]) < 0.01 < use["before, trigger"]
    assert use["before, other"] < 0.05 * use["before, trigger"]

    said = rf"runs 'relu' attention.*rows sum to {float(maps.sum(-1).mean()):.3g} on average"
    with pytest.warns(ss.SpectralWarning, match=said):
        found = ss.find_sinks(relu, windows, ss.read_spectrum(relu), draws=3)
    assert found.sinks == () and found.sink_rate.value == 0 and found.total_mass.value == 0
    for k in (0, 1, 20, 63):
        given = maps[:, k + 1 :, k].sum(1) / (64 - k)
        assert found.attention.alpha[:, 0, 0, k] == pytest.approx(given, abs=1e-6)
        assert (found.attention.seen[:, 0, 0, k] == 64 - k).all()
        by_head = ss.attention_by_head(relu, windows, k)["attention"]
        assert by_head.to_numpy() == pytest.approx(given, abs=1e-6)
    assert (found.attention.to_sink_logit == 0).all()


def test_nothing_puts_a_softmax_in_place_of_another_attention(
    script: Any, folders: dict[str, Path], relu: ss.LanguageModel
) -> None:
    windows = held_out(script, relu, folders["relu"])
    with pytest.raises(ss.InputError, match=r"'relu' attention.*no\s*softmax"), ss.attending(relu, print):
        pass
    with pytest.raises(ss.InputError, match="would put a softmax in its place"):
        ss.head_use(relu, windows)
    before = returned(relu, windows)
    maps = ss.trace(relu, torch.stack(list(windows.rows)), {}, attention=True, readout=lambda *g: g[2][0])
    assert torch.equal(maps[:, 0], before) and relu.config._attn_implementation == script.RELU
    with whole_maps(relu):
        assert torch.equal(returned(relu, windows), before)
    as_softmax = returned(ss.load(folders["relu"], attention="eager"), windows)
    assert (as_softmax - before).abs().max() > 0.1, "else this test could not tell them apart"


def test_a_checkpoint_that_names_an_attention_unknown_here_is_refused(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    for file in folders["relu"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes().replace(b'"relu"', b'"cubic"'))
    with pytest.raises(ss.InputError, match=r"cannot be loaded.*cubic"):
        ss.load(tmp_path)


def test_an_attention_that_returns_no_weights_is_refused(
    script: Any, folders: dict[str, Path], relu: ss.LanguageModel
) -> None:
    def silent(*given: Any, **options: Any) -> tuple[Tensor, None]:
        return script.relu_attention(*given, **options)[0], None

    AttentionInterface.register("silent", silent)
    AttentionMaskInterface.register("silent", eager_mask)
    model, windows = ss.load(folders["relu"], attention="silent"), held_out(script, relu, folders["relu"])
    for measure in (ss.attention.attention_by_position, ss.attention_by_head):
        with pytest.raises(ss.InputError, match="returns none"):
            measure(model, windows)


@pytest.fixture(scope="module")
def three(script: Any, experiment: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Recipes of the experiment, cut to 200 steps of half a batch, and trained."""
    options = experiment.Options(runs=tmp_path_factory.mktemp("three"), steps=200, checkpoints=(0,))
    recipes = {kind: replace(experiment.recipe(options, kind, 1), batch=16) for kind in ("AdamW", "SGD")}
    for recipe in recipes.values():
        script.main(recipe)
    return recipes


def at_the_end(experiment: Any, recipe: Any) -> pd.DataFrame:
    return pd.DataFrame(experiment.measure(recipe.out, recipe, WINDOWS)).set_index("site")


def test_the_papers_architecture_has_no_biases_and_embeddings_of_variance_1(
    script: Any, three: dict[str, Any]
) -> None:
    recipe = three["AdamW"]
    untrained, trained = script.build(recipe), ss.load(recipe.out).module
    for model in (untrained, trained):
        matrices = [module for module in model.modules() if isinstance(module, Conv1D)]
        assert len(matrices) == 3 * 4 and all(not module.bias.any() for module in matrices)
    for module in untrained.modules():
        if isinstance(module, torch.nn.Embedding):
            assert float(module.weight.detach().std()) == pytest.approx(1, abs=0.03)
        if isinstance(module, Conv1D):
            inputs = module.weight.shape[0]
            assert float(module.weight.detach().abs().max()) == pytest.approx(inputs**-0.5, rel=0.01)
    x = torch.randn(5, 3, recipe.width)
    block = untrained.transformer.h[0].mlp
    by_hand = (x @ block.c_fc.weight).relu() @ block.c_proj.weight
    assert torch.allclose(
        untrained.train()(torch.zeros(1, 3).long()).logits, untrained(torch.zeros(1, 3).long()).logits
    )
    assert torch.allclose(block(x), by_hand, atol=1e-5)


def test_three_layers_measured_are_what_the_model_computes(
    script: Any, experiment: Any, three: dict[str, Any]
) -> None:
    recipe = three["AdamW"]
    found = at_the_end(experiment, recipe)
    model = ss.load(recipe.out, attention="eager").module
    draw = torch.Generator().manual_seed(recipe.seed + 2**20)
    ids = script.text(script.chain(recipe), WINDOWS, recipe.window, draw)
    exits: list[Tensor] = []
    for block in model.transformer.h:
        block.register_forward_hook(
            lambda _, __, out: exits.append(out[0] if isinstance(out, tuple) else out)
        )
    with torch.no_grad():
        run = model(ids, output_attentions=True, output_hidden_states=True)
    norms = [x.norm(dim=-1) for x in (run.hidden_states[0], *exits)]
    assert found["bos"].to_numpy() == pytest.approx([float(x[:, 0].mean()) for x in norms], rel=1e-5)
    assert found["others"].to_numpy() == pytest.approx([float(np.median(x[:, 1:])) for x in norms], rel=1e-5)
    assert found["ratio"].to_numpy() == pytest.approx((found["bos"] / found["others"]).to_numpy())
    triggers = script.is_trigger(ids)
    for layer, maps in enumerate(run.attentions):
        to_bos = {True: [], False: []}
        for window, row in enumerate(triggers.tolist()):
            for query in range(2, recipe.window):
                to_bos[row[query]].append(float(maps[window, 0, query, 0]))
        row = found.loc[f"exit {layer}"]
        assert row["attention"] == pytest.approx(np.mean(to_bos[False]), abs=1e-5)
        assert row["attention_of_triggers"] == pytest.approx(np.mean(to_bos[True]), abs=1e-5)


def test_adam_begins_to_raise_bos_below_the_sink_and_sgd_does_not(
    script: Any, experiment: Any, three: dict[str, Any]
) -> None:
    """After 200 steps; `results/backcopy.csv` has the peak after 3000."""
    adam, sgd = (at_the_end(experiment, three[kind]) for kind in ("AdamW", "SGD"))
    before = pd.DataFrame(
        experiment.measure(three["AdamW"].out / "step-000000", three["AdamW"], WINDOWS)
    ).set_index("site")
    assert (before["ratio"] < 1.1).all() and not before["sink"].any()
    assert adam.loc["exit 0", "ratio"] > 1.2 > 0.8 > adam.loc["exit 2", "ratio"]
    assert adam.loc["exit 0", "bos"] > 1.4 * before.loc["exit 0", "bos"]
    assert adam["sink"].all() and adam["onset"].eq(1).all()
    assert adam.loc["exit 1", "attention"] > 0.6 > 0.1 > adam.loc["exit 1", "attention_of_triggers"]
    assert adam.loc["exit 1", "value_ratio"] < 0.5
    assert (sgd["ratio"] < 1.1).all() and sgd.loc["exit 0", "bos"] < 1.15 * before.loc["exit 0", "bos"]


def test_a_recipe_is_finished_only_by_itself(script: Any, three: dict[str, Any], tmp_path: Path) -> None:
    recipe = three["SGD"]
    assert script.finished(recipe) and (recipe.out / "step-000000" / "config.json").exists()
    assert not script.finished(replace(recipe, seed=2))
    assert not script.finished(replace(recipe, learning_rate=0.1))
    assert not script.finished(replace(recipe, out=tmp_path))


@pytest.mark.parametrize(
    ("ratios", "answer"),
    [
        ((2.5, 1.2, 0.6), True),
        ((1.2, 2.5, 0.6), True),
        ((1.9, 1.2, 0.6), False),
        ((2.5, 2.6, 2.7), False),
        ((1.0, 1.0, 9.0), False),
        ((2.0, 1.0, 0.5), False),
    ],
)
def test_a_peak_is_high_and_gone_at_the_last_exit(
    experiment: Any, ratios: tuple[float, ...], answer: bool
) -> None:
    assert experiment.peaks(ratios) is answer


def test_a_run_is_read_at_its_last_step_and_a_sink_is_what_others_attend_to(experiment: Any) -> None:
    rows = []
    for kind, attention, found in (("SGD", 0.7, False), ("ReLU attention", 0.01, True)):
        for step, ratio in ((0, 9.0), (10, 3.0)):
            for site, times in (("embedding", 100.0), ("exit 0", 1.0), ("exit 1", 0.5), ("exit 2", 0.1)):
                here = attention if site == "exit 1" else 0.001
                row = {"kind": kind, "seed": 0, "step": step, "site": site, "ratio": ratio * times}
                row |= {"attention": here, "attention_of_triggers": here / 10, "sink": found, "bos": 2.0}
                row |= {"sink_rate": float(here > 0.3), "value_ratio": here, "others": 1.0, "unread": 0.5}
                row |= {"unread_of_others": 0.4, "attention_of_bos": 30.0 if found else 1.0}
                rows.append(row | {"nll_after_triggers": 0.1, "excess_nll_elsewhere": 0.2})
    runs = experiment.by_run(pd.DataFrame(rows)).set_index("kind")
    assert runs["peak"].tolist() == [1, 1] and runs["sink"].tolist() == [1, 0]
    assert runs["called a sink by find_sinks"].tolist() == [0, 1]
    assert runs["ratio at a middle exit, largest"].tolist() == [3, 3]
    assert runs["ratio at the last exit"].to_numpy() == pytest.approx([0.3, 0.3])
    assert runs["attention to BOS, layer with most"].tolist() == [0.7, 0.01]
    assert runs["attention to BOS by triggers, same layer"].to_numpy() == pytest.approx([0.07, 0.001])
    least = runs["value of BOS over the mean, least in a layer with the sink"]
    assert least["SGD"] == 0.7 and np.isnan(least["ReLU attention"])


AS_PUBLISHED = {"AdamW": (1, 1), "SGD": (0, 1), "ReLU attention": (0, 0)}


def planted(**changed: tuple[float, float]) -> pd.DataFrame:
    """Three seeds of each kind as the paper has them; `changed` is the second seed's peak and sink."""
    rows = []
    for kind, usual in AS_PUBLISHED.items():
        for seed in range(3):
            peak, sink = changed.get(kind.split()[0], usual) if seed == 1 else usual
            rows.append({"kind": kind, "seed": seed, "peak": peak, "sink": sink})
    return pd.DataFrame(rows)


def test_the_verdict_asks_every_seed(experiment: Any) -> None:
    assert experiment.verdict(planted()).startswith("holds: AdamW")
    for kind, other in {"AdamW": (0, 1), "SGD": (1, 1), "ReLU": (0, 1)}.items():
        said = experiment.verdict(planted(**{kind: other}))
        assert said.startswith("holds partly") and kind not in said
    for kind, other in {"AdamW": (1, 0), "SGD": (0, 0), "ReLU": (1, 0)}.items():
        assert kind not in experiment.verdict(planted(**{kind: other}))
    none = experiment.verdict(planted(AdamW=(0, 1), SGD=(1, 1), ReLU=(1, 0)))
    assert none.startswith("does not hold here")


def test_the_table_is_written_and_nothing_is_trained_twice(
    script: Any, experiment: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = experiment.Options(
        tmp_path / "runs", tmp_path / "out", seeds=(1, 2), steps=3, checkpoints=(0,), width=32, windows=8
    )
    experiment.main(options)
    table = pd.read_csv(options.out / "backcopy.csv")
    assert len(table) == 3 * 2 * 2 * 4 and not table["site"].isna().any()
    assert (options.out / "backcopy.png").stat().st_size > 10_000
    runs = experiment.by_run(table)
    last = table[(table["step"] == 3) & (table["kind"] == "SGD") & (table["seed"] == 2)].set_index("site")
    row = runs[(runs["kind"] == "SGD") & (runs["seed"] == 2)].iloc[0]
    assert row["ratio at a middle exit, largest"] == last.loc[["exit 0", "exit 1"], "ratio"].max()
    assert row["ratio at the last exit"] == last.loc["exit 2", "ratio"]
    assert row["attention to BOS, layer with most"] == last["attention"].max()
    summary = pd.read_csv(options.out / "backcopy_summary.csv").set_index(["kind", "quantity"])
    mine = runs[runs["kind"] == "AdamW"]["norm of BOS, exit 0"]
    said = summary.loc[("AdamW", "norm of BOS, exit 0")]
    assert said["mean"] == pytest.approx(mine.mean(), rel=1e-5) and said["seeds"] == 2
    assert said["low"] == pytest.approx(mine.mean() - 12.7062 * mine.sem(), rel=1e-3)

    written = (options.out / "backcopy.csv").read_bytes()
    monkeypatch.setattr(script, "train", lambda recipe: pytest.fail("trained again"))
    experiment.main(options)
    assert (options.out / "backcopy.csv").read_bytes() == written
