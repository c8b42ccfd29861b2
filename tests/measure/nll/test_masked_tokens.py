"""Masked-token NLL, attention and energy of encoders: recomputed by transformers, scipy and a loop."""

import itertools
import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.special
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from nnsight import TransformersModel
from support import tiny_models
from torch import Tensor

import spectral_sinks as ss
from spectral_sinks.measure import memory

SITE = ss.Site("exit", 1)
SPECIAL = {tiny_models.BOS, tiny_models.EOS, 2, tiny_models.MASK}


@pytest.fixture(params=tiny_models.ENCODERS)
def family(request: Any) -> str:
    return request.param


def cut(family: str = "bert", length: int = 24, documents: int = 5) -> ss.Windows:
    texts = [tiny_models.text(2 * length, seed).replace("w3 ", "w4 ") for seed in range(documents)]
    return ss.cut(texts, tiny_models.model(family), length=length)


def rows_of(windows: ss.Windows) -> Tensor:
    return torch.stack(windows.rows)


def by_transformers(module: Any, ids: Tensor, model: ss.LanguageModel) -> list[float]:
    """One window at a time, through `labels`."""
    found: list[float] = []
    for row in ids:
        places = ss.nll.masked_positions(model, row[None])[0]
        seen, labels = row.clone(), torch.full_like(row, -100)
        seen[places], labels[places] = tiny_models.MASK, row[places]
        with torch.no_grad():
            found.append(float(module(seen[None], labels=labels[None]).loss))
    return found


def test_nll_is_the_loss_of_transformers(family: str) -> None:
    windows = cut(family)
    effect = ss.evaluate(tiny_models.model(family), windows, {}, batch_size=4)
    losses = by_transformers(tiny_models.plain(family), rows_of(windows), tiny_models.model(family))
    expected = np.array(losses).reshape(5, 2).mean(1)
    assert effect.table["nll"].to_numpy() == pytest.approx(expected, abs=1e-5)
    assert effect.baseline_nll == effect.nll and effect.delta_nll == 0.0
    assert effect.table["tokens"].tolist() == [2 * round(0.15 * 24)] * 5
    with torch.no_grad():
        whole = tiny_models.plain(family)(rows_of(windows), labels=rows_of(windows)).loss
    assert abs(float(whole) - effect.nll) > 0.003, "the NLL of tokens that are seen is another"


def test_a_filter_is_scored_at_the_masked_positions(family: str) -> None:
    model, windows = tiny_models.model(family), cut(family)
    edits = {SITE: ss.remove(ss.read_spectrum(model, bands=4).dark(0.5))}
    ids = rows_of(windows)
    places = ss.nll.masked_positions(model, ids)
    seen = ss.nll.masked_ids(model, ids)
    pick = places[..., None].expand(-1, -1, tiny_models.VOCABULARY)
    base, filtered = (
        scipy.special.log_softmax(tiny_models.logits(model, seen, e).gather(1, pick).double().numpy(), -1)
        for e in ({}, edits)
    )
    truth = ids.gather(1, places).numpy()[..., None]
    nll = -np.take_along_axis(filtered, truth, -1)[..., 0].mean(1).reshape(5, 2).mean(1)
    kl = (np.exp(base) * (base - filtered)).sum(-1).mean(1).reshape(5, 2).mean(1)
    agrees = (base.argmax(-1) == filtered.argmax(-1)).mean(1).reshape(5, 2).mean(1)
    effect = ss.evaluate(model, windows, edits, batch_size=3)
    assert effect.table["nll"].to_numpy() == pytest.approx(nll, abs=1e-5)
    assert effect.table["kl"].to_numpy() == pytest.approx(kl, abs=1e-5) and kl.min() > 1e-3
    assert effect.table["top1_agreement"].to_numpy() == pytest.approx(agrees)


