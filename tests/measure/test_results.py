"""Every result has `table`, `summary()` and `record()`, and they say the same."""

import json
from collections.abc import Iterator
from functools import cache
from typing import Any

import pandas as pd
import pytest
import torch
from support import tiny_encoders, tiny_models

import spectral_sinks as ss

KINDS = (
    *("effect", "sinks", "verdict", "comparison", "designation", "circuits", "detectors"),
    *("image effect", "outliers", "image sinks", "image circuits", "circuits of positions"),
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
        "circuits of positions": ss.no_op_circuits(model, windows, spectrum, [0, 1, 0, 2]),
    }


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
