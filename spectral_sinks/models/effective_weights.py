"""The matrices by which modules act, however these are stored: quantised, offloaded, or with adapters.

A layer of the usual kind acts by its `weight`. The matrix of any other is what the layer does to unit
vectors, which needs no knowledge of the storage and includes every adapter that is active.
"""

import math
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

import torch
from accelerate.utils import align_module_device, has_offloaded_params
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import Parameter
from transformers.pytorch_utils import Conv1D

from spectral_sinks.errors import InputError, brief

UNITS = 256
"""Unit vectors that a module reads at once."""

STATIC = ("activation_scale", "input_scale")
"""Attributes of layers that round their input to multiples of a fixed scale."""

MULTIPLE = 64
"""How many of these multiples a unit vector has: int8 and float8 represent it and its half exactly."""

NONLINEAR = 0.1
"""Relative error above which a module does not count as a linear map: roundings of the input are below it."""

SET_TO_ZERO = ("bias", "input_activation_scale", "output_activation_scale")
"""Tensors of a layer that are zero while its matrix is read: its bias, and scales of which zero turns off the
rounding (Gemma)."""

ROUNDED = 0.005
"""Largest relative difference that the rounding of a layer's output to bfloat16 makes in a whole matrix."""

SCALE = 0.01
"""Relative difference of a layer's matrix from its weight that is due to rounded unit vectors."""

ADAPTED = ("dynamic", "longrope")
"""Kinds of rotary positions whose frequencies depend on the longest text so far."""

USUAL = ("torch.nn.modules.", "transformers.pytorch_utils", "transformers.models.")
"""Modules of Python whose layers act by their `weight`."""


def effective_weight(
    module: nn.Module, dtype: torch.dtype, columns: slice = slice(None)
) -> Float[Tensor, "outputs inputs"]:
    """Return the matrix by which a linear layer acts, without its bias.

    It is a view of the stored weight where the layer acts by that, and is in float32 at least otherwise.

    Args:
        module: an `nn.Linear`, a `Conv1D`, or what stands in the place of one.
        dtype: the dtype of the layer's input.
        columns: the inputs that are read, as a slice without a step.

    Raises:
        InputError: for a module that is not a linear map.

    """
    module = compiled_from(module)
    with loaded(module):
        weight = usual_weight(module, dequantised=True)
    if weight is None:
        weight = _of_another_process(module)
    if weight is None:
        return _responses(module, dtype, columns)
    return (weight if isinstance(module, nn.Linear) else weight.T)[:, columns]


def effective_embedding(module: nn.Module) -> Float[Tensor, "vocabulary d"]:
    """Return the rows of an embedding, without the constant by which some embeddings multiply them.

    Raises InputError for an embedding that cannot be read.
    """
    module = compiled_from(module)
    with loaded(module):
        weight = usual_weight(module, dequantised=True)
    if weight is None:
        weight = _of_another_process(module)
    if weight is not None:
        return weight
    inner: Any = innermost(module)
    with torch.no_grad():
        ids = torch.arange(inner.num_embeddings, device=device_of(module))
        rows = torch.cat([_forward(module, part[None])[0] for part in ids.split(UNITS)]).float()
    scale = getattr(inner, "embed_scale", getattr(inner, "scalar_embed_scale", 1.0))
    return rows / torch.as_tensor(scale).to(rows)


def effective_kernel(module: nn.Module, dtype: torch.dtype) -> Float[Tensor, "outputs inputs"]:
    """Return the kernel of a convolution without overlap, with one column for each value of a patch."""
    with loaded(module):
        weight = usual_weight(module)
    if weight is not None:
        return weight.flatten(1)
    inner: Any = innermost(module)
    patch = (inner.in_channels, *inner.kernel_size)
    units = torch.eye(math.prod(patch), device=device_of(module), dtype=dtype)
    with torch.no_grad(), alone(module):
        found = [_forward(module, part.unflatten(1, patch)).flatten(1) for part in units.split(UNITS)]
    return torch.cat(found).T.float()


