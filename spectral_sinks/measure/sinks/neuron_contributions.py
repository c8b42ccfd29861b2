"""What each neuron of an MLP or of a mixture of experts writes at a sink, and what its weights predict."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn

from spectral_sinks.data.texts import Windows
from spectral_sinks.errors import InputError
from spectral_sinks.interventions.silencing import mlp_output, neuron_count
from spectral_sinks.interventions.sites import Site
from spectral_sinks.interventions.tracing import trace
from spectral_sinks.measure.memory import batches
from spectral_sinks.measure.residual.mlp_neurons import ranked_neurons
from spectral_sinks.models.effective_weights import constant
from spectral_sinks.models.experts import Mixture, Routed, mixture_of
from spectral_sinks.models.language import LanguageModel
from spectral_sinks.models.weights import mlp_weights, norm_after_mlp


def contributions(
    model: LanguageModel,
    windows: Windows,
    position: int,
    layer: int,
    written: Float[Tensor, "d"],
    batch_size: int | None,
) -> pd.DataFrame:
    """Return the table of neurons of one layer."""
    mixture = mixture_of(model, layer)
    direction = written / written.norm()
    along: list[Tensor] = []  # of each neuron at activation 1
    sizes: list[Tensor] = []
    predicted: list[Tensor] = []
    for unit in _units(model, layer):
        along.append(unit["down"] @ direction)
        sizes.append(unit["down"].norm(dim=1))
        predicted.append(sizes[-1] * _excited(unit))
    count = neuron_count(model, layer)
    weights = _Neurons(torch.cat(along), torch.cat(sizes))
    if len(weights.along) != count:
        raise InputError(
            f"the matrices that write the MLP of layer {layer} of {model.name} have {len(weights.along)} "
            f"rows for {count} neurons, so its neurons cannot be told apart"
        )
    site = Site("mlp", layer)
    seen = _Plain(model, layer) if mixture is None else _Mixed(model, layer, mixture)
    sums = torch.zeros(4, count, dtype=torch.float64)
    with seen.watching():
        for _, ids in batches(model, windows, batch_size):
            added = trace(
                model,
                ids.to(model.device),
                {},
                [site],
                readout=lambda final, read, weights: read[site].view(final.shape).double().cpu(),
            )
            sums += seen.sums(added, position, weights)
    named = ("activation", "contribution", "contribution_others", "size_others")
    columns: dict[str, NDArray[np.float64]] = dict(zip(named, (sums / len(windows)).numpy(), strict=True))
    columns["predicted"] = torch.cat(predicted).numpy()
    found = ranked_neurons({layer: columns}, "contribution")
    ranks = found["predicted"].rank(ascending=False, method="first").astype(int)
    found = found.assign(predicted_rank=ranks)
    return found if mixture is None else found.assign(expert=found["neuron"].map(mixture.expert))


def _units(model: LanguageModel, layer: int) -> Iterator[dict[str, Float[Tensor, "neurons d"]]]:
    """Return the matrices of a plain MLP, or of each expert in turn, with the gains of norms, float64."""
    found: dict[str, Tensor] = {}
    for weight in mlp_weights(model, layer):
        found[weight.part] = weight.folded().double().cpu()
        if weight.part == "down":
            yield found
            found = {}


@dataclass(frozen=True, eq=False)
class _Neurons:
    """What each neuron writes at activation 1: its length along what the MLP writes, and its size."""

    along: Float[Tensor, "neurons"]
    sizes: Float[Tensor, "neurons"]


class _Plain:
    """What the neurons of a plain MLP hold, summed up from passes."""

    def __init__(self, model: LanguageModel, layer: int) -> None:
        self.model, self.layer, self.scale_of = model, layer, _Scale(model, layer)
        self.held: Tensor = torch.empty(0)
        self.output: Tensor = torch.empty(0)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Keep what the last pass inside the block held."""

        def keep(_: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
            self.held, self.output = given[0].detach(), output.detach()

        handle = mlp_output(self.model, self.layer).register_forward_hook(keep)
        try:
            yield
        finally:
            handle.remove()

    def sums(
        self, added: Float[Tensor, "batch tokens d"], position: int, neurons: _Neurons
    ) -> Float[Tensor, "four neurons"]:
        """Return sums over windows: the activation and the contribution at the sink, and the means of the
        contribution and of the size at other tokens.
        """
        act = self.held.view(*added.shape[:2], -1).double().cpu()
        scaled = act * self.scale_of(self.output.view_as(added).double().cpu(), added)[..., None]
        rest = torch.arange(added.shape[1]) != position
        return torch.stack(
            [
                act[:, position].sum(0),
                scaled[:, position].sum(0) * neurons.along,
                scaled[:, rest].mean(1).sum(0) * neurons.along,
                scaled[:, rest].abs().mean(1).sum(0) * neurons.sizes,
            ]
        )


class _Mixed:
    """The same for a mixture of experts; an activation counts times the weight of the token's routing."""

    def __init__(self, model: LanguageModel, layer: int, mixture: Mixture) -> None:
        self.model, self.layer, self.mixture, self.scale_of = model, layer, mixture, _Scale(model, layer)
        self.routed: list[Routed] = []
        self.kept: dict[str, Tensor] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Keep what the last pass inside the block held."""
        kept, mixture = self.kept, self.mixture

        def routed(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> None:
            self.routed[:] = [mixture.weighted(given, named)]
            kept["experts"] = output.detach()

        def shared(_: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
            kept["held"], kept["shared"] = given[0].detach(), output.detach()

        def whole(_: nn.Module, __: Any, output: Any) -> None:
            kept["output"] = (output[0] if isinstance(output, tuple) else output).detach()

        layout = self.model.layout
        mlp = self.model.module.get_submodule(f"{layout.layers}.{self.layer}.{layout.mlp}")
        with ExitStack() as stack:
            stack.callback(mixture.experts.register_forward_hook(routed, with_kwargs=True).remove)
            if mixture.shared is not None:
                stack.callback(mixture.shared.register_forward_hook(shared).remove)
            stack.callback(mlp.register_forward_hook(whole).remove)
            yield

    def sums(
        self, added: Float[Tensor, "batch tokens d"], position: int, neurons: _Neurons
    ) -> Float[Tensor, "four neurons"]:
        """Return the sums of `_Plain.sums`.

        Raises InputError if the MLP adds something else than what the neurons of its experts write.
        """
        (routed,), mixture = self.routed, self.mixture
        batch, tokens, _ = added.shape
        kept = {name: x.double().reshape(batch * tokens, -1) for name, x in self.kept.items()}
        neurons_write = (mixture.written(routed) + mixture.constant(routed)).double()
        self._check("its experts", kept["experts"] - neurons_write, kept["experts"])
        # a shared expert may be added times a factor, one per token
        rest, factor = kept["output"] - kept["experts"], None
        if mixture.shared is not None:
            factor = (rest * kept["shared"]).sum(-1) / kept["shared"].square().sum(-1)
            rest = rest - factor[:, None] * kept["shared"]
        self._check("its MLP", rest, kept["output"])
        scale = self.scale_of(kept["output"].view(added.shape).cpu(), added).flatten().to(rest.device)
        place = torch.arange(tokens, device=rest.device).repeat(batch)
        at, others = (place == position).double(), (place != position).double() / (tokens - 1)
        by_token = (at, at * scale, others * scale, others * scale.abs())
        found: list[Tensor] = []
        for index, weight in enumerate(by_token):
            held = routed.held.double()
            part = (held.abs() if index == 3 else held) * weight[:, None, None]
            total = part.new_zeros(mixture.count, mixture.width)
            found.append(total.index_add_(0, routed.chosen.flatten(), part.flatten(0, 1)).flatten())
            if factor is not None:
                dense = kept["held"] * factor[:, None]
                found[-1] = torch.cat([found[-1], weight @ (dense.abs() if index == 3 else dense)])
        ones = torch.ones_like(neurons.along)
        return torch.stack(found).cpu() * torch.stack([ones, neurons.along, neurons.along, neurons.sizes])

    def _check(self, what: str, error: Tensor, whole: Tensor) -> None:
        if error.norm() > 2e-2 * whole.norm():
            raise InputError(
                f"what {what} of layer {self.layer} of {self.model.name} ({self.model.family}) adds is not "
                "what the neurons of its experts write, so they cannot be told apart"
            )


def _excited(weights: dict[Any, Tensor]) -> Float[Tensor, "neurons"]:
    """Return the largest response of each neuron to an input of length 1, without the activation function."""
    up, gate = weights["up"], weights.get("gate")
    if gate is None:
        return up.norm(dim=1)
    return (gate.norm(dim=1) * up.norm(dim=1) + (gate * up).sum(1).abs()) / 2


class _Scale:
    """The factor between the folded output of an MLP's last matrix and what is added, one per token."""

    def __init__(self, model: LanguageModel, layer: int) -> None:
        layout = model.layout
        name = norm_after_mlp(layout)
        self.factor, self.norm = layout.traits.write_factor, None
        if name:
            block = model.module.get_submodule(f"{layout.layers}.{layer}")
            self.norm = block.get_submodule(name)
            weight = next(w for w in mlp_weights(model, layer) if w.part == "down")
            self.gain = torch.ones(model.d) if weight.gain is None else weight.gain
            self.gain, self.centres = self.gain.double().cpu(), weight.centres
            self.bias = constant(self.norm, model.d, model.dtype).double().cpu()

    def __call__(
        self, output: Float[Tensor, "batch tokens d"], added: Float[Tensor, "batch tokens d"]
    ) -> Float[Tensor, "batch tokens"]:
        if self.norm is None:
            return torch.full(output.shape[:2], float(self.factor), dtype=torch.float64)
        folded = (output - output.mean(-1, keepdim=True) if self.centres else output) * self.gain
        own = added - self.factor * self.bias
        return (own * folded).sum(-1) / folded.square().sum(-1)
