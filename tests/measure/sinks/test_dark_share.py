"""A sink that is dark under one convention and not under another: both shares, and the sentences."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text
from support import tiny_models
from support.planted_sinks import BANDS, D, sinking

import spectral_sinks as ss
from spectral_sinks.spectra.conventions import disagreement

CASES = {(1, 1e-3): "folded", (10, 1e-3): "folded", (20, 1e3): "raw"}
"""The convention under which the planted sink is dark, by its band under raw and the gain of its channel."""


@pytest.fixture(scope="module", params=CASES, ids=str)
def planted(request: pytest.FixtureRequest) -> Any:
    """A model, its texts, its spectra (raw and folded), and the convention under which its sink is dark."""
    model, raw, windows = sinking(*request.param)
    return model, windows, [raw, folded(model)], CASES[request.param]


def folded(model: ss.LanguageModel) -> ss.Spectrum:
    return ss.read_spectrum(model, convention="folded", bands=BANDS)


def bases(model: ss.LanguageModel) -> dict[str, np.ndarray]:
    """The dark tail under each convention, `[d, r]`, from the SVD of numpy in float64."""
    weight = model.module.lm_head.weight.detach().double().numpy()
    gain = model.module.model.norm.weight.detach().double().numpy()
    rank = D // BANDS
    return {
        name: np.linalg.svd(matrix)[2][-rank:].T
        for name, matrix in {"raw": weight, "folded": weight * gain}.items()
    }


def entering(model: ss.LanguageModel, windows: ss.Windows, layer: int) -> np.ndarray:
    """The residual `[windows, tokens, d]` that a layer reads, in float64."""
    seen: list[torch.Tensor] = []
    module = model.module.model.layers[layer]
    handle = module.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        model.module(torch.stack(windows.rows), use_cache=False)
    handle.remove()
    return seen[0].double().numpy()


def share(x: np.ndarray, basis: np.ndarray) -> np.ndarray:
    return np.square(x @ basis).sum(-1) / np.square(x).sum(-1)


def passes(model: ss.LanguageModel, measure: Callable[[], object]) -> int:
    """Return the number of windows that enter the first layer."""
    count: list[int] = []
    layer = model.module.model.layers[0]
    handle = layer.register_forward_pre_hook(lambda _, given: count.append(len(given[0])))
    measure()
    handle.remove()
    return sum(count)


def test_both_shares_of_a_sink_against_float64(planted: Any) -> None:
    model, windows, spectra, dark = planted
    (sink,) = ss.find_sinks(model, windows, spectra, draws=4).sinks
    x = entering(model, windows, sink.layer)
    drawn = [ss.random_subspace(D, D // BANDS, seed).orthonormal().numpy() for seed in range(4)]
    random = [share(x[:, 0], basis).mean() for basis in drawn]
    assert list(sink.conventions) == ["raw", "folded"]
    for name, basis in bases(model).items():
        found = sink.conventions[name]
        assert found.share.value == pytest.approx(share(x[:, 0], basis).mean(), abs=1e-5)
        assert found.others.value == pytest.approx(share(x[:, 1:], basis).mean(), abs=1e-5)
        assert (found.share.least, found.share.most) == pytest.approx((min(random), max(random)), abs=1e-5)
        assert (found.dark, found.share.value > 0.9) == (name == dark, name == dark)
    assert (sink.convention, sink.dark) == ("raw", dark == "raw")
    assert sink.dark_share == sink.conventions["raw"].share
    assert sink.other_dark_share == sink.conventions["raw"].others


def test_the_first_spectrum_decides_and_the_others_change_no_number(planted: Any) -> None:
    model, windows, spectra, dark = planted
    raw, other = spectra
    both, alone = (ss.find_sinks(model, windows, given, draws=3) for given in (spectra, raw))
    (row,), (single,) = (found.summary().to_dict("records") for found in (both, alone))
    assert {name: row[name] for name in single} == single, "the old columns"
    assert {*row} - {*single} == {
        *(f"dark_share_folded{end}" for end in ("", "_low", "_high", "_least", "_most")),
        *(f"other_dark_share_folded{end}" for end in ("", "_low", "_high")),
        "dark_folded",
    }
    assert (row["convention"], row["dark"], row["dark_folded"]) == ("raw", dark == "raw", dark == "folded")
    turned = ss.find_sinks(model, windows, [other, raw], draws=3)
    assert turned.conventions == ("folded", "raw") and turned.convention == "folded"
    (swapped,) = turned.summary().to_dict("records")
    assert (swapped["dark"], swapped["dark_raw"]) == (row["dark_folded"], row["dark"])
    assert (swapped["dark_share"], swapped["dark_share_raw"]) == (row["dark_share_folded"], row["dark_share"])
    record = json.loads(json.dumps(both.record()))
    assert (record["convention"], record["conventions"]) == ("raw", ["raw", "folded"])
    (sink,) = record["sinks"]
    assert sink["dark_share_folded"] == row["dark_share_folded"] and sink["dark_folded"] == row["dark_folded"]
    assert sink["random_dark_share_folded"] == [row["dark_share_folded_least"], row["dark_share_folded_most"]]
    assert sink["other_dark_share_folded_interval"] == [
        row["other_dark_share_folded_low"],
        row["other_dark_share_folded_high"],
    ]


def test_where_conventions_disagree(planted: Any) -> None:
    model, windows, spectra, dark = planted
    (sink,) = ss.find_sinks(model, windows, spectra, draws=3).sinks
    other = {"raw": "folded", "folded": "raw"}[dark]
    assert sink.disagreement == f"dark under {dark}; not dark under {other}"
    for spectrum in spectra:
        (alone,) = ss.find_sinks(model, windows, spectrum, draws=3).sinks
        assert alone.disagreement == "", "one convention has nothing to disagree with"
    unsure = ss.stats.Estimate(0.9, float("nan"), float("nan"))
    shares = sink.conventions | {other: replace(sink.conventions[other], share=unsure)}
    assert replace(sink, conventions=shares).disagreement == "", "without an interval nothing is said"


def test_the_words_of_a_disagreement() -> None:
    assert disagreement({"raw": "dark", "folded": "dark"}) == disagreement({}) == ""
    three = {"raw": "not dark", "folded": "dark", "centred": "dark"}
    assert disagreement(three) == "dark under folded and centred; not dark under raw"


def test_a_second_convention_takes_no_further_pass() -> None:
    model, raw, windows = sinking(1, 1e-3)
    both = [raw, folded(model)]
    counts = [
        passes(model, lambda given=given: ss.find_sinks(model, windows, given, draws=2))
        for given in (raw, both)
    ]
    assert counts[0] == counts[1]


def test_without_a_sink_the_columns_are_there() -> None:
    model, raw, windows = sinking(1, 1e-3)
    for layer in model.module.model.layers:
        layer.self_attn.q_proj.bias.data.zero_()
    table = ss.find_sinks(model, windows, [raw, folded(model)], draws=2).summary()
    assert table.empty and {"dark_share", "dark", "dark_share_folded", "dark_folded"} <= set(table)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (lambda raw, other: [], "no spectrum is given"),
        (lambda raw, other: [raw, raw], "conventions raw, raw: give each convention once"),
        (
            lambda raw, other: [raw, replace(other, matrix="embedding")],
            "spectra of unembedding and embedding",
        ),
        (lambda raw, other: [raw, other.with_bands(8)], "spectra of 20 and 8 bands"),
        (lambda raw, other: [raw, narrow()], "width 8 for LlamaForCausalLM of width 40"),
    ],
)
def test_spectra_that_do_not_belong_together(changed: Any, message: str) -> None:
    model, raw, windows = sinking(1, 1e-3)
    given = changed(raw, folded(model))
    with pytest.raises(ss.InputError, match=message):
        ss.find_sinks(model, windows, given, draws=2)


def narrow() -> ss.Spectrum:
    return ss.Spectrum(
        torch.eye(8, dtype=torch.float64), torch.arange(8.0, 0, -1), convention="folded", count=4
    )


def test_one_spectrum_or_those_of_both_conventions_are_read() -> None:
    model = sinking(1, 1e-3)[0]
    for convention, expected in (
        (None, ["folded", "raw"]),
        ("raw", ["raw", "folded"]),
        ("folded", ["folded", "raw"]),
        ("centred", ["centred", "raw", "folded"]),
    ):
        found = ss.read_spectra(model, convention=convention, bands=BANDS)
        assert [each.convention for each in found] == expected
        for each in found:
            alone = ss.read_spectrum(model, convention=each.convention, bands=BANDS)
            assert each.fingerprint == alone.fingerprint and torch.equal(each.vectors, alone.vectors)


def test_a_convention_that_cannot_be_read_is_named_and_left_out() -> None:
    model, raw, _ = sinking(1, 1e-3)
    model.module.model.norm.forward = lambda x: x.sin()
    with pytest.warns(ss.SpectralWarning, match="under convention 'folded': LlamaRMSNorm is"):
        found = ss.read_spectra(model, convention="raw", bands=BANDS)
    assert [each.fingerprint for each in found] == [raw.fingerprint]
    with pytest.warns(
        ss.SpectralWarning, match="'raw', since 'folded' cannot be read: LlamaRMSNorm is"
    ) as said:
        found = ss.read_spectra(model, bands=BANDS)
    assert len(said) == 1
    assert [each.fingerprint for each in found] == [raw.fingerprint]
    with pytest.raises(ss.InputError, match="not understood as a norm"):
        ss.read_spectra(model, convention="folded", bands=BANDS)


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collect what is written in a figure."""
    texts: list[str] = []
    save = Figure.savefig

    def collect(figure: Figure, *given: Any, **options: Any) -> None:
        texts.extend(text.get_text() for text in figure.findobj(Text))
        save(figure, *given, **options)

    monkeypatch.setattr(Figure, "savefig", collect)
    return texts


