"""The command line: what it prints equals what the library returns; JSON is one object and nothing else."""

import io
import json
import math
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from support import tiny_models

import spectral_sinks as ss
from spectral_sinks.cli import main

NLL_FIELDS = {
    *("nll", "baseline_nll", "delta_nll", "delta_nll_interval", "documents", "tokens", "first_token_ids"),
    *("layer", "site", "filter", "rank", "removed_energy_share", "sink_mass", "baseline_sink_mass"),
}
"""What `nll --json` holds at least."""

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save(tmp_path_factory.mktemp("checkpoint") / "model")


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [tiny_models.text(90, seed) for seed in range(5)]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command with --json; the one object that it prints."""

    def call(*arguments: object) -> Any:
        status, out, err = tiny_models.run(capsys, *arguments, "--json")
        assert (status, err) == (0, "") and out.count("\n") == 1

        def no_constant(name: str) -> None:
            raise AssertionError(f"{name} is not JSON")

        return json.loads(out, parse_constant=no_constant)

    return call


@pytest.fixture
def nll(run: Run, checkpoint: Path, text: Path) -> Run:
    def call(*arguments: object) -> Any:
        found = run("nll", checkpoint, "--text", text, "--length", 70, *arguments)
        assert set(found) >= NLL_FIELDS
        return found

    return call


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> ss.LanguageModel:
    return ss.load(checkpoint)


@pytest.fixture(scope="module")
def windows(model: ss.LanguageModel, texts: list[str]) -> ss.Windows:
    return ss.cut(texts, model, length=70)


def agrees(found: dict[str, Any], effect: ss.Effect) -> None:
    """Check every number of `nll` against the library's effect."""
    assert found["nll"] == pytest.approx(effect.nll)
    assert found["baseline_nll"] == pytest.approx(effect.baseline_nll)
    assert found["delta_nll"] == pytest.approx(effect.delta_nll)
    assert found["delta_nll_interval"] == pytest.approx(list(effect.delta_nll_interval))
    assert found["removed_energy_share"] == pytest.approx(effect.table["removed_energy_share"].mean())
    assert found["sink_mass"] == pytest.approx(effect.sink_mass)
    assert found["baseline_sink_mass"] == pytest.approx(effect.baseline_sink_mass)
    assert (found["documents"], found["tokens"]) == (5, 5 * 69)
    assert found["first_token_ids"] == [0] and found["rank"] == effect.rank


def test_info(run: Run, checkpoint: Path) -> None:
    assert run("info", checkpoint) == ss.describe(checkpoint)
    assert run("info")["model"] == ss.DEFAULT


@pytest.mark.parametrize(
    "options", [[], ["--matrix", "embedding"], ["--convention", "centred", "--bands", "7"]]
)
def test_spectrum(run: Run, checkpoint: Path, options: list[str]) -> None:
    found = run("spectrum", checkpoint, *options)
    weight = (
        tiny_models.plain().lm_head if "embedding" not in options else tiny_models.plain().model.embed_tokens
    ).weight
    matrix = weight.detach().double().numpy()
    if "centred" in options:
        matrix = (matrix - matrix.mean(0)) * tiny_models.plain().model.norm.weight.detach().double().numpy()
    values = np.linalg.svd(matrix, compute_uv=False)
    assert found["singular_values"] == pytest.approx(values.tolist())
    assert found["convention"] == ("centred" if "centred" in options else "raw") and found["tied"] is False
    count = 7 if options[-1:] == ["7"] else 20
    assert [band["band"] for band in found["bands"]] == list(range(1, count + 1))
    assert sum(band["directions"] for band in found["bands"]) == 32
    assert sum(band["energy_share"] for band in found["bands"]) == pytest.approx(1)
    last = found["bands"][-1]
    assert (last["largest"], last["smallest"]) == pytest.approx((values[last["first"]], values[-1]))


def test_nll_of_the_untouched_model(nll: Run, model: ss.LanguageModel, windows: ss.Windows) -> None:
    found = nll()
    agrees(found, ss.evaluate(model, windows, {}))
    assert found["delta_nll"] == 0 and found["filter"] == "none" and found["layer"] is None


@pytest.mark.parametrize(
    ("options", "spec"),
    [
        (["--remove", "dark"], "dark"),
        (["--keep", "1-8,20"], "1-8,20"),
        (["--remove", "random:6"], "random:6"),
    ],
)
def test_nll_with_a_filter(
    nll: Run, model: ss.LanguageModel, windows: ss.Windows, options: list[str], spec: str
) -> None:
    found = nll("--layer", 1, *options, "--seed", 4)
    make = ss.keep if options[0] == "--keep" else ss.remove
    chosen = make(ss.read_spectrum(model, convention="folded").subspace(spec, 4))
    agrees(found, ss.evaluate(model, windows, {ss.Site("exit", 1): chosen}))
    assert found["layer"] == 1 and found["site"] == "exit" and found["delta_nll"] != 0