def test_cells_in_batches_equal_cells_alone(family: str) -> None:
    model, windows = tiny_models.model(family), cut(family, 64)
    spectrum = ss.read_spectrum(model, bands=4)
    cells: dict[str, Any] = {"no-op": {}, "keep all": {SITE: ss.phi(spectrum, 1, 4)}}
    for kind in ("embedding", "attention", "exit", "mlp"):
        cells[kind] = {ss.Site(kind, 0 if kind == "embedding" else 2): ss.remove(spectrum.band(4))}
    together = ss.evaluate_all(model, windows, cells, batch_size=16)
    for name, edits in cells.items():
        alone = ss.evaluate(model, windows, edits, batch_size=1).table
        columns = [c for c in alone.columns if c != "top1_agreement"]
        np.testing.assert_allclose(together[name].table[columns], alone[columns], atol=2e-5)
    for name in ("no-op", "keep all"):
        assert (together[name].table["delta_nll"] == 0).all()
        assert together[name].sink_mass == together[name].baseline_sink_mass


def test_the_mean_that_fills_is_of_masked_windows(family: str) -> None:
    model, windows = tiny_models.model(family), cut(family)
    seen = ss.nll.masked_ids(model, rows_of(windows))
    read = ss.trace(model, seen, {}, [SITE], readout=lambda final, read, _: read[SITE])
    mean = ss.mean_residual(model, windows, SITE, batch_size=3)
    assert (mean - read.double().mean(0)).abs().max() <= 1e-6
    edits = {SITE: ss.remove(ss.read_spectrum(model, bands=4).subspace("1-4"), ss.Mean(mean))}
    same = {SITE: lambda x: mean.float().expand_as(x)}
    found, expected = (ss.evaluate(model, windows, e).table["nll"] for e in (edits, same))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_rows_of_a_batch_that_is_halved_stay_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows fit: the reference of a part of the batch is that of its masked positions."""
    model, windows = tiny_models.model("bert"), cut("bert")
    cells: dict[str, Any] = {str(i): {ss.Site("mlp", i): ss.rnd(32, 8, i)} for i in range(3)}
    whole = ss.evaluate_all(model, windows, cells)
    monkeypatch.setattr(memory, "TOKENS", {"cpu": 3 * 24})
    few = ss.evaluate_all(model, windows, cells)
    for name in cells:
        np.testing.assert_allclose(whole[name].table, few[name].table, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(st.integers(4, 96), st.integers(1, 5), st.integers(0, 2**32))
def test_what_is_masked(tokens: int, count: int, seed: int) -> None:
    model = tiny_models.model("bert")
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, tiny_models.VOCABULARY, (count, tokens), generator=draw)
    ids[:, 0], ids[:, -1] = tiny_models.BOS, tiny_models.EOS
    places = ss.nll.masked_positions(model, ids)
    assert places.shape == (count, max(1, round(0.15 * tokens)))
    assert (places.diff() > 0).all(), "in order, none twice"
    seen = ss.nll.masked_ids(model, ids)
    assert ((seen != ids).sum(1) == places.shape[1]).all()
    assert (seen.gather(1, places) == tiny_models.MASK).all()
    assert (ids.gather(1, places) > tiny_models.MASK).all(), "special tokens never"
    order = torch.randperm(count, generator=draw)
    assert torch.equal(ss.nll.masked_positions(model, ids[order]), places[order])
    for row, expected in zip(ids, places, strict=True):
        assert torch.equal(ss.nll.masked_positions(model, row[None])[0], expected)


def test_the_shortest_window_has_its_one_word_masked() -> None:
    """15 % of three tokens is less than half of one: at least one, and there may be no more."""
    row = torch.tensor([[tiny_models.BOS, 9, tiny_models.EOS]])
    assert ss.nll.masked_positions(tiny_models.model("bert"), row).tolist() == [[1]]


def test_masks_are_spread_over_windows_and_positions() -> None:
    model = tiny_models.model("bert")
    ids = torch.stack([torch.arange(4, 44)] * 600)
    ids[:, 0], ids[:, -1] = tiny_models.BOS, tiny_models.EOS
    ids[:, 5], ids[:, 6] = torch.arange(600) % 90 + 4, torch.arange(600) // 90 + 4  # no two are the same
    share = torch.zeros(600, 40).scatter(1, ss.nll.masked_positions(model, ids), 1).mean(0)
    assert share[0] == share[-1] == 0
    assert (share[1:-1] - 6 / 38).abs().max() < 5 * (6 / 38 / 600) ** 0.5


def test_the_choice_does_not_change_between_releases() -> None:
    """Numbers that were measured depend on it: another rule needs another name."""
    row = torch.tensor([[tiny_models.BOS, *range(10, 48), tiny_models.EOS]])
    assert ss.nll.masked_positions(tiny_models.model("bert"), row).tolist() == [[3, 4, 13, 21, 22, 37]]


def test_windows_open_with_cls_and_close_with_sep(family: str) -> None:
    model, text = tiny_models.model(family), "w10 w11 w12 w13 w14 w15 w16 w17 w18"
    with pytest.warns(ss.SpectralWarning, match="shorter than two tokens"):
        windows = ss.cut([text, "w20 w21", "w30"], model, length=6)
    with pytest.raises(ss.InputError, match="reads as a special token even in a text"):
        ss.cut("[CLS] w20 w21 [SEP]", model, length=6)  # this tokenizer has no other way to read the words
    assert [row.tolist() for row in windows.rows] == [
        [0, 10, 11, 12, 13, 1],
        [0, 14, 15, 16, 17, 1],
        [0, 20, 21, 1],
    ]
    assert windows.opens_with_bos and windows.record["closes_with_sep"]
    assert "15 %" in windows.record["masking"] and windows.record["tokens_dropped"] == 1
    bare = ss.cut([text], model, length=6, bos="never")
    assert bare.rows[0].tolist() == [10, 11, 12, 13, 14, 15] and not bare.record["closes_with_sep"]
    with pytest.raises(ss.InputError, match="windows of 3 tokens: nothing is left"):
        ss.cut([text], model, length=3)
    assert not {"masking", "closes_with_sep"} & set(ss.cut([text], tiny_models.model("llama")).record)


@pytest.mark.parametrize("position", [0, 3, -1])
def test_attention_by_head_is_the_mean_over_all_queries(family: str, position: int) -> None:
    model, windows = tiny_models.model(family), cut(family, 70)
    table = ss.attention_by_head(model, windows, position, batch_size=3)
    with torch.no_grad():
        maps = tiny_models.plain(family)(rows_of(windows), output_attentions=True).attentions
    assert len(table) == 5 * 3 * 4
    for row in table.itertuples():
        two = [maps[row.layer][2 * row.document + i, row.head] for i in (0, 1)]
        expected = np.mean([[float(m[i, position]) for i in range(70)] for m in two])
        assert row.attention == pytest.approx(expected, abs=1e-6)
    assert ss.attention_by_head(model, windows, position, length=70).equals(
        ss.attention_by_head(model, windows, position)
    )
    with pytest.raises(ss.InputError, match="64 tokens: a token of an encoder attends to its whole window"):
        ss.attention_by_head(model, windows, length=64)


def test_sink_mass_is_that_of_the_masked_window(family: str) -> None:
    model, windows = tiny_models.model(family), cut(family, 70)
    with torch.no_grad():
        seen = ss.nll.masked_ids(model, rows_of(windows))
        maps = tiny_models.plain(family)(seen, output_attentions=True).attentions
    expected = [float(layer[..., 0].mean()) for layer in maps]
    assert ss.evaluate(model, windows, {}).sink_mass == pytest.approx(expected, abs=1e-6)
    assert ss.evaluate(model, cut(family, 24), {}).sink_mass is None, "windows under 64 tokens"


def test_uniform_attention() -> None:
    module = tiny_models.plain("bert")
    for layer in module.bert.encoder.layer:
        torch.nn.init.zeros_(layer.attention.self.query.weight)
        torch.nn.init.zeros_(layer.attention.self.query.bias)
    model = ss.load(module, tokenizer=tiny_models.encoder_tokenizer())
    windows = cut(length=80)
    for position in (0, 40, -1):
        found = ss.attention_by_head(model, windows, position)["attention"]
        assert found.to_numpy() == pytest.approx(
            ss.attention.uniform_attention(position, 80, causal=False), abs=1e-7
        )
    assert ss.attention.uniform_attention(5, 80, causal=False) == 1 / 80
    verdict = ss.sink_verdict(model, windows, ss.read_spectrum(model, bands=4), draws=2)
    assert verdict.verdict == "no sink" and verdict.onset is None
    assert verdict.mass.value == pytest.approx(1 / 80)


@pytest.fixture(scope="module")
def planted() -> ss.LanguageModel:
    """Channel 0 marks [SEP] in the stream; keys of layer 0 read it alone, and queries always ask for it."""
    module = tiny_models.plain("bert")
    with torch.no_grad():
        words = module.bert.embeddings.word_embeddings.weight
        words[:, 0] = 0
        words[tiny_models.EOS, 0] = 50
        module.bert.embeddings.LayerNorm.weight.fill_(1)
        module.bert.embeddings.LayerNorm.bias.zero_()
        attention = module.bert.encoder.layer[0].attention.self
        for part in (attention.query, attention.key):
            part.weight.zero_()
            part.bias.zero_()
        attention.query.bias.fill_(1)
        attention.key.weight[:, 0] = 10
    return ss.load(module, tokenizer=tiny_models.encoder_tokenizer())


def test_a_planted_sep_sink_is_found(planted: ss.LanguageModel) -> None:
    windows = cut(length=64)
    sep, cls = (ss.attention_by_head(planted, windows, p).query("layer == 0")["attention"] for p in (-1, 0))
    assert sep.min() > 0.999 and cls.max() < 0.001
    gone = {ss.Site("keys", 0): lambda x: x * (torch.arange(32) > 0)}
    weights = ss.trace(
        planted, rows_of(windows), gone, readout=lambda final, read, weights: weights, attention=True
    )
    assert torch.allclose(weights[0], torch.full_like(weights[0], 1 / 64))


def test_a_layer_has_the_sink_above_twice_one_in_t(planted: ss.LanguageModel) -> None:
    """A weak sink at [CLS], which lies under twice the uniform attention of a causal model."""
    module = tiny_models.plain("bert")
    planted_layer = planted.module.bert.encoder.layer[0].attention.self
    with torch.no_grad():
        words = module.bert.embeddings.word_embeddings.weight
        words[:, 0] = 0
        words[tiny_models.BOS, 0] = 50
        module.bert.embeddings.LayerNorm.load_state_dict(
            planted.module.bert.embeddings.LayerNorm.state_dict()
        )
        attention = module.bert.encoder.layer[0].attention.self
        attention.load_state_dict(planted_layer.state_dict())
        attention.key.weight[:, 0] = 0.15
    model = ss.load(module, tokenizer=tiny_models.encoder_tokenizer())
    windows = cut(length=80)
    verdict = ss.sink_verdict(model, windows, ss.read_spectrum(model, bands=4), draws=2)
    mass = ss.evaluate(model, windows, {}).sink_mass
    assert mass is not None and 2 / 80 < mass[0] < 2 * ss.attention.uniform_attention()
    assert verdict.onset == 0


def test_logits_of_tokens_that_nobody_asks_for_are_never_computed(family: str) -> None:
    model = ss.load(tiny_models.plain(family), tokenizer=tiny_models.encoder_tokenizer())

    def never(*_: Any) -> None:
        raise AssertionError("the head ran over the vocabulary")

    handle = model.module.get_submodule(model.layout.unembedding).register_forward_pre_hook(never)
    assert np.isfinite(ss.evaluate(model, cut(family), {SITE: ss.rnd(32, 4)}).nll)
    handle.remove()


def test_energy_sees_sep_apart(family: str) -> None:
    model, windows = tiny_models.model(family), cut(family)
    spectrum = ss.read_spectrum(model, bands=4)
    table = ss.energy(model, windows, spectrum, [SITE], batch_size=3)
    x = ss.trace(model, rows_of(windows), {}, [SITE], readout=lambda final, read, _: read[SITE]).double()
    shares = (x @ spectrum.vectors).square().unflatten(-1, (4, 8)).sum(-1) / x.square().sum(-1, keepdim=True)
    spans = {"bos": slice(0, 1), "other": slice(1, -1), "sep": slice(23, 24)}
    assert set(table["position_class"]) == set(spans)
    for (document, kind), part in table.groupby(["document", "position_class"]):
        expected = shares[2 * document : 2 * document + 2, spans[str(kind)]].mean((0, 1))
        assert part["share"].to_numpy() == pytest.approx(expected.numpy(), abs=1e-6)
        norms = x[2 * document : 2 * document + 2, spans[str(kind)]].norm(dim=-1).quantile(0.5, 1)
        assert part["norm"].to_numpy() == pytest.approx(float(norms.mean()), rel=1e-5)


def test_the_screen_is_the_derivative(family: str) -> None:
    model = ss.load(tiny_models.plain(family).double(), tokenizer=tiny_models.encoder_tokenizer())
    windows, spectrum = cut(family), ss.read_spectrum(model, bands=4)
    table = ss.nll.first_order(model, windows, spectrum, batch_size=4).set_index(["layer", "band"])[
        "estimate"
    ]
    step = 1e-3  # ModernBERT rotates its queries in single precision
    for layer, band in itertools.product(range(3), (1, 4)):
        v = spectrum.band(band).orthonormal()
        cells: dict[str, Any] = {
            sign: {ss.Site("exit", layer): lambda x, s=s, v=v: x - s * step * (x @ v) @ v.T}
            for sign, s in (("up", 1), ("down", -1))
        }
        effects = ss.evaluate_all(model, windows, cells)
        slope = (effects["up"].nll - effects["down"].nll) / (2 * step)
        assert table[layer, band] == pytest.approx(slope, rel=2e-3, abs=1e-4)


def test_a_sweep_stores_what_evaluate_finds(tmp_path: Path) -> None:
    model, windows = tiny_models.model("roberta"), cut("roberta")
    cells = ss.grid(model, windows, ss.read_spectrum(model, bands=4), layers=[0, 2], remove=["4"], controls=1)
    sweep = ss.Sweep.of(model, windows, cells)
    table = ss.sweep(sweep, tmp_path / "out").table
    effects = ss.evaluate_all(model, windows, {cell.name: cell.edits for cell in cells})
    for name, effect in effects.items():
        rows = table[table["name"] == name].sort_values("document")
        np.testing.assert_allclose(rows["nll"], effect.table["nll"], atol=2e-5)
    other = replace(model, tokenizer=tiny_models.encoder_tokenizer())
    assert ss.Sweep.of(other, windows, cells).addresses == sweep.addresses
    seen = [sweep.addresses]
    other.tokenizer.add_special_tokens({"extra_special_tokens": ["w9", "[MASK]"]})
    seen.append(ss.Sweep.of(other, windows, cells).addresses)
    other.tokenizer.mask_token = "w9"
    seen.append(ss.Sweep.of(other, windows, cells).addresses)
    assert len(set(itertools.chain(*seen))) == 3 * len(cells), "the special tokens and the mask token count"


def test_an_nnsight_model_works(family: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        wrapped = TransformersModel(
            tiny_models.plain(family),
            task="fill-mask",
            tokenizer=tiny_models.encoder_tokenizer(),
        )
    model, windows = ss.load(wrapped), cut(family)
    assert ss.evaluate(model, windows, {}).nll == ss.evaluate(tiny_models.model(family), windows, {}).nll


@pytest.mark.parametrize("tokenizer", [None, tiny_models.encoder_tokenizer(mask=False)])
def test_without_a_mask_token(tokenizer: Any) -> None:
    """Spectra, energy and attention need none; the NLL says what is missing."""
    model = ss.load(tiny_models.plain("bert"), tokenizer=tokenizer)
    windows = ss.Windows.of_ids(rows_of(cut()), model)
    assert len(ss.energy(model, windows, ss.read_spectrum(model, bands=4)))
    for call in (ss.evaluate_all, lambda *a: ss.nll.first_order(*a[:2], ss.read_spectrum(model, bands=4))):
        with pytest.raises(ss.InputError, match=r"tokenizer that has a mask token.*load\(model, tokenizer="):
            call(model, windows, {"no-op": {}})


def refused(call: Any, message: str) -> None:
    with pytest.raises(ss.InputError, match=message):
        call()


def test_what_has_no_meaning_is_refused() -> None:
    model, windows = tiny_models.model("bert"), cut()
    spectrum = ss.read_spectrum(model, bands=4)
    unknown = ss.Windows.of_ids(torch.tensor([[0, 2, 2, 2, 2, 2, 2, 5, 2, 2, 2, 1]]), model)
    refused(
        lambda: ss.evaluate(model, unknown, {}),
        "a window of 12 tokens has 1 that are not special, and 2 are to be masked",
    )
    refused(
        lambda: ss.generate(model, tiny_models.ids(1)),
        "predicts masked tokens: only a causal model continues",
    )
    refused(
        lambda: ss.nll.continuation_nll(model, tiny_models.ids(1), tiny_models.ids(1)[None]),
        "only a causal model",
    )
    refused(
        lambda: ss.residual.band_lens(model, windows, {"u": spectrum}),
        "reads through cls.predictions.transform",
    )
    refused(lambda: tiny_models.model("llama").mask, "is a causal language model: it masks nothing")
    swap = ss.remove(spectrum.dark(0.2), ss.Swap())
    refused(lambda: ss.evaluate(model, windows, {SITE: swap}), "'swap' in an encoder.*'all-but-first'")
    spared = ss.remove(spectrum.dark(0.2), ss.Swap(), "all-but-first")
    assert np.isfinite(ss.evaluate(model, windows, {SITE: spared}).nll)


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], family: str) -> None:
    folder, text = tiny_models.save(tmp_path / "model", family), tmp_path / "text.txt"
    text.write_text("|".join(tiny_models.text(128, seed) for seed in range(3)))
    shared = ["--text", text, "--separator", "|", "--length", "64", "--bands", "4", "--json"]
    ran = tiny_models.run(capsys, "nll", folder, "--layer", 1, "--remove", "4", "--controls", 2, *shared)
    assert ran.status == 0, ran.err
    found = json.loads(ran.out)
    model = ss.load(folder)
    windows = ss.cut(text.read_text().split("|"), model, length=64)
    folded = ss.read_spectrum(model, convention="folded", bands=4)
    effect = ss.evaluate(model, windows, {SITE: ss.remove(folded.band(4))})
    assert found["nll"] == pytest.approx(effect.nll, abs=1e-6)
    assert found["sink_mass"] == pytest.approx(effect.sink_mass, abs=1e-6)
    assert "15 %" in found["masking"] and found["reads_through"] == model.reads_through
    assert found["tokens"] == 6 * 10 and found["opens_with_bos"]
    ran = tiny_models.run(capsys, "nll", folder, *shared[:-1])
    assert ran.status == 0 and "nats per masked token" in ran.out
    ran = tiny_models.run(capsys, "energy", folder, *shared)
    assert ran.status == 0 and {row["position_class"] for row in json.loads(ran.out)["rows"]} == {
        "bos",
        "other",
        "sep",
    }
    ran = tiny_models.run(capsys, "info", folder, "--json")
    assert ran.status == 0 and json.loads(ran.out)["causal"] is False
    ran = tiny_models.run(capsys, "spectrum", folder, "--json", "--bands", 4)
    assert ran.status == 0 and json.loads(ran.out)["reads_through"] == model.reads_through


def test_a_classifier_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_models.plain("bert").config
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path)
    tiny_models.encoder_tokenizer().save_pretrained(tmp_path)
    for command in ("nll", "energy", "info", "spectrum"):
        ran = tiny_models.run(capsys, command, tmp_path)
        said = "BertForSequenceClassification (bert) has a head that is not over the vocabulary"
        assert ran.status == 2 and said in ran.err
