"""Spectra of a model's matrices, from the model or from single tensors of its checkpoint."""

import warnings
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from spectral_sinks.errors import InputError, SpectralWarning
from spectral_sinks.models.adapters import adapted_base
from spectral_sinks.models.blueprint import blueprint, final_norm, tensor_name
from spectral_sinks.models.checkpoint import QuantisedError, Source, find_source
from spectral_sinks.models.effective_weights import effective_parameter
from spectral_sinks.models.gguf import EMBEDDING
from spectral_sinks.models.language import LanguageModel, token_rows
from spectral_sinks.models.layout import TRANSFORMS, through
from spectral_sinks.models.loading import load, load_tokenizer, read_config, refuse_code
from spectral_sinks.models.loading_vision import load_vision
from spectral_sinks.models.masked_lm import is_masked_lm
from spectral_sinks.models.norms import centres, gain_of
from spectral_sinks.models.spectra_vision import CLASSIFIER, Reading, is_vision, read_checkpoint, read_model
from spectral_sinks.models.vision import VisionModel
from spectral_sinks.spectra.conventions import DEFAULT_CONVENTION, Convention
from spectral_sinks.spectra.rounding import RoundingNoise, rounding_noise
from spectral_sinks.spectra.spectrum import Spectrum

UNEMBEDDINGS = (
    "lm_head.weight",
    "embed_out.weight",
    "model.lm_head.weight",
    "language_model.lm_head.weight",
    "cls.predictions.decoder.weight",
    "lm_head.decoder.weight",
    "decoder.weight",
    "output.weight",  # GGUF
)
EMBEDDINGS = (
    "model.embed_tokens.weight",
    "transformer.wte.weight",
    "wte.weight",
    "gpt_neox.embed_in.weight",
    "model.language_model.embed_tokens.weight",
    "language_model.model.embed_tokens.weight",
    "bert.embeddings.word_embeddings.weight",
    "roberta.embeddings.word_embeddings.weight",
    "model.embeddings.tok_embeddings.weight",
    "token_embd.weight",  # GGUF
    "transformer.word_embeddings.weight",
    "word_embeddings.weight",
    "model.decoder.embed_tokens.weight",
    "decoder.embed_tokens.weight",
    "biogpt.embed_tokens.weight",
    "gpt_neox_japanese.embed_in.weight",
    "transformer.tokens_embed.weight",
    "tokens_embed.weight",
    "transformer.w.weight",
    "backbone.embeddings.weight",
    "rwkv.embeddings.weight",
)
NORMS = (
    "model.norm.weight",
    "transformer.ln_f.weight",
    "ln_f.weight",
    "gpt_neox.final_layer_norm.weight",
    "model.language_model.norm.weight",
    "language_model.model.norm.weight",
    "cls.predictions.transform.LayerNorm.weight",
    "cls.predictions.transform.LayerNorm.gamma",
    "lm_head.layer_norm.weight",
    "head.norm.weight",
    "output_norm.weight",  # GGUF
)


def read_local_spectrum(
    model: LanguageModel | VisionModel | str | Path,
    matrix: str,
    *,
    convention: Convention = DEFAULT_CONVENTION,
    bands: int = 20,
    revision: str | None = None,
    gguf_file: str | None = None,
    use_cache: bool = True,
) -> Spectrum:
    """Return a spectrum from weights in this process or in a checkpoint: the local part of `read_spectrum`.

    From a name or folder, only the tensors needed are read, and the model is not built. Arguments and errors
    are those of `measure.residual.matrix_spectrum.read_spectrum`.
    """
    if matrix not in CLASSIFIER and convention != "raw":
        raise InputError(
            f"convention {convention!r} folds the final norm into the unembedding; {matrix} has only 'raw'"
        )
    read = _reading(model, matrix, convention, revision, gguf_file)
    if convention == "centred" and read.tokens is not None and read.tokens < len(read.weight):
        warnings.warn(
            f"{len(read.weight) - read.tokens} rows of the unembedding belong to no token of the tokenizer, "
            f"which has {read.tokens}: they are left out of the centred spectrum",
            SpectralWarning,
            stacklevel=3,
        )
        read = replace(read, weight=read.weight[: read.tokens])
    # rows read the residual stream: [rows, d]
    weight = read.weight
    if weight.ndim == 2 and weight.shape[1] != read.width and weight.shape[0] == read.width:
        weight = weight.T
    if weight.ndim != 2 or weight.shape[1] != read.width:
        raise InputError(
            f"{read.name} has shape {tuple(weight.shape)}: no side of the residual stream's width "
            f"{read.width}"
        )
    return Spectrum.from_matrix(
        weight,
        name=read.name,
        convention=convention,
        gain=read.gain,
        centre_residual=read.layernorm,
        tied=read.tied,
        reads_through=read.through if read.name == "unembedding" else "",
        bands=bands,
        use_cache=use_cache,
    )


