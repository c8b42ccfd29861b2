"""Spectra of a model's matrices, from the model or from single tensors of its checkpoint."""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spectral_sinks.errors import InputError, SpectralWarning
from spectral_sinks.models.adapters import adapted_base
from spectral_sinks.models.blueprint import blueprint, final_norm, tensor_name
from spectral_sinks.models.checkpoint import QuantisedError, Source, find_source
from spectral_sinks.models.configuration import is_masked, is_vision, load_tokenizer, read_config, refuse_code
from spectral_sinks.models.effective_weights import effective_parameter
from spectral_sinks.models.encoders import is_bare, is_encoder
from spectral_sinks.models.gguf import EMBEDDING
from spectral_sinks.models.language import LanguageModel, rows_of, token_rows
from spectral_sinks.models.loading import load
from spectral_sinks.models.loading_vision import load_vision
from spectral_sinks.models.norms import centres, gain_of
from spectral_sinks.models.spectra_vision import CLASSIFIER, Reading, read_checkpoint, read_model
from spectral_sinks.models.tensor_names import EMBEDDINGS, NORMS, UNEMBEDDINGS, present_of, read_through, ties
from spectral_sinks.models.vision import VisionModel
from spectral_sinks.spectra.conventions import DEFAULT_CONVENTION, Convention
from spectral_sinks.spectra.rounding import RoundingNoise, rounding_noise
from spectral_sinks.spectra.spectrum import Spectrum

PADDING_ZEROED = ("youtu",)
"""Model types whose embedding of the padding token transformers sets to zero when it loads a checkpoint.

The model computes with zeros, whatever the checkpoint stores there.
"""


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
    if convention == "centred" and read.tokens is not None:
        rows = rows_of(read.weight, read.tokens)
        if left_out := len(read.weight) - len(rows):
            last = int(read.tokens.max()) + 1
            end = max(0, len(read.weight) - last)
            warnings.warn(
                f"{left_out} rows of the unembedding belong to no token of the tokenizer ({end} at its end "
                f"and {left_out - end} before the last row that does): they are left out of the centred "
                "spectrum",
                SpectralWarning,
                stacklevel=3,
            )
        read = replace(read, weight=rows)
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
        if not model.has_head:
            raise InputError(no_unembedding(f"{model.name} ({type(model.module).__name__})"))
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


def lacks_head(model: Any, revision: str | None = None, gguf_file: str | None = None) -> bool:
    """Whether a model, or the checkpoint of that name or folder, is an encoder without a head."""
    if not isinstance(model, str | Path):
        return isinstance(model, LanguageModel) and not model.has_head
    source = find_source(str(model), revision, gguf_file)
    return not is_vision(source) and is_masked(source) and is_bare(source.config.get("architectures") or ())


def no_unembedding(title: str) -> str:
    """Say that an encoder has no unembedding, and which matrix to take."""
    return f"{title} is an encoder without a head, and has no unembedding: take matrix 'embedding'"


def _from_checkpoint(source: Source, matrix: str, convention: Convention) -> Reading:
    config: dict[str, Any] = source.config.get("text_config", source.config)
    classes: list[str] = config.get("architectures") or []
    encoder = is_encoder(classes, config.get("model_type"), config.get("is_decoder"))
    bare = encoder and is_bare(classes)
    if bare and matrix == "unembedding":
        raise InputError(no_unembedding(f"{source.name} ({classes[0]})"))
    present = source.shards
    known = {"unembedding": (*UNEMBEDDINGS, *EMBEDDINGS), "embedding": EMBEDDINGS}
    wanted = [name for name in known.get(matrix, (matrix,)) if name.endswith(".weight")]
    source.require_plain(name.removesuffix(".weight") for name in wanted)
    head, embedding = present_of(present, UNEMBEDDINGS), present_of(present, EMBEDDINGS)
    tied = not bare and ties(source)
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
    padding = config.get("pad_token_id")
    zeroed = config.get("model_type") in PADDING_ZEROED and (tied or name == embedding)
    if zeroed and isinstance(padding, int) and 0 <= padding < len(weight):
        weight = weight.index_fill(0, torch.tensor([padding]), 0)
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
        name = present_of(source.shards, NORMS)
        if name is None:
            raise InputError(f"{source.name} holds no final norm that is known: use convention 'raw'")
        return source.tensor(name).float(), name.removesuffix("weight") + "bias" in source.shards
    norm = final_norm(source)
    return gain_of(norm, width), centres(norm, width)


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


def _examples(names: list[str], tried: str = "") -> str:
    matrices = [name for name in names if name.endswith("weight")][:4]
    known = [f"'{name}'" for name in ("unembedding", "embedding") if name != tried]
    return f"use {', '.join(known)} or a parameter such as {', '.join(matrices)}"
