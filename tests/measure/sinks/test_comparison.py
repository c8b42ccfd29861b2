"""`compare` and `designate`: against loops, other measurements and a sink built by hand."""

import functools
import json

import numpy as np
import pandas as pd
import pytest
import torch
from support import reference_attention, tiny_models
from support.planted_sinks import sinking
from torch import Tensor

import spectral_sinks as ss
from spectral_sinks.spectra.edits import as_edit

LENGTH = 24


@functools.cache
def model(family: str = "llama") -> ss.LanguageModel:
    return ss.load(tiny_models.plain(family), tokenizer=tiny_models.tokenizer())


def windows(rows: int = 4, length: int = LENGTH) -> ss.Windows:
    return ss.Windows.of_ids(tiny_models.ids(rows, length), model(), [i // 2 for i in range(rows)])


def nll(loaded: ss.LanguageModel, ids: Tensor, start: int = 0) -> Tensor:
    """Nats per predicted token of each row, those after `start`."""
    logits = loaded.module(ids, use_cache=False).logits.double()[:, start:-1].log_softmax(-1)
    return -logits.gather(-1, ids[:, start + 1 :, None])[..., 0].mean(1)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_a_comparison_is_what_a_loop_finds(family: str) -> None:
    loaded, given = model(family), windows()
    ids = torch.stack(given.rows)
    spectrum = ss.read_spectrum(loaded, bands=8)
    move = ss.attention.MaskKey(1)
    found = ss.compare(loaded, given, {"mask": move}, positions=[0, 3], spectrum=spectrum, batch_size=3)
    states, maps = {}, {}
    for name, look in (("untouched", lambda call: None), ("mask", move)):
        whole: list[Tensor] = []

        def watch(call: ss.attention.AttentionCall, into: list[Tensor] = whole) -> None:
            into.append(torch.cat([call.weights(rows) for rows in call.blocks()], 2))

        with ss.attending(loaded, look), ss.attending(loaded, watch):
            rows = found.table[found.table["intervention"] == name]
            expected = nll(loaded, ids).view(2, 2).mean(1)
            assert rows["nll"].to_numpy() == pytest.approx(expected.numpy(), abs=2e-6)
            whole.clear()
            states[name] = loaded.module(ids, use_cache=False, output_hidden_states=True).hidden_states
        maps[name] = torch.stack(whole, 1).double()  # [batch, layers, heads, queries, keys]
        mass = maps[name][:, :, :, 4:, [0, 3]].mean(3)
        table = found.attention[found.attention["intervention"] == name]
        by_document = mass.view(2, 2, *mass.shape[1:]).mean(1)
        assert table["attention"].to_numpy() == pytest.approx(by_document.flatten().numpy(), abs=1e-6)
        assert rows["mass"].to_numpy() == pytest.approx(by_document.sum(-1).mean((1, 2)).numpy(), abs=1e-6)
        left = (1 - maps[name][:, :, :, 4:].sum(-1)).mean((1, 2, 3)).view(2, 2).mean(1)
        assert rows["unspent"].to_numpy() == pytest.approx(left.numpy(), abs=1e-6)
        assert (left > 0.01).all() == (family == "gpt_oss")

        site = states[name][2].double()
        norms = site.norm(dim=-1)
        others = [k for k in range(LENGTH) if k not in (0, 3)]
        ratio = norms[:, [0, 3]] / norms[:, others].quantile(0.5, 1, keepdim=True)
        dark = spectrum.dark().share(site)
        here = found.residuals[
            (found.residuals["intervention"] == name) & (found.residuals["site"] == "exit 1")
        ]
        for column, value in (
            ("norm_ratio", ratio),
            ("dark_share", dark[:, [0, 3]]),
            ("other_dark_share", dark[:, others].mean(1, keepdim=True).expand(-1, 2)),
        ):
            mean = value.reshape(2, 2, 2).mean(1).flatten()
            assert here[column].to_numpy() == pytest.approx(mean.numpy(), rel=1e-5)
    rows = found.table.set_index("intervention")
    assert rows.loc["mask", "delta_nll"].to_numpy() == pytest.approx(
        rows.loc["mask", "nll"].to_numpy() - rows.loc["untouched", "nll"].to_numpy()
    )


def test_filters_are_compared_as_they_are_evaluated() -> None:
    """The NLL, its difference and the divergence agree with `evaluate_all`, under a move as without one."""
    loaded, given = model("qwen2"), windows(6, 80)
    spectrum = ss.read_spectrum(loaded, bands=8)
    site = ss.Site("exit", 0)
    cells = {
        "dark": {site: ss.remove(spectrum.dark())},
        "norm": {site: ss.spectra.scale(loaded.d, 5.0, ss.At(3))},
        "fixed": {
            site: ss.remove(
                ss.spectra.channels(loaded.d, ss.residual.massive_channels(loaded, given, site)),
                ss.Mean(ss.mean_residual(loaded, given, site)),
                ss.At(0),
            )
        },
    }
    effects = ss.evaluate_all(loaded, given, cells)
    found = ss.compare(loaded, given, cells).table
    for name, effect in effects.items():
        rows = found[found["intervention"] == name]
        for column in ("nll", "delta_nll", "kl"):
            assert rows[column].to_numpy() == pytest.approx(effect.table[column].to_numpy(), abs=3e-6)
    assert abs(effects["fixed"].delta_nll) < 1e-6, "position 0 is its own mean where all texts open with BOS"
    assert abs(effects["norm"].delta_nll) > 1e-5
    look = ss.attention.Streaming(0, 10)
    with ss.attending(loaded, look):
        effect = ss.evaluate(loaded, given, cells["dark"])
    both = ss.compare(loaded, given, {"look": look, "both": [look, cells["dark"]]}).table.set_index(
        "intervention"
    )
    assert both.loc["look", "nll"].to_numpy() == pytest.approx(
        effect.table["baseline_nll"].to_numpy(), abs=3e-6
    )
    assert both.loc["both", "nll"].to_numpy() == pytest.approx(effect.table["nll"].to_numpy(), abs=3e-6)


def test_a_prefix_is_before_the_text_and_not_scored() -> None:
    loaded, given = model("gpt2"), windows()
    found = ss.compare(
        loaded, given, {"prefix": [ss.attention.Prefix((5,)), ss.attention.Prefix((9, 4))]}, positions=[2]
    )
    ids = torch.stack(given.rows)
    longer = torch.cat([torch.tensor([9, 4, 5]).expand(4, -1), ids], 1)
    with torch.no_grad():
        expected = nll(loaded, longer, 3).view(2, 2).mean(1)
        maps = loaded.module(longer, output_attentions=True, use_cache=False).attentions
    rows = found.table[found.table["intervention"] == "prefix"]
    assert rows["nll"].to_numpy() == pytest.approx(expected.numpy(), abs=2e-6)
    mass = torch.stack([layer[:, :, 6:, 5].mean((1, 2)) for layer in maps]).mean(0)
    assert rows["mass"].to_numpy() == pytest.approx(mass.view(2, 2).mean(1).numpy(), abs=1e-6)
    assert rows["unspent"].to_numpy() == pytest.approx(0, abs=1e-6), (
        "the prefix receives, and that is no loss"
    )
    none = ss.compare(loaded, given, {"prefix": ss.attention.Prefix(())}).table
    assert (none["delta_nll"] == 0).all()


def test_controls_are_the_same_move_elsewhere() -> None:
    loaded, given = model(), windows()
    site = ss.Site("exit", 0)
    moves = {
        "mask": ss.attention.MaskKey(0),
        "norm": {site: ss.spectra.scale(loaded.d, 4.0, "first")},
        "logit": ss.attention.SinkLogit(2.0),
        "both": [ss.attention.MaskKey(0), ss.attention.Restrict(2)],
    }
    found = ss.compare(loaded, given, moves, controls=3, seed=1)
    drawn = found.table[found.table["control_of"] != ""]
    assert set(drawn["control_of"]) == {"mask", "norm"}, "others have no one position"
    copies = {
        "key": ss.attention.CopyKey(21, source=17),
        "rest": {site: ss.spectra.carry(loaded.d, 18, ss.At(22))},
    }
    rows = ss.compare(loaded, given, copies, controls=3).table
    of = rows.loc[rows["control_of"] != "", "intervention"].str.rsplit(" ", n=1, expand=True)[1].astype(int)
    assert of.min() > 17, "what is copied comes from before"
    places = {name: int(name.rsplit(" ", 1)[1]) for name in drawn["intervention"].unique()}
    assert len(places) == 6 and 0 not in places.values() and max(places.values()) < LENGTH - 1
    for name, place in places.items():
        move = (
            ss.attention.MaskKey(place)
            if name.startswith("mask")
            else {site: ss.spectra.scale(loaded.d, 4.0, ss.At(place))}
        )
        again = ss.compare(loaded, given, {"again": move}).table
        expected = again.loc[again["intervention"] == "again", "nll"].to_numpy()
        assert drawn.loc[drawn["intervention"] == name, "nll"].to_numpy() == pytest.approx(expected, abs=1e-6)
    summary = found.summary().set_index("intervention")
    means = drawn[drawn["control_of"] == "mask"].groupby("intervention")["delta_nll"].mean()
    assert summary.loc["mask", ["controls", "control_least", "control_most"]].tolist() == pytest.approx(
        [3, means.min(), means.max()]
    )
    assert np.isnan(summary.loc["logit", "control_least"]) and "control_most" in repr(found)
    same = ss.compare(loaded, given, moves, controls=3, seed=1).table
    pd.testing.assert_frame_equal(same, found.table)


def test_windows_are_compared_in_any_batches() -> None:
    loaded = model()
    given = ss.Windows.of_ids(
        [*tiny_models.ids(3, 20), *tiny_models.ids(2, 24, seed=1)], loaded, [0, 0, 1, 1, 2]
    )
    moves = {
        "mask": ss.attention.MaskKey(token=5),
        "restrict": ss.attention.Restrict(4),
        "logit": ss.attention.SinkLogit(1.0),
    }
    a, b = (ss.compare(loaded, given, moves, batch_size=size) for size in (1, 16))
    for name in ("table", "attention", "residuals"):
        left, right = getattr(a, name), getattr(b, name)
        pd.testing.assert_frame_equal(left, right, atol=2e-6, rtol=1e-5)


def hide_first(row: reference_attention.Row) -> None:
    if row.at > 0:
        row.seen = row.seen & (torch.arange(len(row.seen)) > 0)


def test_masking_the_planted_sink_spreads_its_mass_evenly() -> None:
    loaded, spectrum, given = sinking(20)
    moves = {
        "mask": ss.attention.MaskKey(0),
        "drop": ss.attention.MaskKey(0, renormalise=False),
        "at 9": ss.attention.MaskKey(9),
    }
    found = ss.compare(loaded, given, moves, positions=[0], spectrum=spectrum)
    rows = found.table.groupby("intervention")[["mass", "unspent"]].mean()
    assert rows.loc["untouched", "mass"] > 0.99 and rows.loc["at 9", "mass"] > 0.99
    assert rows.loc["mask"].tolist() == pytest.approx([0, 0], abs=1e-6)
    assert rows.loc["drop", "unspent"] == pytest.approx(rows.loc["untouched", "mass"], abs=0.01)
    ids = torch.stack(given.rows)
    maps = torch.stack(reference_attention.run(loaded, ids, hide_first)[1], 1).double()
    for position in (1, 5, 30):
        found = ss.compare(loaded, given, {"mask": ss.attention.MaskKey(0)}, positions=[position])
        mass = found.attention.groupby(["intervention", "layer"])["attention"].mean()
        expected = maps[:, :, :, position + 1 :, position].mean((0, 2, 3))
        assert mass["untouched"].max() < 0.01 < 0.02 < mass["mask"].min()
        assert mass["mask"].to_numpy() == pytest.approx(expected.numpy(), abs=1e-4)
        even = np.mean([1 / i for i in range(position + 1, 64)])
        assert mass["mask", 0] == pytest.approx(even, abs=1e-3), "only BOS has the carrier"


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("message", "ask"),
    [
        ("is not an intervention", lambda m, w: ss.compare(m, w, {"a": 3})),
        ("two edits at exit 0", lambda m, w: ss.compare(m, w, {"a": [{ss.Site(): abs}, {ss.Site(): abs}]})),
        (
            "is that of the pass without",
            lambda m, w: ss.compare(m, w, {"untouched": ss.attention.SinkLogit()}),
        ),
        ("expected some of 0 to 22", lambda m, w: ss.compare(m, w, {}, positions=[23])),
        ("layer 9", lambda m, w: ss.compare(m, w, {"a": ss.attention.MaskKey(0, layers=[9])})),
        ("layer 9", lambda m, w: ss.compare(m, w, {"a": {ss.Site("exit", 9): abs}})),
        ("the text has 24 tokens", lambda m, w: ss.compare(m, w, {"a": ss.attention.Restrict(24)})),
        ("outside the vocabulary", lambda m, w: ss.compare(m, w, {"a": ss.attention.Prefix((97,))})),
        ("a prefix of 110 tokens", lambda m, w: ss.compare(m, w, {"a": ss.attention.Prefix((3,) * 110)})),
        (
            "takes another document",
            lambda m, w: ss.compare(
                m,
                ss.Windows.of_ids(w.rows[:1], m),
                {"a": {ss.Site(): ss.remove(ss.spectra.channels(m.d, [1]), ss.Swap())}},
            ),
        ),
        ("22 are left", lambda m, w: ss.compare(m, w, {"a": ss.attention.MaskKey(0)}, controls=23)),
        ("which sink", lambda m, w: ss.designate(m, w)),
        ("which sink", lambda m, w: ss.designate(m, w, 3, token=3)),
        ("no query comes after it", lambda m, w: ss.designate(m, w, 23)),
        (
            "token 1 has no query",
            lambda m, w: ss.designate(m, ss.Windows.of_ids([[0, 3, 4]] * 2, m), token=1),
        ),
        ("at least two documents", lambda m, w: ss.designate(m, ss.Windows.of_ids([[0, 3, 4]], m), 1)),
        (
            "cut them to one length",
            lambda m, w: ss.designate(m, ss.Windows.of_ids([[0, 3], [0, 3, 4]], m), 1),
        ),
        ("the windows have 24 tokens", lambda m, w: ss.residual.mean_values(m, w, 24)),
        ("the windows have 24 tokens", lambda m, w: ss.residual.massive_channels(m, w, ss.Site(), 24)),
        ("give at least 1", lambda m, w: ss.residual.massive_channels(m, w, ss.Site(), count=0)),
    ],
)
def test_what_means_nothing_is_refused(message: str, ask: object) -> None:
    assert callable(ask)
    with pytest.raises(ss.InputError, match=message):
        ask(model(), windows())


def test_means_are_over_windows_and_tokens() -> None:
    loaded, given = model("qwen3"), windows()
    values: list[Tensor] = []
    keys: list[Tensor] = []

    def look(call: ss.attention.AttentionCall) -> None:
        values.append(call.value.double())
        keys.append(call.key.double())

    with ss.attending(loaded, look), torch.no_grad():
        loaded.module(torch.stack(given.rows), use_cache=False)
    value, key = torch.stack(values), torch.stack(keys)
    assert torch.allclose(
        ss.residual.mean_values(loaded, given, None, batch_size=3), value.mean((1, 3)), atol=1e-6
    )
    assert torch.allclose(
        ss.residual.mean_values(loaded, given, 4, batch_size=3), value[:, :, :, 4].mean(1), atol=1e-6
    )
    assert torch.allclose(ss.residual.mean_keys(loaded, given, 4), key[:, :, :, 4].mean(1), atol=1e-6)
    site = ss.Site("exit", 1)
    mean = ss.mean_residual(loaded, given, site)[2].abs()
    found = ss.residual.massive_channels(loaded, given, site, 2, 3)
    assert mean[found].tolist() == sorted(mean.tolist(), reverse=True)[:3]


def test_positions_have_an_address_and_a_name() -> None:
    loaded, given = model(), windows()
    spectrum = ss.read_spectrum(loaded, bands=8)
    addresses: set[str] = set()
    for tokens in (ss.At(1), ss.At(2), "first"):
        for edit in (ss.spectra.scale(loaded.d, 2.0, tokens), ss.spectra.carry(loaded.d, 0, tokens)):
            addresses.add(json.dumps(as_edit(edit).address))
    assert len(addresses) == 6
    fills = [
        *(ss.spectra.scale(4, factor) for factor in (1.0, 2.0)),
        *(ss.spectra.amplify(4, factor) for factor in (1.0, 2.0)),
        *(ss.spectra.carry(4, source, "all") for source in (1, 2)),
    ]
    assert len({json.dumps(as_edit(edit).address) for edit in fills}) == 6, (
        "factors and sources are told apart"
    )
    cells = ss.grid(loaded, given, spectrum, layers=[0], remove=["dark"], tokens=[ss.At(1, 4)])
    assert any("at 1 4" in cell.name for cell in cells)


@torch.no_grad()
def test_the_first_tokens_alone_are_counted() -> None:
    """With fewer `tokens` than a window has: queries, random positions and candidates lie among the first."""
    loaded, given = model(), windows()
    ids = torch.stack(given.rows)
    moves = {"mask": ss.attention.MaskKey(5), "copy": ss.attention.CopyKey(6, source=4)}
    found = ss.compare(loaded, given, moves, positions=[0, 3], length=10, controls=2)
    maps = torch.stack(loaded.module(ids, output_attentions=True, use_cache=False).attentions, 1).double()
    expected = maps[:, :, :, 4:10, [0, 3]].mean(3).view(2, 2, 3, 4, 2).mean(1)
    table = found.attention[found.attention["intervention"] == "untouched"]
    assert table["attention"].to_numpy() == pytest.approx(expected.flatten().numpy(), abs=1e-6)
    assert set(found.attention["intervention"]) == {"untouched", *moves}, "and none of the controls"

    def places(of: str, count: int) -> set[int]:
        rows = ss.compare(loaded, given, {of: moves[of]}, positions=[0, 3], length=10, controls=count).table
        drawn = rows.loc[rows["control_of"] == of, "intervention"].unique()
        return {int(name.rsplit(" ", 1)[1]) for name in drawn}

    assert places("mask", 6) == {1, 2, 4, 6, 7, 8}, "with queries after them, none of those chosen"
    assert places("copy", 3) == {5, 7, 8}, "and none that is copied or comes before"
    for name, count in (("mask", 7), ("copy", 4)):
        with pytest.raises(ss.InputError, match=f"{count - 1} are left"):
            places(name, count)
    with pytest.raises(ss.InputError, match="expected some of 0 to 8"):
        ss.compare(loaded, given, {}, positions=[9], length=10)
    assert len(ss.compare(loaded, given, {}, positions=[8], length=10).table) == 2


@torch.no_grad()
def test_a_document_is_the_mean_over_its_predicted_tokens() -> None:
    loaded = model()
    rows = [*tiny_models.ids(1, 6), *tiny_models.ids(2, 24, seed=1)]
    found = ss.compare(loaded, ss.Windows.of_ids(rows, loaded, [0, 0, 3]), {"mask": ss.attention.MaskKey(0)})
    each = [float(nll(loaded, row[None])) for row in rows]
    untouched = found.table[found.table["intervention"] == "untouched"]
    expected = [(5 * each[0] + 23 * each[1]) / 28, each[2]]
    assert untouched["document"].tolist() == [0, 3]
    assert untouched["nll"].to_numpy() == pytest.approx(expected, abs=2e-6)
    masked = found.table[found.table["intervention"] == "mask"].set_index("document")
    summary = found.summary().set_index("intervention").loc["mask"]
    assert summary["baseline_nll"] == pytest.approx(np.mean(expected), abs=2e-6)
    assert summary["baseline_mass"] == pytest.approx(untouched["mass"].mean())
    delta = masked["nll"].to_numpy() - untouched["nll"].to_numpy()
    assert summary["delta_nll"] == pytest.approx(delta.mean()) and abs(delta.mean()) > 1e-5
    assert summary["documents"] == 2 and summary["delta_nll_low"] <= delta.mean() <= summary["delta_nll_high"]


@torch.no_grad()
def test_residuals_under_a_prefix_are_those_of_the_text() -> None:
    loaded, given = model("gpt2"), windows()
    ids, prefix = torch.stack(given.rows), ss.attention.Prefix((9, 4))
    found = ss.compare(loaded, given, {"prefix": prefix}, positions=[2])
    longer = torch.cat([torch.tensor([9, 4]).expand(4, -1), ids], 1)
    states = loaded.module(longer, use_cache=False, output_hidden_states=True).hidden_states
    norms = states[1][:, 2:].double().norm(dim=-1)
    others = norms[:, [k for k in range(LENGTH) if k != 2]].quantile(0.5, 1)
    here = found.residuals[
        (found.residuals["intervention"] == "prefix") & (found.residuals["site"] == "exit 0")
    ]
    expected = (norms[:, 2] / others).view(2, 2).mean(1)
    assert here["norm_ratio"].to_numpy() == pytest.approx(expected.numpy(), rel=1e-5)
    full = ss.compare(
        loaded, given, {"prefix": ss.attention.Prefix((5,) * (tiny_models.CONTEXT - LENGTH))}
    ).table
    assert np.isfinite(full["nll"]).all(), "a prefix may fill the context"
