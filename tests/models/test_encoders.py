"""Bidirectional encoders: loaded by architecture, every site equal to hooks, the spectrum of their head."""

import copy
import json
import pickle
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
import transformers
from safetensors.torch import load_file, save_file
from support import tiny_models
from support.reference_hooks import hooked
from torch import Tensor

import spectral_sinks as ss
from spectral_sinks.models.attention_sdpa import whole_maps
from spectral_sinks.models.weights import residual_weights

IDS = tiny_models.ids()
KINDS = ("queries", "keys", "values", "attention", "mlp-input", "mlp", "exit")
SITES = [ss.Site("embedding"), ss.Site("head", 1, 2), *(ss.Site(kind, 1) for kind in KINDS)]
EVERYWHERE = [ss.Site(s.kind, layer, s.head) for layer in range(3) for s in SITES if s.kind != "embedding"]
DENSE = {"bert": "cls.predictions.transform.dense", "roberta": "lm_head.dense"}


@pytest.fixture(params=tiny_models.ENCODERS)
def family(request: Any) -> str:
    return request.param


def untouched(family: str) -> Tensor:
    with torch.no_grad():
        return tiny_models.plain(family)(IDS).logits


def test_the_parts_are_found_and_add_up(family: str) -> None:
    model = tiny_models.model(family)
    model.check()
    assert model.tested and not model.causal
    assert (model.layers, model.d, model.heads, model.key_heads, model.head_size) == (3, 32, 4, 4, 8)
    assert (model.bos, model.sep, model.mask) == (tiny_models.BOS, tiny_models.EOS, tiny_models.MASK)
    assert model.context == tiny_models.CONTEXT, "positions of RoBERTa begin behind the padding id"
    assert model.tied == (family != "modernbert untied")
    dense = DENSE.get(family, "head.dense")
    assert dense in model.reads_through and model.layout.final_norm in model.reads_through
    assert ("model.final_norm" in model.reads_through) == (model.family == "modernbert")
    assert not tiny_models.model("llama").reads_through and tiny_models.model("llama").causal


def test_the_longest_window_that_is_offered_runs(family: str) -> None:
    ids = tiny_models.ids(1, tiny_models.CONTEXT) + 1  # nothing is padding
    ids[ids == tiny_models.VOCABULARY] = 5
    ids[ids == 2] = 6
    with torch.no_grad():
        tiny_models.plain(family)(ids)
        if family in ("bert", "roberta"):  # the others have no table of positions
            with pytest.raises((IndexError, RuntimeError)):
                tiny_models.plain(family)(torch.cat([ids, ids[:, :1]], dim=1))


@pytest.mark.parametrize(
    ("part", "wrong"),
    [
        ("attention_write", "attention.output.LayerNorm"),
        ("mlp_write", "intermediate"),
        ("attention_add_norm", "output.LayerNorm"),
        ("mlp_add_norm", ""),
        ("final_norm", "bert.embeddings.LayerNorm"),
    ],
)
def test_wrong_parts_of_a_post_norm_layer_are_refused(part: str, wrong: str) -> None:
    with pytest.raises(
        (ss.InputError, RuntimeError), match=r"layer 0 is not entry|logits are not|size of tensor"
    ):
        ss.load(tiny_models.plain("bert"), parts={part: wrong})


def test_identity_and_keep_all_change_no_bit(family: str) -> None:
    model, expected = tiny_models.model(family), untouched(family)
    everywhere = [ss.Site("embedding"), *EVERYWHERE]
    kept = ss.phi(ss.read_spectrum(model, bands=4), 1, 4)
    assert torch.equal(tiny_models.logits(model, IDS, {}), expected)
    assert torch.equal(tiny_models.logits(model, IDS, dict.fromkeys(everywhere, lambda x: x * 1.0)), expected)
    assert torch.equal(tiny_models.logits(model, IDS, dict.fromkeys(everywhere, kept)), expected)


