"""Planted sinks are found with what was planted, their randomised twins have none, numbers are recomputed."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import tiny_models
from support.planted_sinks import D, sinking
from torch import Tensor

import spectral_sinks as ss

NAMED = {
    *("position", "token", "share_of_documents", "attention_mass"),
    *("norm_ratio", "dark_share", "other_dark_share"),
}
"""What `sinks --json` says of each sink at least."""


@pytest.mark.parametrize("band", [1, 10, 20])
def test_a_planted_sink_at_the_first_position(band: int) -> None:
    model, spectrum, windows = sinking(band)
    found = ss.find_sinks(model, windows, spectrum, draws=5)
    (sink,) = found.sinks
    assert (sink.position, sink.token, sink.documents, sink.share_of_documents) == (0, "0", 3, 1.0)
    assert found.sink_rate.value == 1 and sink.attention_mass.value > 0.9
    assert sink.uniform_mass == pytest.approx(ss.attention.uniform_attention())
    assert (sink.dark, sink.dark_share.value > 0.9) == (band == 20, band == 20)
    assert sink.other_dark_share.value < 0.2 and 0 < sink.dark_share.least <= sink.dark_share.most < 0.5
    assert sink.norm_ratio.value > 4 and found.high_norm_mass.value == pytest.approx(found.total_mass.value)
    assert (sink.onset_layer, sink.erasure_layer, sink.norm_onset, sink.norm_erasure) == (0, None, -1, None)
    assert found.onset_layer == 0 and not found.dispersed and found.repeated == 0
    assert repr(sink).startswith("<Sink at position 0 ('0') in 3 documents: layers 0 to the last; at layer ")


def test_onset_and_erasure() -> None:
    """Queries that do not ask in layers 0 and 2, and a last layer that never sees what the norm was."""
    model, spectrum, windows = sinking(20)
    layers = model.module.model.layers
    for layer in (layers[0], layers[2]):
        layer.self_attn.q_proj.bias.data.zero_()
    dark = ss.remove(spectrum.dark())
    handle = layers[2].register_forward_pre_hook(lambda _, given: (dark(given[0]), *given[1:]))
    (sink,) = ss.find_sinks(model, windows, spectrum, draws=2).sinks
    handle.remove()
    assert (sink.onset_layer, sink.erasure_layer, sink.layer) == (1, 2, 1)
    assert (sink.norm_onset, sink.norm_erasure) == (-1, 2)


def test_no_sink_in_the_twin_that_does_not_ask() -> None:
    model, spectrum, windows = sinking(20)
    for layer in model.module.model.layers:
        layer.self_attn.q_proj.bias.data.zero_()
    found = ss.find_sinks(model, windows, spectrum, draws=2)
    assert found.sinks == () and found.onset_layer is None and found.sink_rate.value == 0
    assert found.total_mass.value == 0 and not found.members.any()
    assert found.by_head()["first"].to_numpy() == pytest.approx(ss.attention.uniform_attention(), abs=1e-4)
    assert found.high_norm_mass.value == pytest.approx(ss.attention.uniform_attention(), abs=1e-4)
    assert found.uniform_high_norm_mass == pytest.approx(ss.attention.uniform_attention())
    assert not found.dispersed, "high norm without attention, and no text repeats a token"


def test_a_sink_that_goes_with_its_token() -> None:
    """Texts that open with anything, and hold the token somewhere, or do not."""
    model, spectrum, _ = sinking(20)
    ids = torch.randint(1, 90, (6, 64), generator=torch.Generator().manual_seed(0))
    places = {0: 5, 1: 12, 3: 20, 4: 9}
    for row, place in places.items():
        ids[row, place] = 0
    ids[5, 60] = 0  # too late to count
    given = ss.Windows.of_ids(ids, model)
    found = ss.find_sinks(model, given, spectrum, draws=5)
    (sink,) = found.sinks
    assert (sink.position, sink.token, sink.documents) == (None, "0", 4)
    assert sink.share_of_documents == pytest.approx(4 / 6) and sink.dark
    assert repr(sink).startswith("<Sink at '0' in 4 documents: ")
    assert {(int(w), int(k)) for w, k in np.argwhere(found.members)} == set(places.items())
    maps = eager(model, ids)
    alphas = [maps[sink.layer, w, :, k:, k].mean() for w, k in places.items()]
    assert sink.attention_mass.value == pytest.approx(float(torch.stack(alphas).mean()), abs=1e-5)
    uniform = np.mean([ss.attention.uniform_attention(k) for k in places.values()])
    assert sink.uniform_mass == pytest.approx(uniform)
    total = [maps[:, w, :, :, k].sum() for w, k in places.items()]
    assert found.total_mass.value == pytest.approx(float(sum(total)) / (3 * 6 * 5 * 64), abs=1e-5)
    ids[:, 0] = 0
    (first,) = ss.find_sinks(model, ss.Windows.of_ids(ids, model), spectrum, draws=2).sinks[:1]
    assert first.position == 0, "and a shared first token is listed by its position"


def eager(model: ss.LanguageModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found = model.module(ids, output_attentions=True, use_cache=False)
    return torch.stack(found.attentions)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "gpt_oss"])
def test_numbers_recomputed(family: str) -> None:
    model, epsilon = (
        ss.load(tiny_models.plain(family), tokenizer=tiny_models.tokenizer()),
        0.09,
    )
    ids, owner = tiny_models.ids(5, 40, seed=8), [0, 1, 1, 2, 3]
    spectrum = ss.read_spectrum(model, bands=8)
    found = ss.find_sinks(
        model,
        ss.Windows.of_ids(ids, model, owner),
        spectrum,
        length=32,
        epsilon=epsilon,
        draws=3,
        batch_size=2,
    )
    maps = eager(tiny_models.model(family), ids[:, :32]).double()
    alpha = torch.stack([maps[..., k:, k].mean(-1) for k in range(32)], -1)  # layers windows heads tokens

    def documents(values: Any) -> float:
        table: Any = np.array(
            [np.mean([float(values[w]) for w in range(5) if owner[w] == d]) for d in range(4)]
        )
        return float(table.mean())

    above = (alpha > epsilon).any(0).any(1)
    at = [k for k in range(17) if len({owner[w] for w in range(5) if above[w, k]}) >= 2]
    assert sorted(s.position for s in found.sinks if s.position is not None) == at and at
    rest = 1 - maps.sum(-1).mean((0, 2, 3))
    assert found.to_sink_logit.value == pytest.approx(documents(rest) if family == "gpt_oss" else 0, abs=1e-6)
    rates = (alpha[..., 0] > epsilon).double().mean((0, 2))
    assert found.sink_rate.value == pytest.approx(documents(rates))
    members = torch.as_tensor(found.members)
    total = (maps.sum(-2) * members[:, None]).sum(-1).mean((0, 2)) / 32
    assert found.total_mass.value == pytest.approx(documents(total), abs=1e-6)
    drawn = [
        ss.random_subspace(model.d, spectrum.dark().rank, seed).orthonormal().double() for seed in range(3)
    ]
    for sink in found.sinks:
        k = sink.position
        if k is None:
            continue
        by_layer = [documents(layer) for layer in alpha[..., k].mean(2)]
        assert sink.layer == int(np.argmax(by_layer))
        assert sink.attention_mass.value == pytest.approx(max(by_layer), abs=1e-6)
        owners = [
            {owner[w] for w in range(5) if (alpha[layer, w, :, k] > epsilon).any()} for layer in range(3)
        ]
        assert sink.share_of_documents == len(set.union(*owners)) / 4
        counts = [len(o) for o in owners]
        high = [layer for layer in range(3) if counts[layer] >= max(counts) / 2]
        assert sink.onset_layer == high[0]
        assert sink.erasure_layer == (high[-1] + 1 if high[-1] < 2 else None)
        site = ss.Site("exit", sink.layer - 1) if sink.layer else ss.Site("embedding")
        x = ss.trace(
            model, ids[:, :32], {}, [site], readout=lambda f, read, _, site=site: read[site]
        ).double()
        norm = x.norm(dim=-1)
        others = [
            norm[w][~members[w]].median() if (~members[w]).sum() % 2 else np.median(norm[w][~members[w]])
            for w in range(5)
        ]
        assert sink.norm_ratio.value == pytest.approx(
            documents([norm[w, k] / others[w] for w in range(5)]), rel=1e-4
        )

        def share(basis: Tensor, x: Tensor = x) -> Tensor:
            return (x @ basis.double()).square().sum(-1) / x.square().sum(-1)

        dark = share(spectrum.dark().orthonormal())
        assert sink.dark_share.value == pytest.approx(documents(dark[:, k]), abs=1e-5)
        rest = [dark[w][~members[w]].mean() for w in range(5)]
        assert sink.other_dark_share.value == pytest.approx(documents(rest), abs=1e-5)
        random = [documents(share(basis)[:, k]) for basis in drawn]
        assert (sink.dark_share.least, sink.dark_share.most) == pytest.approx(
            (min(random), max(random)), abs=1e-5
        )


@pytest.mark.parametrize("family", ["mistral", "gpt_oss"])
def test_tables_and_means_recomputed(family: str) -> None:
    """Where windows slide and rows sum to less than one, and documents have one window or two."""
    model, epsilon, owner = tiny_models.model(family), 0.09, np.array([0, 1, 1, 2, 3])
    ids = tiny_models.ids(5, 32, seed=8)
    windows = ss.Windows.of_ids(ids, model, owner.tolist())
    found = ss.find_sinks(
        model, windows, ss.read_spectrum(model, bands=8), length=32, epsilon=epsilon, draws=2
    )
    maps = eager(model, ids).double().transpose(0, 1).numpy()  # windows layers heads queries keys

    def documents(values: Any) -> Any:
        return np.stack([values[owner == d].mean(0) for d in range(4)])

    members = found.members[:, None, None, None, :]
    heads = found.by_head()
    assert list(zip(heads["document"], heads["layer"], heads["head"], strict=True)) == [
        (d, layer, head) for d in range(4) for layer in range(3) for head in range(4)
    ]
    for column, values in (
        ("mass", (maps * members).sum(-1).mean(-1)),
        ("first", maps[..., 0].mean(-1)),
        ("to_sink_logit", 1 - maps.sum(-1).mean(-1)),
    ):
        assert heads[column].to_numpy() == pytest.approx(documents(values).ravel(), abs=1e-6)
    seeing = (maps[..., 0] > 0).sum(-1)
    of_seen = documents((maps[..., 0].sum(-1) / seeing > epsilon).mean((1, 2))).mean()
    assert found.sink_rate_of_seen.value == pytest.approx(of_seen)
    assert of_seen > found.sink_rate.value and seeing.min() == 8
    even = [[row[: i + 1].mean() for i in range(32)] for row in found.members]
    assert found.members.any() and found.uniform_total_mass == pytest.approx(np.mean(even))
    alpha = np.stack([maps[..., k:, k].mean(-1) for k in range(32)], -1)
    rates = documents((alpha > epsilon).mean((1, 2))).mean(0)
    assert found.rates()["mean"].to_numpy() == pytest.approx(rates)
    site = ss.Site("exit", 1)
    norm = ss.trace(model, ids, {}, [site], readout=lambda final, read, _: read[site]).norm(dim=-1)
    ratio = documents(norm.numpy() / np.median(norm[:, 1:].numpy())).mean(0)
    norms = found.norms()
    assert norms.loc[norms["layer"] == 1, "norm_ratio"].to_numpy() == pytest.approx(ratio, rel=1e-4)
    assert norms["layer"].unique().tolist() == [-1, 0, 1, 2]


def test_above_epsilon_is_strictly_above_it() -> None:
    """Two tokens and no questions: alpha_0 is 3/4 and alpha_1 is 1/2, to the bit."""
    model, spectrum, _ = sinking(20)
    for layer in model.module.model.layers:
        layer.self_attn.q_proj.bias.data.zero_()
    windows = ss.Windows.of_ids([[3, 4], [5, 6], [7, 8]], model)
    for epsilon, positions in ((0.75, []), (0.7499, [0]), (0.5, [0]), (0.4999, [0, 1])):
        with pytest.warns(ss.SpectralWarning, match="repeat one token"):  # one of two fills half
            found = ss.find_sinks(model, windows, spectrum, length=2, epsilon=epsilon, draws=2)
        assert [sink.position for sink in found.sinks] == positions, "half of the queries are enough"
        assert found.sink_rate.value == found.sink_rate_of_seen.value == (0 in positions)
        assert found.rates()["mean"].tolist() == [0 in positions, 1 in positions]


def test_a_sink_of_half_of_the_documents() -> None:
    model, spectrum, windows = sinking(20)
    ids = torch.cat([torch.stack(windows.rows), torch.stack(windows.rows)[:1]])
    ids[:2, 0] = torch.tensor([5, 6])
    (sink,) = ss.find_sinks(model, ss.Windows.of_ids(ids, model), spectrum, draws=2).sinks
    assert (sink.position, sink.token, sink.documents, sink.share_of_documents) == (0, None, 2, 0.5)
    assert sink.tokens == {"0": 2, "5": 1, "6": 1} and (sink.norm_onset, sink.norm_erasure) == (-1, None)
    ids[2, 0] = 7
    assert ss.find_sinks(model, ss.Windows.of_ids(ids, model), spectrum, draws=2).sinks == ()


@pytest.mark.parametrize(
    ("single", "fourfold", "without", "documents"),
    [
        (3, 3, 0, 3),  # half of those that hold it
        (3, 4, 0, None),
        (2, 0, 2, None),  # three at least
        (3, 0, 9, 3),  # a quarter of all
        (3, 0, 10, None),
    ],
)
def test_in_how_many_documents_a_token_is_a_sink(
    single: int, fourfold: int, without: int, documents: int | None
) -> None:
    """Four copies in a row share the attention, and none has more than epsilon."""
    model, spectrum, _ = sinking(20)
    count = single + fourfold + without
    ids = torch.randint(1, 90, (count, 64), generator=torch.Generator().manual_seed(0))
    ids[range(single), range(9, 9 + single)] = 0
    ids[single : single + fourfold, 5:9] = 0
    found = ss.find_sinks(model, ss.Windows.of_ids(ids, model), spectrum, draws=2).sinks
    assert [(sink.token, sink.documents) for sink in found] == (
        [] if documents is None else [("0", documents)]
    )


def test_a_document_has_a_sink_where_any_of_its_windows_has() -> None:
    model, spectrum, _ = sinking(20)
    ids = torch.randint(1, 90, (9, 64), generator=torch.Generator().manual_seed(0))
    ids[[0, 3, 6], [9, 10, 11]] = 0
    (sink,) = ss.find_sinks(model, ss.Windows.of_ids(ids, model, [0, 0, 0, 1, 1, 1, 2, 2, 2]), spectrum).sinks
    assert (sink.token, sink.documents, sink.share_of_documents) == ("0", 3, 1.0)
    one = ss.Windows.of_ids(ids[:7], model, [0, 1, 2, 0, 3, 4, 0])
    assert ss.find_sinks(model, one, spectrum, draws=2).sinks == (), "three windows of one document"


def test_every_part_of_dark_and_of_dispersal_is_needed() -> None:
    model, spectrum, windows = sinking(20)
    found = ss.find_sinks(model, windows, spectrum, draws=2)
    share, other = ss.stats.Estimate(0.6, 0.5, 0.7, 0.1, 0.4), ss.stats.Estimate(0.2, 0.1, 0.45)
    for change, dark in (
        ({}, True),
        ({"share": replace(share, most=0.5)}, False),
        ({"share": replace(share, low=0.39)}, False),
        ({"others": replace(other, high=0.5)}, False),
    ):
        raw = ss.sinks.DarkShare(**{"share": share, "others": other} | change)
        sink = replace(found.sinks[0], conventions={"raw": raw})
        assert sink.dark == raw.dark == dark, change
    total = ss.stats.Estimate(0.25, 0.2, 0.3)
    for repeated, mass, dispersed in ((1, 0.51, True), (1, 0.5, False), (0, 0.9, False)):
        high = ss.stats.Estimate(mass, mass, mass)
        one = replace(found, repeated=repeated, high_norm_mass=high, total_mass=total)
        assert one.dispersed == dispersed


@pytest.fixture(scope="module")
def sinklet() -> tuple[ss.LanguageModel, ss.Spectrum]:
    return ss.load(), ss.read_spectrum()


def test_the_embedded_model_has_one_dark_sink(sinklet: tuple[ss.LanguageModel, ss.Spectrum]) -> None:
    model, spectrum = sinklet
    found = ss.find_sinks(model, ss.cut(ss.documents(limit=8), model, length=64), spectrum)
    (sink,) = found.sinks
    assert (sink.position, sink.token, sink.share_of_documents) == (0, "<bos>", 1.0)
    assert sink.dark and sink.dark_share.value > 4 * sink.dark_share.most
    assert 0.35 < found.sink_rate.value < 0.55 and found.onset_layer == 1
    assert sink.norm_onset == 0 and sink.norm_ratio.value > 6
    assert not found.massive["massive"].any() and set(found.massive["position"]) == {0}


def test_all_equal_tokens_are_dispersal_and_not_the_end_of_the_sink(
    sinklet: tuple[ss.LanguageModel, ss.Spectrum],
) -> None:
    model, spectrum = sinklet
    assert model.bos is not None
    equal = ss.Windows.of_ids(torch.full((2, 64), model.bos), model)
    with pytest.warns(
        ss.SpectralWarning,
        match="2 of 2 windows repeat one token; dispersal: .* does not mean",
    ):
        found = ss.find_sinks(model, equal, spectrum, draws=2)
    assert found.sink_rate.value == 0 and found.sinks == () and found.dispersed
    high = found.residuals.high(found.levels)
    assert high[:, 1:].all() and not high[:, 0].any(), "all of them, from the exit of layer 0 on"
    assert found.high_norm_mass.value == pytest.approx(5 / 6, abs=1e-6), "all attention of layers 1 to 5"
    assert found.high_norm_share == pytest.approx(5 / 6) == found.uniform_high_norm_mass
    record = found.record()
    assert record["dispersal"] and record["repeated_windows"] == 2 and record["sinks"] == []
    plain = tiny_models.model()
    with pytest.warns(
        ss.SpectralWarning, match="1 of 1 windows repeat one token; their sink rate says little"
    ):
        found = ss.find_sinks(
            plain, ss.Windows.of_ids([[9] * 64], plain), ss.read_spectrum(plain, bands=8), draws=2
        )
    assert not found.dispersed and found.high_norm_mass.value == 0


def test_one_document_has_no_interval_and_no_verdict() -> None:
    model, spectrum, windows = sinking(20)
    found = ss.find_sinks(model, ss.Windows.of_ids(windows.rows[:1], model), spectrum, draws=2)
    (sink,) = found.sinks
    assert sink.dark is None and np.isnan(sink.dark_share.low) and sink.dark_share.value > 0.9
    assert found.record()["sinks"][0]["dark"] is None


ROLES = ("template", "user", "template", "assistant")


def test_attention_by_role_recomputed() -> None:
    """Roles of tokens in turn; the last document has no assistant, and two windows are of one document."""
    model = tiny_models.model("gpt_oss")
    ids, owner = tiny_models.ids(5, 40, seed=8), [0, 1, 1, 2, 3]
    roles = [[ROLES[(k // 3) % (4 if w < 4 else 2)] for k in range(40)] for w in range(5)]
    given = ss.Windows.of_ids(ids, model, owner, roles=roles)
    found = ss.find_sinks(model, given, ss.read_spectrum(model, bands=8), length=32, epsilon=0.09, draws=2)
    table = found.by_role().set_index("role")
    maps = eager(model, ids[:, :32]).double().numpy()  # layers windows heads queries keys
    alpha = np.stack([maps[..., k:, k].mean(-1) for k in range(32)], -1).mean((0, 2))
    total = maps.sum(-2).sum((0, 2))
    uniform = np.array([sum(1 / (q + 1) for q in range(k, 32)) / 32 for k in range(32)])
    documents = [[0], [1, 2], [3], [4]]
    assert found.members.any() and found.roles is not None and {len(row) for row in found.roles} == {32}
    for role in ("template", "user", "assistant"):
        at = [np.array([said == role for said in row[:32]]) for row in roles]
        row, holding = table.loc[role], [d for d in documents if at[d[0]].any()]
        assert (row["documents"], row["tokens"]) == (len(holding), sum(int(here.sum()) for here in at))
        assert row["sink_tokens"] == sum(int((a & m).sum()) for a, m in zip(at, found.members, strict=True))
        received = [np.mean([alpha[w][at[w]].mean() for w in d]) for d in holding]
        assert row["attention"] == pytest.approx(np.mean(received), rel=1e-5)
        assert row["attention_low"] == pytest.approx(ss.stats.mean_interval(received)[0], rel=1e-4)
        share = [np.mean([total[w][at[w]].sum() / total[w].sum() for w in d]) for d in documents]
        assert row["share"] == pytest.approx(np.mean(share), rel=1e-5)
        # Among four documents many resampled means equal the mean, so rounding moves the bounds of BCa
        assert row["share_high"] == pytest.approx(ss.stats.mean_interval(share)[1], rel=3e-2)
        even = [np.mean([uniform[at[w]].sum() for w in d]) for d in documents]
        assert row["uniform_share"] == pytest.approx(np.mean(even))
        sinks = [
            np.mean([total[w][at[w] & found.members[w]].sum() / total[w].sum() for w in d]) for d in documents
        ]
        assert row["sink_share"] == pytest.approx(np.mean(sinks), rel=1e-5)
    assert table["share"].sum() == pytest.approx(1) == table["uniform_share"].sum()
    assert table["share"].is_monotonic_decreasing and table.loc["assistant", "documents"] == 3
    assert found.record()["roles"] == found.by_role().to_dict("records")


def test_windows_without_roles() -> None:
    model, spectrum, windows = sinking(20)
    found = ss.find_sinks(model, windows, spectrum, draws=2)
    assert found.roles is None and "roles" not in found.record()
    with pytest.raises(ss.InputError, match=r"have no roles: cut chats with ss.cut\(chats, model, chat"):
        found.by_role()


def test_tables_and_record() -> None:
    model, spectrum, windows = sinking(20)
    found = ss.find_sinks(model, windows, spectrum, draws=2)
    heads, rates, norms = found.by_head(), found.rates(), found.norms()
    assert len(heads) == 3 * 3 * 5 and heads["mass"].to_numpy() == pytest.approx(heads["first"].to_numpy())
    assert len(rates) == 64 and rates["mean"].iloc[0] == 1 and (rates["mean"].iloc[1:32] == 0).all()
    first = norms[norms["position"] == 0].set_index("layer")["norm_ratio"]
    usual = np.median(found.residuals.norm[:, 2, 1:])
    assert first[1] == pytest.approx(found.residuals.norm[:, 2, 0].mean() / usual, rel=1e-5)
    record = json.loads(json.dumps(found.record()))
    assert record["epsilon"] == 0.3 and record["tokens_per_window"] == 64 and record["onset_layer"] == 0
    assert record["sink_rate"] == 1 and len(record["sink_rate_by_position"]) == 64
    assert set(record["sinks"][0]) > NAMED


@pytest.mark.parametrize(
    ("options", "message"), [({"epsilon": 1.0}, "epsilon 1.0"), ({"epsilon": -0.1}, "epsilon")]
)
def test_an_epsilon_that_no_head_can_meet(options: Any, message: str) -> None:
    model, spectrum, windows = sinking(20)
    with pytest.raises(ss.InputError, match=message):
        ss.find_sinks(model, windows, spectrum, **options)


def test_a_spectrum_of_another_width() -> None:
    _, spectrum, _ = sinking(20)
    model = tiny_models.model()
    with pytest.raises(ss.InputError, match=f"width {D} for LlamaForCausalLM of width 32"):
        ss.find_sinks(model, ss.Windows.of_ids(tiny_models.ids(2, 64), model), spectrum)


def test_the_figure_with_sinks_and_without(tmp_path: Path) -> None:
    model, spectrum, windows = sinking(20)
    for place in range(2):
        found = ss.find_sinks(model, windows, spectrum, draws=2)
        path = tmp_path / f"{place}.png"
        tables = (found.by_head(), found.rates(), found.norms())
        ss.figures.sinks(*tables, path, epsilon=0.3, found=found.summary())
        assert path.stat().st_size > 10_000
        model.module.model.layers.apply(
            lambda part: part.bias.data.zero_() if hasattr(part, "bias") and part.bias is not None else None
        )
