"""Small random image encoders of every family, and images: what tests of vision measure on."""

import copy
import functools
from typing import Any

import torch
import transformers
from torch import Tensor

import spectral_sinks as ss

D, LAYERS, HEADS, PATCH, SIDE, CLASSES = 32, 3, 4, 4, 20, 5

SIZES: dict[str, Any] = {
    "hidden_size": D,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 48,
    "image_size": SIDE,
    "patch_size": PATCH,
}
DINO: dict[str, Any] = {key: size for key, size in SIZES.items() if key != "intermediate_size"} | {
    "mlp_ratio": 2,
    "layerscale_value": 1.0,
}
LABELS: dict[str, Any] = {"num_labels": CLASSES}
CONFIGS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "dinov2": ("Dinov2Model", "Dinov2Config", DINO),
    "dinov2 classifier": ("Dinov2ForImageClassification", "Dinov2Config", DINO | LABELS),
    "dinov2 swiglu": ("Dinov2Model", "Dinov2Config", DINO | {"use_swiglu_ffn": True}),
    "dinov2 registers": (
        "Dinov2WithRegistersModel",
        "Dinov2WithRegistersConfig",
        DINO | {"num_register_tokens": 4},
    ),
    "dinov2 registers classifier": (
        "Dinov2WithRegistersForImageClassification",
        "Dinov2WithRegistersConfig",
        DINO | LABELS | {"num_register_tokens": 2},
    ),
    "dinov3": ("DINOv3ViTModel", "DINOv3ViTConfig", SIZES | {"num_register_tokens": 4}),
    "dinov3 gated": (
        "DINOv3ViTModel",
        "DINOv3ViTConfig",
        SIZES | {"num_register_tokens": 0, "use_gated_mlp": True},
    ),
    "vit": ("ViTModel", "ViTConfig", SIZES),
    "vit classifier": ("ViTForImageClassification", "ViTConfig", SIZES | LABELS),
    "deit": ("DeiTModel", "DeiTConfig", SIZES),
    "deit classifier": ("DeiTForImageClassificationWithTeacher", "DeiTConfig", SIZES | LABELS),
    "clip": ("CLIPVisionModel", "CLIPVisionConfig", SIZES),
    "siglip": ("SiglipVisionModel", "SiglipVisionConfig", SIZES),
}
FAMILIES = tuple(CONFIGS)
WITH_HEAD = tuple(name for name in FAMILIES if "classifier" in name)


def build(family: str = "dinov2", *, seed: int = 0, attention: str = "sdpa", **sizes: Any) -> Any:
    """Make a transformers model with every parameter random."""
    kind, config, given = CONFIGS[family]
    made = getattr(transformers, kind)._from_config(
        getattr(transformers, config)(**given | sizes), attn_implementation=attention
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            random = torch.randn(parameter.shape, generator=generator)
            gain = parameter.ndim == 1 and name.endswith(("weight", "lambda1"))
            parameter.copy_(1 + 0.3 * random if gain else 0.2 * random)
    return made.eval()


@functools.cache
def _built(family: str) -> Any:
    return build(family)


def plain(family: str = "dinov2") -> Any:
    """Return a model that nnsight has never touched, a new copy each time: the weights of `model(family)`."""
    return copy.deepcopy(_built(family))


@functools.cache
def model(family: str = "dinov2") -> ss.VisionModel:
    return ss.load_vision(plain(family))


def images(count: int = 3, side: int = SIDE, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def pixels(family: str = "dinov2", count: int = 3, side: int = SIDE, seed: int = 0) -> ss.Pixels:
    return ss.pixels(images(count, side, seed), model(family))
