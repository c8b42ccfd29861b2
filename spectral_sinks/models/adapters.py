"""Adapters of peft: models that hold them, and their folders."""

import sys
from importlib.util import find_spec
from typing import Any

import torch
from safetensors import SafetensorError

from spectral_sinks.errors import InputError, brief
from spectral_sinks.models.checkpoint import Source, find_source
from spectral_sinks.models.effective_weights import device_of


def is_adapted(model: Any) -> bool:
    """Whether an object is a model of peft, without an import of peft."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(model, peft.PeftModel | peft.PeftMixedModel)


def refuse_prompts(model: Any) -> None:
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


def check_adapted(given: Any, module: Any) -> None:
    """Raise InputError if a model of peft computes other logits than the model inside it."""
    if not is_adapted(given):
        return
    given.eval()
    ids = torch.tensor([[0, 1]], device=device_of(module.get_input_embeddings()))
    try:
        with torch.no_grad():
            outside, inside = (each(input_ids=ids).logits.float() for each in (given, module))
    except (RuntimeError, ValueError, TypeError) as error:
        raise InputError(
            f"a {type(given).__name__} does not run on token ids alone ({brief(error)})"
        ) from error
    if not torch.allclose(outside, inside, rtol=1e-2, atol=1e-2):
        raise InputError(_beside(given))


def adapted_base(source: Source) -> Source | None:
    """Return the checkpoint that an adapter without a model of its own adapts; None for any other source.

    Raises InputError if peft is not installed, or if the adapter does not say what it adapts.
    """
    if source.adapter is None:
        return None
    if source.folder is not None and source.file("config.json") is not None:
        raise InputError(
            f"{source.name} holds a model and an adapter, and which of them is meant is not clear: move "
            "adapter_config.json and the adapter's weights to a folder of their own"
        )
    if find_spec("peft") is None:
        raise InputError(f"{source.name} holds an adapter, which peft loads: pip install peft")
    name = source.adapter.get("base_model_name_or_path")
    if not name:
        raise InputError(
            f"the adapter_config.json of {source.name} does not name the model that it adapts: load that "
            "model by transformers, and give the PeftModel of both to load"
        )
    return find_source(str(name), source.adapter.get("revision"))


def with_adapter(module: Any, source: Source, allow_pickle: bool) -> Any:
    """Return the module with the adapter of a checkpoint, which acts on its weights.

    Raises InputError for an adapter that cannot be loaded, that is pickled (unless allowed), or that does
    more than weights do.
    """
    import peft

    if source.file("adapter_model.safetensors") is None and not allow_pickle:
        raise InputError(
            f"{source.name} holds no adapter_model.safetensors, and a pickled adapter can run code when it "
            "is loaded: convert it, or allow it: load(..., allow_pickle=True), --allow-pickle"
        )
    try:
        given = peft.PeftModel.from_pretrained(module, source.location, revision=source.revision)
    except (ValueError, KeyError, OSError, RuntimeError, TypeError, SafetensorError) as error:
        raise InputError(f"the adapter of {source.name} cannot be loaded: {brief(error)}") from error
    refuse_prompts(given)
    inner: Any = given.base_model.model
    if inner.main_input_name == "input_ids":
        check_adapted(given, inner)
    return inner
