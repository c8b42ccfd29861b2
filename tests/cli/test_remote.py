"""`--remote` on the command line, and what `reproduce` makes of a model elsewhere."""

import json
from pathlib import Path

import pytest
from support import fake_ndif, tiny_models

import spectral_sinks as ss
from spectral_sinks import experiments as study


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "texts.txt"
    path.write_text("|".join(tiny_models.text(70, seed) for seed in range(3)))
    return path


@pytest.mark.parametrize("remote", ["local", "ndif"])
@pytest.mark.parametrize(
    "command",
    [
        ("nll", "--layer", 1, "--remove", "dark", "--controls", 2),
        ("energy",),
        ("sinks", "--epsilon", 0.07, "--draws", 2),
        ("circuits", "--position", 1),
    ],
    ids=lambda c: c[0],
)
def test_a_command_says_the_same_elsewhere(
    command: tuple[object, ...],
    remote: str,
    folder: Path,
    text: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake_ndif.serve(folder, monkeypatch)
    name, *options = command
    options += ["--text", text, "--separator", "|", "--length", 66, "--bands", 4, "--json"]
    here, there = (
        tiny_models.run(capsys, name, folder, *options, *more) for more in ((), ("--remote", remote))
    )
    assert (here.status, there.status) == (0, 0), there.err
    one, other = json.loads(here.out), json.loads(there.out)
    record = other.pop("remote")
    assert record["host"] == (fake_ndif.HOST if remote == "ndif" else "local rehearsal")
    assert len(record["jobs"]) >= 2 and record["server"]["nnsight"] and "remote" not in one
    if name in ("nll", "sinks") and remote == "ndif":  # BOS is compared in this process alone
        assert one.pop("bos_comparison") is not None
        assert other.pop("bos_comparison") is None
    agree(one, other)
    assert fake_ndif.without_key(there.out + there.err)


def agree(one: object, other: object, where: str = "") -> None:
    if isinstance(one, dict) and isinstance(other, dict):
        assert one.keys() == other.keys()
        for key in one:
            agree(one[key], other[key], f"{where} {key}")
    elif isinstance(one, list) and isinstance(other, list):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            agree(*pair, where)
    elif isinstance(one, float):
        # over three documents an interval jumps where resampled means tie but for rounding
        jumps = where.startswith(" sinks") and where.endswith("interval")
        # parts of what a mode reads may cancel in their sum, and the basis has travelled in float32
        rounded = where.endswith("reading_dark")
        assert other == pytest.approx(one, abs=2e-2 if jumps else 1e-4 if rounded else 2e-6), where
    else:
        assert one == other, where


def test_a_failure_is_one_line_and_status_2(
    folder: Path, text: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = fake_ndif.serve(folder, monkeypatch)
    fake.trouble = [(400, f"Invalid API key format: '{fake_ndif.KEY}'.")]
    options = ("--text", text, "--separator", "|", "--length", 66, "--remote", "ndif")
    ran = tiny_models.run(capsys, "nll", folder, *options)
    assert ran.status == 2 and "does not accept the API key" in ran.err.splitlines()[-1]
    assert fake_ndif.without_key(ran.out + ran.err)


def test_reproduce_leaves_out_what_cannot_be_had(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(given: ss.experiments.Study) -> ss.experiments.Finding:
        return ss.experiments.Finding(
            [ss.experiments.answer("nll", given.evaluate({"no-op": {}})["no-op"].nll)]
        )

    def refused(given: ss.experiments.Study) -> ss.experiments.Finding:
        given.model.require_weights("this")
        raise ss.InputError("not to be had")

    monkeypatch.setattr(study, "EXPERIMENTS", ("sink", "weights"))
    monkeypatch.setattr(study, "find_experiment", {"sink": run, "weights": refused}.__getitem__)
    monkeypatch.setattr(
        study, "cut", lambda texts, model, **_: ss.Windows.of_ids(tiny_models.ids(3, 66), model)
    )
    monkeypatch.setattr(study, "read_spectrum", lambda model, which: ss.spectra.random_spectrum(model.d, 4))
    with pytest.warns(ss.SpectralWarning, match="'weights' is left out: not to be had"):
        found = ss.reproduce(ss.load(folder, remote="local"), tmp_path / "out", remote="local")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert [each.name for each in found] == ["sink"] == manifest["experiments"]
    assert manifest["remote"]["host"] == "local rehearsal"
    with pytest.raises(ss.InputError, match="not to be had"):
        ss.reproduce(ss.load(folder), tmp_path / "here")
