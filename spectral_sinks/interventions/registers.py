"""Registers of an image encoder: added at test time for what its register neurons write, or taken out."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from spectral_sinks.errors import InputError
from spectral_sinks.models.vision import ADDED, VisionModel

Neurons = pd.DataFrame | Sequence[tuple[int, int]]
"""A table with the columns `layer` and `neuron`, or such pairs."""


@dataclass(frozen=True)
class _Append:
    """After the embedding: zero tokens between the prefix and the patches."""

    start: int
    count: int

    def __call__(self, _: nn.Module, given: Any, x: Float[Tensor, "batch tokens d"]) -> Tensor:
        zeros = x.new_zeros(len(x), self.count, x.shape[-1])
        return torch.cat([x[:, : self.start], zeros, x[:, self.start :]], dim=1)


@dataclass(frozen=True)
class _Move:
    """Before an MLP's last matrix: neurons act at the added tokens in place of the patches."""

    start: int
    count: int
    neurons: tuple[int, ...]

    def __call__(self, _: nn.Module, given: tuple[Float[Tensor, "batch tokens neurons"], ...]) -> Any:
        x = given[0].clone()
        end = self.start + self.count
        chosen = torch.tensor(self.neurons, device=x.device)
        patches = x[:, end:, chosen]
        largest = patches.gather(1, patches.abs().argmax(1, keepdim=True))
        x[:, self.start : end, chosen] = largest.expand(-1, self.count, -1)
        x[:, end:, chosen] = 0
        return (x, *given[1:])


@dataclass(frozen=True)
class _Drop:
    """Before what follows the encoder: the added tokens are taken out again."""

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


def mlp_output(model: VisionModel, layer: int, module: nn.Module | None = None) -> nn.Linear:
    """The last matrix of a layer's MLP, whose inputs are the neurons (fc2, down_proj), in a copy if given.

    Raises InputError where the MLP ends in no linear module.
    """
    path = f"{model.layout.layers}.{layer}.{model.layout.mlp}"
    parts = (module or model.module).get_submodule(path).modules()
    linear = [part for part in parts if isinstance(part, nn.Linear) and part.out_features == model.d]
    if not linear:
        raise InputError(f"{path} of {model.name} has no matrix that writes to the stream, so no neurons")
    return linear[-1]


def by_layer(model: VisionModel, neurons: Neurons) -> dict[int, tuple[int, ...]]:
    """Neurons by layer. Raises InputError for those that the model does not have, and for one named twice."""
    given: Any = neurons
    if isinstance(neurons, pd.DataFrame):
        if missing := {"layer", "neuron"} - set(given.columns):
            raise InputError(f"a table of neurons without {', '.join(sorted(missing))}: see register_neurons")
        given = zip(given["layer"].tolist(), given["neuron"].tolist(), strict=True)
    found: dict[int, list[int]] = {}
    for layer, neuron in given:
        if not 0 <= layer < model.layers:
            raise InputError(f"layer {layer}: {model.name} has layers 0 to {model.layers - 1}")
        if not 0 <= neuron < (count := mlp_output(model, layer).in_features):
            raise InputError(f"neuron {neuron}: layer {layer} of {model.name} has neurons 0 to {count - 1}")
        if neuron in found.setdefault(int(layer), []):
            raise InputError(f"neuron {neuron} of layer {layer} is named twice")
        found[layer].append(int(neuron))
    return {layer: tuple(sorted(found[layer])) for layer in sorted(found)}


def _install(
    model: VisionModel,
    module: nn.Module,
    neurons: Mapping[int, tuple[int, ...]],
    registers: int,
    keep: bool = False,
) -> Callable[[], None]:
    """Put the edit into a module, the model's own or a copy of it; what is returned takes it out."""
    tower: Any = module.get_submodule(model.layout.embedding.rpartition(".")[0])
    if hasattr(tower.embeddings, ADDED):
        raise InputError(f"{model.name} has test-time registers already: give them all at once")
    if isinstance(registers, bool) or registers < 0:
        raise InputError(f"{registers} registers: expected a number of tokens from 0 on")
    start = len(model.prefix)
    handles: list[Any] = []
    for layer, chosen in neurons.items():
        move = _Move(start, registers, chosen)
        handles.append(mlp_output(model, layer, module).register_forward_pre_hook(move))
    if registers:
        drop = _Drop(start, registers)
        handles.append(tower.embeddings.register_forward_hook(_Append(start, registers)))
        if model.cls is None and isinstance(getattr(tower, "head", None), nn.Module):  # SigLIP pools all
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
    """Inside the block, the model has test-time registers: for `trace` and every measurement.

    Zero tokens without position join the stream behind the embedding, after the prefix (behind [CLS] and
    trained registers), where no rotation reaches them; CLIP's first norm makes its bias of them, as in the
    published code. At the layer of each of `neurons`, every added token gets the neuron's activation of
    largest magnitude over the image's patches, sign preserved, and the patches get 0; [CLS] and trained
    registers keep theirs. `model.prefix` ends in "test1", ..., and sites see these tokens; the head and
    `last_hidden_state` do not. With no registers the neurons are silenced on the patches; with no neurons
    there are plain zero tokens more. Raises InputError for neurons that the model does not have, for a
    negative number, and inside another such block.

    Jiang et al. 2025. Their code gives all registers the same as well; but of a layer's neurons at once, over
    all tokens, it takes one largest value for all, where the paper and this take each neuron's own.
    """
    remove = _install(model, model.module, by_layer(model, neurons), registers)
    try:
        with fingerprinted_anew(model):
            yield model
    finally:
        remove()


@contextmanager
def fingerprinted_anew(model: VisionModel) -> Iterator[None]:
    """Inside the block the model's fingerprint is taken anew; the one known before is kept for later."""
    known = model.__dict__.pop("fingerprint", None)
    try:
        yield
    finally:
        model.__dict__.pop("fingerprint", None)
        if known:
            model.__dict__["fingerprint"] = known


def with_registers(
    model: VisionModel, neurons: Neurons, registers: int = 1, *, keep: bool = False
) -> PreTrainedModel:
    """A copy of the transformers model with test-time registers built in: called and used as the original.

    It can be copied, pickled (`torch.save`), moved, trained further and given to `load_vision`; its state
    dict is the original's, so `save_pretrained` saves the weights without the registers. Its
    `last_hidden_state` has the original's tokens, with `keep` the added ones after the prefix as well, which
    the head never sees. Hidden states and attention weights asked for hold them. Raises InputError as
    `install_registers` does, and for `keep` in a model that gives logits alone.
    """
    if keep and model.tower is not model.module:
        raise InputError(f"{model.name} gives logits, so there are no added tokens to keep: leave out `keep`")
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
    """Inside the block, the model has no trained registers: they are taken out from the embedding on.

    Raises InputError for a model without any.
    """
    require_registers(model)
    part = model.tower.embeddings
    tokens, count = part.register_tokens, model.config.num_register_tokens
    part.register_tokens = nn.Parameter(tokens.detach()[:, :0], requires_grad=False)
    model.config.num_register_tokens = 0
    try:
        with fingerprinted_anew(model):
            yield model
    finally:
        part.register_tokens, model.config.num_register_tokens = tokens, count
