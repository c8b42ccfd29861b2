"""Spectra of a model's matrices, from the model or from single tensors of its checkpoint."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from spectral_sinks.errors import InputError
from spectral_sinks.models.checkpoint import Source, find_source
from spectral_sinks.models.gguf import EMBEDDING
from spectral_sinks.models.language import LanguageModel
from spectral_sinks.models.layout import TRANSFORMS, through
from spectral_sinks.models.loading import refuse_code
from spectral_sinks.models.masked_lm import is_masked_lm
from spectral_sinks.models.spectra_vision import CLASSIFIER, Reading, is_vision, read_checkpoint, read_model
from spectral_sinks.models.vision import VisionModel
from spectral_sinks.spectra.conventions import DEFAULT_CONVENTION, Convention
from spectral_sinks.spectra.rounding import RoundingNoise, rounding_noise
from spectral_sinks.spectra.spectrum import Spectrum

UNEMBEDDINGS = (
    "lm_head.weight",
    "embed_out.weight",
    "model.lm_head.weight",
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
    source.require_weights()
    if is_vision(source):
        return read_checkpoint(source, matrix, convention)
    return _from_checkpoint(source, matrix, convention)


def _from_model(model: LanguageModel, matrix: str, convention: Convention) -> Reading:
    named = {"unembedding": model.layout.unembedding, "embedding": model.layout.embedding}
    parameters: dict[str, Tensor] = dict(model.module.named_parameters(remove_duplicate=False))
    name = f"{named[matrix]}.weight" if matrix in named else matrix
    if name not in parameters:
        raise InputError(f"{model.name} has no parameter {name!r}; {_examples(list(parameters))}")
    gain = model.final_gain if convention != "raw" else None
    return Reading(
        matrix, parameters[name], model.d, gain, model.centres_residual, model.tied, model.reads_through
    )


def _from_checkpoint(source: Source, matrix: str, convention: Convention) -> Reading:
    config: dict[str, Any] = source.config.get("text_config", source.config)
    is_masked_lm(config.get("architectures") or (), config.get("model_type"), config.get("is_decoder"))
    present = source.shards
    head, embedding = _present(present, UNEMBEDDINGS), _present(present, EMBEDDINGS)
    # transformers ties where the configuration says so, whatever else the checkpoint stores
    tied = head is None or (config.get("tie_word_embeddings") is True and embedding is not None)
    if tied and matrix == "unembedding" and config.get("tie_word_embeddings") is False:
        raise InputError(f"{source.name} holds no unembedding and does not tie one to its embedding")
    named = {"unembedding": embedding if tied else head, "embedding": embedding}
    name = named.get(matrix, matrix)
    if name not in present:
        raise InputError(f"{source.name} holds no tensor for {matrix!r}; {_examples(list(present))}")
    norm = _present(present, NORMS)
    gain = None
    if convention != "raw":
        if norm is None:
            raise InputError(f"{source.name} holds no final norm that is known: use convention 'raw'")
        gain = source.tensor(norm).float()
        # GGUF files store 1 + w
        if source.gguf is None and str(config.get("model_type", "")).startswith("gemma"):
            gain = 1 + gain
    layernorm = norm is not None and norm.removesuffix("weight") + "bias" in present
    layernorm = layernorm or read_through(present) != ""  # the LayerNorm of a masked-LM head may lack a bias
    width = config.get("hidden_size") or config.get("n_embd")
    if not isinstance(width, int):
        raise InputError(f"{source.name}: config.json names no hidden_size")
    return Reading(matrix, source.tensor(str(name)), width, gain, layernorm, tied, read_through(present))


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


def _examples(names: list[str]) -> str:
    matrices = [name for name in names if name.endswith("weight")][:4]
    return f"use 'unembedding', 'embedding' or a parameter such as {', '.join(matrices)}"