@pytest.mark.parametrize("site", SITES, ids=str)
def test_a_filter_equals_hooks_written_by_hand(family: str, site: ss.Site) -> None:
    spectrum = ss.read_spectrum(tiny_models.model(family), bands=8)
    basis = torch.cat([spectrum.vectors[:, :4], spectrum.vectors[:, 24:]], dim=1)
    rest = (torch.eye(32, dtype=torch.float64) - basis @ basis.T).float()
    removed = ss.remove(spectrum.subspace("1,7-8"))
    traced = tiny_models.logits(tiny_models.model(family), IDS, {site: removed})
    twin = tiny_models.plain(family)
    with torch.no_grad(), hooked(twin, family, site, lambda x: x @ rest):
        by_hand = twin(IDS).logits
    with torch.no_grad(), hooked(twin, family, site, removed):
        same_filter = twin(IDS).logits
    assert (traced - untouched(family)).abs().max() > 1e-3, "the filter must act"
    assert (traced - by_hand).abs().max() <= 5e-5
    if site.kind == "head":
        assert (traced - same_filter).abs().max() <= 1e-5
    else:
        assert torch.equal(traced, same_filter)


def test_many_sites_with_attention_equal_hooks(family: str) -> None:
    model = tiny_models.model(family)
    spectrum = ss.read_spectrum(model, bands=8)
    edits = {site: ss.remove(spectrum.band(1 + i % 8)) for i, site in enumerate(EVERYWHERE)}
    twin = tiny_models.plain(family)
    with torch.no_grad(), ExitStack() as stack:
        for site in sorted(edits, key=lambda s: s.rank):
            stack.enter_context(hooked(twin, family, site, edits[site]))
        expected = twin(IDS, output_attentions=True)
    found, maps = ss.trace(
        model,
        IDS,
        edits,
        readout=lambda final, read, weights: (model.unembed(final), weights),
        attention=True,
    )
    assert (found - expected.logits).abs().max() <= 5e-5
    assert len(maps) == 3
    for one, other in zip(maps, expected.attentions, strict=True):
        assert (one - other).abs().max() <= 1e-5
        assert float(one[:, :, 0, -1].min()) >= 0 and one[:, :, :4, 4:].sum() > 0, "earlier tokens look ahead"


def test_what_is_kept_and_what_is_removed_add_up(family: str) -> None:
    model = tiny_models.model(family)
    dark = ss.read_spectrum(model, bands=4).dark(0.3)
    sites = [ss.Site("exit", 1), ss.Site("attention", 0), ss.Site("mlp", 2)]

    def residuals(edit: Any, site: ss.Site) -> Tensor:
        return ss.trace(model, IDS, {site: edit}, [site], readout=lambda final, read, _: read[site])

    for site in sites:
        whole = residuals(lambda x: x, site)
        parts = residuals(ss.keep(dark), site) + residuals(ss.remove(dark), site)
        assert (whole - parts).abs().max() <= 1e-5 * whole.abs().max()


def test_a_post_norm_exit_is_the_norm_of_the_sum() -> None:
    model = tiny_models.model("bert")
    layer = tiny_models.plain("bert").bert.encoder.layer[1]
    sites = [ss.Site("exit", 0), ss.Site("attention", 1), ss.Site("mlp", 1), ss.Site("exit", 1)]
    read = ss.trace(model, IDS, {}, sites, readout=lambda final, read, _: read)
    entry, attention, mlp, exit = (read[site] for site in sites)
    with torch.no_grad():
        middle = layer.attention.output.LayerNorm(entry + attention)
        assert torch.allclose(layer.output.LayerNorm(middle + mlp), exit, atol=1e-5)
    assert not torch.allclose(entry + attention + mlp, exit, atol=0.1)


