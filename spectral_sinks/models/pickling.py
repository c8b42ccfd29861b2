"""Pickling of models, so that they can be sent to other processes.

`pickle` copies the weights. The pickler of `torch.multiprocessing` passes shared memory, which both processes
then use. nnsight's wrapper is not pickled, and is applied again on the other side.
"""

import copyreg
from collections.abc import Mapping
from typing import Any

import torch

from spectral_sinks.errors import InputError
from spectral_sinks.models.attention_sdpa import BLOCKWISE, WHOLE
from spectral_sinks.models.base import settings_of
from spectral_sinks.models.effective_weights import offloaded
from spectral_sinks.models.language import LanguageModel
from spectral_sinks.models.layout import Layout
from spectral_sinks.models.patches import patches
from spectral_sinks.models.wrapping import wrap


def reduce_model(model: LanguageModel) -> tuple[Any, ...]:
    """Return what `pickle` needs to rebuild a model.

    Raises InputError for a model that is spread over several devices, for one inside `attending`, and for one
    that another process could not make from its configuration and its weights.
    """
    module = model.module
    if len(set((getattr(module, "hf_device_map", None) or {}).values())) > 1:
        raise InputError(
            f"{model.name} is spread over several devices by its device_map, so it cannot be handed to other "
            "processes: run it in one process"
        )
    if module.config._attn_implementation in (BLOCKWISE, WHOLE):
        raise InputError(
            f"the attention of {model.name} is read or changed by functions of this process, "
            "which cannot be sent to others: leave `attending` first, or run in one process"
        )
    if acting := patches(model):
        raise InputError(
            f"{model.name} is changed by functions of this process, which other processes do not have "
            f"({acting[0]}): run it in one process"
        )
    tensors = {
        **dict(module.named_parameters(remove_duplicate=False)),  # tied weights stay tied
        **dict(module.named_buffers(remove_duplicate=False)),
    }
    attention = module.config._attn_implementation
    with torch.device("meta"):
        plain = type(module)(module.config)
    names = {
        *dict(plain.named_parameters(remove_duplicate=False)),
        *dict(plain.named_buffers(remove_duplicate=False)),
    }
    usual = all(type(tensor) in (torch.Tensor, torch.nn.Parameter) for tensor in tensors.values())
    if names != set(tensors) or not usual or offloaded(module):
        raise InputError(
            f"{model.name} has adapters, or weights that are quantised or offloaded, and cannot be handed to "
            "other processes: run it in one process, or merge the adapters first (merge_and_unload)"
        )
    if changed := [path for path in _kinds(module) if _kinds(plain).get(path) != _kinds(module)[path]]:
        raise InputError(
            f"{changed[0]} of {model.name} is not as the configuration describes it, and another process "
            "would make it so: run the model in one process"
        )
    return rebuild_model, (
        type(module),
        module.config,
        attention,
        tensors,
        model.layout,
        model.name,
        model.tokenizer,
    )


def _kinds(module: torch.nn.Module) -> dict[str, Any]:
    """Return the class and the settings of each part of a model, by path."""
    return {
        path: (type(part), [setting for setting in settings_of(part) if setting[0] != "training"])
        for path, part in module.named_modules()
        if path
    }


def rebuild_model(
    kind: type[Any],
    config: Any,
    attention: str,
    tensors: Mapping[str, torch.Tensor],
    layout: Layout,
    name: str,
    tokenizer: Any,
) -> LanguageModel:
    """Rebuild the model on the given tensors, without copying them."""
    with torch.device("meta"):
        module = kind(config)
    module.config._attn_implementation = attention
    for path, tensor in tensors.items():
        owner, _, own = path.rpartition(".")
        part = module.get_submodule(owner)
        if own in part._parameters:
            part._parameters[own] = torch.nn.Parameter(tensor, requires_grad=False)
        else:
            part._buffers[own] = tensor
    return LanguageModel(wrap(module.eval(), tokenizer), layout, name, tokenizer)


copyreg.pickle(LanguageModel, reduce_model)