def effective_parameter(model: nn.Module, name: str, dtype: torch.dtype) -> Tensor | None:
    """Return the parameter of that name as it acts, in its stored orientation; None if there is none.

    The name of a layer with `.weight` behind it names the layer's matrix, also where that has another form.
    """
    path, _, own = name.rpartition(".")
    try:
        part = model.get_submodule(path)
    except AttributeError:
        return None
    inner = innermost(part)
    if own == "weight" and hasattr(inner, "num_embeddings"):
        return effective_embedding(part)
    if own == "weight" and isinstance(getattr(inner, "in_features", getattr(inner, "nx", None)), int):
        weight = effective_weight(part, dtype)
        return weight.T if isinstance(inner, Conv1D) else weight
    with loaded(part):
        weight = part._parameters.get(own)
    if weight is not None and not _plain(weight):
        raise InputError(
            f"{name} is stored quantised (a {type(weight).__name__} of {weight.dtype}) in a "
            f"{type(part).__name__}, from which no matrix can be taken: load the model dequantised"
        )
    return weight


def constant(module: nn.Module, width: int, dtype: torch.dtype) -> Float[Tensor, "outputs"]:
    """Return what a linear layer or a norm gives for zeros, in float32: its bias."""
    with torch.no_grad():
        return _forward(module, torch.zeros(1, 1, width, device=device_of(module), dtype=dtype))[0, 0].float()


def usual_weight(module: nn.Module, *, dequantised: bool = False) -> Tensor | None:
    """Return the weight of a layer that acts by it as it lies; None for any other module.

    With `dequantised`, the weight may also be a quantised tensor that acts as its numbers do (torchao).
    """
    weight: Any = getattr(module, "weight", None)
    method = own_forward(module)
    if method is not type(module).forward or not method.__module__.startswith(USUAL):
        return None
    if dequantised and hasattr(weight, "__tensor_flatten__"):
        weight = weight.dequantize()
    return weight if _plain(weight) and not weight.is_meta else None


def _of_another_process(module: nn.Module) -> Tensor | None:
    """Return the weight of a layer whose values are in another process: a shape, a dtype and no values."""
    weight = module._parameters.get("weight")
    return weight if weight is not None and weight.is_meta and not offloaded(module) else None


def stored_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a module's state dict by name: plain ones, in whatever memory the module has them.

    A tensor that accelerate has put elsewhere is loaded, and a quantised tensor is taken apart.
    """
    for name, tensor in sorted(module.state_dict().items()):
        if isinstance(tensor, Tensor) and tensor.is_meta:
            path, _, own = name.rpartition(".")
            with loaded(part := module.get_submodule(path)):
                tensor = getattr(part, own)
        yield from _parts(name, tensor)


def unsaved_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the buffers that a state dict leaves out, by name, such as the frequencies of rotary positions.

    Frequencies that a model adapts to the length of a text are left out.
    """
    for path, part in module.named_modules():
        if getattr(part, "rope_type", None) in ADAPTED:
            continue
        for name in sorted(part._non_persistent_buffers_set):
            if isinstance(tensor := part._buffers.get(name), Tensor):
                yield f"{path}.{name}", tensor


def adapter_state(module: nn.Module) -> str:
    """Describe which adapters of peft act, and how strongly, as text; "" without adapters."""
    found: list[str] = []
    for name, part in module.named_modules():
        if isinstance(getattr(type(part), "active_adapters", None), property):
            given: Any = part
            state = (given.active_adapters, given.disable_adapters, given.merged_adapters)
            found.append(f"{name} {state} {getattr(given, 'scaling', None)}")
    return "; ".join(found)


@contextmanager
def loaded(module: nn.Module) -> Iterator[None]:
    """Inside the block, the weights that accelerate has put elsewhere are where the module runs."""
    with ExitStack() as stack:
        for part in module.modules():
            if has_offloaded_params(part):
                stack.enter_context(align_module_device(part))
        yield


