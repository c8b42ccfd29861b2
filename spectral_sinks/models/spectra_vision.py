"""Matrices that read the residual stream of an image encoder, from the model or from its checkpoint."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from spectral_sinks.errors import InputError
from spectral_sinks.models.checkpoint import Source
from spectral_sinks.models.effective_weights import effective_parameter
from spectral_sinks.models.layout_vision import HEADS, SEARCHED, TOWERS
from spectral_sinks.models.vision import VisionModel
from spectral_sinks.spectra.conventions import Convention

CLASSIFIER = ("unembedding", "classifier")
"""Names of the matrix of the classifier head."""

PATCHES = ("patch_embeddings.projection", "patch_embeddings", "patch_embedding")
"""Module names of the patch embedding."""


@dataclass(frozen=True, eq=False)
class Reading:
    """A matrix, and the norm through which it reads the residual stream."""

    name: str
    weight: Float[Tensor, "rows columns"]
    width: int
    gain: Float[Tensor, "d"] | None = None
    layernorm: bool = False
    """Whether that norm subtracts the mean over the residual stream."""
    tied: bool = False
    through: str = ""
    """What lies between the residual stream and the matrix besides one norm."""
    tokens: Int[Tensor, "tokens"] | None = None
    """The rows that belong to tokens; None if all do, or if that is not known."""


def read_model(model: VisionModel, matrix: str, convention: Convention) -> Reading:
    """Return the named matrix of a model.

    Raises InputError if the model has no such matrix, or no norm before its head for the convention.
    """
    if matrix == "embedding":
        return Reading(matrix, model.embedding_weight, model.d)
    if matrix not in CLASSIFIER:
        weight = effective_parameter(model.module, matrix, model.dtype)
        if weight is None:
            names = [name for name, _ in model.module.named_parameters()]
            raise InputError(f"{model.name} has no parameter {matrix!r}; {_examples(names)}")
        return Reading(matrix, as_rows(weight), model.d)
    weight = model.unembedding_weight
    if convention == "raw":
        return Reading("classifier", weight, model.d)
    _require_norm(model.family, model.name)
    weight = centred(model.head_weights, model.d) if convention == "centred" else weight
    return Reading("classifier", weight, model.d, model.final_gain, model.centres_residual)


def read_checkpoint(source: Source, matrix: str, convention: Convention) -> Reading:
    """Return the named matrix of a checkpoint, reading only the tensors needed.

    Parameters are named as in the checkpoint.
    """
    config: dict[str, Any] = source.config.get("vision_config") or source.config
    family = str(config.get("model_type") or f"{source.config.get('model_type')}_vision_model")
    width = config.get("hidden_size")
    if not isinstance(width, int):
        raise InputError(f"{source.name}: config.json names no hidden_size of the image encoder")
    present = list(source.shards)
    if matrix == "embedding":
        name = _of_tower(present, [f"embeddings.{each}" for each in PATCHES])
        if name is None:
            raise InputError(f"{source.name} holds no patch embedding that is known; {_examples(present)}")
        return Reading(matrix, as_rows(source.tensor(name)).T, width)
    if matrix not in CLASSIFIER:
        if matrix not in present:
            raise InputError(f"{source.name} holds no tensor {matrix!r}; {_examples(present)}")
        source.require_plain([matrix.removesuffix(".weight")] if matrix.endswith(".weight") else [])
        return Reading(matrix, as_rows(source.tensor(matrix)), width)
    heads = [f"{head}.weight" for head in HEADS if f"{head}.weight" in present]
    if not heads:
        raise InputError(
            f"{source.name} has no classifier head, so nothing names what is read of its residual stream; "
            f"{_examples([name for name in present if '.0.' in name])}"
        )
    source.require_plain(HEADS)
    parts = [source.tensor(head) for head in heads]
    if convention == "raw":
        return Reading("classifier", stacked(parts, width), width)
    _require_norm(family, source.name)
    norm = _of_tower(present, SEARCHED["final_norm"])
    if norm is None:
        raise InputError(f"{source.name} holds no final norm that is known: use convention 'raw'")
    weight = centred(parts, width) if convention == "centred" else stacked(parts, width)
    return Reading("classifier", weight, width, source.tensor(norm).float(), layernorm=True)


def stacked(heads: list[Tensor], d: int) -> Float[Tensor, "rows d"]:
    """Return the rows of some heads, with one block for each token that each head reads."""
    return torch.cat([part for head in heads for part in head.split(d, dim=1)])


def centred(heads: list[Tensor], d: int) -> Float[Tensor, "rows d"]:
    """Return the rows as `stacked` does, each block without its mean over classes, which softmax ignores."""
    blocks = [part.detach().double() for head in heads for part in head.split(d, dim=1)]
    return torch.cat([block - block.mean(0) for block in blocks])


def as_rows(weight: Tensor) -> Tensor:
    """Return the kernel of a convolution `[outputs, ...]` as a matrix, and any other tensor unchanged."""
    return weight.flatten(1) if weight.ndim > 2 else weight


def _require_norm(family: str, name: str) -> None:
    if family == "clip_vision_model":
        raise InputError(
            f"the head of {name} reads the mean of the last layer's tokens, with no norm before it to fold "
            "in: use convention 'raw'"
        )


def _of_tower(present: list[str], names: Any) -> str | None:
    """Return the first of some parameters that a checkpoint holds, whatever the encoder is called in it."""
    towers = (*TOWERS, "vision_model.vision_model")
    wanted = [f"{tower}.{name}.weight".lstrip(".") for tower in towers for name in names]
    return next((name for name in wanted if name in present), None)


def _examples(names: list[str]) -> str:
    matrices = [name for name in names if name.endswith(("value.weight", "v_proj.weight", "fc1.weight"))]
    return f"use 'classifier', 'embedding' or a parameter such as {', '.join(matrices[:3])}"
