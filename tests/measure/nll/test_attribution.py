"""The first-order screen against finite differences, and where it must be zero."""

import numpy as np
import pytest
import torch
from support import tiny_models

import spectral_sinks as ss

EPSILON = 0.01
IDS = tiny_models.ids(5, 24)
OWNERS = [0, 0, 1, 2, 2]


def table(model: ss.LanguageModel, windows: ss.Windows, spectrum: ss.Spectrum, **options: int) -> np.ndarray:
    found = ss.nll.first_order(model, windows, spectrum, **options)
    assert list(found.columns) == ["layer", "band", "estimate"]
    return found.pivot(index="layer", columns="band", values="estimate").to_numpy()


@pytest.mark.parametrize(
    "family",
    ["llama", "qwen2", "gemma2", "gpt2", "gpt_neox parallel", "olmo2", "phi3"],  # not gpt_oss: routing jumps
)
def test_finite_differences(family: str) -> None:
    model = tiny_models.model(family)
    windows = ss.Windows.of_ids([*IDS[:4], IDS[4, :15]], model, OWNERS)
    spectrum = ss.read_spectrum(model, bands=4)
    found = table(model, windows, spectrum, batch_size=2)
    cells = {}
    for layer in range(model.layers):
        for band, subspace in enumerate(spectrum):
            for sign in (1, -1):
                cells[f"{layer} {band} {sign}"] = {
                    ss.Site("exit", layer): lambda x, s=subspace, e=sign * EPSILON: x - e * s.project(x)
                }
    effects = ss.evaluate_all(model, windows, cells)
    expected = [
        [
            (effects[f"{layer} {band} 1"].nll - effects[f"{layer} {band} -1"].nll) / (2 * EPSILON)
            for band in range(spectrum.count)
        ]
        for layer in range(model.layers)
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())
    # the loss does not see the scale of what the final norm reads: the last exit's bands add up to nothing
    assert abs(found[-1].sum()) < 1e-3 * np.abs(found[-1]).max()
    assert abs(found[0].sum()) > 1e-2 * np.abs(found[0]).max(), "elsewhere they do not"


def test_one_band_is_the_sum_of_its_parts_and_weights_need_no_gradients() -> None:
    model = ss.load(tiny_models.build().requires_grad_(False))
    windows = ss.Windows.of_ids(IDS, model)
    spectrum = ss.read_spectrum(model, bands=8)
    with torch.no_grad():
        fine = table(model, windows, spectrum)
    coarse = ss.nll.first_order(model, windows, spectrum.with_bands(4), [2, 0])
    assert coarse["layer"].tolist() == [2] * 4 + [0] * 4
    np.testing.assert_allclose(
        coarse["estimate"].to_numpy().reshape(2, 4), fine.reshape(3, 4, 2).sum(-1)[[2, 0]], atol=1e-6
    )
    assert all(weight.grad is None for weight in model.module.parameters())


def test_what_is_refused() -> None:
    model = tiny_models.model()
    windows = ss.Windows.of_ids(IDS, model)
    with pytest.raises(ss.InputError, match="layer 3"):
        ss.nll.first_order(model, windows, ss.read_spectrum(model, bands=4), [3])
    other = ss.Spectrum(torch.eye(16, dtype=torch.float64), torch.arange(16.0, 0, -1), count=4)
    with pytest.raises(ss.InputError, match="width 16 for a model of width 32"):
        ss.nll.first_order(model, windows, other)