def _reading(
    model: LanguageModel | VisionModel | str | Path,
    matrix: str,
    convention: Convention,
    revision: str | None,
    gguf_file: str | None,
) -> Reading:
    """Find a matrix, and the norm through which it reads."""
    if isinstance(model, VisionModel):
        return read_model(model, matrix, convention)
    if isinstance(model, LanguageModel):
        return _from_model(model, matrix, convention)
    source = find_source(str(model), revision, gguf_file)
    refuse_code(source, trust_remote_code=True)  # only tensors are read, so none of its code runs
    if (base := adapted_base(source)) is not None:
        return _reading(_load(base, source.name, revision), matrix, convention, revision, None)
    source.require_weights()
    try:
        if is_vision(source):
            return read_checkpoint(source, matrix, convention)
        return _from_checkpoint(source, matrix, convention)
    except QuantisedError:
        return _reading(_load(source, source.name, revision), matrix, convention, revision, None)


def _load(source: Source, name: str, revision: str | None) -> LanguageModel | VisionModel:
    """Load a model whose kind is that of a checkpoint."""
    return (load_vision if is_vision(source) else load)(name, revision=revision)


def _from_model(model: LanguageModel, matrix: str, convention: Convention) -> Reading:
    if matrix == "unembedding":
        weight = model.unembedding_weight
    elif matrix == "embedding":
        weight = model.embedding_weight
    else:
        weight = effective_parameter(model.module, matrix, model.dtype)
    if weight is None:
        names = [name for name, _ in model.module.named_parameters(remove_duplicate=False)]
        raise InputError(f"{model.name} has no parameter {matrix!r}; {_examples(names)}")
    gain = model.final_gain if convention != "raw" else None
    return Reading(
        matrix,
        weight,
        model.d,
        gain,
        model.centres_residual,
        model.tied,
        model.reads_through,
        token_rows(model.tokenizer),
    )


def _from_checkpoint(source: Source, matrix: str, convention: Convention) -> Reading:
    config: dict[str, Any] = source.config.get("text_config", source.config)
    is_masked_lm(config.get("architectures") or (), config.get("model_type"), config.get("is_decoder"))
    present = source.shards
    known = {"unembedding": (*UNEMBEDDINGS, *EMBEDDINGS), "embedding": EMBEDDINGS}
    wanted = [name for name in known.get(matrix, (matrix,)) if name.endswith(".weight")]
    source.require_plain(name.removesuffix(".weight") for name in wanted)
    head, embedding = _present(present, UNEMBEDDINGS), _present(present, EMBEDDINGS)
    tied = ties(source)
    if matrix in known and (embedding is None if tied or matrix == "embedding" else head is None):
        head, embedding = _named_by_class(source, head, embedding)
    if head is None and matrix == "unembedding" and not tied:
        raise InputError(f"{source.name} holds no unembedding and does not tie one to its embedding")
    either = embedding or head  # one of two tied matrices may be left out
    named = {"unembedding": either if tied else head, "embedding": either if tied else embedding}
    name = named.get(matrix, matrix)
    if name not in present:
        raise InputError(f"{source.name} holds no tensor for {matrix!r}; {_examples(list(present), matrix)}")
    width = _width(source, config)
    gain, layernorm = None, False
    if convention != "raw":
        gain, layernorm = _final_gain(source, width)
    tokens = token_rows(load_tokenizer(source, False)) if convention == "centred" else None
    weight, through = source.tensor(str(name)), read_through(present)
    return Reading(matrix, weight, width, gain, layernorm, tied, through, tokens)


