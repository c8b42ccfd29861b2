"""`sinks`, `energy` and `nll` on a sink that is dark under the folded convention alone: both are shown."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from support import planted_outliers, tiny_encoders, tiny_models
from support.planted_sinks import BANDS, VOCABULARY, D, sinking

import spectral_sinks as ss

DISAGREE = "is dark under folded; not dark under raw (folded reads the residual through the gain of the final"
NLL = ("nll", "--layer", 0, "--remove", "dark", "--length", 64)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planted") / "model"
    sinking(1, 1e-3)[0].module.save_pretrained(folder)
    tiny_models.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def windows(checkpoint: Path) -> ss.Windows:
    drawn = torch.randint(3, VOCABULARY, (4, 63), generator=torch.Generator().manual_seed(0))
    ids = torch.cat([torch.zeros(4, 1, dtype=torch.int64), drawn], dim=1)
    return ss.Windows.of_ids(ids, ss.load(checkpoint))


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], checkpoint: Path, windows: ss.Windows, tmp_path: Path) -> Any:
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(" ".join(f"w{i}" for i in row[1:].tolist()) for row in windows.rows))

    def call(command: str, *options: object) -> tiny_models.Ran:
        given = ["--text", path, "--separator", r"\n\n", *options]
        done = tiny_models.run(capsys, command, checkpoint, *given)
        assert done.status == 0, done.err
        return done

    return call


def shares(x: np.ndarray, model: Any) -> dict[str, np.ndarray]:
    """The dark share of each token under each convention, from the SVD of numpy in float64."""
    weight, gain = (p.detach().double().numpy() for p in (model.lm_head.weight, model.model.norm.weight))
    bases = {"raw": np.linalg.svd(weight)[2], "folded": np.linalg.svd(weight * gain)[2]}
    rank = D // BANDS
    return {
        name: np.square(x @ rows[-rank:].T).sum(-1) / np.square(x).sum(-1) for name, rows in bases.items()
    }


def test_sinks(run: Any) -> None:
    record = json.loads(run("sinks", "--json").out)
    assert (record["convention"], record["conventions"]) == ("folded", ["folded", "raw"])
    (sink,) = record["sinks"]
    assert (sink["dark"], sink["dark_raw"]) == (True, False)
    assert sink["dark_share"] > 0.9 and sink["dark_share_raw"] < 0.1
    said = run("sinks").out
    assert "The sink at position 0 " + DISAGREE in said
    assert re.search(r"folded +0\.9\d+ .* yes", said) and re.search(r"raw +0\.0\d+ .* no", said), said
    turned = json.loads(run("sinks", "--json", "--convention", "raw").out)
    assert (turned["convention"], turned["conventions"]) == ("raw", ["raw", "folded"])
    (swapped,) = turned["sinks"]
    assert (swapped["dark"], swapped["dark_folded"]) == (False, True)
    assert swapped["dark_share_folded"] == sink["dark_share"]


def test_energy(run: Any, checkpoint: Path, windows: ss.Windows) -> None:
    record = json.loads(run("energy", "--json").out)
    assert (record["convention"], record["conventions"]) == ("folded", ["folded", "raw"])
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    with torch.no_grad():
        states = model(torch.stack(windows.rows), output_hidden_states=True).hidden_states
    for name, rows in (("folded", record["rows"]), ("raw", record["rows_raw"])):
        table = pd.DataFrame(rows).set_index(["site", "layer", "position_class", "band"])["share"]
        for layer, state in ((-1, states[0]), (1, states[2])):
            expected = shares(state.double().numpy(), model)[name]
            site = ("embedding" if layer < 0 else "exit", layer)
            assert table[*site, "bos", BANDS] == pytest.approx(expected[:, 0].mean(), abs=1e-5)
            assert table[*site, "other", BANDS] == pytest.approx(expected[:, 1:].mean(), abs=1e-5)
        assert np.allclose(table.groupby(["site", "layer", "position_class"]).sum(), 1, atol=1e-5)
    said = run("energy").out
    assert "band 20 (dark), raw" in said and "band 20 (dark), folded" in said
    assert "At 4 of 4 sites the share of the first token in the dark band is above chance (0.050)" in said


def test_nll(run: Any, checkpoint: Path, windows: ss.Windows) -> None:
    found = json.loads(run(*NLL, "--json").out)
    assert (found["convention"], found["conventions"]) == ("folded", ["folded", "raw"])
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    with torch.no_grad():
        x = model(torch.stack(windows.rows), output_hidden_states=True).hidden_states[1].double().numpy()
    drawn = [ss.random_subspace(D, D // BANDS, seed).orthonormal().numpy() for seed in range(20)]
    random = [(np.square(x[:, 0] @ basis).sum(-1) / np.square(x[:, 0]).sum(-1)).mean() for basis in drawn]
    for name, end in (("folded", ""), ("raw", "_raw")):
        expected = shares(x, model)[name]
        assert found[f"dark_share{end}"] == pytest.approx(expected[:, 0].mean(), abs=1e-5)
        assert found[f"other_dark_share{end}"] == pytest.approx(expected[:, 1:].mean(), abs=1e-5)
        assert found[f"random_dark_share{end}"] == pytest.approx([min(random), max(random)], abs=1e-5)
    assert (found["dark"], found["dark_raw"]) == (True, False)
    said = run(*NLL).out
    assert "dark share of position 0, raw" in said and "dark share of position 0, folded" in said
    assert "At exit 0, position 0 " + DISAGREE in said
    assert "dark share" not in run("nll", "--length", 64).out, "without a filter there is no site"


def test_where_they_agree_nothing_is_said(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for command in (("sinks", "--draws", 2), ("nll", "--layer", 0, "--remove", "dark")):
        said = tiny_models.run(capsys, *command, "--documents", 3).out
        assert "folded" in said and "through the gain" not in said


@pytest.mark.parametrize("command", [("sinks",), ("energy",), NLL], ids=lambda c: c[0])
def test_the_model_is_loaded_once(command: Any, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    load = ss.load

    def counted(name: str, **options: Any) -> ss.LanguageModel:
        loaded.append(name)
        return load(name, **options)

    monkeypatch.setattr(ss, "load", counted)
    run(*command)
    assert len(loaded) == 1


@pytest.mark.filterwarnings("always:nothing is shown", "always:what is dark")
@pytest.mark.parametrize("command", [("sinks",), ("energy",), NLL], ids=lambda c: c[0])
def test_a_norm_that_is_not_known(command: Any, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spectral_sinks.models.blueprint.tensor_name", lambda *_: None)
    for options, words in (
        ((), "what is dark is judged under convention 'raw', since 'folded' cannot be read"),
        (("--convention", "raw"), "nothing is shown under convention 'folded'"),
    ):
        done = run(*command, "--json", *options)
        assert json.loads(done.out)["conventions"] == ["raw"]
        assert " ".join(done.err.split()).count(words) == 1
        assert " ".join(done.err.split()).count("holds no weight of its final norm") == 1
        assert "folded" not in run(*command, *options).out


@pytest.mark.filterwarnings("ignore:band edges")
@pytest.mark.filterwarnings("always:what is dark")
def test_image_classifiers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = transformers.CLIPConfig(vision_config=tiny_encoders.SIZES, num_labels=5)
    models = {
        "vit": planted_outliers.save(planted_outliers.plant("vit classifier"), tmp_path / "vit"),
        "clip": planted_outliers.save(transformers.CLIPForImageClassification(config), tmp_path / "clip"),
    }
    (tmp_path / "pictures").mkdir()
    pictures = planted_outliers.pictures(tmp_path / "pictures", ("cat", "dog"))
    for name, conventions in (("vit", ["folded", "raw"]), ("clip", ["raw"])):
        done = tiny_models.run(capsys, "vision", models[name], pictures, "--epsilon", 0.01, "--json")
        assert done.status == 0, done.err
        record = json.loads(done.out)["sinks"]
        assert record["conventions"] == conventions and record["sinks"]
        for sink in record["sinks"]:
            assert ("dark_share_raw" in sink) == (name == "vit") and 0 <= sink["dark_share"] <= 1
        assert ("no norm before it to fold in" in done.err) == (name == "clip")
