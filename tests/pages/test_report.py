"""The report of a model: its tables are the measurements, and what is lacking is named with a reason."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import page_models, tiny_models

import spectral_sinks as ss
from spectral_sinks.pages.model_report import ModelReport, report, sentence
from spectral_sinks.pages.report_charts import BLUES, charts_of


def windows_of(model: ss.LanguageModel, documents: int = 3) -> ss.Windows:
    return ss.cut([page_models.hostile_text(seed=seed) for seed in range(documents)], model, length=70)


@pytest.fixture(scope="module")
def made() -> ModelReport:
    model = page_models.model()
    return report(model, windows_of(model), ss.read_spectra(model, bands=5), draws=3, command="a command")


def data_of(html: str) -> Any:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def test_the_tables_are_the_measurements(made: ModelReport) -> None:
    model = page_models.model()
    windows, spectra = windows_of(model), ss.read_spectra(model, bands=5)
    assert made.absent == {}
    found = ss.find_sinks(model, windows, spectra, draws=3)
    assert made.tables["sinks"].equals(found.summary())
    verdict = ss.sink_verdict(model, windows, spectra, draws=3)
    assert made.record["verdict"]["sentence"] == sentence(verdict)
    assert made.record["verdict"]["convention"] == "folded" and len(made.record["verdict"]["others"]) == 1
    heads = made.tables["heads"].set_index(["layer", "head"])
    attention = ss.attention_by_head(model, windows).groupby(["layer", "head"])["attention"].mean()
    assert heads["received"].to_numpy() == pytest.approx(attention.to_numpy(), abs=1e-6)
    effect = ss.evaluate(model, windows, {verdict.site: ss.remove(spectra[0].band(2))})
    row = made.tables["bands"].set_index("band").loc[2]
    assert row["delta_nll"] == pytest.approx(effect.delta_nll)
    assert (row["random_least"], row["random_most"]) == pytest.approx(
        (verdict.delta.least, verdict.delta.most)
    )
    circuits = ss.no_op_circuits(model, windows, spectra[0])
    profiles = made.tables["profiles"].set_index(["layer", "head", "what", "band"])["share"]
    for _, expected in circuits.profile(1, 2).iterrows():
        assert profiles[1, 2, expected["what"], expected["band"]] == pytest.approx(expected["share"])
    energy = ss.energy(model, windows, spectra)
    chosen = energy.query("layer == 1 and band == 5 and position_class == 'bos' and convention == 'raw'")
    shown = made.tables["energy"].query(
        "layer == 1 and band == 5 and position_class == 'bos' and convention == 'raw'"
    )
    assert float(shown["share"].iloc[0]) == pytest.approx(chosen["share"].mean())
    spectrum = made.tables["spectrum"].query("convention == 'folded'")
    assert spectrum["singular_value"].to_numpy() == pytest.approx(spectra[0].values.numpy())
    assert spectrum["band"].value_counts().to_dict() == {
        band: spectra[0].band(band).rank for band in range(1, 6)
    }


def test_the_page_holds_the_tables_the_verdict_and_how_to_repeat_it(made: ModelReport) -> None:
    page = made.page.html
    data = data_of(page)
    names = {"spectrum", "energy", "norms", "heads", "bands"}
    assert names <= set(data["figures"]) <= names | {"dark-share"}
    for name in ("bands", "heads"):
        shown = data["figures"][name]["table"]
        assert shown["columns"] == list(made.tables[name].columns)
        assert len(shown["rows"]) == len(made.tables[name])
    assert "a command" in page and made.record["provenance"][3][1] in page
    assert str(made.record["verdict"]["sentence"])[:30] in page
    assert len(page) < 15_000_000


def test_no_token_becomes_markup(made: ModelReport) -> None:
    page = made.page.html
    scripts = page.count("</script>")
    assert "onerror=document" not in page.replace("\\u003cimg src=x onerror=document", "")
    assert scripts == page.count("<script") == 4, "the data, Plotly, and two files"


def test_plotly_knows_every_figure(made: ModelReport) -> None:
    graph_objects = pytest.importorskip("plotly.graph_objects")
    for chart in charts_of(made.record, made.tables):
        for variant in chart.variants.values():
            graph_objects.Figure(variant)  # raises for what Plotly does not know


def test_colours_grow_darker_so_that_they_read_in_greyscale() -> None:
    def grey(color: str) -> float:
        return sum(
            weight * int(color[at : at + 2], 16)
            for weight, at in zip((0.30, 0.59, 0.11), (1, 3, 5), strict=True)
        )

    greys = [grey(str(color)) for _, color in BLUES]
    assert greys == sorted(greys, reverse=True) and min(-np.diff(greys)) > 25


def test_a_part_that_cannot_be_measured_is_named_with_its_reason() -> None:
    model = page_models.model()
    windows = ss.cut([page_models.hostile_text()], model, length=70)
    made = report(model, windows, ss.read_spectra(model, bands=5), draws=2)
    assert made.absent == {
        "the verdict on the sink": "a verdict needs intervals: give at least two documents"
    }
    assert "verdict" not in made.tables and "bands" in made.tables
    assert "It is not known whether this model has a dark sink" in made.page.html
    assert "give at least two documents" in made.page.html


def test_an_encoder_has_a_report() -> None:
    model = tiny_models.model("bert")
    windows = ss.cut([tiny_models.text(60, seed) for seed in range(2)], model, length=64)
    made = report(model, windows, ss.read_spectrum(model, bands=4), draws=2)
    assert "spectrum" in made.tables and "both directions" in made.page.html
    assert made.absent["the verdict on the sink"].startswith("a verdict needs windows of 64 tokens")


def test_what_is_wrong_is_said_in_one_sentence(
    made: ModelReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ss.InputError, match=r"report\.pdf is not a name for a page: let it end in \.html"):
        made.save(tmp_path / "report.pdf")
    with pytest.raises(ss.InputError, match="is not a folder"):
        made.save(tmp_path / "nowhere" / "report.html")
    assert made.save(tmp_path / "report.html").read_text(encoding="utf-8") == made.page.html
    fresh = ModelReport(made.model, made.record, made.tables, made.maps, made.absent)
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(ss.InputError, match=r"pip install 'spectral-sinks\[pages\]'"):
        fresh.save(tmp_path / "other.html")


def test_a_notebook_shows_the_page_in_a_frame(made: ModelReport) -> None:
    shown = made._repr_html_()
    assert shown.startswith("<iframe") and "allow-same-origin" not in shown
    assert "<script" not in shown, "the page is quoted"
