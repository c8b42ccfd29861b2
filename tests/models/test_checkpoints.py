"""Spectra from a checkpoint: equal to the model's, from the needed tensors alone; what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support import tiny_models

import spectral_sinks as ss
from spectral_sinks.models import checkpoint as source

UNEMBEDDING = {
    "qwen2": "model.embed_tokens.weight",
    "gemma2": "model.embed_tokens.weight",
    "gemma3": "model.embed_tokens.weight",
    "gpt2": "transformer.wte.weight",
    "gpt_neox": ("lm_head.weight", "embed_out.weight"),
    "gpt_neox parallel": ("lm_head.weight", "embed_out.weight"),
}
NORM = {
    "gpt2": "transformer.ln_f.weight",
    "gpt_neox": "gpt_neox.final_layer_norm.weight",
    "gpt_neox parallel": "gpt_neox.final_layer_norm.weight",
}


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the tensors read from any file; loading a model is an error."""
    names: list[str] = []
    original = source._opened

    class Spy:
        def __init__(self, *given: Any) -> None:
            self.given = given

        def __enter__(self) -> "Spy":
            self.stored = original(*self.given).__enter__()
            return self

        def __exit__(self, *_: Any) -> None:
            self.stored.__exit__(None, None, None)

        def keys(self) -> list[str]:
            return list(self.stored.keys())

        def get_tensor(self, name: str) -> torch.Tensor:
            names.append(name)
            return self.stored.get_tensor(name)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was built")

    monkeypatch.setattr(source, "_opened", Spy)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", refuse)
    return names


def same(a: ss.Spectrum, b: ss.Spectrum) -> None:
    assert a.fingerprint == b.fingerprint
    assert torch.equal(a.values, b.values) and torch.equal(a.vectors, b.vectors)
    assert (a.matrix, a.convention, a.tied, a.count) == (b.matrix, b.convention, b.tied, b.count)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_the_folder_gives_the_spectrum_of_the_model(family: str, tmp_path: Path, read: list[str]) -> None:
    folder = tiny_models.save(tmp_path / "model", family)
    expected_name = UNEMBEDDING.get(family, "lm_head.weight")
    norm_name = NORM.get(family, "model.norm.weight")
    for convention in ("raw", "folded", "centred"):
        read.clear()
        found = ss.read_spectrum(folder, convention=convention, use_cache=False)
        assert len(read) == (1 if convention == "raw" else 2)
        assert read[-1] in expected_name
        assert read[:-1] == ([] if convention == "raw" else [norm_name])
        same(found, ss.read_spectrum(tiny_models.model(family), convention=convention, use_cache=False))
    read.clear()
    same(ss.read_spectrum(folder, "embedding"), ss.read_spectrum(tiny_models.model(family), "embedding"))
    assert len(read) == 1


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_conventions_against_their_formulas(family: str) -> None:
    plain = tiny_models.plain(family)
    weight = plain.get_output_embeddings().weight.detach().double()
    norm = plain.transformer.ln_f if family == "gpt2" else plain.model.norm
    folded = weight * norm.weight.detach().double()
    centred = folded - folded.mean(0)
    if family == "gpt2":  # a LayerNorm takes the residual's own mean away
        centred = centred - centred.mean(1, keepdim=True)
    for convention, matrix in (("raw", weight), ("folded", folded), ("centred", centred)):
        found = ss.read_spectrum(tiny_models.model(family), convention=convention)
        squares = found.vectors * found.values.square() @ found.vectors.T
        assert torch.allclose(squares, matrix.T @ matrix, atol=1e-6)


def test_a_sharded_folder(tmp_path: Path, read: list[str]) -> None:
    whole = tiny_models.save(tmp_path / "whole")
    shards = tiny_models.save(tmp_path / "shards", max_shard_size="20KB")
    assert len(list(shards.glob("*.safetensors"))) > 2 and not (shards / "model.safetensors").exists()
    same(ss.read_spectrum(shards, convention="folded"), ss.read_spectrum(whole, convention="folded"))
    assert read == ["model.norm.weight", "lm_head.weight"] * 2
    index = json.loads((shards / "model.safetensors.index.json").read_text())["weight_map"]
    for file in set(index.values()) - {index["lm_head.weight"]}:
        (shards / file).unlink()  # what is not needed need not be there
    same(ss.read_spectrum(shards), ss.read_spectrum(whole))


