"""The classes of a checkpoint's model, without memory for weights: names, and the final norm."""

import copy
from collections.abc import Collection
from typing import Any

import torch

from spectral_sinks.errors import InputError, brief
from spectral_sinks.models.checkpoint import Source
from spectral_sinks.models.configuration import read_config
from spectral_sinks.models.layout import find_layout
from spectral_sinks.models.loading import class_of


def blueprint(source: Source) -> Any:
    """Return the model of a checkpoint on the meta device.

    Raises InputError if transformers does not know its classes.
    """
    kind = class_of(source)
    try:
        config = read_config(source, False)
        with torch.device("meta"):
            return kind.from_config(config, attn_implementation="eager").eval()
    except Exception as error:  # of the code of a family, which raises types of its own
        raise InputError(
            f"{source.name}: transformers cannot build the classes of this model, which say how its tensors "
            f"are used ({brief(error)}): load the model, and give it to read_spectrum"
        ) from error


def tensor_name(module: Any, part: Any, own: str, present: Collection[str]) -> str | None:
    """Return the name in a checkpoint of one parameter of a module's part; None if it is not there.

    A checkpoint may leave out the prefix of the model's inner part, or have an older order of prefixes.
    """
    path = next((name for name, each in module.named_modules() if each is part and name), None)
    if path is None:
        return None
    name = f"{path}.{own}"
    names = (name, name.removeprefix(f"{module.base_model_prefix}."))
    if (found := next((each for each in names if each in present), None)) is not None:
        return found
    ending = "." + ".".join(name.split(".")[-2:])
    ends = [each for each in present if f".{each}".endswith(ending)]
    return ends[0] if len(ends) == 1 else None


def final_norm(source: Source) -> Any:
    """Return the final norm of a checkpoint's model on the CPU, with its own gain and without its bias.

    Raises InputError if it is not found.
    """
    module = blueprint(source)
    part = module.get_submodule(find_layout(module).final_norm)
    norm = copy.deepcopy(part).to_empty(device="cpu").float()
    for own, parameter in norm.named_parameters():
        if own == "bias":  # which changes neither its gain nor its centring
            torch.nn.init.zeros_(parameter)
            continue
        names = (tensor_name(module, part, each, source.shards) for each in (own, "gamma"))
        name = next((each for each in names if each is not None), None)
        if name is None:
            raise InputError(f"{source.name} holds no {own} of its final norm: use convention 'raw'")
        with torch.no_grad():
            parameter.copy_(source.tensor(name))
    return norm