def _named_by_class(source: Source, head: str | None, embedding: str | None) -> tuple[str | None, str | None]:
    """Return the names of unembedding and embedding, also where only the model's class tells them."""
    try:
        module = blueprint(source)
    except InputError:
        return head, embedding
    parts = module.get_output_embeddings(), module.get_input_embeddings()
    found = [tensor_name(module, part, "weight", source.shards) for part in parts]
    return head or found[0], embedding or found[1]


def _width(source: Source, config: dict[str, Any]) -> int:
    """Return the width of the residual stream."""
    width = config.get("hidden_size") or config.get("n_embd")
    if not isinstance(width, int):
        width = getattr(read_config(source, False).get_text_config(), "hidden_size", None)
    if not isinstance(width, int):
        raise InputError(f"{source.name}: config.json names no hidden_size")
    return width


def _final_gain(source: Source, width: int) -> tuple[Tensor, bool]:
    """Return the gain of the final norm, and whether that norm subtracts the mean, as LayerNorm does.

    Families store a gain as it acts, or without 1, so the norm itself is run.
    """
    if source.gguf is not None:  # which stores gains as they act
        name = _present(source.shards, NORMS)
        if name is None:
            raise InputError(f"{source.name} holds no final norm that is known: use convention 'raw'")
        return source.tensor(name).float(), name.removesuffix("weight") + "bias" in source.shards
    norm = final_norm(source)
    return gain_of(norm, width), centres(norm, width)


def ties(source: Source) -> bool:
    """Whether transformers gives the model of a checkpoint one matrix as embedding and unembedding.

    It does so if the configuration says so, unless the checkpoint holds two matrices that differ. Weights are
    read only to compare these.
    """
    head, embedding = _present(source.shards, UNEMBEDDINGS), _present(source.shards, EMBEDDINGS)
    kind, says = source.config.get("model_type"), source.config.get("tie_word_embeddings", head is None)
    if isinstance(kind, str) and kind in CONFIG_MAPPING:  # whose defaults differ between families
        says = getattr(read_config(source, False), "tie_word_embeddings", False)
    if not says or head is None or embedding is None:
        return bool(says)
    try:
        return torch.equal(source.tensor(head), source.tensor(embedding))
    except QuantisedError:
        return False


def quantization_noise(
    model: str | Path,
    spectrum: Spectrum,
    *,
    revision: str | None = None,
    gguf_file: str | None = None,
) -> RoundingNoise | None:
    """Return what the quantisation of a GGUF file does to the dark band of its unembedding.

    It is measured by noise of the size of the quantisation. None for another checkpoint, for another matrix,
    and for a type whose values are not evenly spaced.

    Args:
        model: the file, or its folder or hub id.
        spectrum: the spectrum of the unembedding, as read from the file.
        revision: the revision of a hub model.
        gguf_file: the name of the file in a folder that holds several, or in a hub repository.

    """
    source = find_source(str(model), revision, gguf_file)
    if source.gguf is None or spectrum.matrix not in ("unembedding", "embedding"):
        return None
    read = _from_checkpoint(source, spectrum.matrix, spectrum.convention)
    step = source.gguf.steps(EMBEDDING if spectrum.matrix == "embedding" else source.gguf.unembedding)
    if step is None:
        return None
    return rounding_noise(read.weight, step, spectrum, gain=read.gain, centre_residual=read.layernorm)


def read_through(present: Iterable[str]) -> str:
    """Describe the modules between residual stream and unembedding, from the tensor names of a checkpoint."""
    names = {name.rpartition(".")[0] for name in present}
    dense = next((name for name in TRANSFORMS if name in names), "")
    norm = next((name for name in (each.rpartition(".")[0] for each in NORMS) if name in names), "")
    return through(dense, norm) if dense else ""


def _present(present: dict[str, str], names: tuple[str, ...]) -> str | None:
    return next((name for name in names if name in present), None)


def _examples(names: list[str], tried: str = "") -> str:
    matrices = [name for name in names if name.endswith("weight")][:4]
    known = [f"'{name}'" for name in ("unembedding", "embedding") if name != tried]
    return f"use {', '.join(known)} or a parameter such as {', '.join(matrices)}"
