"""The verdict on planted sinks, its numbers recomputed, and the rule itself."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from support import tiny_models
from support.planted_sinks import sinking

import spectral_sinks as ss
from spectral_sinks.measure.sinks.verdict import judge
from spectral_sinks.stats import Estimate

ROOT = Path(__file__).parents[3]
NAN = float("nan")


@pytest.fixture(scope="module")
def across() -> Any:
    spec = importlib.util.spec_from_file_location("across", ROOT / "experiments" / "across.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("band", "verdict"), [(1, "not dark"), (10, "not dark"), (20, "dark")])
def test_planted_sinks(band: int, verdict: str) -> None:
    model, spectrum, windows = sinking(band)
    found = ss.sink_verdict(model, windows, spectrum, draws=5)
    assert found.verdict == verdict, found.reason
    assert found.head.value > 0.9 and found.rate.value == 1 and found.onset == 0
    assert found.rank == 2 and found.documents == 3
    assert (found.share.value > 0.9) == (found.cut.value > 0.8) == (band == 20)
    assert found.share.most < 0.5 and found.cut.most < 0.5
    if band == 1:
        assert "dark share 0.0" in found.reason and "cut by" in found.reason


@pytest.mark.parametrize(("band", "gain", "dark"), [(1, 1e-3, "folded"), (20, 1e3, "raw")])
def test_planted_sinks_under_two_conventions(band: int, gain: float, dark: str) -> None:
    """Each verdict is that of its spectrum alone, whichever comes first."""
    model, raw, windows = sinking(band, gain)
    spectra = {"raw": raw, "folded": ss.read_spectrum(model, convention="folded", bands=20)}
    other = {"raw": "folded", "folded": "raw"}[dark]
    found = ss.sink_verdict(model, windows, list(spectra.values()), draws=4)
    assert (found.convention, found.verdict) == ("raw", "dark" if dark == "raw" else "not dark")
    assert found.conventions[dark].verdict == "dark" and found.conventions[other].verdict == "not dark"
    assert found.disagreement == f"dark under {dark}; not dark under {other}"
    assert found.conventions[dark].cut.value > 0.8 and found.conventions[other].cut.value < 0.5
    row = found.record()
    for place, (name, spectrum) in enumerate(spectra.items()):
        alone = ss.sink_verdict(model, windows, spectrum, draws=4)
        assert alone.alternatives == () and alone.disagreement == ""
        suffix = f"_{name}" if place else ""
        for column in ("verdict", "reason", "reached"):
            assert row[f"{column}{suffix}"] == getattr(alone, column)
        for column in ("share", "others", "cut", "delta"):
            for end, number in getattr(alone, column).all_columns("").items():
                assert row[f"{column}{suffix}{end}"] == pytest.approx(number, abs=1e-6), (name, column, end)
    assert (row["nll"], row["rate"]) == (found.alternatives[0].nll.value, found.alternatives[0].rate.value)
    turned = ss.sink_verdict(model, windows, list(spectra.values())[::-1], draws=4)
    assert (turned.convention, turned.disagreement) == ("folded", found.disagreement)


def test_a_second_convention_is_one_more_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, windows = sinking(1, 1e-3)
    cells: list[list[str]] = []
    traced: list[int] = []

    def evaluated(*given: Any, **options: Any) -> Any:
        cells.append(list(given[2]))
        return ss.evaluate_all(*given, **options)

    def trace(*given: Any, **options: Any) -> Any:
        traced.append(1)
        return ss.trace(*given, **options)

    monkeypatch.setattr("spectral_sinks.measure.sinks.verdict.evaluate_all", evaluated)
    monkeypatch.setattr("spectral_sinks.measure.sinks.dark_share.trace", trace)
    ss.sink_verdict(model, windows, ss.read_spectra(model, bands=20), draws=2)
    assert cells == [["dark folded", "dark raw", "random 0", "random 1"]] and len(traced) == 1


def test_a_uniform_model_has_no_sink() -> None:
    model, spectrum, windows = sinking(20)
    for layer in model.module.model.layers:
        layer.self_attn.q_proj.bias.data.zero_()
    found = ss.sink_verdict(model, windows, spectrum, draws=2)
    assert found.verdict == "no sink" and found.onset is None and found.rate.value == 0
    assert found.mass.value == pytest.approx(ss.attention.uniform_attention(), abs=1e-4)
    assert found.share.value > 0.9, "a dark first token is no sink"


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "qwen2", "gpt_neox parallel", "gpt_oss"])
def test_its_numbers_recomputed(family: str) -> None:
    model = tiny_models.model(family)
    windows = ss.Windows.of_ids(tiny_models.ids(5, 66), model, [0, 1, 1, 2, 3])
    spectrum = ss.read_spectrum(model, bands=8)
    found = ss.sink_verdict(model, windows, spectrum, draws=3, batch_size=2)
    heads = ss.attention_by_head(model, windows)
    mass = heads.groupby("layer")["attention"].mean()
    assert found.layer == mass.idxmax() and found.mass.value == pytest.approx(mass.max())
    assert found.head.value == pytest.approx(heads.groupby(["layer", "head"])["attention"].mean().max())
    assert found.rate.value == pytest.approx((heads["attention"] > 0.3).mean())
    above = [layer for layer in mass.index if mass[layer] > 2 * ss.attention.uniform_attention()]
    assert found.onset == (above[0] if above else None)
    site = ss.Site("exit", found.layer - 1) if found.layer else ss.Site("embedding")
    assert found.site == site

    x = ss.trace(
        model, torch.stack(windows.rows), {}, [site], readout=lambda final, read, weights: read[site]
    ).double()
    owner = pd.Series(windows.document)

    def mean(values: torch.Tensor) -> float:
        return float(pd.Series(values.numpy()).groupby(owner).mean().mean())

    def share(basis: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return (rows @ basis.double()).square().sum(-1) / rows.square().sum(-1)

    dark = spectrum.vectors[:, -found.rank :]
    assert found.share.value == pytest.approx(mean(share(dark, x[:, 0])), rel=1e-4)
    assert found.others.value == pytest.approx(mean(share(dark, x[:, 1:]).mean(1)), rel=1e-4)
    drawn = [ss.random_subspace(model.d, found.rank, seed) for seed in range(3)]
    random = [mean(share(space.orthonormal(), x[:, 0])) for space in drawn]
    assert (found.share.least, found.share.most) == pytest.approx((min(random), max(random)), rel=1e-4)

    effects = [ss.evaluate(model, windows, {site: ss.remove(space)}) for space in (spectrum.dark(), *drawn)]
    cuts = [
        float(np.mean(1 - e.table[f"sink_mass_{found.layer}"] / e.table[f"baseline_sink_mass_{found.layer}"]))
        for e in effects
    ]
    assert (found.cut.value, found.cut.least, found.cut.most) == pytest.approx(
        (cuts[0], min(cuts[1:]), max(cuts[1:])), abs=1e-5
    )
    deltas = [effect.delta_nll for effect in effects]
    assert (found.delta.value, found.delta.least, found.delta.most) == pytest.approx(
        (deltas[0], min(deltas[1:]), max(deltas[1:])), abs=1e-5
    )
    assert (found.delta.low, found.delta.high) == pytest.approx(effects[0].delta_nll_interval, abs=1e-5)
    assert found.reached == sum(delta >= deltas[0] for delta in deltas[1:])


HEAD, SHARE, OTHERS = (0.5, 0.4, 0.6), (0.5, 0.4, 0.6, 0.0, 0.3), (0.1, 0.1, 0.2)
CUT = (0.7, 0.6, 0.8, 0.0, 0.5)


@pytest.mark.parametrize(
    ("changed", "verdict", "reason"),
    [
        ({}, "dark", "sink cut by 0.700"),
        ({"head": (0.5, 0.3, 0.6)}, "no sink", "strongest head 0.500"),
        ({"head": (0.5, NAN, NAN)}, "no sink", ""),
        ({"share": (0.5, 0.4, 0.6, 0.0, 0.4)}, "not dark", "dark share 0.500, random up to 0.400"),
        ({"others": (0.1, 0.1, 0.4)}, "not dark", "dark share 0.500, others 0.100"),
        ({"cut": (0.7, 0.6, 0.8, 0.0, 0.6)}, "not dark", "sink cut by 0.700, random up to 0.600"),
    ],
)
def test_the_rule(changed: Any, verdict: str, reason: str) -> None:
    given = {"head": HEAD, "share": SHARE, "others": OTHERS, "cut": CUT} | changed
    found = judge(**{name: Estimate(*numbers) for name, numbers in given.items()})
    assert found[0] == verdict and reason in found[1]


def test_what_it_needs() -> None:
    model, spectrum, windows = sinking(20)
    with pytest.raises(ss.InputError, match="two documents"):
        ss.sink_verdict(model, ss.Windows.of_ids(windows.rows[:1], model), spectrum)
    with pytest.raises(ss.InputError, match="over 64"):
        ss.sink_verdict(model, ss.Windows.of_ids([row[:40] for row in windows.rows], model), spectrum)


def test_a_row_of_the_table(across: Any, tmp_path: Path) -> None:
    model, spectrum, windows = sinking(20)
    verdict = ss.sink_verdict(model, windows, spectrum, name="planted", draws=3)
    row = verdict.record()
    assert row["model"] == "planted" and row["site"] == str(verdict.site)
    assert (row["share"], row["share_low"], row["share_most"]) == (
        verdict.share.value,
        verdict.share.low,
        verdict.share.most,
    )
    assert "rate_least" not in row, "no control, no column"
    study = ss.experiments.Study(model, windows, spectrum, spectrum, tmp_path, draws=2)
    finding = across.run(study)
    assert {"across.csv", "across.png"} <= {path.name for path in tmp_path.iterdir()}
    assert len(pd.read_csv(tmp_path / "across.csv")) == 1 and len(finding.answers) == 4


def test_models_and_checkpoints_of_a_training_run(across: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    module = tiny_models.plain("llama")
    module.config.save_pretrained(run / "model")
    tiny_models.tokenizer().save_pretrained(run / "tokenizer")
    torch.save({"model": module.state_dict(), "step": 250}, run / "step-000250.pt")
    folder = tiny_models.save(tmp_path / "saved")
    lines = tmp_path / "lines.jsonl"
    lines.write_text("".join(f'{{"text": "{tiny_models.text(70, seed)}"}}\n' for seed in range(3)))
    out = tmp_path / "out"
    across.main(across.Options((str(folder), str(run / "step-000250.pt")), out, "two", str(lines), draws=2))
    table = pd.read_csv(out / "two.csv")
    assert list(table["model"]) == ["saved", "run, step 250"]
    assert set(table["convention"]) == {"raw"} and table["share_folded"].between(0, 1).all()
    same = table.drop(columns="model").astype(str)
    assert same.iloc[0].equals(same.iloc[1]), "the same weights"
    assert (out / "two.png").stat().st_size > 10_000
