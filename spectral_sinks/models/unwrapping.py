"""The transformers model inside the wrappers of peft, torch.compile, DataParallel and DeepSpeed."""

import sys
from typing import Any

import torch
from torch import nn

from spectral_sinks.errors import InputError
from spectral_sinks.models.effective_weights import device_of

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
        if _adapted(model):
            _refuse_prompts(model)
            model = held.base_model.model
        elif inside is not None:
            model = getattr(model, inside)
        else:
            _refuse_shards(model)
            break
    return model


def check_adapted(given: Any, module: Any) -> None:
    """Raise InputError if a model of peft computes other logits than the model inside it."""
    if not _adapted(given):
        return
    given.eval()
    ids = torch.tensor([[0, 1]], device=device_of(module.get_input_embeddings()))
    try:
        with torch.no_grad():
            outside, inside = (each(input_ids=ids).logits.float() for each in (given, module))
    except (RuntimeError, ValueError, TypeError) as error:
        raise InputError(f"a {type(given).__name__} does not run on token ids alone ({error})") from error
    if not torch.allclose(outside, inside, rtol=1e-2, atol=1e-2):
        raise InputError(_beside(given))


def _classes(model: Any) -> list[str]:
    return [kind.__name__ for kind in type(model).__mro__]


def _adapted(model: Any) -> bool:
    """Whether an object is a model of peft, without an import of peft."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(model, peft.PeftModel | peft.PeftMixedModel)


def _refuse_prompts(model: Any) -> None:
    """Raise InputError for an active adapter that is known to do more than weights do."""
    beside = ("is_prompt_learning", "is_adaption_prompt", "alora_invocation_tokens")
    configs = [model.peft_config[name] for name in model.active_adapters]
    if any(getattr(config, name, None) for config in configs for name in beside):
        raise InputError(_beside(model))


def _beside(model: Any) -> str:
    methods = {str(getattr(c.peft_type, "value", c.peft_type)) for c in model.peft_config.values()}
    return (
        f"a {type(model).__name__} with an adapter of the kind {', '.join(sorted(methods))} does more than "
        "weights do, such as adding tokens, and only adapters of weights, such as LoRA, can be measured: "
        "give the base model"
    )


def _refuse_shards(model: nn.Module) -> None:
    parts = any(SHARDED & {*_classes(part)} for part in model.modules())
    weights = any(type(w).__name__ == "DTensor" or hasattr(w, "ds_id") for w in model.parameters())
    if parts or weights:
        raise InputError(
            f"{type(model).__name__} is sharded over processes (FSDP, tensor parallelism or ZeRO-3), so that "
            "none holds its weights: save it by save_pretrained, and load the folder in one process"
        )
