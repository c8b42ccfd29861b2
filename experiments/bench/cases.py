"""The models of the benchmarks: the embedded model and a random Llama, in the forms that each side needs."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import sides
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import spectral_sinks as ss

BATCH = 16
"""Number of windows in a forward pass."""

CHUNK = 256
"""Number of predictions that the hand-written replay unembeds at once.

At these vocabularies it is the number that the package uses."""


@dataclass(frozen=True)
class Case:
    """A model in the forms that the two sides of a ratio need, all of which share the same weights."""

    name: str
    model: ss.LanguageModel
    windows: ss.Windows
    kept: Sequence[int]
    """Numbers of bands that the ladder keeps."""
    rounds: int
    pass_target: float
    stack: int = 1
    """Number of cells in one pass of the hand-written replay."""

    @cached_property
    def spectrum(self) -> ss.Spectrum:
        return ss.read_spectrum(self.model)

    @cached_property
    def plain(self) -> Any:
        return sides.twin(self.model)

    @cached_property
    def eager(self) -> ss.LanguageModel:
        return ss.load(sides.twin(self.model, "eager"))

    @cached_property
    def ids(self) -> Tensor:
        return torch.stack(self.windows.rows).to(self.model.device)

    @cached_property
    def filters(self) -> dict[sides.Cell, ss.Filter]:
        """Phi 1:k at every exit, by cell."""
        phi = {k: ss.phi(self.spectrum, 1, k) for k in self.kept}
        if self.model.device.type == "cuda":  # moved once here, not in every cell
            phi = {k: keep.to(self.model.device, torch.float32) for k, keep in phi.items()}
        return {(layer, k): phi[k] for layer in range(self.model.layers) for k in self.kept}

    def at(self, layer: int) -> dict[sides.Cell, ss.Filter]:
        return {cell: keep for cell, keep in self.filters.items() if cell[0] == layer}

    def evaluate(
        self, cells: dict[sides.Cell, Any], model: ss.LanguageModel | None = None
    ) -> dict[str, ss.Effect]:
        named = {f"{layer} {k}": {ss.Site("exit", layer): edit} for (layer, k), edit in cells.items()}
        return ss.evaluate_all(model or self.model, self.windows, named, batch_size=BATCH)


def random_llama(d: int, layers: int, tokens: int, windows: int, **options: Any) -> tuple[Any, ss.Windows]:
    """Make a Llama with random weights and a vocabulary that is small for its layers, and random windows.

    Args:
        d: width of the residual stream.
        layers: number of layers.
        tokens: number of tokens in a window.
        windows: number of windows.
        **options: `device` and `dtype` of the model.

    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=d,
        intermediate_size=11 * d // 4,
        num_hidden_layers=layers,
        num_attention_heads=d // 64,
        max_position_embeddings=tokens,
    )
    with torch.device(options.get("device", "cpu")):
        module = LlamaForCausalLM(config).to(options.get("dtype", torch.float32))
    model = ss.load(module)
    model.module.set_attn_implementation("sdpa_opening")
    return model, ss.Windows.of_ids(torch.randint(0, 4096, (windows, tokens)), model)


class Bench:
    """The models of the benchmarks, each of which is made on first use."""

    def __init__(self, quick: bool) -> None:
        self.quick = quick

    @cached_property
    def embedded(self) -> Case:
        model = ss.load()
        windows = ss.cut(ss.documents(limit=2 if self.quick else 8), model, per_document=1)
        kept = (5, 19) if self.quick else range(1, 21)
        return Case("embedded, d 128, 6 layers", model, windows, kept, 1 if self.quick else 3, 1.15)

    @cached_property
    def random(self) -> Case:
        model, windows = random_llama(1024, 4 if self.quick else 12, 128, 1 if self.quick else 2)
        name = f"random Llama, d 1024, {model.layers} layers"
        return Case(name, model, windows, (5, 10, 15, 19), 1 if self.quick else 2, 1.05, 4)

    @property
    def cases(self) -> tuple[Case, Case]:
        return self.embedded, self.random
