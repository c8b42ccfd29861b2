"""Registers of an image encoder: test-time registers are added, or trained registers are removed."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from spectral_sinks.errors import InputError
from spectral_sinks.interventions.silencing import Neurons, by_layer, mlp_output
from spectral_sinks.models.vision import ADDED, VisionModel


@dataclass(frozen=True)
class _Append:
    """A hook after the embedding that inserts zero tokens between the prefix and the patches."""

    start: int
    count: int

    def __call__(self, _: nn.Module, given: Any, x: Float[Tensor, "batch tokens d"]) -> Tensor:
        zeros = x.new_zeros(len(x), self.count, x.shape[-1])
        return torch.cat([x[:, : self.start], zeros, x[:, self.start :]], dim=1)


@dataclass(frozen=True)
class _Move:
    """A hook before the last matrix of an MLP that lets neurons act at the added tokens, not at patches."""

    start: int
    count: int
    neurons: tuple[int, ...]

    def __call__(self, _: nn.Module, given: tuple[Float[Tensor, "batch tokens neurons"], ...]) -> Any:
        x = given[0].clone()
        end = self.start + self.count
        chosen = torch.tensor(self.neurons, device=x.device)
        patches = x[:, end:, chosen]
        # The activation of largest magnitude over the patches, with its sign
        largest = patches.gather(1, patches.abs().argmax(1, keepdim=True))
        x[:, self.start : end, chosen] = largest.expand(-1, self.count, -1)
        x[:, end:, chosen] = 0
        return (x, *given[1:])


@dataclass(frozen=True)
class _Drop:
    """A hook that removes the added tokens, before or after a module."""

    start: int
    count: int

    def __call__(self, _: nn.Module, given: Any, *output: Any) -> Any:
        if not output:
            return (self.cut(given[0]), *given[1:])
        found = output[0]
        if isinstance(found, tuple):
            return (self.cut(found[0]), *found[1:])
        found["last_hidden_state"] = self.cut(found["last_hidden_state"])
        return found

    def cut(self, x: Float[Tensor, "batch tokens d"]) -> Tensor:
        return torch.cat([x[:, : self.start], x[:, self.start + self.count :]], dim=1)


def _install(
    model: VisionModel,
    module: nn.Module,
    neurons: Mapping[int, tuple[int, ...]],
    registers: int,
    keep: bool = False,
) -> Callable[[], None]:
    """Install test-time registers in a module by hooks, and return a function that removes them.

    Args:
        model: the image encoder.
        module: the module of the model, or a copy of it.
        neurons: the neurons of each layer.
        registers: number of tokens that are added.
        keep: whether the output of the encoder includes the added tokens.

    Raises:
        InputError: for a model that already has test-time registers, and for a negative number.

    """
    tower: Any = module.get_submodule(model.layout.embedding.rpartition(".")[0])
    if hasattr(tower.embeddings, ADDED):
        raise InputError(f"{model.name} already has test-time registers: install all of them at once")
    if isinstance(registers, bool) or registers < 0:
        raise InputError(f"{registers} registers: expected a number of tokens, 0 or more")
    start = len(model.prefix)
    handles: list[Any] = []
    for layer, chosen in neurons.items():
        move = _Move(start, registers, chosen)
        handles.append(mlp_output(model, layer, module).register_forward_pre_hook(move))
    if registers:
        drop = _Drop(start, registers)
        handles.append(tower.embeddings.register_forward_hook(_Append(start, registers)))
        # The head of SigLIP pools all tokens, so they are removed before it
        if model.cls is None and isinstance(getattr(tower, "head", None), nn.Module):
            handles.append(tower.head.register_forward_pre_hook(drop))
        if not keep:
            handles.append(tower.register_forward_hook(drop))
    if registers or neurons:
        pairs = [[layer, neuron] for layer, chosen in neurons.items() for neuron in chosen]
        setattr(tower.embeddings, ADDED, {"registers": registers, "neurons": pairs})

    def remove() -> None:
        for handle in handles:
            handle.remove()
        if hasattr(tower.embeddings, ADDED):
            delattr(tower.embeddings, ADDED)

    return remove


@contextmanager
def install_registers(
    model: VisionModel,
    neurons: Neurons,
    registers: int = 1,
) -> Iterator[VisionModel]:
    """Give the model test-time registers inside the block, for `trace` and every measurement.

    Zero tokens without a position are inserted after the embedding, between the prefix ([CLS] and trained
    registers) and the patches. They are not rotated. The first norm of CLIP turns them into its bias, as in
    the published code. At the layer of each neuron, every added token gets the neuron's activation of largest
    magnitude over the patches of the image, with its sign, and the patches get 0. [CLS] and trained registers
    keep their activations.

    `model.prefix` ends in "test1", ..., and sites see the added tokens. The head and `last_hidden_state` do
    not. Without registers, the neurons are silenced on the patches. Without neurons, the added tokens are
    plain zero tokens.

    Raises InputError for neurons that the model does not have, for a negative number of registers, and inside
    another such block.

    Source: Jiang et al. 2025. Their code also gives all registers the same activations. It takes one largest
    value over all neurons of a layer and all tokens, whereas the paper and this function take the largest
    value of each neuron.
    """
    remove = _install(model, model.module, by_layer(model, neurons), registers)
    try:
        yield model
    finally:
        remove()


def with_registers(
    model: VisionModel, neurons: Neurons, registers: int = 1, *, keep: bool = False
) -> PreTrainedModel:
    """Return a copy of the transformers model with test-time registers built in.

    The copy is called and used like the original. It can be copied, pickled (`torch.save`), moved to another
    device, trained further and given to `load_vision`. Its state dict is that of the original, so
    `save_pretrained` saves the weights without the registers.

    `last_hidden_state` has the tokens of the original. With `keep`, it also has the added tokens, after the
    prefix. The head never sees them. Hidden states and attention weights, if requested, always include them.

    Raises InputError as `install_registers` does, and for `keep` if the model returns only logits.
    """
    if keep and model.tower is not model.module:
        raise InputError(f"{model.name} returns logits, so it has no added tokens to keep: leave out `keep`")
    chosen = by_layer(model, neurons)
    made = copy.deepcopy(model.module)
    _install(model, made, chosen, registers, keep)
    return made


def require_registers(model: VisionModel) -> None:
    """Raise InputError for a model without trained registers."""
    if not model.registers:
        tokens = ", ".join((*model.prefix, "patches"))
        raise InputError(f"{model.name} has no trained registers: its tokens are {tokens}")


@contextmanager
def without_registers(model: VisionModel) -> Iterator[VisionModel]:
    """Remove the trained registers of the model inside the block, from the embedding on.

    Raises InputError for a model without trained registers.
    """
    require_registers(model)
    part = model.tower.embeddings
    tokens, count = part.register_tokens, model.config.num_register_tokens
    part.register_tokens = nn.Parameter(tokens.detach()[:, :0], requires_grad=False)
    model.config.num_register_tokens = 0
    try:
        yield model
    finally:
        part.register_tokens, model.config.num_register_tokens = tokens, count
