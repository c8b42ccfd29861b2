"""A sink built by hand along a direction of one band: removing that band, and no other, destroys it."""

import pytest
from support.planted_sinks import BANDS, sinking

import spectral_sinks as ss

FIRST = [1, 10, 20]
"""The head of the spectrum, its middle, its dark tail."""


@pytest.mark.parametrize("band", FIRST)
def test_removing_the_band_of_the_sink_and_no_other_destroys_it(band: int) -> None:
    model, spectrum, windows = sinking(band)
    exit0 = ss.Site("exit", 0)
    cells = {str(j): {exit0: ss.remove(spectrum.band(j))} for j in range(1, BANDS + 1)}
    effects = ss.evaluate_all(model, windows, cells)
    uniform = sum(1 / n for n in range(1, 65)) / 64
    assert ss.attention.uniform_attention() == pytest.approx(uniform) and round(uniform, 4) == 0.0741
    for j in range(1, BANDS + 1):
        before, after = effects[str(j)].baseline_sink_mass, effects[str(j)].sink_mass
        assert before is not None and after is not None
        assert min(before) > 0.9, "every layer has the sink"
        assert after[0] == before[0], "below the site nothing changes"
        if j == band:
            assert after[1] == pytest.approx(uniform, abs=0.01)
        else:
            assert min(after) > 0.9


@pytest.mark.parametrize("band", FIRST)
def test_keeping_spares_the_sink_only_with_its_band(band: int) -> None:
    model, spectrum, windows = sinking(band)
    specs = ("3-9", f"3-9,{band}")
    cells = {spec: {ss.Site("exit", 0): ss.keep(spectrum.subspace(spec))} for spec in specs}
    without, spared = (effect.sink_mass for effect in ss.evaluate_all(model, windows, cells).values())
    assert without is not None and without[1] < 0.09
    assert spared is not None and min(spared) > 0.9


def test_the_first_token_alone_carries_it_and_a_swap_spares_it() -> None:
    model, spectrum, windows = sinking(20)
    removed = ss.remove(spectrum.dark())
    filters = {
        "first": removed.at("first"),
        "others": removed.at("all-but-first"),
        "swap": removed.filled(ss.Swap()),
        "keys": removed,
    }
    sites = dict.fromkeys(filters, ss.Site("exit", 0)) | {"keys": ss.Site("keys", 1)}
    cells = {name: {sites[name]: f} for name, f in filters.items()}
    mass = {name: effect.sink_mass for name, effect in ss.evaluate_all(model, windows, cells).items()}
    assert all(layers is not None for layers in mass.values())
    assert mass["first"][1] < 0.09
    assert min(mass["others"]) > 0.9
    assert min(mass["swap"]) > 0.9, "position 0 is one token in every document"
    assert mass["keys"][1] < 0.09 and mass["keys"][2] > 0.9, "only the keys of layer 1 went without"
    queries = ss.evaluate(model, windows, {ss.Site("queries", 1): removed}).sink_mass
    assert queries is not None and queries[1] > 0.9, "queries fire without reading it"
