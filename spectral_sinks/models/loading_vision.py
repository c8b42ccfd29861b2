"""`load_vision`: an image encoder by folder, hub id or object."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoImageProcessor, AutoModel, PreTrainedModel, ViTImageProcessorPil

from spectral_sinks.errors import InputError, SpectralWarning, brief
from spectral_sinks.models.adapters import adapted_base, with_adapter
from spectral_sinks.models.checkpoint import Source, find_source
from spectral_sinks.models.configuration import TWO_TOWERS, refuse_code
from spectral_sinks.models.effective_weights import check_finite
from spectral_sinks.models.layout_vision import vision_layout
from spectral_sinks.models.loading import (
    load_weights,
    moved,
    refuse_options,
)
from spectral_sinks.models.unwrapping import unwrapped
from spectral_sinks.models.vision import VisionModel
from spectral_sinks.models.wrapping import wrap_encoder

OTHER_FORMAT = (
    "give the same encoder as transformers has it, such as facebook/dinov2-base or "
    "openai/clip-vit-base-patch32, or convert it by transformers' script for its family"
)
"""What to do about a checkpoint of another library."""


def load_vision(
    model: str | Path | PreTrainedModel | torch.nn.Module | VisionModel,
    *,
    processor: Any = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str = "auto",
    revision: str | None = None,
    attention: str = "auto",
    parts: Mapping[str, str] | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> VisionModel:
    """Load an image encoder: a Hugging Face id, a folder, or a loaded transformers model.

    The supported families are DINOv2 with and without registers, DINOv3, ViT, DeiT, and the vision towers of
    CLIP and SigLIP. A classifier head is loaded if the checkpoint has one. A model given as an object stays
    on its device, in its dtype and with its attention, and is put into evaluation mode.

    Args:
        model: a Hugging Face id, a folder, or a transformers model.
        processor: an image processor; by default the checkpoint's own.
        device: the device to which the model is moved.
        dtype: the dtype of the weights; "auto" is the checkpoint's own.
        revision: the revision of a hub model.
        attention: transformers' `attn_implementation`; "auto" is "sdpa". Sinks can be measured under all.
        parts: names of modules, for a model whose layout is not found.
        allow_pickle: whether pickled weights may be loaded, which can run code.
        trust_remote_code: whether the checkpoint may run code of its own.

    Raises:
        InputError: for a name that is neither a folder nor reachable; for missing, pickled (unless allowed)
            or non-finite weights; for a checkpoint that runs code of its own (unless trusted); for a model
            of timm or OpenCLIP, for one that is not an image encoder, or whose modules are not found or do
            not add up; and for options that a model object cannot take.

    """
    if not isinstance(model, str | Path):
        refuse_options(model, dtype=dtype, device=device, revision=revision, attention=attention)
    if isinstance(model, VisionModel):
        refuse_options(model, processor=processor, parts=parts)
        return model
    if isinstance(model, str | Path):
        source = find_source(str(model), revision)
        refuse_other_libraries(source)
        base = adapted_base(source)
        module = _load(base or source, dtype, attention, allow_pickle, trust_remote_code)
        if base is not None:
            module = with_adapter(module, source, allow_pickle)
        module = module if device is None else moved(module, device)
        processor = processor or load_processor(source) or (base and load_processor(base))
        name = source.name
    else:
        given: Any = unwrapped(model)
        refuse_other_modules(given)
        alone = given.config.model_type in TWO_TOWERS and not hasattr(given, "classifier")
        module = getattr(given, "vision_model", given) if alone else given
        name = getattr(given, "name_or_path", "") or type(given).__name__
    module.eval()
    layout = vision_layout(module, parts)
    for parameter, tensor in module.named_parameters():
        check_finite(f"{name}: {parameter}", tensor)
    loaded = VisionModel(wrap_encoder(module), layout, name, processor)
    loaded.check()
    return loaded


def refuse_other_libraries(source: Source) -> None:
    """Raise InputError for a checkpoint of timm or OpenCLIP without a configuration of transformers."""
    config = source.config if source.file("config.json") else {}
    if "model_type" in config:
        return
    if "architecture" in config:
        raise InputError(
            f"{source.name} is a checkpoint of timm ({config['architecture']}), and encoders are read in "
            f"transformers' format: {OTHER_FORMAT}"
        )
    if source.file("open_clip_config.json") is not None:
        raise InputError(
            f"{source.name} is a checkpoint of OpenCLIP, and encoders are read in transformers' format: "
            f"{OTHER_FORMAT}"
        )


def refuse_other_modules(module: Any) -> None:
    """Raise InputError for a module that has no configuration, as those of timm and OpenCLIP have none."""
    if getattr(getattr(module, "config", None), "model_type", None) in (None, "timm_wrapper"):
        kind = type(module)
        library = kind.__module__.partition(".")[0]
        raise InputError(f"{library}'s {kind.__name__} is no encoder of transformers: {OTHER_FORMAT}")


def _load(
    source: Source, dtype: torch.dtype | str, attention: str, allow_pickle: bool, trust_remote_code: bool
) -> Any:
    refuse_code(source, trust_remote_code)
    source.require_weights(allow_pickle)
    return load_weights(
        source,
        _class_of(source),
        "an image encoder",
        dtype=dtype,
        attn_implementation="sdpa" if attention == "auto" else attention,
        use_safetensors=None if allow_pickle else True,
        trust_remote_code=trust_remote_code,
    )


def _class_of(source: Source) -> Any:
    """Return the transformers class: the one named in the configuration if it has a classifier head, else the
    encoder's.
    """
    named = (source.config.get("architectures") or [""])[0]
    if "ForImageClassification" in named and hasattr(transformers, named):
        return getattr(transformers, named)
    kind = TWO_TOWERS.get(source.config.get("model_type", ""))
    return getattr(transformers, kind) if kind else AutoModel


def load_processor(source: Source) -> Any:
    """Load the checkpoint's image processor, with Pillow as its backend; None if it ships none.

    transformers has some processors only for torchvision (DINOv3). If torchvision is not installed, ViT's
    processor runs with the same settings, with a warning. Raises InputError for a processor that cannot be
    read.
    """
    if source.file("preprocessor_config.json") is None:
        return None
    try:
        return AutoImageProcessor.from_pretrained(source.location, backend="pil", **source.options)
    except ImportError as error:
        warnings.warn(
            f"{source.name}: transformers runs its image processor by torchvision, which is not installed: "
            f"its settings are run by Pillow, which resizes a little differently ({str(error).split()[0]})",
            SpectralWarning,
            stacklevel=3,
        )
        return ViTImageProcessorPil.from_pretrained(source.location, **source.options)
    except (ValueError, KeyError, OSError) as error:
        raise InputError(f"the image processor of {source.name} cannot be loaded: {brief(error)}") from error