@pytest.mark.parametrize("matrix", ["unembedding", "embedding"])
def test_the_spectrum_is_that_of_the_decoder(family: str, matrix: str, tmp_path: Path) -> None:
    model, plain = tiny_models.model(family), tiny_models.plain(family)
    weight = (
        plain.get_output_embeddings() if matrix == "unembedding" else plain.get_input_embeddings()
    ).weight
    values, rows = scipy.linalg.svd(weight.detach().double().numpy(), full_matrices=False)[1:]
    folder = tiny_models.save(tmp_path, family)
    for source in (model, folder):
        found = ss.read_spectrum(source, matrix, bands=4)
        np.testing.assert_allclose(found.values.numpy(), values, rtol=1e-10)
        inside = found.dark(0.25).orthonormal().numpy()
        np.testing.assert_allclose(inside @ inside.T, rows[24:].T @ rows[24:], atol=1e-9)
        assert found.reads_through == (model.reads_through if matrix == "unembedding" else "")
        assert ("reads through" in repr(found)) == (matrix == "unembedding")
        assert found.tied == model.tied and found.with_bands(8).reads_through == found.reads_through


@pytest.mark.parametrize("convention", ["folded", "centred"])
def test_the_heads_own_norm_is_folded(family: str, convention: Any, tmp_path: Path) -> None:
    model, plain = tiny_models.model(family), tiny_models.plain(family)
    weight = plain.get_output_embeddings().weight.detach().double()
    weight = weight * plain.get_submodule(model.layout.final_norm).weight.detach().double()
    if convention == "centred":
        weight = weight - weight.mean(0)
        weight = weight - weight.mean(1, keepdim=True)
    values = scipy.linalg.svdvals(weight.numpy())
    for source in (model, tiny_models.save(tmp_path, family)):
        found = ss.read_spectrum(source, convention=convention, bands=4).values.numpy()
        np.testing.assert_allclose(found, values, rtol=1e-6, atol=1e-6)


def test_a_folder_comes_back(family: str, tmp_path: Path) -> None:
    loaded = ss.load(tiny_models.save(tmp_path, family))
    assert not loaded.causal and type(loaded.module) is type(tiny_models.plain(family))
    assert loaded.fingerprint == tiny_models.model(family).fingerprint and loaded.reads_attention
    assert torch.equal(tiny_models.logits(loaded, IDS, {}), untouched(family))
    described = ss.describe(tmp_path)
    assert not described["causal"] and described["layout_tested"] and described["opens_with_bos"]
    assert described["bos_token"] == "[CLS]" and described["context"] == tiny_models.CONTEXT
    assert described["reads_through"] == loaded.reads_through and described["tied"] == loaded.tied


@pytest.mark.parametrize("architectures", [None, ["BertForPreTraining"]])
def test_a_folder_without_its_class_is_known_by_type(architectures: Any, tmp_path: Path) -> None:
    path = tiny_models.save(tmp_path, "bert") / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": architectures}))
    assert torch.equal(tiny_models.logits(ss.load(tmp_path), IDS, {}), untouched("bert"))


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_decoder_stays_causal(family: str, tmp_path: Path) -> None:
    decoder = tiny_models.build(family, is_decoder=True)  # the masked-LM class warns, and attends causally
    decoder.save_pretrained(tmp_path)
    tiny_models.tokenizer().save_pretrained(tmp_path)
    for model in (ss.load(tmp_path), ss.load(copy.deepcopy(decoder), tokenizer=tiny_models.tokenizer())):
        assert model.causal and ss.describe(tmp_path)["causal"] and model.reads_through
        with torch.no_grad():
            logits = decoder(IDS).logits
        assert (tiny_models.logits(model, IDS, {}) - logits).abs().max() <= 1e-5
        expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
        effect = ss.evaluate(model, ss.Windows.of_ids(IDS, model), {})
        assert effect.nll == pytest.approx(float(expected), abs=1e-5)


def test_a_model_travels_to_another_process(family: str) -> None:
    model = pickle.loads(pickle.dumps(tiny_models.model(family)))
    assert not model.causal and model.tied == tiny_models.model(family).tied
    assert torch.equal(tiny_models.logits(model, IDS, {}), untouched(family))


