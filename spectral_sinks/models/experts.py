"""The routed experts of an MLP that is a mixture: their matrices, and what their neurons hold."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from spectral_sinks.errors import InputError
from spectral_sinks.models.effective_weights import innermost, inputs_of, is_linear, loaded

if TYPE_CHECKING:
    from spectral_sinks.models.base import Transformer

SHARED = -1
"""The number of the expert that every token passes, among the units of a mixture."""


@dataclass(frozen=True, eq=False)
class Mixture:
    """The experts of one MLP, stored as transformers' interface for experts has them.

    Neurons are numbered through: those of expert 0, of expert 1 and so on, and last those of the shared
    expert.
    """

    experts: Any
    """The module that holds all routed experts in three-dimensional parameters."""
    shared: Any | None
    """The last matrix of the shared expert, if there is one."""
    count: int
    """Number of routed experts."""
    width: int
    """Number of neurons of a routed expert."""

    @property
    def routed(self) -> int:
        """Number of neurons of all routed experts."""
        return self.count * self.width

    @property
    def total(self) -> int:
        """Number of all neurons."""
        return self.routed + (0 if self.shared is None else inputs_of(self.shared))

    def expert(self, neuron: int) -> int:
        """Return the expert that a neuron belongs to, or `SHARED`."""
        return neuron // self.width if neuron < self.routed else SHARED

    def matrices(self) -> Iterator[dict[str, Tensor]]:
        """Return the matrices of each routed expert: `gate` (if any) and `up` read, `down` writes; a row is a
        direction of the residual stream.
        """
        own = self.experts
        with loaded(own):
            first = own.gate_up_proj if own.has_gate else own.up_proj
            for index in range(self.count):
                reads, writes = first[index].detach(), own.down_proj[index].detach()
                if own.is_transposed:
                    reads = reads.T
                else:
                    writes = writes.T
                if not own.has_gate:
                    yield {"up": reads, "down": writes}
                    continue
                gate, up = reads.chunk(2) if own.is_concatenated else (reads[::2], reads[1::2])
                yield {"gate": gate, "up": up, "down": writes}

    def weighted(self, given: tuple[Any, ...], named: dict[str, Any]) -> "Routed":
        """Return what the neurons of the chosen experts hold, times the weights of the routing.

        `given` and `named` are the arguments of the module of experts.
        """
        hidden, chosen, weights = (x for x in (*given, *named.values()) if isinstance(x, Tensor))
        own = self.experts
        first = own.gate_up_proj if own.has_gate else own.up_proj
        bias = (own.gate_up_proj_bias if own.has_gate else own.up_proj_bias) if own.has_bias else None
        held = hidden.new_zeros(*chosen.shape, self.width)
        for index in chosen.unique().tolist():
            token, place = torch.where(chosen == index)
            read = hidden[token] @ (first[index] if own.is_transposed else first[index].T)
            read = read if bias is None else read + bias[index]
            act = own._apply_gate(read) if own.has_gate else own.act_fn(read)
            held[token, place] = (act * weights[token, place, None]).to(held)
        return Routed(held.detach(), chosen, weights.detach())

    def written(self, routed: "Routed") -> Float[Tensor, "tokens d"]:
        """Return what neurons that hold this add to the residual stream, without a bias."""
        down = self.experts.down_proj.detach()
        total = routed.held.new_zeros(len(routed.held), down.shape[2 if self.experts.is_transposed else 1])
        for index in routed.chosen.unique().tolist():
            token, place = torch.where(routed.chosen == index)
            matrix = down[index] if self.experts.is_transposed else down[index].T
            total.index_add_(0, token, routed.held[token, place] @ matrix)
        return total

    def constant(self, routed: "Routed") -> Float[Tensor, "tokens d"] | float:
        """Return what the biases of the chosen experts add, 0 without any."""
        if not self.experts.has_bias:
            return 0.0
        return torch.einsum("tk,tkd->td", routed.weights, self.experts.down_proj_bias.detach()[routed.chosen])


@dataclass(frozen=True, eq=False)
class Routed:
    """What the neurons of routed experts hold in one pass."""

    held: Float[Tensor, "tokens chosen width"]
    """Activations times the weight of the routing. Times its row of `down`, this is what a neuron adds."""
    chosen: Int[Tensor, "tokens chosen"]
    """The experts that each token passes."""
    weights: Float[Tensor, "tokens chosen"]


def mixture_of(model: "Transformer", layer: int) -> Mixture | None:
    """Return the experts of a layer's MLP, or None for a plain MLP.

    Raises InputError for experts that are stored in another way than transformers' interface has them.
    """
    mlp: Any = model.module.get_submodule(f"{model.layout.layers}.{layer}.{model.layout.mlp}")
    found: Any = getattr(mlp, "experts", None)
    if found is None:
        return None
    title = f"the experts of {model.name} ({model.family})"
    flags = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "has_post_expert_norm")
    if innermost(found) is not found or (
        model.family == "gpt_oss" and type(found).__name__ != "GptOssExperts"
    ):
        raise InputError(
            f"{title} are in a {type(found).__name__}, which does not store their matrices as they act: "
            "merge an adapter (merge_and_unload), or load mxfp4 weights by transformers with "
            "quantization_config=Mxfp4Config(dequantize=True)"
        )
    with loaded(found):
        down = getattr(found, "down_proj", None)
    if not isinstance(down, Tensor) or down.ndim != 3 or not all(hasattr(found, name) for name in flags):
        raise InputError(
            f"{title} are not stored as transformers' interface for experts stores them: their matrices "
            "cannot be taken apart"
        )
    if found.has_post_expert_norm:
        raise InputError(f"{title} pass a norm each before they are added, so their neurons do not add up")
    own = {id(part) for part in found.modules()}
    rest = [(name, part) for name, part in mlp.named_modules() if id(part) not in own and is_linear(part)]
    writers = [part for name, part in rest if name.rpartition(".")[2] == "down_proj"]
    if len(writers) > 1:
        raise InputError(
            f"the MLP of layer {layer} of {model.name} ({model.family}) has {len(writers)} shared experts, "
            "so its neurons cannot be told apart"
        )
    width = down.shape[1 if found.is_transposed else 2]
    return Mixture(found, writers[0] if writers else None, len(down), width)
