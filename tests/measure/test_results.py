"""Every result has `table`, `summary()` and `record()`, and they say the same."""

import json
from collections.abc import Iterator
from functools import cache
from typing import Any

import pandas as pd
import pytest
import torch
from support import tiny_encoders, tiny_models
from support.planted_sinks import sinking

import spectral_sinks as ss
from spectral_sinks.measure.results import ROWS, Result

KINDS = (
    *("effect", "sinks", "verdict", "comparison", "designation", "circuits", "detectors"),
    *("image effect", "outliers", "image sinks", "image circuits", "circuits of positions"),
    *("sink rule", "mask agreement", "clean direction", "spike writers", "head removal", "quantisation"),
)


@cache
def results() -> dict[str, Any]:
    model = tiny_models.model()
    windows = ss.Windows.of_ids(tiny_models.ids(4, 64), model)
    spectrum = ss.read_spectrum(model, bands=4)
    circuits = ss.no_op_circuits(model, windows, spectrum)
    encoder = tiny_encoders.model("dinov2 classifier")
    pixels = ss.pixels(tiny_encoders.images(3), encoder)
    matrix = torch.randn(60, encoder.d, generator=torch.Generator().manual_seed(0))
    head = ss.Spectrum.from_matrix(matrix, bands=4)
    planted, dark, texts = sinking(20)
    sinks = ss.find_sinks(planted, texts, dark, draws=0)
    rule = ss.SinkRule.learn(planted, sinks, dark)
    cut = {ss.Site("exit", 1): ss.remove(spectrum.dark())}
    return {
        "effect": ss.evaluate(model, windows, cut),
        "sinks": ss.find_sinks(model, windows, spectrum, epsilon=0.01, draws=2),
        "verdict": ss.sink_verdict(model, windows, spectrum, draws=2),
        "comparison": ss.compare(model, windows, {"mask": ss.attention.MaskKey(0)}),
        "designation": ss.designate(model, windows, 3, controls=1, draws=2),
        "circuits": circuits,
        "detectors": circuits.detectors,
        "image effect": ss.evaluate_images(encoder, pixels, {"cut": cut})["cut"],
        "outliers": ss.outliers(encoder, pixels, rule=1.0),
        "image sinks": ss.vision_sinks(encoder, pixels, epsilon=0.01),
        "image circuits": ss.no_op_circuits(encoder, pixels, head, "cls"),
        "sink rule": rule,
        "mask agreement": ss.sinks.mask_agreement(planted, sinks, rule),
        "clean direction": ss.clean(torch.ones(planted.d), rule),
        "spike writers": ss.spike_writers(planted, texts, layer=0, counts=(1,), draws=2),
        "head removal": ss.sinks.head_removal(planted, texts, counts=(1, 2), draws=2),
        "quantisation": ss.sinks.quantisation_report(planted, texts, rule, dark, bits=(4,), draws=2),
        "circuits of positions": ss.no_op_circuits(model, windows, spectrum, [0, 1, 0, 2]),
    }


class Hostile(Result):
    """A result of texts that a terminal or a notebook would obey."""

    headline = "of <b>\x1b[31mnobody</b>"

    def summary(self) -> pd.DataFrame:
        rows = [
            {"token": "<script>\x1b[2J", "mass": 0.123456, "mass_low": 0.1, "mass_high": 0.2, "dark": True}
        ]
        return pd.DataFrame(rows + [{"token": None, "mass": float("nan"), "dark": False}] * 20)


def test_a_result_shows_texts_as_data_and_few_rows() -> None:
    text, html = repr(Hostile()), Hostile()._repr_html_()
    assert "\x1b" not in text + html and "\\x1b[2J" in text
    assert "<script>" not in html and "&lt;script&gt;" in html and "<b>" not in html
    assert "0.1235 [0.1, 0.2]" in text and "13 more rows in summary()" in text and "13 more rows" in html
    assert len(text.splitlines()) == 11
    assert "yes" in text and "nan" not in text.lower() and "None" not in text


@pytest.mark.parametrize("kind", KINDS)
def test_a_result_shows_itself_by_a_line_and_a_table(kind: str) -> None:
    found = results()[kind]
    text, html = repr(found), found._repr_html_()
    lines = text.splitlines()
    assert 2 <= len(lines) <= 25 and max(map(len, lines)) < 250, text
    assert all(word not in text for word in ("array(", "tensor(", "DataFrame", "Estimate(")), text
    assert html.startswith("<p><strong>") and html.count("<table") == 1
    assert html.count("<tr") <= max(ROWS + 1, len(found.listed) + 1, 40)


def test_what_a_result_shows_is_its_summary() -> None:
    verdict, sinks = results()["verdict"], results()["sinks"]
    assert verdict.verdict in repr(verdict).splitlines()[0]
    mass = verdict.summary().iloc[0]
    assert f"{mass['mass']:.4g} [{mass['mass_low']:.4g}, {mass['mass_high']:.4g}]" in repr(verdict)
    first = sinks.summary().iloc[0]
    assert f"{len(sinks.sinks)} sink" in repr(sinks).splitlines()[0]
    assert f"{first['attention_mass']:.4g} [{first['attention_mass_low']:.4g}" in repr(sinks)
    assert f"{first['attention_mass']:.4g} [" in sinks._repr_html_()


def keys(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield str(key)
            yield from keys(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from keys(inner)


@pytest.mark.parametrize("kind", KINDS)
def test_a_result_speaks_the_dialect(kind: str) -> None:
    found = results()[kind]
    summary = found.summary()
    assert isinstance(found.table, pd.DataFrame) and len(found.table)
    assert isinstance(summary, pd.DataFrame) and len(summary)
    assert summary.columns.is_unique and found.table.columns.is_unique
    for name in summary.columns[summary.columns.str.endswith("_low")]:
        middle = summary[name.removesuffix("_low")]
        inside = (summary[name] <= middle + 1e-9) & (middle <= summary[name.replace("_low", "_high")] + 1e-9)
        assert (inside | summary[name].isna()).all(), name
    assert set(keys(json.loads(json.dumps(found.record()))))


def test_the_summary_of_sinks_has_the_numbers_of_their_records() -> None:
    found = results()["sinks"]
    rows = found.summary()
    assert len(rows) == len(found.sinks)
    for row, sink in zip(rows.to_dict("records"), found.record()["sinks"], strict=True):
        assert row["attention_mass"] == sink["attention_mass"] and row["dark"] == sink["dark"]
        assert [row["attention_mass_low"], row["attention_mass_high"]] == sink["attention_mass_interval"]
    assert "dark_share" not in results()["image sinks"].summary(), "no spectrum was given"


def test_the_table_of_circuits_has_the_means_of_their_heads() -> None:
    found = results()["circuits"]
    means = found.table.groupby(["layer", "head"])[["attention", "top_two"]].mean().reset_index()
    expected = found.heads[["layer", "head", "attention", "top_two"]]
    pd.testing.assert_frame_equal(means, expected.reset_index(drop=True), check_dtype=False, rtol=1e-6)