def test_readers_and_writers_are_taken_apart(family: str) -> None:
    """The matrices of layer 1 rebuild what its components write, before any norm of the sum."""
    model, plain = tiny_models.model(family), tiny_models.plain(family)
    shares = ss.residual.weight_shares(model, {"dark": ss.read_spectrum(model, bands=4).dark(0.25)})
    parts = {"q", "k", "v", "up", "o", "down"} | ({"gate"} if model.family == "modernbert" else set())
    assert set(shares["part"]) == parts and len(shares)
    found = {(w.part, w.unit): w for w in residual_weights(model) if w.layer == 1}
    layer = plain.get_submodule(model.layout.layers)[1]
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        if model.family == "modernbert":
            mlp = layer.mlp
            hidden = mlp.act(x @ found["gate", -1].rows.T) * (x @ found["up", -1].rows.T)
            assert torch.allclose(hidden @ found["down", -1].rows, mlp(x), atol=1e-5)
            assert torch.equal(found["q", 0].gain, layer.attn_norm.weight)
        else:
            up = layer.intermediate
            hidden = up.intermediate_act_fn(x @ found["up", -1].rows.T + up.dense.bias)
            written = hidden @ found["down", -1].rows + layer.output.dense.bias
            assert torch.allclose(written, layer.output.dense(up(x)), atol=1e-5)
            assert found["q", 0].gain is None and torch.equal(
                found["down", -1].gain, layer.output.LayerNorm.weight
            )
            assert torch.equal(found["o", 0].gain, layer.attention.output.LayerNorm.weight)


def classifier(kind: str) -> Any:
    return getattr(transformers, kind)(
        tiny_models.plain("roberta" if kind.startswith("Ro") else "bert").config
    )


@pytest.mark.parametrize("kind", ["BertForSequenceClassification", "RobertaForTokenClassification"])
def test_a_model_with_a_head_of_another_kind_is_refused(kind: str, tmp_path: Path) -> None:
    classifier(kind).save_pretrained(tmp_path)
    for call in (ss.load, ss.read_spectrum, ss.describe):
        with pytest.raises(
            ss.InputError, match=f"{kind} .* a head that is not over the vocabulary: expected a masked"
        ):
            call(tmp_path)
    with pytest.raises(ss.InputError, match="a head that is not over the vocabulary"):
        ss.load(classifier(kind))


def test_a_decoder_class_that_looks_ahead_is_refused() -> None:
    ahead = transformers.BertLMHeadModel(tiny_models.plain("bert").config)
    with pytest.raises(
        ss.InputError, match="BertLMHeadModel whose tokens attend to later ones: set is_decoder"
    ):
        ss.load(ahead)


def test_the_opening_alone_is_no_attention_of_an_encoder(tmp_path: Path) -> None:
    with pytest.raises(ss.InputError, match=r"BertForMaskedLM attend to later ones.*attention='eager'"):
        ss.load(tiny_models.save(tmp_path, "bert"), attention="sdpa_opening")
    fast = ss.load(tmp_path, attention="sdpa")
    assert not fast.reads_attention
    assert (tiny_models.logits(fast, IDS, {}) - untouched("bert")).abs().max() <= 1e-5


def test_weights_that_are_missing_are_named(tmp_path: Path) -> None:
    path = tiny_models.save(tmp_path, "roberta") / "model.safetensors"
    kept = {name: weight for name, weight in load_file(path).items() if "lm_head.dense" not in name}
    save_file(kept, path, {"format": "pt"})
    with pytest.raises(ss.InputError, match="lacks 2 of the weights of a RobertaForMaskedLM"):
        ss.load(tmp_path)


def test_attention_in_blocks_sees_every_key(family: str) -> None:
    """Rows of an encoder reach past the opening, of which alone blockwise attention shows maps."""
    model, ids = tiny_models.model(family), tiny_models.ids(2, 80)
    seen: list[Tensor] = []
    with torch.no_grad():
        expected = tiny_models.plain(family)(ids, output_attentions=True)
    with ss.attending(model, lambda call: seen.append(call.weights())):
        assert (tiny_models.logits(model, ids, {}) - expected.logits).abs().max() <= 1e-5
        with pytest.raises(ss.InputError, match=r"attention weights of .* cannot be read"):
            ss.attention_by_head(model, ss.Windows.of_ids(ids, model))
        count = len(seen)
        with whole_maps(model):
            found = ss.attention_by_head(model, ss.Windows.of_ids(ids, model), -1)
    assert count == 3 and model.reads_attention
    for one, other in zip(seen, expected.attentions, strict=False):
        assert (one - other).abs().max() <= 1e-6
    alphas = torch.stack([layer[..., -1].mean(-1) for layer in expected.attentions], dim=1)
    assert found["attention"].to_numpy() == pytest.approx(alphas.flatten().numpy(), abs=1e-6)