def test_any_named_matrix_and_its_side(tmp_path: Path) -> None:
    folder, plain = tiny_models.save(tmp_path / "model"), tiny_models.plain()
    gate = plain.model.layers[1].mlp.gate_proj.weight.detach()  # reads the residual: 48 x 32
    down = plain.model.layers[1].mlp.down_proj.weight.detach()  # writes it: 32 x 48
    for name, matrix in (("gate_proj", gate), ("down_proj", down.T)):
        found = ss.read_spectrum(folder, f"model.layers.1.mlp.{name}.weight")
        assert found.d == 32 and not found.tied
        assert torch.allclose(found.values, torch.linalg.svdvals(matrix.double()))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("matrix", "convention", "message"),
    [
        ("no.such.weight", "raw", "no tensor for 'no.such.weight'; use 'unembedding', 'embedding' or"),
        ("model.norm.weight", "raw", r"shape \(32,\).*width 32"),
        ("embedding", "folded", "folds the final norm into the unembedding; embedding has only 'raw'"),
        ("unembedding", "white", "convention 'white'"),
    ],
)
def test_matrices_that_cannot_be_read(tmp_path: Path, matrix: str, convention: Any, message: str) -> None:
    folder = tiny_models.save(tmp_path / "model")
    with pytest.raises(ss.InputError, match=message):
        ss.read_spectrum(folder, matrix, convention=convention)


def test_a_checkpoint_without_a_tensor_is_not_filled_with_random_numbers(tmp_path: Path) -> None:
    folder = tiny_models.save(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ss.InputError, match=r"lacks .*model\.layers\.1\.mlp\.up_proj\.weight"):
        ss.load(folder)
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ss.InputError, match="holds no unembedding and does not tie one"):
        ss.read_spectrum(folder)
    assert not ss.describe(folder)["tied"] and ss.read_spectrum(folder, "embedding").d == 32


def test_a_checkpoint_that_its_config_does_not_fit(tmp_path: Path) -> None:
    folder = tiny_models.save(tmp_path / "model")
    file, told = folder / "model.safetensors", folder / "config.json"
    weights, config = load_file(file), json.loads(told.read_text())

    told.write_text(json.dumps(config | {"num_hidden_layers": 2}))
    with pytest.warns(
        ss.SpectralWarning, match=r"does not count, such as that of model\.layers\.2\.input_layer"
    ):
        assert ss.load(folder).layers == 2
    told.write_text(json.dumps(config))
    assert ss.load(folder).layers == 3

    short = weights["lm_head.weight"][:-1].clone()
    save_file(weights | {"lm_head.weight": short}, file, {"format": "pt"})
    with pytest.raises(
        ss.InputError, match=r"lm_head\.weight is \[96, 32\] where its config\.json asks for \[97, 32\]"
    ):
        ss.load(folder)

    codes = (50 * weights["model.layers.1.mlp.up_proj.weight"]).to(torch.int8)
    save_file(weights | {"model.layers.1.mlp.up_proj.weight": codes}, file, {"format": "pt"})
    with pytest.raises(ss.InputError, match=r"stores model\.layers\.1\.mlp\.up_proj\.weight as integers"):
        ss.load(folder)


def test_a_model_without_a_head_is_told_where_one_is() -> None:
    with pytest.raises(ss.InputError, match="or load the model with its head, by AutoModelForCausalLM"):
        ss.load(tiny_models.plain().model)


