"""Pages in a real browser: from a file, without a network; what is shown equals the tables."""

import csv
import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import page_images, page_models
from support.browser import Opened, launched

import spectral_sinks as ss
from spectral_sinks.pages.image_explorer import ImageExplorer
from spectral_sinks.pages.model_report import ModelReport, report
from spectral_sinks.pages.text_explorer import TextExplorer, explore

TEXTS = [page_models.hostile_text(40), page_models.right_to_left_text(20)]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with launched() as found:
        yield found


@pytest.fixture(scope="module")
def reported(browser: Any) -> ModelReport:
    model = page_models.model()
    texts = [page_models.hostile_text(seed=seed) for seed in range(2)]
    return report(model, ss.cut(texts, model, length=70), ss.read_spectra(model, bands=5), draws=2)


@pytest.fixture(scope="module")
def explored(browser: Any) -> TextExplorer:
    model = page_models.model()
    return explore(model, TEXTS, ss.read_spectra(model, bands=4), exits=[0, 1])


@pytest.fixture(scope="module")
def report_page(
    browser: Any, reported: ModelReport, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Opened]:
    with Opened(browser, reported.save(tmp_path_factory.mktemp("report") / "report.html")) as opened:
        yield opened


@pytest.fixture(scope="module")
def explorer_page(
    browser: Any, explored: TextExplorer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Opened]:
    with Opened(browser, explored.save(tmp_path_factory.mktemp("explorer") / "explorer.html")) as opened:
        yield opened


