"""The explorer of images: every number is that of the measurements; names of files are data."""

import base64
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support import page_images, page_models, tiny_encoders, tiny_models

import spectral_sinks as ss
from spectral_sinks.pages import explorer_page, token_readings
from spectral_sinks.pages.image_explorer import ImageExplorer, prefix_label
from spectral_sinks.pages.packing import from_codes


@pytest.fixture(scope="module")
def pixels(tmp_path_factory: pytest.TempPathFactory) -> ss.Pixels:
    return page_images.pixels(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def made(pixels: ss.Pixels) -> ImageExplorer:
    return page_images.explored(pixels)


def test_every_number_is_that_of_the_measurements(made: ImageExplorer, pixels: ss.Pixels) -> None:
    model, spectrum = page_images.model(), page_images.spectrum()
    alpha = ss.attention.attention_by_position(model, pixels).alpha
    norm = ss.outliers(model, pixels).norm
    shares = ss.energy(model, pixels, spectrum)
    assert len({image.grid for image in made.images}) > 1, "the pictures keep their shapes"
    for place, image in enumerate(made.images):
        size = pixels.lengths[place]
        assert image.grid == pixels.grids[place] and len(image.labels) == size
        assert image.received == pytest.approx(alpha[place, ..., :size], abs=1e-6)
        assert image.norm == pytest.approx(norm[place, :, :size], rel=1e-5)
        assert image.shares is not None and image.shares.shape == (model.layers + 1, 4, size)
        here = shares[(shares["document"] == place) & (shares["position_class"] == "patches")]
        mean = here.pivot(index="layer", columns="band", values="share").to_numpy()
        assert image.shares[..., len(image.prefix) :].mean(-1) == pytest.approx(mean, abs=1e-5)
        drawn = (alpha[place, ..., :size] > page_images.EPSILON).any((0, 1))
        assert drawn.any()
        assert sorted(image.sinks) == np.flatnonzero(drawn).tolist()


def test_maps_and_channels_are_those_of_the_plain_model(made: ImageExplorer, pixels: ss.Pixels) -> None:
    plain = tiny_encoders.build(page_images.FAMILY, attention="eager")
    for place, image in enumerate(made.images):
        with torch.no_grad():
            ran = plain(pixels[place][None], output_hidden_states=True, output_attentions=True)
        assert image.maps == pytest.approx(torch.cat(ran.attentions).numpy(), abs=1e-5)
        states = torch.cat(ran.hidden_states)
        assert image.norm == pytest.approx(states.norm(dim=-1).numpy(), rel=1e-4)
        for position, sites in image.sinks.items():
            largest = int(states[1, position].abs().argmax())
            assert sites[1][0] == (largest, pytest.approx(float(states[1, position, largest]), rel=1e-4))


def test_filters_were_run_through_the_encoder(made: ImageExplorer, pixels: ss.Pixels) -> None:
    model = ss.load_vision(tiny_encoders.build(page_images.FAMILY, attention="eager"))
    assert set(made.filters) == {"dark (raw)", "head", "middle", "random"}
    edits = {ss.Site("exit", 1): ss.remove(page_images.spectrum().dark())}
    for place, image in enumerate(made.images):
        maps = ss.trace(
            model,
            pixels[place][None],
            edits,
            readout=lambda final, read, weights: torch.stack([each[0] for each in weights]),
            attention=True,
        )
        reading = image.filtered["dark (raw)", 1]
        assert reading.nll is None and reading.received is not None and image.received is not None
        assert reading.received == pytest.approx(maps.mean((1, 2)).numpy(), abs=1e-5)
        assert not np.allclose(reading.received[2], image.received.mean(1)[2], atol=1e-4)


def test_the_table_has_one_row_per_token_and_layer(made: ImageExplorer) -> None:
    table, image = made.table, made.images[1]
    assert len(table) == sum(each.norm.size for each in made.images)
    here = table[(table["image"] == 1) & (table["layer"] == 1)]
    assert here["token"].tolist()[:4] == ["[CLS]", "register 1", "register 2", "row 0, column 0"]
    assert image.received is not None and image.shares is not None
    assert here["received"].to_numpy() == pytest.approx(image.received[1].mean(0))
    assert here["band 4 (dark)"].to_numpy() == pytest.approx(image.shares[2, 3])
    assert here["norm"].to_numpy() == pytest.approx(image.norm[2])


@pytest.mark.parametrize("shape", ["own", "square"])
def test_the_picture_has_the_size_that_the_encoder_saw(tmp_path: Path, shape: str) -> None:
    pixels = page_images.pixels(tmp_path, shape)  # pyright: ignore
    made = ss.explore(page_images.model(), pixels, page_images.spectrum())
    for place, image in enumerate(made.images):
        address = image.shown()["picture"]
        assert address.startswith("data:image/jpeg;base64,")
        picture = Image.open(io.BytesIO(base64.b64decode(address.split(",")[1])))
        side = tiny_encoders.PATCH
        assert picture.size == (image.grid[1] * side, image.grid[0] * side)
        assert picture.size[::-1] == tuple(pixels[place].shape[-2:])
        seen = (pixels[place] * 0.2 + 0.5).movedim(0, -1).numpy() * 255
        assert np.asarray(picture).mean((0, 1)) == pytest.approx(seen.mean((0, 1)), abs=4)
        bright = (
            np.asarray(picture, dtype=float)[:4, :4].mean() - np.asarray(picture, dtype=float)[-4:, :4].mean()
        )
        assert bright > 100, "the white corner is where it was"


def test_columns_of_pixels_that_no_patch_covers_are_not_shown() -> None:
    model = tiny_encoders.model("vit")
    with pytest.warns(ss.SpectralWarning, match="no multiple of the patch"):
        pixels = ss.pixels(torch.randn(1, 3, 20, 22, generator=torch.Generator().manual_seed(0)), model)
    made = ss.explore(model, pixels, ss.read_spectrum(model, "embedding", bands=4))
    assert made.images[0].picture.size == (20, 20) and made.images[0].grid == (5, 5)
    assert made.images[0].name == "image 1"


def test_no_name_of_a_file_becomes_markup(made: ImageExplorer) -> None:
    page = made.page.html
    assert page.count("</script>") == page.count("<script") == 5
    content = page.split("</style>")[1].split("<script", 1)[0]
    assert "<img" not in content and "onerror=document" in content, "the name is there, as text"
    assert "\u202e" not in page and "⟨U+202E⟩" in content
    assert made.images[0].name.endswith(page_images.NAMES[0])


def test_an_encoder_without_a_head_needs_a_matrix_for_bands() -> None:
    pixels = tiny_encoders.pixels("dinov2")
    model = pixels.model
    made = ss.explore(model, pixels)
    assert "has no classifier head" in made.absent["bands and filters"]
    assert made.filters == {} and made.exits == () and made.images[0].shares is None
    content = made.page.html.split("</style>")[1].split("<script", 1)[0]
    assert 'id="filter"' not in content and 'value="share"' not in content and "has no classifier" in content
    with pytest.raises(ss.InputError, match="exits are those of filters, which need a spectrum"):
        ss.explore(model, pixels, exits=[0])


@pytest.mark.filterwarnings("ignore:band edges")  # 5 classes read 5 of 32 directions
def test_the_head_gives_the_bands_unless_a_spectrum_does() -> None:
    made = ss.explore(page_images.model(), tiny_encoders.images(1))
    assert made.record["matrix"] == "classifier" and "dark, raw" in made.subspaces
    assert made.filters["dark (folded)"].endswith(
        "smallest singular values of classifier (folded convention)"
    )


def test_pictures_with_many_patches_keep_the_strongest_weights(
    made: ImageExplorer, pixels: ss.Pixels, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = made.images[0]
    assert image.maps is not None
    mean = image.maps.mean(1)
    # what does not fit into the page
    monkeypatch.setattr(explorer_page, "STRONGEST", 2)
    whole, nothing = explorer_page.fitted(made, 10**9)
    assert nothing == []
    sizes = [len(explorer_page.inside_script(part)) for part in whole]
    maps = sum(len(explorer_page.inside_script(part["maps"])) for part in whole)
    least, said = explorer_page.fitted(made, sum(sizes) - maps * 85 // 100)
    assert any("2 strongest weights" in each and "the images have many patches" in each for each in said)
    kept = least[0]["maps"]
    assert kept["kind"] == "strongest"
    keys = from_codes(kept["keys"]).astype(int)
    assert np.take_along_axis(mean, keys, -1) == pytest.approx(np.sort(mean, -1)[..., ::-1][..., :2])
    assert from_codes(kept["weights"]) == pytest.approx(np.take_along_axis(mean, keys, -1), abs=0.5 / 254)
    # what does not fit into memory
    monkeypatch.setattr(token_readings, "MAP_VALUES", 1)
    shorter = ss.explore(page_images.model(), pixels, page_images.spectrum())
    assert shorter.images[0].maps is None and "the images have many patches" in str(shorter.absent)


def test_a_name_loads_the_encoder(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    page_images.model().module.save_pretrained(folder)
    page_images.model().processor.save_pretrained(folder)
    made = ss.explore(str(folder), page_images.pictures(tmp_path)[:1], page_images.spectrum())
    assert isinstance(made, ImageExplorer) and made.images[0].grid == (5, 5)


def test_labels_of_tokens_are_words() -> None:
    assert [prefix_label(name) for name in ("cls", "distillation", "reg12", "test1")] == [
        "[CLS]",
        "distillation",
        "register 12",
        "test-time register 1",
    ]


def test_what_is_wrong_is_said_in_one_sentence(tmp_path: Path) -> None:
    model, spectrum = page_images.model(), page_images.spectrum()
    windows = ss.cut([tiny_models.text(20)], page_models.model())
    for given, options, said in (
        ([], {}, "no image is given: give one to twelve"),
        (tiny_encoders.images(13), {}, "13 images: an explorer shows at most 12"),
        (tiny_encoders.images(1), {"exits": [9]}, "9"),
        (tiny_encoders.images(1), {"length": 20}, "reads images, so give their size to ss.pixels"),
        (windows, {}, "reads images: ss.pixels"),
        (["nowhere.png"], {}, "nowhere.png"),
    ):
        with pytest.raises(ss.InputError, match=said):
            ss.explore(model, given, spectrum, **options)
    with pytest.raises(ss.InputError, match="reads texts, and images were given"):
        ss.explore(page_models.model(), tiny_encoders.pixels(count=1))  # pyright: ignore
    with pytest.raises(ss.InputError, match="a report is of a language model"):
        ss.report(model)  # pyright: ignore
