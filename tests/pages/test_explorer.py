"""The explorer of texts: every number is measured another way; what does not fit is left out and named."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import page_models, tiny_models

import spectral_sinks as ss
from spectral_sinks.pages import explorer_page, token_readings
from spectral_sinks.pages.packing import from_codes
from spectral_sinks.pages.text_explorer import TextExplorer, explore

TEXTS = [page_models.hostile_text(40), page_models.right_to_left_text(20)]


@pytest.fixture(scope="module")
def made() -> TextExplorer:
    model = page_models.model()
    return explore(model, TEXTS, ss.read_spectra(model, bands=4), exits=[0, 1])


def plain_pass(ids: list[int]) -> Any:
    with torch.no_grad():
        return tiny_models.plain()(
            torch.tensor([ids]), output_hidden_states=True, output_attentions=True, use_cache=False
        )


def plain_nll(ids: list[int], logits: torch.Tensor) -> np.ndarray[Any, Any]:
    losses = torch.nn.functional.cross_entropy(logits[0, :-1], torch.tensor(ids[1:]), reduction="none")
    return losses.numpy()


@pytest.mark.parametrize("which", [0, 1])
def test_every_number_is_that_of_the_plain_model(made: TextExplorer, which: int) -> None:
    text = made.texts[which]
    ran = plain_pass(text.ids)
    assert np.isnan(text.nll[0])
    assert text.nll[1:] == pytest.approx(plain_nll(text.ids, ran.logits), abs=1e-4)
    # the last of the hidden states is behind the final norm
    states = torch.cat(ran.hidden_states[:-1]).double()
    assert text.norm[:-1] == pytest.approx(states.norm(dim=-1).numpy(), rel=1e-4)
    dark = ss.read_spectrum(page_models.model(), convention="folded", bands=4).dark()
    assert text.shares[:-1, 3] == pytest.approx(dark.share(states).numpy(), abs=1e-5)
    maps = torch.cat(ran.attentions).numpy()
    assert text.maps == pytest.approx(maps, abs=1e-5)
    size = len(text.ids)
    assert text.received == pytest.approx(maps.sum(2) / (size - np.arange(size)), abs=1e-5)
    for position, sites in text.sinks.items():
        largest = int(states[1, position].abs().argmax())
        assert sites[1][0][0] == largest
        assert sites[1][0][1] == pytest.approx(float(states[1, position, largest]), rel=1e-4)


def test_filters_were_run_through_the_model(made: TextExplorer) -> None:
    model, text = page_models.model(), made.texts[0]
    spectra = ss.read_spectra(model, bands=4)
    assert set(text.filtered) == {(name, layer) for name in made.filters for layer in (0, 1)}
    removed = {"dark (folded)": spectra[0].dark(), "dark (raw)": spectra[1].dark()}
    for name, space in removed.items():
        logits = tiny_models.logits(
            model, torch.tensor([text.ids]), {ss.Site("exit", 1): ss.remove(space)}
        ).detach()
        reading = text.filtered[name, 1]
        assert reading.nll[1:] == pytest.approx(plain_nll(text.ids, logits), abs=1e-4)
        assert reading.received is not None and text.received is not None
        below = text.received.mean(1)[:2]
        assert reading.received[:2] == pytest.approx(below, abs=1e-6), "below the exit nothing changes"
        assert not np.allclose(reading.received[2], text.received.mean(1)[2])
    ranks = {name: what.split(" directions")[0].split()[-1] for name, what in made.filters.items()}
    assert set(ranks.values()) == {str(spectra[0].dark().rank)}


def test_the_table_has_one_row_per_token(made: TextExplorer) -> None:
    table = made.table
    assert len(table) == sum(len(text.ids) for text in made.texts)
    first = table[table["text"] == 0]
    text = made.texts[0]
    assert first["nll"].to_numpy() == pytest.approx(text.nll, nan_ok=True)
    assert first["delta_nll random exit 0"].to_numpy() == pytest.approx(
        text.filtered["random", 0].nll - text.nll, nan_ok=True
    )


def test_long_texts_keep_the_mean_over_heads_and_longer_ones_the_strongest_weights(
    made: TextExplorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, text = page_models.model(), made.texts[0]
    assert text.maps is not None
    mean = text.maps.mean(1)
    values = sum(len(t.ids) ** 2 for t in made.texts) * model.layers
    for most, reason in ((values, "single heads"), (values - 1, "strongest weights")):
        monkeypatch.setattr(token_readings, "MAP_VALUES", most)
        shorter = explore(model, TEXTS, ss.read_spectra(model, bands=4), exits=[0])
        assert any(reason in f"{name} {why}" for name, why in shorter.absent.items())
        other = shorter.texts[0]
        if most == values:
            assert other.maps is not None and other.maps[:, 0] == pytest.approx(mean, abs=1e-5)
        else:
            assert other.maps is None and other.strongest is not None
            keys, weights = other.strongest
            assert weights == pytest.approx(np.sort(mean, -1)[..., ::-1][..., :8], abs=1e-5)
            assert np.take_along_axis(mean, keys, -1) == pytest.approx(weights, abs=1e-5)
            assert "strongest weights" in shorter.page.html


def test_a_small_page_leaves_out_what_does_not_fit_and_says_so(
    made: TextExplorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, nothing = explorer_page.fitted(made, 10**9)
    assert nothing == []
    size = len(explorer_page.inside_script(whole))
    least, said = explorer_page.fitted(made, size - 1000)
    assert len(explorer_page.inside_script(least)) <= size - 500 and said
    with pytest.raises(ss.InputError, match="give fewer or smaller ones"):
        explorer_page.fitted(made, 1000)
    text = made.texts[0]
    assert from_codes(explorer_page.as_codes(text.shares, 16, within=(0.0, 1.0))) == pytest.approx(
        text.shares, abs=1e-5
    )


def test_no_token_becomes_markup(made: TextExplorer) -> None:
    page = made.page.html
    assert page.count("</script>") == page.count("<script") == 5
    assert "<img" not in page.split("</style>")[1].split("<script", 1)[0]
    assert "onerror=document" not in page.replace("\\u003cimg src=x onerror=document", "").replace(
        "&lt;img src=x onerror=document", ""
    )


def test_an_encoder_has_no_nll_and_says_so() -> None:
    model = tiny_models.model("bert")
    made = explore(model, tiny_models.text(20), ss.read_spectrum(model, bands=4))
    assert "NLL by token" in made.absent and made.texts[0].nll is None and made.table["nll"].isna().all()
    assert "an encoder predicts masked tokens only" in made.page.html


def test_what_is_wrong_is_said_in_one_sentence(made: TextExplorer, tmp_path: Path) -> None:
    model, spectrum = page_models.model(), ss.read_spectrum(page_models.model(), bands=4)
    for texts, options, said in (
        ([], {}, "no text is given: give one to twelve texts"),
        (["w20 w21 w22"] * 13, {}, "13 windows: an explorer shows at most 12"),
        ("w20 w21 w22", {"exits": [9]}, "9"),
        ("w20 w21 w22", {"exits": []}, "no exit is given"),
    ):
        with pytest.raises(ss.InputError, match=said):
            explore(model, texts, spectrum, **options)  # pyright: ignore
    with pytest.raises(ss.InputError, match=r"let it end in \.html"):
        made.save(tmp_path / "page.txt")
    assert made.save(tmp_path / "page.html").stat().st_size < 15_000_000