def accessible(opened: Opened) -> None:
    """Check that axe finds no serious violation."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed")
    found = axe.Axe().run(opened.page).response["violations"]
    serious = [
        (each["id"], [node["html"][:120] for node in each["nodes"][:3]])
        for each in found
        if each["impact"] in ("serious", "critical")
    ]
    assert serious == []


def clean(opened: Opened, pictures: int = 0) -> None:
    """Check that the page asked for nothing, complained of nothing, and ran nothing of its tokens."""
    assert opened.complaints == [] and opened.asked == []
    assert opened.page.evaluate("document.body.dataset.hacked") is None
    assert opened.page.locator("main script, main b").count() == 0
    assert opened.page.locator("main img").count() == pictures


def fits(opened: Opened, width: int = 360) -> None:
    """Check that nothing is wider than a narrow screen."""
    page = opened.page
    page.set_viewport_size({"width": width, "height": 800})
    opened.wait_until(f"document.documentElement.scrollWidth <= {width}")
    page.set_viewport_size({"width": 1000, "height": 900})


def test_the_report_opens_without_a_network(report_page: Opened, reported: ModelReport) -> None:
    page = report_page.page
    verdict = reported.record["verdict"]["sentence"]
    assert page.locator("#verdict").inner_text() == " ".join(verdict.split())
    drawn = page.locator("figure .chart .main-svg").count()
    assert drawn >= page.locator("figure").count() >= 5
    fits(report_page)
    accessible(report_page)
    clean(report_page)


def test_the_numbers_of_a_figure_are_the_table(report_page: Opened, reported: ModelReport) -> None:
    page, table = report_page.page, reported.tables["bands"]
    details = page.locator('details[data-numbers="bands"]')
    details.locator("summary").focus()
    page.keyboard.press("Enter")
    rows = details.locator("tbody tr")
    rows.first.wait_for()
    assert rows.count() == len(table)
    column = list(table.columns).index("delta_nll")
    shown = [float(row.locator("td").nth(column).inner_text()) for row in rows.all()]
    assert shown == pytest.approx(table["delta_nll"].tolist(), rel=6e-3, abs=6e-5)
    with page.expect_download() as started:
        details.locator("button").click()
    read = list(csv.DictReader(io.StringIO(Path(started.value.path()).read_text("utf-8-sig"))))
    assert [float(row["delta_nll"]) for row in read] == pytest.approx(table["delta_nll"].tolist())


def test_a_choice_of_convention_draws_the_other_numbers(report_page: Opened, reported: ModelReport) -> None:
    page = report_page.page
    for convention in ("raw", "folded"):
        page.select_option('select[data-variant="energy"]', convention)
        drawn = page.evaluate("document.querySelector('[data-figure=energy] .chart').data[0].customdata")
        table = reported.tables["energy"]
        chosen = table[(table["convention"] == convention) & (table["position_class"] == "bos")]
        grid = chosen.pivot(index="band", columns="layer", values="share").to_numpy()
        assert np.array(drawn) == pytest.approx(100 * grid)


def test_a_click_and_a_list_choose_a_head(report_page: Opened, reported: ModelReport) -> None:
    page = report_page.page
    heads = reported.tables["heads"].set_index(["layer", "head"])

    def check(layer: int, head: int) -> None:
        said = f"Head {head} of layer {layer} gives the first token "
        report_page.wait_until(f"document.querySelector('#head-words').textContent.startsWith('{said}')")
        share = page.locator("#head-words").inner_text().removeprefix(said).split(" %")[0]
        assert float(share) == pytest.approx(100 * heads.loc[(layer, head), "received"], abs=0.051)
        drawn = page.evaluate("document.getElementById('head-map').data[0].z.map((row) => row[0])")
        expected = reported.maps[layer, head][:, 0]
        assert np.array(drawn) == pytest.approx(expected, abs=0.5 / 254 + 1e-6)
        profile = page.evaluate("document.getElementById('head-profile').data[0].y")
        table = reported.tables["profiles"]
        rows = table[(table["layer"] == layer) & (table["head"] == head) & (table["what"] == "key direction")]
        assert profile == pytest.approx(rows.sort_values("band")["share"].tolist(), abs=1e-4)

    page.select_option("#head-layer", "2")
    page.select_option("#head-head", "1")
    check(2, 1)
    chart = page.locator('[data-figure="heads"] .chart')
    chart.scroll_into_view_if_needed()
    spot = page.evaluate("""() => {
      const chart = document.querySelector('[data-figure=heads] .chart'), box = chart.getBoundingClientRect();
      const { xaxis, yaxis } = chart._fullLayout;
      return [box.x + xaxis._offset + xaxis.l2p(3), box.y + yaxis._offset + yaxis.l2p(0)];
    }""")
    page.mouse.move(*spot)
    page.mouse.click(*spot)
    check(0, 3)
    clean(report_page)


def value_of(page: Any, token: int) -> float | None:
    given = page.locator("#tokens .token").nth(token).get_attribute("data-value")
    return float(given) if given else None


def choose(page: Any, **controls: Any) -> None:
    """Set controls of the explorer by their ids."""
    for name, value in controls.items():
        box = page.locator(f"#{name.replace('_', '-')}")
        if name == "filter_on":
            box.set_checked(value)
        elif name in ("layer", "cover"):
            box.evaluate("(e, v) => { e.value = v; e.dispatchEvent(new Event('input')); }", str(value))
        else:
            box.select_option(str(value))


def test_tokens_are_shown_as_the_text_that_they_are(explorer_page: Opened, explored: TextExplorer) -> None:
    page = explorer_page.page
    choose(page, input=0)
    assert page.locator("#tokens").get_attribute("dir") == "ltr"
    shown = page.locator("#tokens .token").all_text_contents()
    assert shown == [token.text for token in explored.texts[0].tokens]
    assert any("<script>" in text for text in shown) and any("␛[31m" in text for text in shown)
    choose(page, input=1)
    explorer_page.wait_until("document.querySelector('#tokens').dir === 'rtl'")
    assert "سلام" in page.locator("#tokens .token").all_text_contents()[1]
    choose(page, input=0)
    explorer_page.wait_until("document.querySelector('#tokens').dir === 'ltr'")
    accessible(explorer_page)
    fits(explorer_page)
    clean(explorer_page)


def test_each_control_colours_by_what_was_measured(explorer_page: Opened, explored: TextExplorer) -> None:
    page, text = explorer_page.page, explored.texts[0]
    assert text.received is not None
    choose(page, input=0, quantity="received", filter_on=False, layer=1, head=0)
    assert value_of(page, 0) == pytest.approx(text.received[1, :, 0].mean(), abs=2e-5)
    choose(page, head=3)
    assert value_of(page, 5) == pytest.approx(text.received[1, 2, 5], abs=2e-5)
    choose(page, layer=2)
    assert value_of(page, 5) == pytest.approx(text.received[2, 2, 5], abs=2e-5)
    assert page.locator("#layer-value").inner_text() == "2"
    choose(page, quantity="norm", layer=-1)
    assert value_of(page, 7) == pytest.approx(text.norm[0, 7], rel=1e-3)
    choose(page, quantity="share", band=3, layer=0)
    assert value_of(page, 7) == pytest.approx(text.shares[1, 3, 7], abs=2e-5)
    choose(page, quantity="nll")
    assert value_of(page, 0) is None and value_of(page, 9) == pytest.approx(text.nll[9], abs=1e-4)
    for name in explored.filters:
        for exit in explored.exits:
            reading = text.filtered[name, exit]
            choose(page, quantity="nll", filter=name, exit=exit, filter_on=True)
            assert value_of(page, 9) == pytest.approx(reading.nll[9], abs=1e-4)
            choose(page, quantity="delta_nll")
            change = reading.nll[9] - text.nll[9]
            assert value_of(page, 9) == pytest.approx(change, abs=2e-4)
            below = "below" in str(page.locator("#tokens .token").nth(9).get_attribute("class")).split()
            assert below == (change < 0)
    choose(page, quantity="received", layer=2, filter="random", exit=1)
    received = text.filtered["random", 1].received
    assert received is not None
    assert value_of(page, 4) == pytest.approx(received[2, 4], abs=2e-5)
    assert "filter random at exit 1" in page.locator("#state").inner_text()
    choose(page, filter_on=False)
    clean(explorer_page)


def test_a_token_shows_its_attention_bands_and_channels(
    explorer_page: Opened, explored: TextExplorer
) -> None:
    page, text = explorer_page.page, explored.texts[0]
    assert text.maps is not None
    choose(page, input=0, quantity="received", filter_on=False, layer=1, head=2)
    page.locator("#tokens .token").nth(6).click()
    for box, weights in (("#reads", text.maps[1, 1, 6]), ("#readers", text.maps[1, 1, :, 6])):
        row = page.locator(f"{box} tbody tr").first.locator("td").all_inner_texts()
        best = int(np.argmax(weights))
        assert int(row[0]) == best or float(row[2]) == pytest.approx(weights[best], abs=0.5 / 254 + 1e-4)
        assert float(row[2]) == pytest.approx(weights[best], abs=0.5 / 254 + 1e-4)
    bars = page.evaluate("document.getElementById('chart-bands').data[0].y")
    assert bars == pytest.approx(text.shares[2, :4, 6].tolist(), abs=2e-5)
    outgoing = page.evaluate("document.getElementById('chart-out').data[0].z.map((row) => row[3])")
    assert [v or 0.0 for v in outgoing] == pytest.approx(
        text.maps[:, :, 6, 3].mean(1).tolist(), abs=0.5 / 254 + 1e-4
    )
    for position, sites in text.sinks.items():
        page.locator("#tokens .token").nth(position).click()
        row = page.locator("#channels tbody tr").first.locator("td").all_inner_texts()
        assert int(row[0]) == sites[2][0][0]
        assert float(row[1]) == pytest.approx(sites[2][0][1], abs=1e-2)
    clean(explorer_page)


def test_the_keyboard_reaches_every_token(explorer_page: Opened, explored: TextExplorer) -> None:
    page = explorer_page.page
    choose(page, input=0)
    page.locator("#tokens .token").nth(0).click()
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft"):
        page.keyboard.press(key)
    assert page.evaluate("document.activeElement.dataset.token") == "1"
    assert page.locator("#tip").is_visible()
    assert page.locator("#tip").inner_text().startswith(f"1: {explored.texts[0].tokens[1].label}")
    page.keyboard.press("Enter")
    assert page.locator("#token-facts tr").nth(1).locator("td").inner_text() == "1"
    page.keyboard.press("End")
    last = len(explored.texts[0].ids) - 1
    assert page.evaluate("document.activeElement.dataset.token") == str(last)
    stops = page.evaluate("document.querySelectorAll('#tokens [tabindex=\"0\"]').length")
    assert stops == 1, "the tokens are one stop of the tab key"


def test_a_text_of_4096_tokens_opens(browser: Any, explored: TextExplorer, tmp_path: Path) -> None:
    """The numbers are repeated ones; only their size matters here."""
    times = -(-4096 // len(explored.texts[0].ids))
    first = explored.texts[0]

    def long(values: Any) -> Any:
        return np.tile(values, (*(1,) * (values.ndim - 1), times))[..., :4096]

    assert first.received is not None
    filtered = {
        cell: type(reading)(long(reading.nll), None if reading.received is None else long(reading.received))
        for cell, reading in first.filtered.items()
    }
    keys = np.minimum(np.arange(8), np.arange(4096)[:, None])[None].repeat(3, 0)
    text = replace(
        first,
        ids=(first.ids * times)[:4096],
        tokens=(first.tokens * times)[:4096],
        norm=long(first.norm),
        shares=long(first.shares),
        nll=long(first.nll),
        received=long(first.received),
        maps=None,
        strongest=(keys, np.full(keys.shape, 0.1, np.float32)),
        filtered=filtered,
    )
    made = replace(explored, readings=(text,))
    path = made.save(tmp_path / "long.html")
    assert path.stat().st_size < 15_000_000
    with Opened(browser, path) as opened:
        page = opened.page
        assert page.locator("#tokens .token").count() == 4096
        choose(page, quantity="nll")
        assert value_of(page, 4000) == pytest.approx(text.nll[4000], abs=1e-4)
        page.locator("#tokens .token").nth(4000).click()
        row = page.locator("#reads tbody tr").first.locator("td").all_inner_texts()
        assert float(row[2]) == pytest.approx(0.1, abs=0.5 / 254 + 1e-4)
        clean(opened)


PICTURES = 3
"""Pictures on the page of an image: one to choose from, what a patch attends to, and what attends to it."""


@pytest.fixture(scope="module")
def seen(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> ImageExplorer:
    return page_images.explored(page_images.pixels(tmp_path_factory.mktemp("pictures")))


@pytest.fixture(scope="module")
def image_page(
    browser: Any, seen: ImageExplorer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Opened]:
    with Opened(browser, seen.save(tmp_path_factory.mktemp("images") / "images.html")) as opened:
        yield opened


def test_patches_lie_over_the_picture_and_registers_beside_it(
    image_page: Opened, seen: ImageExplorer
) -> None:
    page, first = image_page.page, seen.images[0]
    names = page.locator("#input option").all_inner_texts()
    assert names == [f"{place}. {image.title}" for place, image in enumerate(seen.images, 1)]
    assert page.locator("#tokens .prefix .token").all_inner_texts() == ["[CLS]", "register 1", "register 2"]
    for place, image in reversed(list(enumerate(seen.images))):
        choose(page, input=place)
        rows, columns = image.grid
        image_page.wait_until(
            f"document.querySelectorAll('#tokens .grid .token').length === {rows * columns}"
        )
        image_page.wait_until(f"document.querySelector('#tokens img').naturalWidth === {4 * columns}")
        picture, corner = page.locator("#tokens img"), page.locator("#tokens .grid .token").last
        box, last = picture.bounding_box(), corner.bounding_box()
        assert box and last and box["width"] / box["height"] == pytest.approx(columns / rows, rel=0.02)
        assert last["width"] == pytest.approx(box["width"] / columns, abs=1)
        assert last["x"] + last["width"] == pytest.approx(box["x"] + box["width"], abs=1)
        assert last["y"] + last["height"] == pytest.approx(box["y"] + box["height"], abs=1)
    sinks = page.locator("#tokens .token.sink").evaluate_all("all => all.map((e) => Number(e.dataset.token))")
    assert sinks == sorted(first.sinks)
    choose(page, quantity="delta_received", layer=2)  # the colours of a decrease have texts on them, too
    accessible(image_page)
    fits(image_page)
    clean(image_page, PICTURES)


def test_each_control_colours_patches_by_what_was_measured(image_page: Opened, seen: ImageExplorer) -> None:
    page, image = image_page.page, seen.images[0]
    assert image.received is not None and image.shares is not None
    choose(page, input=0, quantity="received", filter_on=False, layer=1, head=0)
    for token in (0, 2, 9):
        assert value_of(page, token) == pytest.approx(image.received[1, :, token].mean(), abs=2e-5)
    choose(page, head=3, layer=2)
    assert value_of(page, 9) == pytest.approx(image.received[2, 2, 9], abs=2e-5)
    choose(page, quantity="norm", layer=-1)
    assert value_of(page, 7) == pytest.approx(image.norm[0, 7], rel=1e-3)
    choose(page, quantity="share", band=3, layer=0)
    assert value_of(page, 7) == pytest.approx(image.shares[1, 3, 7], abs=2e-5)
    page.locator("#tokens .token").nth(7).hover()
    told = page.locator("#tip").inner_text()
    assert told.startswith(f"7: {image.labels[7]}\nshare of band 4 (dark) at the exit of layer 0")
    assert float(told.splitlines()[1].rsplit(": ")[1]) == pytest.approx(image.shares[1, 3, 7], abs=1e-4)
    choose(page, quantity="delta_received", layer=2, filter="random", exit=1)
    under = image.filtered["random", 1].received
    assert under is not None
    for token in (4, 11):
        change = under[2, token] - image.received[2, :, token].mean()
        assert value_of(page, token) == pytest.approx(change, abs=4e-5)
        below = "below" in str(page.locator("#tokens .token").nth(token).get_attribute("class")).split()
        assert below == (change < 0)
    assert page.locator("#quantity option[value=nll]").count() == 0
    for share in (0, 40):
        choose(page, cover=share)
        color = page.locator("#tokens .grid .token").first.evaluate(
            "e => getComputedStyle(e).backgroundColor"
        )
        assert f"{share / 100:g})" in color
        assert page.locator("#cover-value").inner_text() == f"{share} %"
    clean(image_page, PICTURES)


def test_a_patch_shows_what_it_attends_to_and_what_attends_to_it(
    image_page: Opened, seen: ImageExplorer
) -> None:
    page, image = image_page.page, seen.images[0]
    assert image.maps is not None and image.shares is not None
    choose(page, input=0, quantity="received", filter_on=False, layer=1, head=2)
    page.locator("#tokens .token").nth(12).click()
    for name, weights in (("reads", image.maps[1, 1, 12]), ("readers", image.maps[1, 1, :, 12])):
        cells = page.locator(f"#{name}-map .token")
        drawn = cells.evaluate_all("all => all.map((e) => Number(e.dataset.value))")
        assert drawn == pytest.approx(weights.tolist(), abs=0.5 / 254 + 1e-4)
        row = page.locator(f"#{name} tbody tr").first.locator("td").all_inner_texts()
        assert float(row[2]) == pytest.approx(weights.max(), abs=0.5 / 254 + 1e-4)
        chosen = page.locator(f"#{name}-map .token.selected")
        assert chosen.get_attribute("data-token") == "12"
    bars = page.evaluate("document.getElementById('chart-bands').data[0].y")
    assert bars == pytest.approx(image.shares[2, :4, 12].tolist(), abs=2e-5)
    page.locator("#reads-map .token").nth(5).click()
    assert page.locator("#token-facts tr").first.locator("td").inner_text() == image.labels[5]
    position, sites = next(iter(image.sinks.items()))
    page.locator("#tokens .token").nth(position).click()
    row = page.locator("#channels tbody tr").first.locator("td").all_inner_texts()
    assert int(row[0]) == sites[2][0][0] and float(row[1]) == pytest.approx(sites[2][0][1], abs=1e-2)
    heat = page.evaluate("document.getElementById('heat').data[0].z.map((row) => row[4])")
    assert image.received is not None
    assert heat == pytest.approx(image.received[:, 1, 4].tolist(), abs=2e-5)
    clean(image_page, PICTURES)


def test_the_keyboard_moves_over_the_picture(image_page: Opened, seen: ImageExplorer) -> None:
    page, image = image_page.page, seen.images[0]
    first, (_, columns) = len(image.prefix), image.grid
    choose(page, input=0)
    page.locator("#tokens .token").nth(0).click()
    focus = "document.activeElement.dataset.token"
    steps = {"ArrowDown": 1, "ArrowRight": 2, "End": len(image.labels) - 1, "Home": 0}
    for key, token in steps.items():
        page.keyboard.press(key)
        assert page.evaluate(focus) == str(token)
    for key, token in (
        *[("ArrowRight", place + 1) for place in range(first)],
        ("ArrowDown", first + columns),
        ("ArrowRight", first + columns + 1),
        ("ArrowUp", first + 1),
        ("ArrowUp", first - 1),
    ):
        page.keyboard.press(key)
        assert page.evaluate(focus) == str(token), key
    assert page.locator("#tip").inner_text().startswith(f"{first - 1}: register 2")
    page.keyboard.press("Enter")
    assert page.locator("#token-facts tr").first.locator("td").inner_text() == "register 2"
    assert page.evaluate("document.querySelectorAll('#tokens [tabindex=\"0\"]').length") == 1


def test_the_numbers_of_an_image_are_a_file(image_page: Opened, seen: ImageExplorer) -> None:
    page, image = image_page.page, seen.images[0]
    choose(page, input=0, quantity="norm", layer=0)
    with page.expect_download() as started:
        page.locator("#tokens-csv").click()
    read = list(csv.DictReader(io.StringIO(Path(started.value.path()).read_text("utf-8-sig"))))
    assert [row["token"] for row in read] == image.labels
    assert (read[0]["row"], read[-1]["row"], read[-1]["column"]) == (
        "",
        str(image.grid[0] - 1),
        str(image.grid[1] - 1),
    )
    name = "norm at the exit of layer 0, untouched model"
    assert [float(row[name]) for row in read] == pytest.approx(image.norm[1].tolist(), rel=1e-3)
    clean(image_page, PICTURES)


def test_a_notebook_frame_shows_the_page(browser: Any, explored: TextExplorer, tmp_path: Path) -> None:
    path = tmp_path / "notebook.html"
    path.write_text(f"<!DOCTYPE html><title>notebook</title>{explored._repr_html_()}", encoding="utf-8")
    context = browser.new_context()
    try:
        page = context.new_page()
        page.goto(path.as_uri())
        frame = page.frame_locator("iframe")
        frame.locator("body[data-ready=true]").wait_for(timeout=120_000)
        assert frame.locator("#tokens .token").count() == len(explored.texts[0].ids)
    finally:
        context.close()