def test_the_layer_is_the_one_below_the_strongest_sink(
    nll: Run, model: ss.LanguageModel, windows: Any
) -> None:
    mass = ss.evaluate(model, windows, {}).sink_mass
    assert mass is not None
    assert nll("--remove", "dark")["layer"] == (0 if mass[1] > mass[2] else 1)


def test_controls_are_random_subspaces_of_the_same_rank(
    nll: Run, model: ss.LanguageModel, windows: ss.Windows
) -> None:
    found = nll("--layer", 0, "--remove", "19-20", "--controls", 2)
    assert [c["seed"] for c in found["controls"]] == [0, 1]
    for control in found["controls"]:
        effect = ss.evaluate(model, windows, {ss.Site("exit", 0): ss.rnd(32, found["rank"], control["seed"])})
        assert control["delta_nll"] == pytest.approx(effect.delta_nll)
        assert control["sink_mass"] == pytest.approx(effect.sink_mass)


@pytest.mark.parametrize("fill", ["zero", "mean", "swap", "noise"])
def test_every_fill(nll: Run, model: ss.LanguageModel, windows: ss.Windows, fill: str) -> None:
    site = ss.Site("mlp", 1)
    fills = {"zero": ss.Zero(), "swap": ss.Swap(), "noise": ss.Noise(2)}
    chosen = fills.get(fill) or ss.Mean(ss.mean_residual(model, windows, site))
    effect = ss.evaluate(
        model, windows, {site: ss.remove(ss.read_spectrum(model, convention="folded").bands(1, 10), chosen)}
    )
    found = nll("--layer", 1, "--site", "mlp", "--remove", "1-10", "--fill", fill, "--seed", 2)
    agrees(found, effect)
    assert found["fill"] == fill


@pytest.mark.parametrize("tokens", ["all", "first", "all-but-first", "ids:5,13,40"])
def test_every_choice_of_tokens(nll: Run, model: ss.LanguageModel, windows: ss.Windows, tokens: str) -> None:
    choice = [5, 13, 40] if tokens.startswith("ids") else tokens
    dark = ss.remove(ss.read_spectrum(model, convention="folded").dark()).at(choice)
    found = nll("--layer", 0, "--remove", "dark", "--tokens", tokens)
    agrees(found, ss.evaluate(model, windows, {ss.Site("exit", 0): dark}))
    assert found["filtered_tokens"] == tokens