def naming(texts: list[str]) -> set[str]:
    """The texts that name a convention."""
    return {text for text in texts if re.search(r"\b(raw|folded)\b", text)}


def test_figures_name_the_conventions(planted: Any, written: list[str], tmp_path: Path) -> None:
    model, windows, spectra, dark = planted
    word = "dark" if dark == "raw" else "not dark"
    for given, sinks, verdicts in (
        (spectra, {"raw (decides)", "folded"}, {f"{word} (raw)", "folded"}),
        (spectra[0], {"raw"}, {f"{word} (raw)"}),
    ):
        written.clear()
        found = ss.find_sinks(model, windows, given, draws=2)
        tables = (found.by_head(), found.rates(), found.norms())
        ss.figures.sinks(*tables, tmp_path / "sinks.png", epsilon=0.3, found=found.summary())
        assert naming(written) == sinks and "0 '0'" in written
        written.clear()
        verdict = ss.sink_verdict(model, windows, given, draws=2)
        ss.figures.across(verdict.summary(), tmp_path / "across.png")
        assert naming(written) == verdicts


def test_a_figure_has_the_rows_that_one_convention_decides(tmp_path: Path) -> None:
    model, raw, windows = sinking(1, 1e-3)
    rows = [ss.sink_verdict(model, windows, each, draws=2).summary() for each in (raw, folded(model))]
    with pytest.raises(ss.InputError, match="rows decided by raw and folded: give"):
        ss.figures.across(pd.concat(rows), tmp_path / "across.png")