def offloaded(module: nn.Module) -> bool:
    """Whether accelerate loads weights of a module whenever it runs."""
    return any(has_offloaded_params(part) for part in module.modules())


def device_of(module: nn.Module) -> torch.device:
    """Return the device on which a module expects its input; the CPU for weights in another process."""
    tensor = next(chain(module.parameters(), module.buffers()), torch.empty(0))
    if tensor.is_meta:
        hooked: Any = next((part for part in module.modules() if has_offloaded_params(part)), None)
        return torch.device("cpu" if hooked is None else hooked._hf_hook.execution_device)
    return tensor.device


def dtype_of(module: nn.Module, otherwise: torch.dtype) -> torch.dtype:
    """Return the dtype of the first weight of a module that is neither packed nor in float8."""
    dtypes = (weight.dtype for weight in module.parameters())
    return next((dtype for dtype in dtypes if dtype.is_floating_point and dtype.itemsize > 1), otherwise)


def innermost(module: nn.Module) -> nn.Module:
    """Return the layer inside the wrappers of peft and torch.compile."""
    names = ("_orig_mod", "base_layer", "original_module")
    while (name := next((name for name in names if name in module._modules), None)) is not None:
        module = module.get_submodule(name)
    return module


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer, whatever its storage and the wrappers around it."""
    return all(hasattr(innermost(module), name) for name in ("in_features", "out_features"))


def outermost(module: nn.Module, wanted: Callable[[nn.Module], bool]) -> Iterator[nn.Module]:
    """Return the wanted layers inside a module, each with the wrappers around it."""
    if wanted(module):
        yield module
        return
    for part in module.children():
        yield from outermost(part, wanted)


def compiled_from(module: nn.Module) -> nn.Module:
    """Return the module that torch.compile was given, or the module itself."""
    return getattr(module, "_orig_mod", module)


@contextmanager
def alone(module: nn.Module) -> Iterator[None]:
    """Let the matrix of a layer act alone inside the block: no output is rounded to the size of a bias."""
    held: list[tuple[dict[str, Any], str, Tensor]] = []
    for part in module.modules():
        each: Any = (part._parameters, part._buffers)
        for tensors in each:
            for name in SET_TO_ZERO:
                if (tensor := tensors.get(name)) is not None:
                    held.append((tensors, name, tensor))
                    nothing: Any = torch.zeros_like(tensor)
                    tensors[name] = nn.Parameter(nothing, False) if tensors is part._parameters else nothing
    try:
        yield
    finally:
        for tensors, name, tensor in held:
            tensors[name] = tensor


def _parts(name: str, tensor: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield a tensor, or the plain tensors of which a subclass (torchao) consists."""
    if hasattr(tensor, "__tensor_flatten__"):
        inner, how = tensor.__tensor_flatten__()
        how = re.sub("0x[0-9a-f]+", "", str(how))  # addresses in memory
        for part in inner:
            yield from _parts(f"{name}.{part} {how}", getattr(tensor, part))
    elif isinstance(tensor, Tensor):
        yield name, tensor.data


def _plain(weight: Any) -> bool:
    """Whether a weight is a tensor of numbers as they act, and neither packed nor in need of scales."""
    return type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point() and weight.itemsize > 1


