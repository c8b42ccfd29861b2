"""A side of the comparison: TransformerLens's bridge, one run with a hook for each filter.

The bridge runs eager attention, so that its hooks see scores and patterns; this is its default.
"""

from typing import Any

import torch
from side import Inputs, Run, nll, remove, serve
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge  # pyright: ignore[reportMissingImports]
from transformers import AutoTokenizer


def load(inputs: Inputs) -> Run:
    tokenizer = AutoTokenizer.from_pretrained(inputs.model)
    bridge: Any = TransformerBridge.boot_transformers(
        str(inputs.model), device="cpu", dtype=torch.float32, tokenizer=tokenizer
    )
    bridge.eval()
    ids, basis = inputs.ids, inputs.basis

    def change(x: Tensor, hook: Any) -> Tensor:
        return remove(x, basis)

    def run(exits: list[int]) -> Tensor:
        found = [nll(bridge(ids, return_type="logits"), ids)]
        for layer in exits:
            hooks = [(f"blocks.{layer}.hook_out", change)]
            logits = bridge.run_with_hooks(ids, return_type="logits", fwd_hooks=hooks)
            found.append(nll(logits, ids))
        return torch.stack(found)

    return run


if __name__ == "__main__":
    serve(load, "torch", "transformers", "transformer-lens")
