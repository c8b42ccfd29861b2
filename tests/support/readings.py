"""All that is read off the weights of a language model, and its scores: what two forms of one model share."""

import torch
from torch import Tensor

import spectral_sinks as ss
from spectral_sinks.models.weights import residual_weights
from support import tiny_models

NAMED = "model.layers.1.mlp.up_proj.weight"


def readings(model: ss.LanguageModel, named: str = NAMED) -> dict[str, Tensor]:
    """Return numbers of every measurement that reads a weight, and NLL and KL at every kind of site."""
    ids = tiny_models.ids(4, 20)
    windows = ss.Windows.of_ids(ids, model)
    found: dict[str, Tensor] = {}
    for matrix in ("unembedding", "embedding", named):
        for convention in ("raw", "folded", "centred") if matrix == "unembedding" else ("raw",):
            read = ss.read_spectrum(model, matrix, convention=convention, use_cache=False)
            found[f"{matrix} {convention}"] = read.vectors * read.values.square() @ read.vectors.T
    for weight in residual_weights(model):
        found[f"{weight.part} {weight.layer} {weight.unit}"] = weight.rows
        found[f"{weight.part} {weight.layer} {weight.unit} folded"] = weight.folded()
    found["head write"] = torch.stack([model.head_write(1, head) for head in range(model.heads)])
    found["final gain"] = model.final_gain
    dark = ss.random_subspace(model.d, 8, 0)
    sites = [ss.Site("head", 1, 1), ss.Site("exit", 0), ss.Site("values", 1), ss.Site("mlp", 2)]
    for site in sites:
        effect = ss.evaluate(model, windows, {site: ss.remove(dark)})
        found[f"{site} nll"] = torch.tensor([effect.nll, effect.baseline_nll])
        found[f"{site} kl"] = torch.tensor(effect.table["kl"].to_numpy())
    use = ss.circuits.head_use(model, windows)
    found["head use"] = torch.tensor(use[["attention", "value_ratio", "weighted", "stable_rank"]].to_numpy())
    basis = ss.Spectrum.from_matrix(torch.randn(64, model.d, generator=torch.Generator().manual_seed(0)))
    lens = ss.residual.band_lens(model, windows, {"basis": basis}, bands=[1, 10, 20])
    found["lens"] = torch.tensor(lens[["nll", "kl"]].to_numpy())
    return {name: numbers.detach().double() for name, numbers in found.items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], error: float = 3e-4) -> None:
    """Compare the numbers of two forms of a model, each relative to its own size."""
    assert found.keys() == expected.keys()
    off = {
        name: float((found[name] - numbers).abs().max() / (numbers.abs().max() + 1e-3))
        for name, numbers in expected.items()
    }
    wrong = {name: size for name, size in off.items() if not size <= error}
    assert not wrong, str(wrong)


def differ(found: dict[str, Tensor], expected: dict[str, Tensor], error: float = 1e-3) -> set[str]:
    """Return the names of the numbers in which two models differ."""
    return {name for name in expected if not torch.allclose(found[name], expected[name], error, error)}
