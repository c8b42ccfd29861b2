"""The neurons of MLPs and the heads of attention: where they are, what they hold, and passes without them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from spectral_sinks.errors import InputError
from spectral_sinks.interventions.sites import Site
from spectral_sinks.models.base import Transformer
from spectral_sinks.models.effective_weights import innermost, inputs_of, is_linear, outermost
from spectral_sinks.models.experts import Mixture, mixture_of
from spectral_sinks.models.layout import SHARED_MLP

Neurons = pd.DataFrame | Sequence[tuple[int, int]]
"""A table with the columns `layer` and `neuron`, or pairs of a layer and a neuron."""

ROUTED = ("experts", "router")
"""Names of modules inside an MLP that is a mixture of experts."""


def mlp_output(model: Transformer, layer: int, module: nn.Module | None = None) -> Any:
    """Return the last matrix of a layer's MLP (fc2, down_proj), whose inputs are the neurons.

    With `module`, the matrix is taken from this copy of the model. Raises InputError for a mixture of
    experts, and for an MLP without a linear module that writes to the residual stream.
    """
    layout = model.layout
    apart = bool(layout.mlp_add_norm) or layout.mlp in SHARED_MLP
    path = f"{layout.layers}.{layer}.{layout.mlp_write if apart else layout.mlp}"
    part = (module or model.module).get_submodule(path)
    if any(name.rpartition(".")[2] in ROUTED for name, _ in part.named_modules()):
        raise InputError(
            f"{path} of {model.name} is a mixture of experts, whose neurons act for the tokens of their "
            "expert only: choose a layer with a plain MLP"
        )
    linear = [part for part in outermost(part, _is_matrix) if _outputs_of(part) == model.d]
    if not linear:
        raise InputError(
            f"{path} of {model.name} has no linear module that writes to the residual stream, so it has no "
            "neurons"
        )
    return linear[-1]


def _is_matrix(module: nn.Module) -> bool:
    return is_linear(module) or isinstance(innermost(module), Conv1D)


def _outputs_of(module: nn.Module) -> int:
    inner: Any = innermost(module)
    return inner.nf if isinstance(inner, Conv1D) else inner.out_features


def by_layer(model: Transformer, neurons: Neurons) -> dict[int, tuple[int, ...]]:
    """Group neurons by layer.

    Raises InputError for neurons that the model does not have, and for a neuron that is named twice.
    """
    given: Any = neurons
    if isinstance(given, pd.DataFrame):
        if missing := {"layer", "neuron"} - set(given.columns):
            raise InputError(
                f"the table of neurons has no column {', '.join(sorted(missing))}: see register_neurons"
            )
        given = zip(given["layer"].tolist(), given["neuron"].tolist(), strict=True)
    found: dict[int, list[int]] = {}
    for layer, neuron in given:
        if not 0 <= layer < model.layers:
            raise InputError(f"layer {layer}: {model.name} has layers 0 to {model.layers - 1}")
        if not 0 <= neuron < (count := neuron_count(model, layer)):
            raise InputError(f"neuron {neuron}: layer {layer} of {model.name} has neurons 0 to {count - 1}")
        if neuron in found.setdefault(int(layer), []):
            raise InputError(f"neuron {neuron} of layer {layer} is named twice")
        found[layer].append(int(neuron))
    return {layer: tuple(sorted(found[layer])) for layer in sorted(found)}


def neuron_count(model: Transformer, layer: int) -> int:
    """Return the number of neurons of a layer's MLP; of a mixture, those of all its experts."""
    mixture = mixture_of(model, layer)
    return inputs_of(mlp_output(model, layer)) if mixture is None else mixture.total


@contextmanager
def neuron_activations(
    model: Transformer,
    layers: Iterable[int],
    see: Callable[[int, Float[Tensor, "batch tokens neurons"]], None],
) -> Iterator[None]:
    """Inside the block, call `see(layer, activations)` with the neurons of each layer's MLP."""
    with ExitStack() as stack:
        for layer in layers:
            hook: Any = lambda _, given, layer=layer: see(layer, given[0].detach())  # noqa: E731
            stack.callback(mlp_output(model, layer).register_forward_pre_hook(hook).remove)
        yield


@contextmanager
def silenced(
    model: Transformer, *, neurons: Neurons = (), heads: Sequence[tuple[int, int]] = ()
) -> Iterator[None]:
    """Set neurons of MLPs and the outputs of heads to zero inside the block, at all tokens.

    Args:
        model: a model whose weights are in this process.
        neurons: the neurons, as a table with the columns `layer` and `neuron`, or as pairs. In a mixture of
            experts they are numbered through: those of expert 0, of expert 1 and so on, and last those of the
            shared expert. A neuron of a routed expert acts at the tokens of this expert alone.
        heads: pairs of a layer and a head. What W_O reads from the head is zero; a bias of W_O stays.

    Raises:
        InputError: for neurons or heads that the model does not have, for experts whose matrices are not
            known, and for a model on a server.

    """
    if model.remote is not None:
        raise InputError(f"{model.name} is on a server, and hooks do not travel: load it in this process")
    places: list[tuple[Any, list[int]]] = []
    routed: list[tuple[Mixture, list[int]]] = []
    for layer, chosen in by_layer(model, neurons).items():
        mixture = mixture_of(model, layer)
        if mixture is None:
            places.append((mlp_output(model, layer), list(chosen)))
            continue
        routed.append((mixture, [neuron for neuron in chosen if neuron < mixture.routed]))
        if shared := [neuron - mixture.routed for neuron in chosen if neuron >= mixture.routed]:
            places.append((mixture.shared, shared))
    grouped: dict[int, list[int]] = {}
    for layer, head in heads:
        Site("head", layer, head).check(model)
        columns = model.head_columns(layer, head)
        grouped.setdefault(layer, []).extend(range(columns.start, columns.stop))
    for layer, columns in grouped.items():
        path = f"{model.layout.layers}.{layer}.{model.layout.attention_projection}"
        places.append((model.module.get_submodule(path), columns))
    with ExitStack() as stack:
        for module, columns in places:
            stack.callback(module.register_forward_pre_hook(_Silence(columns)).remove)
        for mixture, chosen in routed:
            hook = _SilenceRouted(mixture, chosen)
            stack.callback(mixture.experts.register_forward_hook(hook, with_kwargs=True).remove)
        yield


class _Silence:
    """A hook before a matrix that sets some of its inputs to zero."""

    def __init__(self, columns: Sequence[int]) -> None:
        self.columns = torch.tensor(columns)

    def __call__(self, _: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        changed = given[0].clone()
        changed[..., self.columns.to(changed.device)] = 0
        return (changed, *given[1:])


class _SilenceRouted:
    """A hook after the experts of a mixture that takes out what some neurons have added."""

    def __init__(self, mixture: Mixture, neurons: Sequence[int]) -> None:
        self.mixture = mixture
        self.chosen = torch.zeros(mixture.count, mixture.width)
        self.chosen.view(-1)[list(neurons)] = 1

    def __call__(self, _: nn.Module, given: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> Tensor:
        routed = self.mixture.weighted(given, named)
        held = routed.held * self.chosen.to(routed.held)[routed.chosen]
        return output - self.mixture.written(replace(routed, held=held))
