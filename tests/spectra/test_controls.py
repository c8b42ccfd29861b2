"""Controls for a filter against explicit float64 matrices, and against what each must leave as it is."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import tiny_models

import spectral_sinks as ss
from spectral_sinks.spectra.edits import as_edit
from spectral_sinks.spectra.spectrum import Spectrum

D = 40


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def share(subspace, x):
    """Recompute the mean share of each token's energy with an explicit projector."""
    basis = subspace.orthonormal().double()
    projected = x.double().reshape(-1, D) @ (basis @ basis.T)
    return float((projected.square().sum(1) / x.double().reshape(-1, D).square().sum(1)).mean())


@pytest.fixture(scope="module")
def u(planted):
    return Spectrum.from_matrix(planted(torch.linspace(10, 1, D)), use_cache=False)


@pytest.fixture(scope="module")
def skewed(u):
    """Residuals whose dark tail holds far more energy than chance, in steps of 1.4 along the spectrum."""
    return gaussian(5, 9, D, seed=3) * 1.1 ** torch.arange(D, dtype=torch.float64) @ u.vectors.T


@given(seed=st.integers(0, 1000), band=st.integers(8, 20))
def test_the_same_energy_is_removed(u, skewed, seed, band):
    observed = u.band(band)
    drawn = ss.spectra.energy_matched(observed, skewed, seed)
    assert share(drawn, skewed) == pytest.approx(share(observed, skewed), rel=0.01)
    basis = drawn.orthonormal()
    torch.testing.assert_close(basis.T @ basis, torch.eye(drawn.rank, dtype=torch.float64))
    assert torch.equal(basis, ss.spectra.energy_matched(observed, skewed, seed).orthonormal()), (
        "the same seed"
    )


def test_matched_directions_are_drawn_evenly(u, skewed):
    """Averaged over draws, the projector has no preferred direction: but for the last one turned."""
    drawn = [ss.spectra.energy_matched(u.bands(15, 20), skewed, seed).orthonormal() for seed in range(200)]
    mean = sum(b @ b.T for b in drawn) / 200
    rank = np.mean([b.shape[1] for b in drawn])
    assert rank > 12, "the tail holds more than its share, so it takes more random directions than its 12"
    torch.testing.assert_close(mean.diagonal(), torch.full((D,), rank / D).double(), atol=0.15, rtol=0)
    assert share(ss.random_subspace(D, 12), skewed) < share(u.bands(15, 20), skewed)


def test_nothing_and_everything_are_matched_by_rank(u, skewed):
    assert ss.spectra.energy_matched(u.subspace("none"), skewed).rank == 0
    assert ss.spectra.energy_matched(u.subspace("all"), skewed).rank == D


def test_what_cannot_be_matched(u, skewed):
    with pytest.raises(ss.InputError, match="width"):
        ss.spectra.energy_matched(u.dark(), torch.ones(3, D + 1))
    for bad in (torch.zeros(3, D), torch.full((3, D), torch.nan)):
        with pytest.raises(ss.InputError, match="zero or not finite"):
            ss.spectra.energy_matched(u.dark(), bad)
    one = u.vectors[:, :1].T
    with pytest.raises(ss.InputError, match="no subspace of rank"):
        ss.spectra.energy_matched(
            u.bands(2, 20), one
        )  # takes nothing, and every random direction takes something


def test_random_within(u):
    outer = u.bands(3, 9)
    drawn = [ss.spectra.random_within(outer, 5, seed).orthonormal() for seed in range(2)]
    projector = outer.orthonormal() @ outer.orthonormal().T
    for basis in drawn:
        torch.testing.assert_close(projector @ basis, basis)
        torch.testing.assert_close(basis.T @ basis, torch.eye(5, dtype=torch.float64))
    assert not torch.allclose(drawn[0], drawn[1])
    whole = ss.spectra.random_within(outer, outer.rank).orthonormal()
    torch.testing.assert_close(whole @ whole.T, projector)
    with pytest.raises(ss.InputError, match="rank 15"):
        ss.spectra.random_within(outer, 15)


def test_a_direction_swap_is_a_fixed_isometry_out_of_the_subspace(u, skewed):
    dark = u.bands(18, 20)
    swap = ss.spectra.DirectionSwap(4)
    kept, out = dark.reject(skewed), ss.remove(dark, swap)(skewed)
    filled = out - kept
    torch.testing.assert_close(filled.norm(dim=-1), dark.project(skewed).norm(dim=-1))
    assert dark.project(filled).abs().max() < 1e-9 * filled.abs().max()
    flat, removed = filled.reshape(-1, D), dark.project(skewed).reshape(-1, D)
    torch.testing.assert_close(flat @ flat.T, removed @ removed.T)
    turned = ss.Subspace(dark.orthonormal() @ torch.linalg.qr(gaussian(6, 6, seed=9)).Q)
    torch.testing.assert_close(swap(removed, turned), swap(removed, dark), msg="whatever basis is stored")
    assert not torch.allclose(ss.spectra.DirectionSwap(5)(removed, dark), flat)
    with pytest.raises(ss.InputError, match="needs as many directions"):
        swap(skewed, dark.complement())