@pytest.mark.parametrize("damage", ["index", "shard", "missing shard"])
def test_a_damaged_sharded_checkpoint(tmp_path: Path, damage: str) -> None:
    folder = tiny_models.save(tmp_path / "model", max_shard_size="20KB")
    index = folder / "model.safetensors.index.json"
    shard = folder / json.loads(index.read_text())["weight_map"]["lm_head.weight"]
    if damage == "index":
        index.write_text(index.read_text()[:100])
    elif damage == "shard":
        shard.write_bytes(shard.read_bytes()[:1000])
    else:
        shard.unlink()
    for use in (ss.load, ss.read_spectrum):
        with pytest.raises(ss.InputError):
            use(folder)


@pytest.mark.parametrize("content", ['"../out.safetensors"', '"/out.safetensors"', '".x"', "5", "[]"])
def test_an_index_that_leads_elsewhere(tmp_path: Path, content: str) -> None:
    folder = tiny_models.save(tmp_path / "model", max_shard_size="20KB")
    index = folder / "model.safetensors.index.json"
    whole = json.loads(index.read_text())
    (tmp_path / "out.safetensors").write_bytes((folder / whole["weight_map"]["lm_head.weight"]).read_bytes())
    for text in (
        json.dumps(whole | {"weight_map": whole["weight_map"] | {"lm_head.weight": json.loads(content)}}),
        json.dumps({"weight_map": json.loads(content)}),
        content,
        "[" * 10**5,
    ):
        index.write_text(text)
        with pytest.raises(ss.InputError, match="is not an index of safetensors files"):
            ss.read_spectrum(folder)