@pytest.mark.parametrize(
    "site",
    ["embedding", "queries", "keys", "values", "head:2", "attention", "mlp-input", "mlp", "exit"],
)
def test_every_site(nll: Run, model: ss.LanguageModel, windows: ss.Windows, site: str) -> None:
    found = nll("--layer", 1, "--site", site, "--remove", "10-20")
    place = ss.Site("head", 1, 2) if site == "head:2" else ss.Site.parse(site, 1)
    agrees(
        found,
        ss.evaluate(
            model, windows, {place: ss.remove(ss.read_spectrum(model, convention="folded").bands(10, 20))}
        ),
    )
    assert found["site"] == site and found["layer"] == place.layer


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collect what the command line warns of."""
    messages: list[str] = []
    monkeypatch.setattr(warnings, "warn", lambda message, *_, **__: messages.append(message))
    return messages


def test_short_windows_have_no_sink_mass(run: Run, checkpoint: Path, text: Path, said: list[str]) -> None:
    found = run("nll", checkpoint, "--text", text, "--length", 30, "--layer", 0, "--remove", "dark")
    assert said == ["no sink mass: a window has under 64 tokens"]
    assert found["sink_mass"] is None and found["baseline_sink_mass"] is None


def test_energy(run: Run, checkpoint: Path, text: Path, model: ss.LanguageModel, windows: ss.Windows) -> None:
    found = run("energy", checkpoint, "--text", text, "--length", 70)
    rows = pd.DataFrame(found["rows"])
    assert {"layer", "position_class", "band", "share"} <= set(rows.columns)
    keys = ["site", "layer", "position_class", "band"]
    expected = (
        ss.energy(model, windows, ss.read_spectrum(model, convention="folded"))
        .groupby(keys)[["share", "norm"]]
        .mean()
    )
    assert len(rows) == len(expected) == 4 * 2 * 20
    found_rows = rows.set_index(keys)[["share", "norm"]].loc[expected.index]
    assert np.allclose(found_rows, expected)


def test_text_from_standard_input(
    run: Run, checkpoint: Path, texts: list[str], nll: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("###".join(texts)))
    found = run("nll", checkpoint, "--text", "-", "--separator", "###", "--length", 70)
    assert found == nll()


def test_bytes_on_standard_input_that_are_no_text(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"w5 zw\xf6lf w6")))
    done = tiny_models.run(capsys, "nll", checkpoint, "--text", "-")
    assert (done.status, done.out) == (2, "") and done.err.count("\n") == 1
    assert "standard input is not UTF-8 text" in done.err and "'ö' in cp1252" in done.err


@pytest.mark.usefixtures("said")
def test_a_text_itself(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("w5 w6")
    itself = run("nll", checkpoint, "--text", "text:w5 w6")
    assert itself["data_hash"] == run("nll", checkpoint, "--text", tmp_path / "text.txt")["data_hash"]


def test_tables_for_people(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    options = ["--text", str(text), "--length", "70"]
    filtered = ["--layer", "1", "--remove", "dark", "--controls", "2"]
    for command, words in (
        (["info"], "family llama context 128"),
        (["spectrum"], "band directions largest 20"),
        (["nll", *options, *filtered], "delta_nll remove dark controls that reach of 2"),
        (["energy", *options], "bos other embedding dark"),
    ):
        main([command[0], str(checkpoint), *command[1:]])
        out = capsys.readouterr().out
        assert all(word in out for word in words.split()), out


@pytest.mark.parametrize("command", ["", "info", "spectrum", "nll", "energy", "reproduce", "verify"])
def test_help(capsys: pytest.CaptureFixture[str], command: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*command.split(), "--help"])
    out = capsys.readouterr().out
    assert stopped.value.code == 0
    assert all(word in out for word in (["--json"] if command else ["info", "spectrum", "nll", "reproduce"]))


def test_an_interruption(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ss, "describe", interrupted)
    with pytest.raises(SystemExit) as stopped:
        main(["info"])
    assert stopped.value.code == 130 and capsys.readouterr().err == "spectral-sinks: interrupted\n"


def test_reproduce_one_experiment(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = run("reproduce", "--only", "spectrum", "--out", out)
    assert found["out"] == str(out)
    assert {row["experiment"] for row in found["rows"]} == {"spectrum"}
    first = found["rows"][0]
    values = torch.linalg.svdvals(ss.load().unembedding_weight.detach().double())
    assert first["quantity"].startswith("W_U: largest / smallest")
    assert math.isclose(first["value"], float(values[0] / values[-1]), rel_tol=1e-6)
    names = {path.name for path in out.iterdir()}
    assert {"spectrum_values.csv", "spectrum_alignment.csv", "spectrum.png", "manifest.json"} <= names
    assert not any(name.endswith(".part") for name in names)
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["experiments"] == ["spectrum"]
    assert manifest["unembedding_hash"] == ss.read_spectrum().fingerprint[:16]
    assert len(pd.read_csv(out / "spectrum_alignment.csv")) == 20


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert tiny_models.run(capsys, "--version") == (0, f"spectral-sinks {ss.__version__}\n", "")


def test_as_a_program(tmp_path: Path) -> None:
    """One JSON object on standard output whatever libraries print; a bad folder is one line and status 2.

    The caches of libraries cannot be written: nothing but a warning of ours may come of it.
    """
    (tmp_path / "file").write_text("")
    unwritable = str(tmp_path / "file" / "cache")
    environment = os.environ | {"HF_HOME": unwritable, "SPECTRAL_SINKS_CACHE": unwritable}

    def program(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "spectral_sinks.cli", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    done = program("nll", "--documents", 2, "--layer", 0, "--remove", "random:3", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["rank"] == 3, done.stderr
    said = ("spectral-sinks: warning: ", "spectral-sinks: nll has run for ")
    assert all(line.startswith(said) for line in done.stderr.splitlines())
    failed = program("nll", tmp_path)
    assert failed.returncode == 2 and failed.stdout == ""
    assert failed.stderr.startswith("spectral-sinks: error: ") and failed.stderr.count("\n") == 1


def test_one_document_is_resampled_by_window(
    checkpoint: Path, tmp_path: Path, run: Run, said: list[str]
) -> None:
    text = tmp_path / "one.txt"
    text.write_text(" ".join(f"w{3 + i % 90}" for i in range(400)))
    one = run("nll", checkpoint, "--text", text, "--layer", 0, "--remove", "dark")
    assert len(said) == 1 and "intervals are over its windows" in said[0]
    assert one["documents"] == 1
    assert one["interval_over"] == "windows"
    low, high = one["delta_nll_interval"]
    assert low <= one["delta_nll"] <= high
    text.write_text("\n\n".join(" ".join(f"w{3 + (i * j) % 90}" for i in range(200)) for j in (1, 7, 11)))
    found = run("nll", checkpoint, "--text", text, "--separator", r"\n\n")
    assert found["documents"] == 3
    assert found["interval_over"] == "documents"


def test_one_window_has_no_interval(checkpoint: Path, tmp_path: Path, run: Run, said: list[str]) -> None:
    text = tmp_path / "short.txt"
    text.write_text("w5 w6 w7 w8")
    found = run("nll", checkpoint, "--text", text, "--layer", 0, "--remove", "dark")
    assert found["delta_nll_interval"] == [None, None]
    assert said[0] == "one window has no interval: give a longer text"


def test_options_of_a_filter_need_one(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for option in (("--layer", 0), ("--controls", 2), ("--fill", "swap"), ("--tokens", "first")):
        done = tiny_models.run(capsys, "nll", checkpoint, *option)
        assert done.status == 2 and "give --keep or --remove" in done.err


def test_nll_of_a_sample_says_so(run: Run, checkpoint: Path, text: Path) -> None:
    options = ["--text", text, "--length", 70, "--layer", 0, "--remove", "dark"]
    exact = run("nll", checkpoint, *options)
    found = run("nll", checkpoint, *options, "--predict", 8)
    assert found["predict"] == 8 and "predict" not in exact
    for name in ("nll", "baseline_nll", "delta_nll", "kl"):
        low, high = found[f"{name}_sampling_interval"]
        assert low < found[name] < high and f"{name}_sampling_interval" not in exact
    other = run("nll", checkpoint, *options, "--predict", 8, "--seed", 1)
    assert other["nll"] != found["nll"]


def test_screened_controls_are_marked(
    run: Run, checkpoint: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["nll", checkpoint, "--text", text, "--length", 70, "--layer", 0, "--remove", "dark"]
    options += ["--controls", 3]
    exact = run(*options)
    found = run(*options, "--screen", 8)
    assert found["delta_nll"] == exact["delta_nll"] and "predict" not in found
    assert all(control["exact"] for control in exact["controls"])
    for control, expected in zip(found["controls"], exact["controls"], strict=True):
        assert not control["exact"] or control["delta_nll"] == expected["delta_nll"]
    shown = tiny_models.run(capsys, *options, "--screen", 8).out
    marks = sum(not control["exact"] for control in found["controls"])
    assert shown.count("~") == marks + (marks > 0)
    assert "controls measured on all tokens" in shown
    refused = (("--screen", 8), ("--screen", 8, "--controls", 2, "--predict", 8))
    for given, reason in zip(refused, ("give --controls 20 as well", "--predict or --screen"), strict=True):
        done = tiny_models.run(capsys, *options[:-2], *given)
        assert done.status == 2 and reason in done.err


def test_the_documented_keys_of_json(run: Run, checkpoint: Path, text: Path, tmp_path: Path) -> None:
    documented = tiny_models.documented_keys()
    del documented["vision"]  # in test_vision.py
    options, rule = ["--text", text, "--length", 70], tmp_path / "rule"
    run("sinks", checkpoint, "--text", text, "--epsilon", 0.05, "--draws", 0, "--export", rule)
    more = {
        "nll": [*options, "--layer", 0, "--remove", "dark", "--controls", 1],
        "energy": options,
        "sinks": ["--text", text, "--epsilon", 0.05, "--draws", 2],
        "circuits": options,
        "quantise": ["--text", text, "--rule", rule, "--by", "place", "--draws", 1, "--bits", 4],
        "kv-cache": ["--text", text, "--size", 20, "--length", 60, "--caches", "none"],
        "report": [*options, "--draws", 2, "--out", tmp_path / "report.html"],
        "explore": ["--text", text, "--out", tmp_path / "explore.html"],
    }
    assert {"info", "spectrum", *more} == set(documented)
    for command, keys in documented.items():
        found = run(command, checkpoint, *more.get(command, []))
        assert tiny_models.keys_of(keys) <= set(found), command
        for inner in re.findall(r"`(\w+)` \([^()]*: ([^()]*)\)|`(rows)` \(([^()]*)\)", keys):
            name, columns = [part for part in inner if part]
            assert found[name], f"{command} has {name}"
            assert set(re.findall(r"`(\w+)`", columns)) <= set(found[name][0]), (command, name)
