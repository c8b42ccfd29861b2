"""What acts in a model besides its weights, its modules and its configuration: hooks and a user's functions.

No hash of a function covers all that it reads. So each of these must say itself when its results change, by
an attribute `address`, or the numbers of the model are not stored.
"""

import hashlib
import inspect
import sys
import sysconfig
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import FunctionType
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module
from transformers import AttentionInterface, AttentionMaskInterface

from spectral_sinks.errors import InputError, brief
from spectral_sinks.models.base import Transformer
from spectral_sinks.models.effective_weights import own_forward
from spectral_sinks.spectra.edits import own_address

LIBRARIES = frozenset(
    [
        *("torch", "transformers", "accelerate", "peft", "nnsight", "kernels", "spectral_sinks"),
        *("bitsandbytes", "torchao", "optimum", "quanto", "hqq", "awq", "gptqmodel", "compressed_tensors"),
        *("fbgemm_gpu", "aqlm", "eetq", "vptq", "spqr_quant", "auto_round", "flash_attn", "fla"),
    ]
)
"""Packages whose modules and hooks do what the configuration says."""

STANDARD, INSTALLED = sysconfig.get_path("stdlib"), {"site-packages", "dist-packages"}
"""The folder of the standard library, and the names of those of packages: functions from elsewhere are a
user's."""

HOOKS = ("_forward_pre_hooks", "_forward_hooks")

GLOBAL_HOOKS = ("_global_forward_pre_hooks", "_global_forward_hooks")


def patches(model: Transformer) -> list[str]:
    """Return a text for each function of a user's that changes what the model computes; [] for a plain model.

    These are forward hooks, replaced `forward` methods, functions put in place of a library's on a module, on
    its class or in the file of its class, an attention implementation registered with transformers, and
    classes of modules that come from no library, which are known by their source. Raises
    InputError for a function without an attribute `address`, and for a class without a source.
    """
    return [*_attention(model), *_hooks(model.module), *_functions(model.module), *_classes(model.module)]


def _attention(model: Transformer) -> Iterator[str]:
    name = model.config._attn_implementation
    for kind, registry in (("attention", AttentionInterface()), ("mask", AttentionMaskInterface())):
        function = registry.get(name) if name is not None else None
        if function is not None and not _of_library(function):
            yield _addressed(f"the {kind} implementation {name!r}", function)


def _hooks(module: nn.Module) -> Iterator[str]:
    for name in GLOBAL_HOOKS:
        for hook in getattr(torch_module, name, {}).values():
            if not _of_library(hook):
                yield _addressed("a hook on all modules", hook)
    for path, part in module.named_modules():
        for kind in HOOKS:
            for hook in getattr(part, kind).values():
                if not _of_library(hook):
                    yield _addressed(f"a forward hook on {path or 'the model'}", hook)
        forward = own_forward(part)
        if not _of_library(forward) and _of_library(type(part)):
            yield _addressed(f"the replaced forward of {path or 'the model'}", forward)


def _functions(module: nn.Module) -> Iterator[str]:
    kinds: dict[type, None] = {}
    for path, part in module.named_modules():
        if _of_library(type(part)):
            kinds |= dict.fromkeys(type(part).__mro__)
            for name, value in vars(part).items():
                if name != "forward" and _of_user(value):
                    yield _addressed(f"the function {name} of {path or 'the model'}", value)
    files = dict.fromkeys(kind.__module__ for kind in kinds if _of_library(kind))
    places = [(kind.__qualname__, vars(kind)) for kind in kinds if _of_library(kind)]
    places += [(name, vars(sys.modules[name])) for name in files if name in sys.modules]
    for place, values in places:
        for name, value in list(values.items()):
            if name != "forward" and _of_user(value):
                yield _addressed(f"the function {name} of {place}", value)


def _classes(module: nn.Module) -> Iterator[str]:
    own = {type(part) for part in module.modules() if not _of_library(type(part))}
    for kind in sorted(own, key=lambda each: each.__qualname__):
        if isinstance(address := getattr(kind, "address", None), str):
            yield f"{kind.__qualname__} {address}"
            continue
        try:
            source = inspect.getsource(kind)
        except (OSError, TypeError) as error:
            raise InputError(
                f"the source of the module {kind.__qualname__} is not known, so numbers of the model cannot "
                "be stored: define it in a file, or give it an attribute `address`, a string that changes "
                "whenever its results do"
            ) from error
        yield f"{kind.__qualname__} {hashlib.sha256(source.encode()).hexdigest()}"


def _of_library(function: Callable[..., Any]) -> bool:
    while isinstance(function, partial):
        function = function.func
    function = getattr(function, "__func__", function)
    home = getattr(function, "__module__", None) or type(function).__module__
    return home.partition(".")[0] in LIBRARIES


def _of_user(value: Any) -> bool:
    """Whether a value is a function that no installed package defines, whatever name it has been given."""
    while isinstance(value, partial):
        value = value.func
    value = getattr(value, "__func__", value)
    if not isinstance(value, FunctionType):
        return False
    home = str(value.__globals__.get("__name__"))  # `functools.wraps` does not change it
    if home.partition(".")[0] in LIBRARIES:
        return False
    file = getattr(sys.modules.get(home), "__file__", None)
    return file is None or not (Path(file).is_relative_to(STANDARD) or INSTALLED & set(Path(file).parts))


def _addressed(what: str, function: Any) -> str:
    try:
        return f"{what}: {own_address(function)}"
    except InputError as error:
        raise InputError(f"{what}: {brief(error)}") from error