def bare(family: str) -> Any:
    """The encoder inside a masked language model, such as BertModel, with the same weights."""
    return tiny_models.plain(family).base_model


def bare_folder(family: str, path: Path) -> Path:
    bare(family).save_pretrained(path)
    tiny_models.encoder_tokenizer().save_pretrained(path)
    return path


def test_an_encoder_without_a_head_runs_as_inside_its_language_model(family: str, tmp_path: Path) -> None:
    folder = bare_folder(family, tmp_path)
    with torch.no_grad():
        states = bare(family)(IDS, output_hidden_states=True)
    whole = ss.Windows.of_ids(IDS, tiny_models.model(family))
    alpha = ss.attention.attention_by_position(tiny_models.model(family), whole).alpha
    for model in (
        ss.load(folder),
        ss.load(bare(family), tokenizer=tiny_models.encoder_tokenizer()),
    ):
        model.check()
        assert not model.causal and not model.has_head and not model.tied and model.tested
        assert "no head" in repr(model) and model.layers == 3
        sites = [ss.Site("exit", 1), ss.Site("exit", 2)]
        final, exits = ss.trace(model, IDS, {}, sites, readout=lambda final, read, _: (final, read))
        assert torch.allclose(final, states.last_hidden_state, atol=1e-5)
        assert torch.allclose(exits[sites[0]], states.hidden_states[2], atol=1e-5)
        doubled = ss.trace(model, IDS, {sites[1]: lambda x: 2 * x}, readout=lambda final, *_: final)
        if model.family != "modernbert":  # whose final norm undoes it
            assert torch.allclose(doubled, 2 * final)
        windows = ss.Windows.of_ids(IDS, model)
        assert "masking" not in windows.record
        np.testing.assert_allclose(ss.attention.attention_by_position(model, windows).alpha, alpha, atol=1e-6)
        mean = ss.mean_residual(model, windows, sites[0])
        assert torch.allclose(mean.float(), states.hidden_states[2].mean(0), atol=1e-5), "nothing is masked"
    described = ss.describe(folder)
    assert not described["has_head"] and not described["tied"] and described["reads_through"] == ""
    assert ss.describe(tiny_models.save(tmp_path / "head", family))["has_head"]


def test_weights_of_a_pooler_are_no_condition(tmp_path: Path) -> None:
    inside = bare("bert")
    inside.pooler = None
    inside.save_pretrained(tmp_path)
    model = ss.load(tmp_path)
    assert model.module.pooler is None and model.fingerprint == ss.load(tmp_path).fingerprint


def test_the_bands_of_a_bare_encoder_are_those_of_its_embedding(family: str, tmp_path: Path) -> None:
    folder = bare_folder(family, tmp_path)
    weight = bare(family).get_input_embeddings().weight.detach().double().numpy()
    values = scipy.linalg.svdvals(weight)
    for source in (folder, ss.load(folder)):
        with pytest.raises(ss.InputError, match=r"has no unembedding: take matrix 'embedding'"):
            ss.read_spectrum(source)
        with pytest.warns(ss.SpectralWarning, match="its bands are those of the embedding"):
            (found,) = ss.read_spectra(source, bands=4)
        assert (found.matrix, found.convention, found.reads_through) == ("embedding", "raw", "")
        np.testing.assert_allclose(found.values.numpy(), values, rtol=1e-10)
        with pytest.raises(ss.InputError, match="embedding has only 'raw'"):
            ss.read_spectra(source, convention="folded")