def in_two_passes(model: Any, windows: ss.Windows, sink: Any, member: Any, dark: Any, draws: int) -> Any:
    """Return the dark shares of a sink from a pass over whole windows that ends with the model."""
    site = ss.Site("exit", sink.layer - 1) if sink.layer else ss.Site("embedding")
    spaces = [dark, *(ss.random_subspace(model.d, dark.rank, seed) for seed in range(draws))]
    ids = torch.stack(windows.rows)
    shares = ss.trace(
        model, ids, {}, [site], readout=lambda _, read, __: torch.stack([s.share(read[site]) for s in spaces])
    ).double()
    of_sink = (shares * member).sum(-1) / member.sum(-1)
    others = (shares[0] * ~member).sum(-1) / (~member).sum(-1)
    return of_sink[:, member.any(1)].mean(1), others.mean()


@pytest.mark.parametrize("places", ["first", "a token"])
def test_one_pass_finds_what_two_do(places: str) -> None:
    """Random shares of a token come from the main pass, of a position from windows that end there."""
    model, spectrum, windows = sinking(20)
    if places != "first":
        ids = torch.randint(1, 90, (6, 64), generator=torch.Generator().manual_seed(0))
        for row, place in {0: 5, 1: 12, 3: 20, 4: 9}.items():
            ids[row, place] = 0
        windows = ss.Windows.of_ids(ids, model)
    heights: list[tuple[int, ...]] = []
    handle = model.module.model.layers[0].register_forward_pre_hook(
        lambda _, given: heights.append(tuple(given[0].shape[:2]))
    )
    found = ss.find_sinks(model, windows, spectrum, draws=3)
    handle.remove()
    (sink,) = found.sinks
    member = torch.from_numpy(found.members)
    expected, others = in_two_passes(model, windows, sink, member, spectrum.dark(), 3)
    assert sink.dark_share.value == pytest.approx(float(expected[0]), abs=1e-6)
    random = expected[1:].tolist()
    assert (sink.dark_share.least, sink.dark_share.most) == pytest.approx(
        (min(random), max(random)), abs=1e-6
    )
    assert sink.other_dark_share.value == pytest.approx(float(others), abs=1e-6)
    rows = len(windows)
    assert heights == ([(rows, 64), (rows, 2)] if places == "first" else [(rows, 64)])


def test_positions_that_depend_on_the_length_of_a_text() -> None:
    plain = tiny_models.plain()
    assert not ss.load(plain).positions_by_length
    dynamic = tiny_models.build(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    assert ss.load(dynamic).positions_by_length
