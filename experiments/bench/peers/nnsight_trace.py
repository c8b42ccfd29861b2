"""A side of the comparison: nnsight by hand, one trace for each filter."""

from typing import Any

import nnsight
import torch
from side import Inputs, Run, nll, remove, serve
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer


def load(inputs: Inputs) -> Run:
    module = AutoModelForCausalLM.from_pretrained(inputs.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(inputs.model)
    model: Any = nnsight.TransformersModel(module, tokenizer=tokenizer, task="text-generation")
    ids, basis = inputs.ids, inputs.basis

    def run(exits: list[int]) -> Tensor:
        with model.trace(input_ids=ids, use_cache=False):
            untouched = nnsight.save(nll(model.lm_head.output, ids))
        found = [untouched]
        for layer in exits:
            with model.trace(input_ids=ids, use_cache=False):
                model.model.layers[layer].output = remove(model.model.layers[layer].output, basis)
                filtered = nnsight.save(nll(model.lm_head.output, ids))
            found.append(filtered)
        return torch.stack(found)

    return run


if __name__ == "__main__":
    serve(load, "torch", "transformers", "nnsight")