@pytest.mark.parametrize("tokens", ["all", "first", "all-but-first"])
def test_norm_restored(u, skewed, tokens):
    filtered = ss.remove(u.bands(15, 20), tokens=tokens)
    restored = ss.spectra.NormRestored(filtered)
    out, plain = restored(skewed), filtered(skewed)
    torch.testing.assert_close(out.norm(dim=-1), skewed.norm(dim=-1))
    cosine = torch.nn.functional.cosine_similarity(out, plain, dim=-1)
    torch.testing.assert_close(cosine, torch.ones_like(cosine))
    untouched = {"all": out[:, :0], "first": out[:, 1:], "all-but-first": out[:, :1]}[tokens]
    where = {"all": skewed[:, :0], "first": skewed[:, 1:], "all-but-first": skewed[:, :1]}[tokens]
    assert torch.equal(untouched, where), "not a bit"
    assert restored(skewed.bfloat16()).dtype == torch.bfloat16
    assert "norm restored" in restored.name


def test_what_norm_restored_refuses_and_what_is_left_of_nothing(u):
    for bad in (ss.remove(u.dark(), ss.Swap()), ss.remove(u.dark(), tokens=[3])):
        with pytest.raises(ss.InputError, match="after a removal"):
            ss.spectra.NormRestored(bad)
    inside = u.dark().orthonormal().T.contiguous()
    left = ss.spectra.NormRestored(ss.remove(u.dark()))(torch.zeros_like(inside))
    assert torch.equal(left, torch.zeros_like(inside))


def test_a_no_op_changes_nothing(u, skewed):
    torch.testing.assert_close(ss.remove(u.dark(), ss.spectra.NoOp())(skewed), skewed)


def test_controls_have_addresses_of_their_own(u):
    dark = u.dark()
    fills = [ss.Zero(), ss.spectra.NoOp(), ss.spectra.DirectionSwap(0), ss.spectra.DirectionSwap(1)]
    edits = [*(ss.remove(dark, fill) for fill in fills), ss.spectra.NormRestored(ss.remove(dark))]
    assert len({str(as_edit(edit).address) for edit in edits}) == len(edits)
    other = ss.spectra.NormRestored(ss.remove(u.band(3)))
    assert (
        as_edit(ss.spectra.NormRestored(ss.remove(dark))).address
        == as_edit(edits[-1]).address
        != as_edit(other).address
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_the_table_of_effects(family):
    model = tiny_models.model(family)
    windows = ss.Windows.of_ids(tiny_models.ids(4, 66, seed=1), model)
    dark = ss.read_spectrum(model).dark()
    restored = ss.spectra.NormRestored(ss.remove(dark))
    cells = {
        "exit": {ss.Site("exit", 0): ss.remove(dark)},
        "no-op": {ss.Site("exit", 0): ss.remove(dark, ss.spectra.NoOp())},
        "keys": {ss.Site("keys", 2): ss.remove(dark), ss.Site("values", 2): ss.remove(dark)},
        "mlp": {ss.Site("mlp", 2): ss.remove(dark)},
        "function": {ss.Site("exit", 1): restored},
    }
    effects = ss.evaluate_all(model, windows, cells)
    table = ss.sweeps.effect_table(effects).set_index("name")
    assert table["n"].eq(4).all()
    assert table.loc["exit", "mean"] == effects["exit"].table["delta_nll"].mean()
    low, high = ss.stats.mean_interval(effects["exit"].table["delta_nll"])
    assert (table.loc["exit", "low"], table.loc["exit", "high"]) == (low, high)
    assert table.loc["exit", "rank"] == dark.rank and table.loc["keys", "rank"] == 2 * dark.rank
    assert table.loc["no-op", "mean"] == pytest.approx(0, abs=1e-5)
    masses = effects["exit"].table
    assert table.loc["exit", "sink"] == pytest.approx(masses[["sink_mass_1", "sink_mass_2"]].mean().mean())
    assert table.loc["keys", "sink"] == pytest.approx(effects["keys"].table["sink_mass_2"].mean())
    assert np.isnan(table.loc["mlp", "sink"]), "no attention reads it"
    assert np.isnan(table.loc["function", "rank"])
    above = ss.sweeps.effect_table(effects, above=1).set_index("name")
    assert above.loc["exit", "sink"] == pytest.approx(masses["sink_mass_2"].mean())
