"""The transformers model inside the wrappers of peft, torch.compile, DataParallel and DeepSpeed."""

from typing import Any

from torch import nn

from spectral_sinks.errors import InputError
from spectral_sinks.models.adapters import is_adapted, refuse_prompts

INSIDE = {
    "OptimizedModule": "_orig_mod",
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "DeepSpeedEngine": "module",
    "AveragedModel": "module",
}
"""Classes that wrap a model, and the name under which they hold it."""

SHARDED = {"FullyShardedDataParallel", "FSDPModule"}


def unwrapped(model: Any) -> Any:
    """Return the model inside any wrappers, or the object itself.

    Raises InputError for a model that is sharded over processes, and for an adapter that changes what passes
    through the model and not its weights.
    """
    while isinstance(model, nn.Module):
        held: Any = model
        inside = next((INSIDE[name] for name in _classes(model) if name in INSIDE), None)
        if is_adapted(model):
            refuse_prompts(model)
            model = held.base_model.model
        elif inside is not None:
            model = getattr(model, inside)
        else:
            _refuse_shards(model)
            break
    return model


def _classes(model: Any) -> list[str]:
    return [kind.__name__ for kind in type(model).__mro__]


def _refuse_shards(model: nn.Module) -> None:
    parts = any(SHARDED & {*_classes(part)} for part in model.modules())
    weights = any(type(w).__name__ == "DTensor" or hasattr(w, "ds_id") for w in model.parameters())
    if parts or weights:
        raise InputError(
            f"{type(model).__name__} is sharded over processes (FSDP, tensor parallelism or ZeRO-3), so that "
            "none holds its weights: save it by save_pretrained, and load the folder in one process"
        )
