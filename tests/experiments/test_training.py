"""The training script: a run that is killed and resumed ends with the weights of one that was not."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location(
        "train_sinklet", ROOT / "experiments" / "training" / "train_sinklet.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def text(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    words = ["sink", "dark", "band", "token", "layer", "head", "stream", "norm", "the", "of", "a"]
    draw = torch.Generator().manual_seed(0)
    for name, count in (("train.jsonl", 40), ("heldout.jsonl", 8)):
        picks = torch.randint(len(words), (count, 300), generator=draw).tolist()
        lines = [json.dumps({"text": " ".join(words[i] for i in row)}) for row in picks]
        (folder / name).write_text("\n".join(lines) + "\n")
    return folder


def recipe(script, text, out, **changes):
    small = {"width": 16, "layers": 2, "heads": 2, "feed_forward": 32, "vocabulary": 300, "window": 128}
    small |= {"batch": 2, "steps": 6, "warmup": 2, "evaluate_every": 2, "compile": False, "short": 0.5}
    return script.Recipe(text=text, out=out, **small | changes)


def test_a_killed_run_goes_on_exactly(script, text, tmp_path, monkeypatch):
    script.main(recipe(script, text, tmp_path / "whole"))

    real = script.sample

    def killed(stream, settings, step):
        if step == 3:
            raise KeyboardInterrupt
        return real(stream, settings, step)

    monkeypatch.setattr(script, "sample", killed)
    with pytest.raises(KeyboardInterrupt):
        script.main(recipe(script, text, tmp_path / "killed"))
    assert not (tmp_path / "killed" / "model").exists()
    monkeypatch.setattr(script, "sample", real)
    script.main(recipe(script, text, tmp_path / "killed"))

    whole, resumed = (
        load_file(tmp_path / run / "model" / "model.safetensors") for run in ("whole", "killed")
    )
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    logs = [(tmp_path / run / "log.jsonl").read_text().splitlines() for run in ("whole", "killed")]
    assert [[json.loads(line)["step"] for line in log] for log in logs] == [[0, 2, 4, 6]] * 2
    assert json.loads(logs[0][-1])["heldout_nll"] == json.loads(logs[1][-1])["heldout_nll"]


def test_windows_open_with_bos_once_and_the_first_half_are_short(script, text, tmp_path):
    settings = recipe(script, text, tmp_path)
    stream = torch.arange(1, 1000).numpy().astype("uint16")
    for step, shape in ((0, (4, 64)), (2, (4, 64)), (3, (2, 128)), (5, (2, 128))):
        batch = script.sample(stream, settings, step)
        assert batch.shape == shape
        assert (batch[:, 0] == 0).all()
        assert (batch[:, 1:] > 0).all()
        assert torch.equal(batch, script.sample(stream, settings, step))
    anywhere = script.sample(stream, recipe(script, text, tmp_path, bos=False, short=0.0), 0)
    assert anywhere.shape == (2, 128)
    assert (anywhere > 0).all()


def test_learning_rate_rises_stays_and_ends_at_zero(script, text, tmp_path):
    settings = recipe(script, text, tmp_path, steps=100, warmup=10, decay=0.25)
    rates = [script.learning_rate(settings, step) for step in range(101)]
    peak = settings.learning_rate
    assert rates[0] == pytest.approx(peak / 10)
    assert rates[9:76] == [pytest.approx(peak)] * 67
    assert rates[88] == pytest.approx(peak * 12 / 25)
    assert rates[100] == 0


@pytest.mark.parametrize("softmax", ["off-by-one", "learned"])
def test_a_further_logit_in_the_softmax(script, text, tmp_path, softmax):
    script.main(recipe(script, text, tmp_path / "run", softmax=softmax))
    script.main(recipe(script, text, tmp_path / "plain"))
    sinks = load_file(tmp_path / "run" / "model" / "sinks.safetensors")["sink_logits"]
    assert sinks.shape == (2, 2) and bool((sinks != 0).any()) == (softmax == "learned")
    names = {run: set(load_file(tmp_path / run / "model" / "model.safetensors")) for run in ("run", "plain")}
    assert names["run"] == names["plain"], "the checkpoint is a plain Llama's"

    settings = recipe(script, text, tmp_path / "run", softmax=softmax)
    model = script.build(settings)
    ids = torch.randint(300, (2, 20), generator=torch.Generator().manual_seed(1))
    weights = model(ids, output_attentions=True).attentions
    assert all((layer.sum(-1) < 1).all() for layer in weights)
    plain = script.build(recipe(script, text, tmp_path / "plain"))(ids, output_attentions=True).attentions
    assert all(
        bool((mine <= theirs + 1e-6).all()) for mine, theirs in zip(weights[:1], plain[:1], strict=True)
    )


def test_bos_at_a_chosen_place(script, text, tmp_path):
    settings = recipe(script, text, tmp_path / "run", position=5)
    rows = script.with_bos(torch.arange(1, 13).view(2, 6).numpy(), settings)
    assert rows.tolist() == [[1, 2, 3, 4, 5, 0, 6], [7, 8, 9, 10, 11, 0, 12]]
    logits = torch.randn(2, 6, 300, generator=torch.Generator().manual_seed(0))
    nll = script.losses_of(logits, torch.from_numpy(rows), settings)
    every = script.losses_of(logits, torch.from_numpy(rows), recipe(script, text, tmp_path))
    assert torch.equal(nll, every[:, [0, 1, 2, 3, 5]]), "all but the prediction of BOS"
    script.main(settings)
    assert json.loads((tmp_path / "run" / "model" / "recipe.json").read_text())["position"] == 5


def test_fine_tuning_without_the_first_key(script, text, tmp_path):
    script.main(recipe(script, text, tmp_path / "plain"))
    start = tmp_path / "plain" / "model"
    settings = recipe(script, text, tmp_path / "tuned", softmax="no-first", start=start, steps=2)
    model = script.build(settings)
    ids = torch.randint(300, (2, 20), generator=torch.Generator().manual_seed(1))
    for layer in model(ids, output_attentions=True).attentions:
        assert (layer[:, :, 1:, 0] == 0).all() and torch.allclose(layer.sum(-1), torch.ones(()))
    before = load_file(start / "model.safetensors")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    script.main(settings)
    after = load_file(tmp_path / "tuned" / "model" / "model.safetensors")
    assert any(not torch.equal(after[name], before[name]) for name in before)
