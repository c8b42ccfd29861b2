"""A side of the comparison: `evaluate_all`, which returns KL, agreement and sink mass besides the NLL."""

import torch
from side import Inputs, Run, serve
from torch import Tensor

import spectral_sinks as ss


def load(inputs: Inputs) -> Run:
    model = ss.load(inputs.model, dtype="float32")
    windows = ss.Windows.of_ids(inputs.ids, model)
    edit = ss.remove(ss.Subspace(inputs.basis))

    def run(exits: list[int]) -> Tensor:
        effects = ss.evaluate_all(
            model, windows, {str(layer): {ss.Site("exit", layer): edit} for layer in exits}
        )
        tables = [effect.table for effect in effects.values()]
        columns = [tables[0]["baseline_nll"], *(table["nll"] for table in tables)]
        return torch.stack([torch.from_numpy(column.to_numpy(copy=True)) for column in columns])

    return run


if __name__ == "__main__":
    serve(load, "torch", "transformers", "nnsight")