def _responses(module: nn.Module, dtype: torch.dtype, columns: slice) -> Float[Tensor, "outputs inputs"]:
    """Return what a layer does to unit vectors, after checking that this is all it does."""
    width = inputs_of(module)
    places = torch.arange(width, device=device_of(module))[columns]
    unit = _unit(module)
    with torch.no_grad(), alone(module):
        weight = torch.cat([_odd(module, x, unit) for x in _units(width, places, dtype)], dim=1)
        signs = torch.randint(2, (1, len(places)), generator=torch.Generator().manual_seed(0)) - 0.5
        halves = torch.zeros(1, width, device=places.device, dtype=dtype)
        halves[:, places] = signs.to(halves)
        expected = weight @ halves[0, places].float()
        error = _odd(module, halves, unit)[:, 0] - expected
    if not error.norm() <= NONLINEAR * expected.norm():
        raise InputError(
            f"{_named(module)} is not a linear map of its input, so it has no weight that can be read"
        )
    # a layer that rounds even unit vectors shows its weight up to one factor
    own: Any = module._parameters.get("weight")
    if _plain(own) and own.shape == (len(weight), width):
        own = own.detach()[:, columns].float()
        factor = (own * weight).sum() / own.square().sum()
        rounded = min(2 * torch.finfo(dtype).eps, ROUNDED)
        same = (weight - factor * own).norm() <= rounded * weight.norm()
        return own if same and abs(factor - 1) <= SCALE else weight
    return weight


def _units(width: int, places: Tensor, dtype: torch.dtype) -> Iterator[Float[Tensor, "units width"]]:
    """Yield the unit vectors of some places, a number of them at once."""
    for part in places.split(UNITS):
        x = torch.zeros(len(part), width, device=places.device, dtype=dtype)
        x[torch.arange(len(part)), part] = 1
        yield x


def _odd(module: nn.Module, x: Float[Tensor, "rows width"], unit: float) -> Float[Tensor, "outputs rows"]:
    """Return the odd part of what a layer does to vectors, which are of length `unit` while it does that.

    The even part is what a bias adds, and what it adds if 1 is rounded to another length than -1.
    """
    both = (_forward(module, sign * unit * x[None])[0].float() for sign in (1, -1))
    return (next(both) - next(both)).T / (2 * unit)


def inputs_of(module: nn.Module) -> int:
    """Return the width of a layer's input."""
    for layer in (module, innermost(module)):
        for name in ("in_features", "nx"):
            if isinstance(found := getattr(layer, name, None), int):
                return found
    raise InputError(f"a {_named(module)} is not known as a linear layer, since it names no in_features")


def _named(module: nn.Module) -> str:
    outer, inner = type(module).__name__, type(innermost(module)).__name__
    return outer if outer == inner else f"{outer} around a {inner}"


def _unit(module: nn.Module) -> float:
    """Return the length of unit vectors that a layer does not round."""
    layers = (module, innermost(module))
    scales = (getattr(layer, name, None) for layer in layers for name in STATIC)
    sizes = (float(scale.detach().max()) for scale in scales if isinstance(scale, Tensor))
    return next((size * MULTIPLE for size in sizes if size > 0), 1.0)


def _forward(module: Any, x: Tensor) -> Tensor:
    """Run a layer without the hooks of others. Raises InputError if it cannot run alone."""
    try:
        return module.forward(x)
    except Exception as error:  # of kernels, which raise types of their own
        raise InputError(
            f"only the layer itself can read the weight of a {_named(module)}, and it does not run alone "
            f"({brief(error)})"
        ) from error


def own_forward(module: nn.Module) -> Any:
    """Return the `forward` that a module has without nnsight and accelerate around it."""
    method: Any = module.__dict__.get("forward", type(module).forward)
    instrumented = type(method).__module__.startswith("nnsight")
    if "_hf_hook" in module.__dict__ and not instrumented:
        method = module.__dict__["_old_forward"]
        instrumented = type(method).__module__.startswith("nnsight")
    if instrumented:
        method = method.state.original
    return getattr(method, "__func__", method)


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise InputError if a weight that is in memory and not packed holds NaN or Inf."""
    if type(tensor) not in (Tensor, Parameter) or tensor.is_meta or not tensor.is_floating_point():
        return
    tensor = tensor if tensor.itemsize > 1 else tensor.float()
    if not torch.isfinite(tensor).all():
        bad = int((~torch.isfinite(tensor)).sum())
        raise InputError(f"{name} holds {bad} NaN or Inf of {tensor.numel()} values: check the weights")