@pytest.mark.usefixtures("unchecked")
def test_load_in_all_its_forms(tmp_path: Path) -> None:
    folder, ids = tiny_models.save(tmp_path / "model"), tiny_models.ids()
    with torch.no_grad():
        expected = tiny_models.plain()(ids).logits
    by_folder = ss.load(folder)
    torch.testing.assert_close(tiny_models.logits(by_folder, ids, {}), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(tiny_models.logits(ss.load(folder, attention="eager"), ids, {}), expected)
    assert (by_folder.bos, by_folder.opens_with_bos, by_folder.reads_attention) == (0, True, True)
    assert ss.load(by_folder) is by_folder
    assert torch.equal(
        tiny_models.logits(ss.load(str(folder)), ids, {}), tiny_models.logits(by_folder, ids, {})
    )
    hugging = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").train()
    loaded = ss.load(hugging)
    assert loaded.bos == 0 and not hugging.training, "tokenizer from its folder; dropout off"
    assert torch.equal(tiny_models.logits(loaded, ids, {}), expected)
    wrapped = ss.load(loaded.nn)
    assert wrapped.nn is loaded.nn and torch.equal(tiny_models.logits(wrapped, ids, {}), expected)
    assert ss.load(folder, dtype=torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(ss.InputError, match="int is not a model"):
        ss.load(3)  # pyright: ignore[reportArgumentType]


def test_describe_reads_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_models.save(tmp_path / "model")
    monkeypatch.setattr(source.Source, "tensor", None)
    found = ss.describe(folder)
    assert found["family"] == "llama" and found["layout_tested"] and not found["tied"]
    assert (found["layers"], found["d_model"], found["heads"], found["key_value_heads"]) == (3, 32, 4, 2)
    assert (found["vocabulary"], found["context"]) == (tiny_models.VOCABULARY, tiny_models.CONTEXT)
    assert (found["bos_token"], found["bos_token_id"], found["opens_with_bos"]) == ("<bos>", 0, True)
    assert ss.describe(tiny_models.save(tmp_path / "tied", "gpt2"))["tied"]


def test_the_embedded_model_is_the_default() -> None:
    model = ss.load()
    assert model.name == ss.DEFAULT and model.family == "llama" and model.context is not None
    model.check()
    same(ss.read_spectrum(), ss.read_spectrum(model))
    for text in ss.documents(limit=3):
        assert ss.cut(text, model).opens_with_bos == (model.bos is not None and model.opens_with_bos)


@pytest.mark.parametrize(
    "option",
    [
        {"dtype": torch.bfloat16},
        {"dtype": "float32"},
        {"attention": "sdpa"},
        {"device_map": "cpu"},
        {"revision": "main"},
    ],
    ids=str,
)
def test_options_that_a_loaded_model_cannot_take_are_refused(option: dict[str, Any]) -> None:
    """They were ignored without a word."""
    module = tiny_models.build()
    for model in (module, ss.load(module)):
        with pytest.raises(ss.InputError, match=f"{next(iter(option))} cannot be given with a"):
            ss.load(model, **option)
    with pytest.raises(ss.InputError, match="device cannot be given with a LanguageModel"):
        ss.load(ss.load(module), device="cpu")
    assert ss.load(ss.load(module)).module is module


def rewritten(folder: Path, change: Any, **config: Any) -> Path:
    """Change the tensors and the configuration of a checkpoint."""
    weights = change(load_file(folder / "model.safetensors"))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    written = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(written))
    return folder


@pytest.mark.parametrize("stored", ["other head", "same head", "head alone", "embedding alone"])
def test_what_is_tied_is_what_transformers_ties(stored: str, tmp_path: Path) -> None:
    """A configuration that ties does not make transformers throw a head of its own away."""
    names = {"head alone": ["model.embed_tokens.weight"], "embedding alone": ["lm_head.weight"]}

    def change(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if stored == "same head":
            weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        return {name: weight for name, weight in weights.items() if name not in names.get(stored, [])}

    folder = rewritten(tiny_models.save(tmp_path / "model"), change, tie_word_embeddings=True)
    model = ss.load(folder)
    assert model.tied == (stored != "other head")
    assert ss.describe(folder)["tied"] == model.tied
    for matrix in ("unembedding", "embedding"):
        same(ss.read_spectrum(folder, matrix), ss.read_spectrum(model, matrix))


def test_a_single_file_beside_a_stale_index(tmp_path: Path) -> None:
    """Transformers loads the single file."""
    folder = tiny_models.save(tmp_path / "model", max_shard_size="20KB")
    new = tiny_models.build(seed=1)
    new.save_pretrained(tmp_path / "new")
    (folder / "model.safetensors").write_bytes((tmp_path / "new" / "model.safetensors").read_bytes())
    for _ in range(2):  # the second time without the former shards
        same(ss.read_spectrum(folder), ss.read_spectrum(ss.load(folder)))
        same(ss.read_spectrum(folder), ss.read_spectrum(tmp_path / "new"))
        for shard in folder.glob("model-*.safetensors"):
            shard.unlink()


@pytest.mark.parametrize("gone", [(), (40, 41, 70)])
def test_rows_that_no_token_uses_are_left_out_of_the_centred_spectrum(
    gone: tuple[int, ...], tmp_path: Path
) -> None:
    module = tiny_models.build(vocab_size=128)
    folder = tmp_path / "padded"
    module.save_pretrained(folder)
    tiny_models.tokenizer().save_pretrained(folder)
    tokens = json.loads((folder / "tokenizer.json").read_text())
    words = tokens["model"]["vocab"]
    tokens["model"]["vocab"] = {word: place for word, place in words.items() if place not in gone}
    (folder / "tokenizer.json").write_text(json.dumps(tokens))
    model = ss.load(folder)
    gain = module.model.norm.weight.detach().double()
    rows = module.lm_head.weight.detach().double() * gain
    used = rows[[place for place in range(tiny_models.VOCABULARY) if place not in gone]]
    message = (
        f"{31 + len(gone)} rows of the unembedding belong to no token of the tokenizer "
        f"\\(31 at its end and {len(gone)} before"
    )
    for given in (folder, model):
        with pytest.warns(ss.SpectralWarning, match=message):
            found = ss.read_spectrum(given, convention="centred", use_cache=False)
        torch.testing.assert_close(found.values, torch.linalg.svdvals(used - used.mean(0)))
        found = ss.read_spectrum(given, convention="folded", use_cache=False)
        torch.testing.assert_close(found.values, torch.linalg.svdvals(rows))
    found = ss.read_spectrum(ss.load(module), convention="centred", use_cache=False)
    torch.testing.assert_close(
        found.values, torch.linalg.svdvals(rows - rows.mean(0)), msg="without a tokenizer"
    )
