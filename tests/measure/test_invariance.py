"""A rotation of the residual basis is no change: NLL, sink and filter effects stay as they are."""

import copy

import numpy as np
import torch
from support import tiny_models

import spectral_sinks as ss

IDS = tiny_models.ids(4, 66, seed=7)


def rotated(model: torch.nn.Module, rotation: torch.Tensor) -> torch.nn.Module:
    """Write the same Llama in another basis: readers see x Q, writers write into x Q."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if parameter.ndim == 2:
                writes = name.endswith(("o_proj.weight", "down_proj.weight"))
                exact = parameter.double()
                parameter.copy_(rotation.T @ exact if writes else exact @ rotation)
    return twin


def test_rotating_the_residual_basis_changes_nothing() -> None:
    plain = tiny_models.build()
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0)  # gains would single out the basis they are written in
    q = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(8)).double()).Q
    results = []
    for model in (ss.load(copy.deepcopy(plain)), ss.load(rotated(plain, q))):
        windows = ss.Windows.of_ids(IDS, model)
        u, e = (ss.read_spectrum(model, matrix, bands=8) for matrix in ("unembedding", "embedding"))
        cells = {
            "no-op": {},
            "dark": {ss.Site("exit", 0): ss.remove(u.dark())},
            "Psi": {ss.Site("exit", 1): ss.psi(u, e, 4)},
            "keys": {ss.Site("keys", 1): ss.phi(u, 1, 4)},
            "mlp": {ss.Site("mlp", 1): ss.omega(u, 3)},
            "swap": {ss.Site("embedding"): ss.remove(u.bands(2, 5), ss.Swap())},
        }
        effects = ss.evaluate_all(model, windows, cells)
        results.append((u, effects, ss.energy(model, windows, u)))
    (u, effects, shares), (v, others, other_shares) = results
    assert torch.allclose(u.values, v.values, rtol=1e-5)
    assert not torch.allclose(u.vectors.abs(), v.vectors.abs(), atol=0.1), "the basis did turn"
    for name, effect in effects.items():
        np.testing.assert_allclose(effect.table, others[name].table, atol=1e-4, err_msg=name)
        assert name == "no-op" or abs(effect.delta_nll) > 1e-3
    for column in ("share", "norm"):
        np.testing.assert_allclose(shares[column], other_shares[column], atol=1e-4)
