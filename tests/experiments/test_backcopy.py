"""Bigram-Backcopy: a model whose head has a known job, and what the tools say of it (Guo et al. 2024)."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

import spectral_sinks as ss
from spectral_sinks.models.opening import whole_maps

SCRIPT = Path(__file__).parents[2] / "experiments" / "train_backcopy.py"
WINDOWS = 24


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("train_backcopy", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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


def seen(model: ss.LanguageModel, windows: ss.Windows) -> list[ss.AttentionCall]:
    calls: list[ss.AttentionCall] = []
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
    alpha = ss.attention_by_position(softmax, windows).alpha
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

    said = rf"runs 'relu' attention.*rows sum to {float(maps.sum(-1).mean()):.3g} in the mean"
    with pytest.warns(ss.SpectralWarning, match=said):
        found = ss.find_sinks(relu, windows, ss.read_spectrum(relu), draws=3)
    assert found.sinks == () and found.sink_rate.value == 0 and found.total_mass.value == 0
    for k in (0, 1, 20, 63):
        assert found.attention.alpha[:, 0, 0, k] == pytest.approx(maps[:, k:, k].mean(1), abs=1e-6)
        assert (found.attention.seen[:, 0, 0, k] == 64 - k).all()
        by_head = ss.attention_by_head(relu, windows, k)["attention"]
        assert by_head.to_numpy() == pytest.approx(maps[:, k:, k].mean(1), abs=1e-6)
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
    for measure in (ss.attention_by_position, ss.attention_by_head):
        with pytest.raises(ss.InputError, match="'silent' attention returns no weights"):
            measure(model, windows)
