"""Energy by band against residuals taken by hooks and explicit projections."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from support import tiny_models
from torch import Tensor

import spectral_sinks as ss

IDS = tiny_models.ids(4, 15, seed=6)
KEYS = ["document", "site", "layer", "position_class"]


def residuals(family: str) -> dict[tuple[str, int], Tensor]:
    """What enters layer 0 and leaves each layer, by hooks on an unwrapped model."""
    plain, seen = tiny_models.plain(family), dict[tuple[str, int], Tensor]()
    blocks = plain.transformer.h if family == "gpt2" else plain.model.layers

    def enters(module: Any, args: Any) -> None:
        seen["embedding", -1] = args[0].double()

    handles = [blocks[0].register_forward_pre_hook(enters)]
    for index, block in enumerate(blocks):

        def leaves(module: Any, args: Any, output: Tensor, index: int = index) -> None:
            seen["exit", index] = output.double()

        handles.append(block.register_forward_hook(leaves))
    with torch.no_grad():
        plain(IDS)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_shares_and_norms_by_hand(family: str) -> None:
    model = tiny_models.model(family)
    spectrum = ss.read_spectrum(model, bands=5)
    table = ss.energy(model, ss.Windows.of_ids(IDS, model, [0, 0, 1, 2]), spectrum, batch_size=3)
    assert np.allclose(table.groupby(KEYS)["share"].sum(), 1, atol=1e-6)
    assert len(table) == 3 * 4 * 2 * 5
    seen, edges = residuals(family), [0, 6, 13, 19, 26, 32]
    indexed = table.set_index([*KEYS, "band"])
    for (site, layer), x in seen.items():
        squares = (x @ spectrum.vectors).square()
        for kind, part, tokens in (("bos", slice(0, 1), 1), ("other", slice(1, None), 14)):
            for document, rows in enumerate(([0, 1], [2], [3])):
                for band in range(5):
                    share = squares[..., edges[band] : edges[band + 1]].sum(-1) / squares.sum(-1)
                    found = indexed.loc[(document, site, layer, kind, band + 1)]
                    assert found["share"] == pytest.approx(float(share[rows, part].mean()), abs=1e-5)
                norms = x.norm(dim=-1)[rows, part].reshape(-1, tokens)
                median = float(norms.quantile(0.5, 1).mean())
                assert found["norm"] == pytest.approx(median, rel=1e-5)


def test_conventions_side_by_side() -> None:
    """Each convention has the rows of its spectrum alone, from the same passes."""
    model, windows = tiny_models.model("gemma2"), ss.Windows.of_ids(IDS, tiny_models.model("gemma2"))
    spectra = ss.read_spectra(model, bands=5)
    both = ss.energy(model, windows, spectra)
    for spectrum in spectra:
        alone = ss.energy(model, windows, spectrum)
        assert set(alone["convention"]) == {spectrum.convention}
        here = both[both["convention"] == spectrum.convention].reset_index(drop=True)
        pd.testing.assert_frame_equal(here, alone)
    shares = both.set_index([*KEYS, "band", "convention"])["share"].unstack()
    assert (shares["raw"] - shares["folded"]).abs().max() > 0.01
    assert (both.groupby([*KEYS, "band"])["norm"].nunique() == 1).all()


def test_the_first_token_is_bos_only_where_it_is_one() -> None:
    model, spectrum = tiny_models.model(), ss.read_spectrum(tiny_models.model())
    assert model.bos == 0
    opened = ss.energy(model, ss.Windows.of_ids(IDS, model), spectrum)
    assert set(opened["position_class"]) == {"bos", "other"}
    closed = ss.energy(model, ss.Windows.of_ids(IDS[:, 1:], model), spectrum)
    assert set(closed["position_class"]) == {"first", "other"}
    bare = ss.load(tiny_models.build())
    assert set(ss.energy(bare, ss.Windows.of_ids(IDS, bare), spectrum)["position_class"]) == {
        "first",
        "other",
    }


def test_chosen_sites_and_another_width() -> None:
    model, spectrum = tiny_models.model(), ss.read_spectrum(tiny_models.model())
    windows = ss.Windows.of_ids(IDS, model)
    table = ss.energy(model, windows, spectrum, [ss.Site("mlp", 2), ss.Site("attention", 0)])
    assert sorted(set(zip(table["site"], table["layer"], strict=True))) == [("attention", 0), ("mlp", 2)]
    other = ss.Spectrum(torch.eye(16, dtype=torch.float64), torch.arange(16, 0, -1.0), count=4)
    with pytest.raises(ss.InputError, match=r"width 16 for .* of width 32"):
        ss.energy(model, windows, other)


def test_random_directions_have_their_dimension_as_share() -> None:
    spectrum = ss.read_spectrum(tiny_models.model(), bands=5)
    shares = spectrum.shares(torch.randn(20_000, 32, generator=torch.Generator().manual_seed(0)))
    sizes = torch.tensor([6, 7, 6, 7, 6]) / 32
    assert torch.allclose(shares.mean(0), sizes, atol=4 * (0.08 / 20_000**0.5))