def test_what_needs_a_head_is_refused_in_one_sentence(family: str, tmp_path: Path) -> None:
    model = ss.load(bare_folder(family, tmp_path))
    windows = ss.Windows.of_ids(IDS, model)
    spectrum = ss.read_spectrum(model, "embedding", bands=4)
    calls = (
        lambda: ss.evaluate(model, windows, {}),
        lambda: ss.sweeps.ladder(model, windows, ss.Site("exit", 1), spectrum, spectrum),
        lambda: ss.sink_verdict(model, windows, [spectrum], draws=2),
        lambda: model.unembed(torch.zeros(1, model.d)),
        lambda: model.unembedding_weight,
    )
    for call in calls:
        with pytest.raises(ss.InputError, match=r"needs a head over the vocabulary, and .*: give a model"):
            call()
    assert ss.nll.compare_bos(model, windows) is None


def test_sinks_and_circuits_of_a_bare_encoder(family: str, tmp_path: Path) -> None:
    """[CLS] by its position and [SEP] by its token, at the end of windows of different length."""
    model = ss.load(bare_folder(family, tmp_path))
    rows = [
        torch.cat([IDS[row, : 8 + row].clamp(min=4), torch.tensor([tiny_models.EOS])]) for row in range(3)
    ]
    windows = ss.Windows.of_ids(rows, model)
    spectrum = ss.read_spectrum(model, "embedding", bands=4)
    found = ss.find_sinks(model, windows, spectrum, draws=2)
    assert found.record()["convention"] == "raw"
    by_token = ss.head_use(model, windows, "[SEP]")
    by_place = ss.head_use(model, windows, [8, 9, 10])
    assert by_token.equals(by_place)
    with torch.no_grad():
        maps = bare(family)(rows[1][None], output_attentions=True).attentions
    to_sep = torch.stack([layer[0, :, :-1, -1] for layer in maps])  # 0 from beyond a sliding window
    expected = (to_sep.sum(-1) / (to_sep > 0).sum(-1)).flatten().numpy()
    found_here = by_token[by_token["document"] == 1]["attention"]
    np.testing.assert_allclose(found_here, expected, atol=1e-6)
    circuits = ss.no_op_circuits(model, windows, spectrum, "[SEP]")
    assert circuits.position == "[SEP]" and circuits.detectors.sinks.tolist() == [8, 9, 10]
    with pytest.raises(ss.InputError, match="window 0 does not hold that token"):
        ss.head_use(model, windows, "[MASK]")
    with pytest.raises(ss.InputError, match=r"no token of .* is called that"):
        ss.head_use(model, windows, "[NONE]")


@pytest.mark.filterwarnings("always:this encoder has no head")
def test_commands_read_a_bare_encoder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = bare_folder("bert", tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(tiny_models.text(30, seed) for seed in range(3)))
    given = ["--text", text, "--separator", "\\n\\n", "--length", 24, "--bands", 4, "--json"]
    info = tiny_models.run(capsys, "info", folder, "--json")
    assert info.status == 0 and json.loads(info.out)["has_head"] is False
    spectrum = tiny_models.run(capsys, "spectrum", folder, "--json")
    assert json.loads(spectrum.out)["matrix"] == "embedding" and "no unembedding" in spectrum.err
    for command in ("sinks", "energy", "circuits"):
        ran = tiny_models.run(capsys, command, folder, *given)
        assert ran.status == 0, ran.err
        assert "no unembedding" in ran.err and json.loads(ran.out)["convention"] == "raw"
        if command != "sinks":
            assert json.loads(ran.out)["matrix"] == "embedding"
    at_sep = tiny_models.run(capsys, "circuits", folder, *given, "--token", "[SEP]")
    assert json.loads(at_sep.out)["position"] == "[SEP]"
    refused = tiny_models.run(capsys, "nll", folder, *given)
    assert refused.status == 2 and refused.err.strip().count("\n") == 0, refused.err
    assert "the NLL needs a head over the vocabulary" in refused.err and "embedding" not in refused.err
