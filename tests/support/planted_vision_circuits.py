"""No-op circuits made by hand in image encoders, on [CLS], on a register or on a patch, and their twins."""

import copy
from typing import Any

import torch
import transformers
from torch import Tensor

import spectral_sinks as ss
from spectral_sinks.models.norms import gain_of
from spectral_sinks.models.weights import attention_weights
from support import tiny_encoders
from support.planted_circuits import gaussian

D, HEADS, SIZE, SIDE, PATCH = 64, 4, 16, 20, 4
LAYER, HEAD, SLOW = 1, 2, 3
"""Where the circuit is; SLOW is a dimension that DINOv3's rotations hardly turn."""

MARK, ALWAYS = 3, 5
"""Channel that the marked token alone carries, and one that all tokens carry."""

PLACES = (2, 7, 13, 24, 18, 11)
"""The marked patch of each image."""

CASES = (
    *((family, "cls") for family in ("dinov2", "vit", "clip", "dinov3")),
    *((family, kind) for family in ("dinov2 registers", "dinov3") for kind in ("cls", "reg3")),
    *((family, "patch") for family in ("dinov2", "dinov2 registers", "vit", "clip", "siglip", "dinov3")),
)
CASES = tuple(dict.fromkeys(CASES))

ANY = ("dinov2", "dinov2 registers", "vit", "deit", "clip", "siglip", "dinov3")
"""Families on which numbers are recomputed."""


def channel(place: int) -> Tensor:
    return torch.nn.functional.one_hot(torch.tensor(place), D).float()


def images(kind: str, seed: int = 5) -> Tensor:
    """Red noise on a blue ground; where the mark is on a patch, that patch of each image is green."""
    found = torch.zeros(len(PLACES), 3, SIDE, SIDE)
    found[:, 0] = gaussian(len(PLACES), SIDE, SIDE, seed=seed)
    found[:, 2] = 1
    for image, place in zip(found, PLACES, strict=True):
        if kind == "patch":
            row, column = divmod(place, SIDE // PATCH)
            patch = image[:, row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH]
            patch[0], patch[1] = 0, 1
    return found


def made(family: str, kind: str) -> tuple[ss.VisionModel, ss.Pixels, list[int]]:
    """One head whose query always asks for a channel that one token alone carries, whose value is nothing.

    The model, its images, and the position of that token in each.
    """
    name, config, given = tiny_encoders.CONFIGS[family]
    given = given | {"hidden_size": D}
    module: Any = (
        getattr(transformers, name)
        ._from_config(getattr(transformers, config)(**given), attn_implementation="eager")
        .eval()
    )
    with torch.no_grad():
        for index, (path, parameter) in enumerate(module.named_parameters()):
            if parameter.ndim >= 2:
                parameter.copy_(0.01 * gaussian(*parameter.shape, seed=100 + index))
            elif path.endswith("bias"):
                parameter.zero_()
        model = ss.load_vision(module)
        embed(model, kind)
        rows = {w.part: w.rows for w in attention_weights(model, LAYER) if w.unit == HEAD}
        slow = torch.zeros(SIZE)
        slow[SLOW] = 1.0
        rows["q"].copy_(0.25 * slow.outer(channel(ALWAYS)))
        rows["k"].copy_(4 * slow.outer(channel(MARK)))
        value = 0.5 * gaussian(SIZE, D, seed=2)
        value[:, [MARK, ALWAYS]] = 0
        value[value != 0] -= value.sum(1, keepdim=True).expand(-1, D - 2).flatten() / (D - 2)  # for LayerNorm
        rows["v"].copy_(value)
        rows["o"].copy_(0.1 * gaussian(SIZE, D, seed=4))
    first = len(model.prefix)
    at = [first + place for place in PLACES] if kind == "patch" else [model.prefix.index(kind)] * len(PLACES)
    return model, ss.pixels(images(kind), model), at


def embed(model: ss.VisionModel, kind: str) -> None:
    """Let patches carry what their colours say, and one token of the prefix the mark, if it is there."""
    marked = 12 * channel(MARK) + 4 * channel(ALWAYS)
    part: Any = model.tower.embeddings
    for path, parameter in part.named_parameters():
        if parameter.ndim == 4:
            weight = torch.zeros_like(parameter)
            weight[:, 0] = 0.25 * gaussian(D, PATCH, PATCH, seed=1)
            weight[[MARK, ALWAYS], 0] = 0
            weight[MARK, 1], weight[ALWAYS, 2] = 12 / PATCH**2, 4 / PATCH**2
            parameter.copy_(weight)
        elif "position" in path:
            parameter[..., [MARK, ALWAYS]] = 0
        elif "cls" in path or "class" in path or "register" in path:
            words = gaussian(*parameter.shape, seed=3).view(-1, D)
            words[:, [MARK, ALWAYS]] = 0
            words += 4 * channel(ALWAYS)
            names = [name for name in model.prefix if name.startswith("reg") == ("register" in path)]
            if kind in names:
                words[names.index(kind)] = marked
            parameter.copy_(words.view(parameter.shape))


def twin(model: ss.VisionModel) -> ss.VisionModel:
    """The same spectra in random directions: each matrix of the layers reads a turned input."""
    module: Any = copy.deepcopy(model.module)
    with torch.no_grad():
        for index, parameter in enumerate(module.get_submodule(model.layout.layers).parameters()):
            if parameter.ndim == 2:
                turn = torch.linalg.qr(gaussian(*[parameter.shape[1]] * 2, seed=1000 + index)).Q
                parameter.copy_(parameter @ turn)
    return ss.load_vision(module)


def spectrum() -> ss.Spectrum:
    return ss.Spectrum.from_matrix(gaussian(80, D, seed=9))


def eager(family: str, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Attention maps of transformers' own eager attention, and norms of W_O v, in fp64."""
    plain: Any = tiny_encoders.plain(family)
    plain.set_attn_implementation("eager")
    plain = plain.double()
    model = tiny_encoders.model(family)
    maps: list[Tensor] = []
    values: list[Tensor] = []
    for layer in plain.get_submodule(model.layout.layers):
        attention = layer.get_submodule(model.layout.attention)
        attention.register_forward_hook(lambda _, __, out: maps.append(out[1]))
        layer.get_submodule(model.layout.values).register_forward_hook(lambda _, __, v: values.append(v))
    with torch.no_grad():
        plain(pixel_values=x.double())
    norms: list[Tensor] = []
    for layer, value in zip(plain.get_submodule(model.layout.layers), values, strict=True):
        write = layer.get_submodule(model.layout.attention_projection).weight
        scale = torch.ones(model.d, dtype=torch.float64)
        if "layer_scale" in model.layout.attention_write:
            scale = gain_of(layer.get_submodule(model.layout.attention_write), model.d).double()
        heads = value.split(model.head_size, dim=-1)
        parts = write.split(model.head_size, dim=1)
        norms.append(
            torch.stack([(v @ w.T * scale).norm(dim=-1) for v, w in zip(heads, parts, strict=True)], 1)
        )
    return maps, norms
