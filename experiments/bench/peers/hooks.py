"""A side of the comparison: hooks by hand on a model of transformers, one whole pass for each filter."""

from typing import Any

import torch
from side import Inputs, Run, nll, remove, serve
from torch import Tensor
from transformers import AutoModelForCausalLM


def load(inputs: Inputs) -> Run:
    model: Any = AutoModelForCausalLM.from_pretrained(inputs.model, dtype=torch.float32).eval()
    ids, basis = inputs.ids, inputs.basis

    def change(module: Any, given: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (remove(output[0], basis), *output[1:])
        return remove(output, basis)

    def run(exits: list[int]) -> Tensor:
        found = [nll(model(ids, use_cache=False).logits, ids)]
        for layer in exits:
            handle = model.model.layers[layer].register_forward_hook(change)
            found.append(nll(model(ids, use_cache=False).logits, ids))
            handle.remove()
        return torch.stack(found)

    return run


if __name__ == "__main__":
    serve(load, "torch", "transformers")
