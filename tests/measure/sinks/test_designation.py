"""Designated sinks: planted ones, what is tried and how it is judged, and that they are dark or not."""

import functools

import numpy as np
import pytest
import torch
from support import tiny_models
from support.planted_sinks import sinking

import spectral_sinks as ss
from spectral_sinks.measure.sinks.attempts import LIGHTEST_FIRST, SCALE

LENGTH = 24


@functools.cache
def model(family: str = "llama") -> ss.LanguageModel:
    return ss.load(tiny_models.plain(family), tokenizer=tiny_models.tokenizer())


def windows(rows: int = 4, length: int = LENGTH) -> ss.Windows:
    return ss.Windows.of_ids(tiny_models.ids(rows, length), model(), [i // 2 for i in range(rows)])


@pytest.mark.parametrize("band", [1, 20])
def test_a_planted_sink_is_designated_elsewhere(band: int) -> None:
    """Its key is all that is special about it, and its key follows its residual in the band planted."""
    loaded, spectrum, given = sinking(band)
    found = ss.designate(loaded, given, 6, spectrum=spectrum, controls=2, draws=5)
    tried = found.tried.set_index("name")
    assert found.old == 0 and found.works and found.documents == 3
    assert found.intervention == "old sink's key and value, mask the old sink" and found.verdict == "not dark"
    assert not tried.loc[["nothing", "restrict to itself", "mask the old sink", SCALE], "works"].any()
    assert tried.loc["old sink's key and value", ["mass", "old_mass"]].tolist() == pytest.approx(
        [0.5, 0.5], abs=0.01
    )
    assert found.mass.value > 0.99 and found.mass_before.value < 0.01 and found.old_mass.value == 0
    dark = tried.loc["old sink's dark band, mask the old sink"]
    assert dark["works"] == (band == 20) and (dark["mass"] > 0.6) == (band == 20)
    assert not tried.filter(like="random band", axis=0)["works"].any()
    again = ss.compare(loaded, given, {"it": list(found.changes)}, positions=[6]).table
    again = again[again["intervention"] == "it"]
    assert again["delta_nll"].mean() == pytest.approx(found.delta_nll.value, abs=1e-6)
    assert again["mass"].mean() == pytest.approx(found.mass.value, abs=1e-6)
    assert found.delta_nll.least <= found.delta_nll.most
    before, after = (found.where[found.where["position"] == p].mean() for p in (0, 6))
    assert before["before"] > 0.99 and before["after"] == 0 and after["after"] > 0.99
    row = found.record()
    assert row["intervention"] == found.intervention and row["mass_low"] <= row["mass"] <= row["mass_high"]
    assert found.intervention in repr(found) and "random band 1" in repr(found)


def test_a_sink_that_is_there_needs_nothing_and_one_that_cannot_be_is_told() -> None:
    loaded, spectrum, given = sinking(20)
    found = ss.designate(loaded, given, 0, spectrum=spectrum)
    assert (found.intervention, found.changes, found.verdict) == ("nothing", (), "dark")
    assert list(found.tried["name"]) == [*LIGHTEST_FIRST[:4], SCALE], (
        "an earlier token cannot take a later key"
    )
    none = ss.designate(model(), windows(), 5)
    assert (none.works, none.intervention, none.verdict) == (False, "none works", "unknown")
    assert none.changes == () and none.mass == none.mass_before and np.isnan(none.share.value)
    assert not none.tried["works"].any() and "strongest head" in none.tried["reason"].iloc[0]


def test_a_token_is_designated_wherever_it_occurs() -> None:
    loaded, spectrum, given = sinking(20)
    rows = torch.stack(given.rows)
    rows[rows == 7] = 8
    rows[0, [5, 20]] = rows[1, 9] = 7
    given = ss.Windows.of_ids(rows, loaded)
    found = ss.designate(loaded, given, token=7, spectrum=spectrum, controls=2, draws=5)
    assert (found.target, found.documents, found.left_out) == ("token 7", 2, 1)
    assert found.intervention == "old sink's key and value, mask the old sink" and found.mass.value > 0.99
    tried = found.tried.set_index("name")
    both = np.mean([1 / 2] * 14 + [2 / 3] * 43)  # queries after one occurrence, and after two
    expected = (both + 1 / 2) / 2
    assert tried.loc["old sink's key and value", "mass"] == pytest.approx(expected, abs=0.01)
    assert tried.loc["restrict to itself", "mass"] < 0.01, "what it gives itself does not count"


def test_a_designation_recomputed() -> None:
    """Documents of one window and of two, fewer tokens than the windows have, every other position drawn."""
    loaded, spectrum, given = sinking(20)
    layers = loaded.module.model.layers
    for layer in layers:
        layer.self_attn.v_proj.weight.data *= 400  # moving attention moves the NLL
    rows = torch.stack(given.rows)
    given = ss.Windows.of_ids(rows, loaded, [0, 0, 1])
    moves = {str(k): [ss.attention.CopyKey(k), ss.attention.MaskKey(0, since=k)] for k in range(1, 7)}
    rows = ss.compare(loaded, given, moves, length=8).table
    nlls = rows.groupby(["intervention", "document"])["nll"].mean().groupby("intervention").mean()
    place = str(nlls[list(moves)].idxmax())  # the others do not reach it
    found = ss.designate(loaded, given, int(place), spectrum=spectrum, length=8, controls=7)
    assert found.intervention == "old sink's key and value, mask the old sink" and nlls.nunique() == 7
    assert abs(nlls - nlls["untouched"]).drop("untouched").min() > 1e-4
    assert found.baseline_nll.value == pytest.approx(nlls["untouched"], abs=2e-6)
    assert found.nll.value == pytest.approx(nlls[place], abs=2e-6)
    others = nlls[[k for k in moves if k != place]]
    assert (found.nll.least, found.nll.most) == pytest.approx((others.min(), others.max()), abs=2e-6)
    least, most = others.min() - nlls["untouched"], others.max() - nlls["untouched"]
    assert (found.delta_nll.least, found.delta_nll.most) == pytest.approx((least, most), abs=2e-6)
    assert (found.delta_nll.value, found.documents) == (
        pytest.approx(nlls[place] - nlls["untouched"], abs=2e-6),
        2,
    )
    tried = found.tried.set_index("name")["delta_nll"]
    assert tried[found.intervention] == pytest.approx(found.delta_nll.value) and tried["nothing"] == 0
    key, mask = found.changes
    assert isinstance(key, ss.attention.CopyKey) and (key.position, key.source) == (int(place), 0)
    assert isinstance(mask, ss.attention.MaskKey) and (mask.position, mask.since) == (0, int(place))
    assert found.old_mass_before.value > 0.7 > 0.01 > found.old_mass.value
    assert set(found.where["position"]) == set(range(8)) and set(found.where["layer"]) == {0, 1, 2}
    after = found.where[found.where["position"] == int(place)]
    again = ss.compare(
        loaded, given, {"it": moves[place]}, positions=[int(place)], spectrum=spectrum, length=8
    )
    here = again.residuals[again.residuals["site"] == str(found.site)].set_index("intervention")[
        "other_dark_share"
    ]
    means = here.groupby("intervention").mean()
    assert found.others.value == pytest.approx(means["it"], abs=1e-6)
    table = again.attention
    expected = (
        table.groupby(["intervention", "layer", "document"])["attention"]
        .mean()
        .groupby(["intervention", "layer"])
        .mean()
    )
    assert after["after"].to_numpy() == pytest.approx(expected["it"].to_numpy(), abs=1e-6)
    assert after["before"].to_numpy() == pytest.approx(expected["untouched"].to_numpy(), abs=1e-6)


def test_the_norm_that_is_scaled_becomes_the_old_sinks() -> None:
    loaded, spectrum, given = sinking(1)
    tried = ss.designate(loaded, given, 6, spectrum=spectrum, controls=2, draws=2).tried.set_index("name")
    both = ss.compare(loaded, given, {}, positions=[0, 6]).attention
    layer = int(both[both["position"] == 0].groupby("layer")["attention"].mean().argmax())
    site = ss.Site("exit", layer - 1) if layer else ss.Site("embedding")

    def ratio(position: int) -> float:
        table = ss.compare(loaded, given, {}, positions=[position]).residuals
        return float(table.loc[table["site"] == str(site), "norm_ratio"].mean())

    edit = {site: ss.spectra.scale(loaded.d, ratio(0) / ratio(6), ss.At(6))}
    rows = ss.compare(loaded, given, {"scale": edit}, positions=[6]).table
    expected = rows.loc[rows["intervention"] == "scale", "delta_nll"].mean()
    assert tried.loc[SCALE, "delta_nll"] == pytest.approx(expected, abs=2e-6) and abs(expected) > 1e-5
    random = tried.filter(like="random band", axis=0)["delta_nll"]
    assert len(random) == 2 and random.nunique() == 2, "each draw is another band"


def test_a_sink_in_two_documents_of_three_is_not_yet_designated() -> None:
    """The whole interval must lie above, of the lead and of the strongest head."""
    loaded, _, given = sinking(20)
    rows = torch.stack(given.rows)
    rows[:, 0] = torch.tensor([5, 7, 0])
    rows[:2, 6] = 0
    found = ss.designate(loaded, ss.Windows.of_ids(rows, loaded), 6)
    nothing = found.tried.set_index("name").loc["nothing"]
    assert nothing["lead"] > 0.3 and nothing["head"] > 0.6 and not nothing["works"]
    assert "it is given" in nothing["reason"] and "strongest head" in nothing["reason"]


def test_windows_without_the_token_are_left_out_with_their_documents() -> None:
    loaded, _, given = sinking(20)
    rows = torch.cat([torch.stack(given.rows), torch.stack(given.rows)])
    rows[rows == 7] = 8
    rows[[1, 3, 5], [5, 8, 9]] = 7
    mixed = ss.Windows.of_ids(rows, loaded, [0, 1, 2, 1, 2, 3])
    found = ss.designate(loaded, mixed, token=7, controls=2)
    alone = ss.designate(loaded, ss.Windows.of_ids(rows[[1, 3, 5]], loaded, [1, 1, 3]), token=7, controls=2)
    assert (found.left_out, found.documents, alone.left_out, alone.documents) == (3, 2, 0, 2)
    for name in ("baseline_nll", "nll", "mass", "old_mass"):
        assert getattr(found, name).value == pytest.approx(getattr(alone, name).value, abs=1e-6)


def test_what_is_tried_is_judged_by_these_numbers() -> None:
    loaded, given = model(), windows()
    for position in (2, 5, 9):
        found = ss.designate(loaded, given, position)
        others = found.where[found.where["position"] != position].groupby("position")["before"].mean()
        assert found.old == others.idxmax()
        nothing = found.tried.set_index("name").loc["nothing"]
        table = ss.compare(loaded, given, {}, positions=[position])
        heads = table.attention.groupby(["layer", "head"])["attention"].mean()
        assert nothing["head"] == pytest.approx(heads.max(), abs=1e-6)
        assert nothing["mass"] == pytest.approx(heads.mean(), abs=1e-6)
        assert nothing["rival"] == found.old and nothing["old_mass"] == pytest.approx(others.max(), abs=1e-6)
        assert nothing["lead"] == pytest.approx(heads.mean() - others.max(), abs=1e-6)
        layer = int(heads.groupby("layer").mean().idxmax())
        site = str(ss.Site("exit", layer - 1) if layer else ss.Site("embedding"))
        ratio = table.residuals.loc[table.residuals["site"] == site, "norm_ratio"].mean()
        assert nothing["norm_ratio"] == pytest.approx(ratio, rel=1e-5) and str(found.site) == site


@torch.no_grad()
def test_occurrences_of_a_token_are_averaged() -> None:
    """Norms and shares of one occurrence or of two, beside the tokens that are none."""
    loaded, spectrum = model(), ss.read_spectrum(model(), bands=8)
    ids = torch.stack(windows().rows)
    ids[ids == 7] = 8
    ids[[0, 0, 1, 2, 3, 3], [2, 9, 5, 6, 4, 11]] = 7
    given = ss.Windows.of_ids(ids, loaded, [0, 0, 1, 1])
    found = ss.designate(loaded, given, token=7, spectrum=spectrum, controls=2, draws=3)
    states = loaded.module(ids, use_cache=False, output_hidden_states=True).hidden_states
    x = states[0 if found.site.kind == "embedding" else found.site.layer + 1].double()
    norms, dark, marks = x.norm(dim=-1), spectrum.dark().share(x), ids == 7
    assert not found.works, "so the numbers are those of the untouched pass"
    for column, values in (
        (
            found.tried["norm_ratio"][0],
            [norms[w][m].mean() / norms[w][~m].quantile(0.5) for w, m in enumerate(marks)],
        ),
        (found.share_before.value, [dark[w][m].mean() for w, m in enumerate(marks)]),
        (found.others.value, [dark[w][~m].mean() for w, m in enumerate(marks)]),
    ):
        assert column == pytest.approx(float(torch.stack(values).mean()), rel=1e-4)


def test_tokens_that_control_are_those_of_the_texts() -> None:
    """Two tokens after the first: the other one is all there is to draw."""
    loaded, _, _ = sinking(20)
    ids = torch.full((3, 20), 9)
    ids[:, 0] = 0
    ids[[0, 1, 2], [4, 6, 8]] = 7
    given = ss.Windows.of_ids(ids, loaded)
    found = ss.designate(loaded, given, token=7, controls=4)
    assert found.intervention == "old sink's key and value, mask the old sink"
    other = [ss.attention.CopyKey(token=9), ss.attention.MaskKey(0)]
    rows = ss.compare(loaded, given, {"other": other}, positions=[4]).table
    expected = rows.loc[rows["intervention"] == "other", "nll"].mean()
    assert [found.nll.least, found.nll.most] == pytest.approx([expected] * 2, abs=2e-6)


@torch.no_grad()
def test_a_sink_that_is_dark_by_the_move() -> None:
    """Two copies of the sink tie with any copy of their key; their band alone, without the rest, wins."""
    loaded, spectrum, given = sinking(20)
    module = loaded.module
    for layer in module.model.layers[:2]:
        layer.self_attn.q_proj.bias.zero_()
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    module.model.embed_tokens.weight[0] += 20 * spectrum.vectors[:, 4].float()
    rows = torch.stack(given.rows)
    rows[:, 3] = 0
    given = ss.Windows.of_ids(rows, loaded)
    found = ss.designate(loaded, given, 6, spectrum=spectrum, controls=2, draws=4)
    assert (found.intervention, found.verdict, str(found.site)) == (
        "old sink's dark band",
        "dark by the intervention",
        "exit 1",
    )
    (edits,) = found.changes
    assert isinstance(edits, dict) and [*edits] == [ss.Site("exit", 1)], "what the layer reads that attends"
    table = ss.compare(loaded, given, {"it": found.changes}, positions=[6], spectrum=spectrum).residuals
    here = table[table["site"] == "exit 1"].groupby("intervention")[["dark_share", "other_dark_share"]].mean()
    assert found.share_before.value == pytest.approx(here.loc["untouched", "dark_share"], abs=1e-6)
    assert found.share.value == pytest.approx(here.loc["it", "dark_share"], abs=1e-6)
    assert found.others.value == pytest.approx(here.loc["it", "other_dark_share"], abs=1e-6)
    x = ss.trace(loaded, rows, {}, [found.site], readout=lambda final, read, _: read[found.site])[:, 6]
    drawn = [float(ss.random_subspace(loaded.d, 2, seed).share(x).mean()) for seed in range(4)]
    before = found.share_before
    assert (before.least, before.most) == pytest.approx((min(drawn), max(drawn)), abs=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("others", [True, False])
def test_dark_is_more_than_random_and_more_than_others(others: bool) -> None:
    """A sink as dark as the other tokens; and one darker than they, but not than random subspaces."""
    loaded, spectrum, given = sinking(20 if others else 10)
    words, dark = loaded.module.model.embed_tokens.weight, spectrum.vectors[:, -2:].float()
    if others:
        words[1:] += 60 * dark[:, 1]
    else:
        words -= words @ dark @ dark.T
        words[0] += 3 * dark[:, 1]
    found = ss.designate(loaded, given, 0, spectrum=spectrum)
    assert found.intervention == "nothing" and found.verdict == "not dark"
    assert (found.share.low > found.share.most) == others
    assert (found.share.low > found.others.high) == (not others)
