"""Image encoders with planted outlier neurons: which tokens become outliers, and where, is known."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor

from support import tiny_encoders

MARK = 6.0
"""What every pixel of a marked patch has; the pixels of the others are noise with mean 0."""

CHANNEL, TARGET = 5, 9
"""Coordinates of the stream: the one that holds a patch's mean pixel, and the one that outliers grow in."""

PLANTABLE = ("dinov2", "dinov2 registers", "vit classifier", "deit", "clip", "siglip", "dinov3")


@torch.no_grad()
def plant(
    family: str = "dinov2",
    layer: int = 1,
    neurons: tuple[int, ...] = (3,),
    size: float = 300.0,
    seed: int = 0,
) -> Any:
    """Make an encoder of small random weights; `neurons` of one layer's MLP fire on marked patches alone.

    The patch embedding writes the mean pixel to `CHANNEL`, which nothing else writes to before that layer.
    Each neuron reads it behind a threshold that only marked patches pass, and writes a share of `size` into
    `TARGET`: from that layer's exit on the norm of marked patches is some hundred, of all others a few.
    """
    module = random_twin(family, seed)
    model_layers = tiny_encoders.model(family).layout.layers
    for name, parameter in module.named_parameters():
        if "patch_embed" in name and parameter.ndim == 4:
            parameter[CHANNEL] = 0.2 / parameter[0].numel()
        elif parameter.ndim >= 1 and parameter.shape[-1] == tiny_encoders.D and "embed" in name:
            parameter[..., CHANNEL] = 0
    blocks = module.get_submodule(model_layers)
    for block in blocks[: layer + 1]:
        for name in ("attention.o_proj", "self_attn.out_proj", "mlp.fc2", "mlp.down_proj"):
            if (part := _part(block, name)) is not None:
                part.weight[CHANNEL] = 0
                part.bias[CHANNEL] = 0
    first, last = mlp(blocks[layer])
    for neuron in neurons:
        first.weight[neuron] = 0
        first.weight[neuron, CHANNEL] = 1
        first.bias[neuron] = -4.0
        last.weight[:, neuron] = 0
        last.weight[TARGET, neuron] = size / len(neurons)
    return module


@torch.no_grad()
def random_twin(family: str = "dinov2", seed: int = 0) -> Any:
    """Make the same encoder with nothing planted; its patch embedding does not see a patch's mean."""
    module = tiny_encoders.build(family, seed=seed)
    for parameter in module.parameters():
        if parameter.ndim > 1:
            parameter.mul_(0.1)
    for name, parameter in module.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(float(name.endswith(("weight", "lambda1"))))
        elif parameter.ndim == 4:
            parameter.sub_(parameter.mean((1, 2, 3), keepdim=True))
    return module


def mlp(block: Any) -> tuple[Any, Any]:
    """Find the two matrices of a layer's MLP."""
    names = ("fc1", "fc2") if hasattr(block.mlp, "fc1") else ("up_proj", "down_proj")
    return getattr(block.mlp, names[0]), getattr(block.mlp, names[1])


def _part(block: Any, name: str) -> Any:
    try:
        return block.get_submodule(name)
    except AttributeError:
        return None


def marked(count: int = 6, each: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Draw images `[count, 3, side, side]`, and which of their patches are marked `[count, rows, columns]`.

    In every image other patches are, and in the last one none.
    """
    generator = torch.Generator().manual_seed(seed)
    side, size = tiny_encoders.SIDE, tiny_encoders.PATCH
    rows = side // size
    noise = torch.randn(count, 3, rows, size, rows, size, generator=generator)
    images = (noise - noise.mean((1, 3, 5), keepdim=True)).reshape(count, 3, side, side)
    marks = torch.zeros(count, rows * rows, dtype=torch.bool)
    for image in range(count - 1):
        marks[image, torch.randperm(rows * rows, generator=generator)[:each]] = True
    marks = marks.view(count, rows, rows)
    wide = marks.repeat_interleave(size, 1).repeat_interleave(size, 2)
    return torch.where(wide[:, None], torch.tensor(MARK), images), marks


def save(module: Any, folder: Path) -> Path:
    """Write a checkpoint folder with its image processor."""
    module.save_pretrained(folder)
    size = {"height": tiny_encoders.SIDE, "width": tiny_encoders.SIDE}
    processor = transformers.ViTImageProcessorPil(size=size, image_mean=[0.5] * 3, image_std=[0.1] * 3)
    processor.save_pretrained(folder)
    return folder


def pictures(folder: Path, labels: tuple[str, str]) -> Path:
    """Write files of two classes, grey noise of mean 0.5 by patch; in each of four another patch is white."""
    rng = np.random.default_rng(0)
    size = tiny_encoders.PATCH
    for label in labels:
        (folder / label).mkdir()
        for row in range(4):
            noise = rng.integers(-40, 41, (5, size, 5, size // 2, 3))
            both = np.stack([noise, -noise], axis=4).reshape(tiny_encoders.SIDE, tiny_encoders.SIDE, 3) + 127
            both[row * size : (row + 1) * size, 2 * size : 3 * size] = 255
            Image.fromarray(both.astype(np.uint8)).save(folder / label / f"{row}.png")
    return folder
