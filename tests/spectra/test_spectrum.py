"""Decomposition, conventions, bands and shares, against scipy in float64."""

import warnings

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from spectral_sinks.errors import InputError, SpectralWarning
from spectral_sinks.spectra import spectrum as module
from spectral_sinks.spectra.spectrum import Spectrum
from spectral_sinks.spectra.subspace import random_subspace

D, ROWS = 60, 500
GAIN = torch.rand(D, generator=torch.Generator().manual_seed(5)) + 0.5


def right_vectors(matrix):
    return scipy.linalg.svd(np.asarray(matrix, dtype=np.float64))[2].T


def sine(a, b):
    """Sine of the largest principal angle between two column spans."""
    return np.sin(scipy.linalg.subspace_angles(np.asarray(a), np.asarray(b)).max())


def decaying(condition, d=D):
    """Make a few dominant singular values, a slow decay and a steep tail, as unembeddings have."""
    t = torch.linspace(0, 1, d, dtype=torch.float64)
    return 30 * condition ** -(0.1 * t.sqrt() + 0.3 * t + 0.6 * t**8)


def hollow(d, count):
    """Make a spectrum whose vectors are not looked at."""
    return Spectrum(torch.zeros(1, 1).double().expand(d, d), torch.arange(d, 0, -1).double(), count=count)


@pytest.fixture(scope="module")
def spectrum(planted):
    return Spectrum.from_matrix(planted(decaying(100.0, 40)), name="W_U", use_cache=False)


@pytest.mark.parametrize(
    ("dtype", "condition"),
    [(torch.float32, 1e2), (torch.float32, 1e6), (torch.bfloat16, 1e2), (torch.float16, 1e2)],
)
@pytest.mark.parametrize("block", [module.BLOCK_ROWS, 97, 7])
def test_dark_subspace_agrees_with_scipy(planted, monkeypatch, dtype, condition, block):
    monkeypatch.setattr(module, "BLOCK_ROWS", block)
    weight = planted(decaying(condition), ROWS).to(dtype)
    spectrum = Spectrum.from_matrix(weight)
    exact = weight.double().numpy()
    truth = right_vectors(exact)
    for rank in (1, 3, 12):
        assert sine(spectrum.dark(rank / D).basis, truth[:, -rank:]) < 1e-6
    np.testing.assert_allclose(spectrum.values, scipy.linalg.svdvals(exact), rtol=1e-8)
    assert spectrum.vectors.dtype == spectrum.values.dtype == torch.float64


def test_the_comparison_tells_careless_decompositions_apart(planted):
    """Single precision loses the directions of the tail, a squared matrix its singular values."""
    weight = planted(decaying(1e6), ROWS).float()
    exact = weight.double().numpy()
    assert sine(torch.linalg.svd(weight).Vh[-3:].T, right_vectors(exact)[:, -3:]) > 1e-5
    squared = np.sqrt(np.linalg.eigvalsh(exact.T @ exact)[0])
    assert abs(squared / scipy.linalg.svdvals(exact)[-1] - 1) > 1e-7


def test_fewer_rows_than_directions(planted):
    weight = planted(decaying(10.0), ROWS)[:23]
    with pytest.warns(SpectralWarning, match="rank 23 of 60.: bands 8 to 20"):
        spectrum = Spectrum.from_matrix(weight)
    np.testing.assert_allclose(spectrum.values[:23], scipy.linalg.svdvals(weight.numpy()), rtol=1e-10)
    assert not spectrum.values[23:].any()
    torch.testing.assert_close(spectrum.vectors.T @ spectrum.vectors, torch.eye(D).double())
    assert (weight @ spectrum.vectors[:, 23:]).abs().max() < 1e-12


@pytest.mark.parametrize("block", [module.BLOCK_ROWS, 60])
@pytest.mark.parametrize("case", ["raw", "folded", "centred", "centred, LayerNorm"])
def test_conventions(planted, monkeypatch, case, block):
    monkeypatch.setattr(module, "BLOCK_ROWS", block)
    weight = planted(decaying(50.0), ROWS) + 0.3  # a mean that centring must remove
    read, gain = weight.numpy(), GAIN.double().numpy()
    if case != "raw":
        read = read @ np.diag(gain)
    if case.startswith("centred"):
        read = read - read.mean(axis=0)
    if case == "centred, LayerNorm":
        read = read @ (np.eye(D) - np.ones((D, D)) / D)
    convention = case.split(",")[0]
    spectrum = Spectrum.from_matrix(
        weight, convention=convention, gain=GAIN, centre_residual=case == "centred, LayerNorm", bands=5
    )
    gram = spectrum.vectors * spectrum.values**2 @ spectrum.vectors.T
    np.testing.assert_allclose(gram, read.T @ read, atol=1e-10 * spectrum.values[0] ** 2)
    assert sine(spectrum.dark().basis, right_vectors(read)[:, -12:]) < 1e-6
    assert spectrum.convention == convention
    if case == "centred, LayerNorm":
        assert spectrum.values[-1] < 1e-12 * spectrum.values[0]
        assert sine(spectrum.vectors[:, -1:], np.ones((D, 1))) < 1e-6


@pytest.mark.parametrize("exponent", [-900, -40, 500, 900])
def test_the_scale_of_the_weights_is_of_no_matter(planted, exponent):
    """Squares of the last ones are out of the range of float64."""
    weight = planted(decaying(1e4), ROWS)
    plain, scaled = Spectrum.from_matrix(weight), Spectrum.from_matrix(weight * 2.0**exponent)
    assert torch.equal(scaled.values, plain.values * 2.0**exponent)
    assert torch.equal(scaled.vectors, plain.vectors)


@pytest.mark.filterwarnings("ignore:band edges")
def test_a_matrix_of_zeros():
    spectrum = Spectrum.from_matrix(torch.zeros(50, 30))
    assert not spectrum.values.any()
    torch.testing.assert_close(spectrum.vectors.T @ spectrum.vectors, torch.eye(30).double())


@pytest.mark.parametrize(
    "form", [torch.nn.Parameter, lambda w: w.T.contiguous().T, lambda w: w.repeat(2, 1)[::2]]
)
def test_the_weights_are_only_read(planted, form):
    plain = planted(decaying(100.0), ROWS)
    weight = form(plain)
    before = weight.detach().clone()
    spectrum = Spectrum.from_matrix(weight, convention="centred", gain=GAIN, centre_residual=True)
    assert torch.equal(weight, before) and not spectrum.vectors.requires_grad
    assert (
        sine(
            spectrum.dark(0.5).basis,
            Spectrum.from_matrix(before, convention="centred", gain=GAIN, centre_residual=True)
            .dark(0.5)
            .basis,
        )
        < 1e-12
    )


@pytest.mark.parametrize("convention", ["raw", "folded"])
def test_only_the_centred_convention_removes_the_mean_of_the_residual(planted, convention):
    weight = planted(decaying(10.0))
    plain = Spectrum.from_matrix(weight, convention=convention, gain=GAIN)
    asked = Spectrum.from_matrix(weight, convention=convention, gain=GAIN, centre_residual=True)
    assert torch.equal(plain.values, asked.values) and plain.fingerprint == asked.fingerprint


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("weight", "options", "message"),
    [
        (torch.ones(9, 5), {"convention": "square"}, "'square'.*raw, folded, centred"),
        (torch.ones(9, 5), {"convention": "folded"}, "gain of width 5, got none"),
        (torch.ones(9, 5), {"convention": "centred", "gain": torch.ones(4)}, r"got shape \(4,\)"),
        (torch.ones(9, 5), {"convention": "folded", "gain": torch.full((5,), torch.nan)}, "gain.*NaN"),
        (torch.tensor([[1.0, torch.nan], [torch.inf, 0.0]]), {}, "lm_head holds 2 NaN or Inf of 4"),
        (torch.ones(5), {}, r"lm_head has shape \(5,\), expected rows x d"),
        (torch.ones(0, 5), {}, r"shape \(0, 5\)"),
        (torch.ones(5, 0), {}, r"shape \(5, 0\)"),
        (torch.eye(9, 5), {"bands": 6}, "6 bands of 5 directions: give 1 to 5"),
        (torch.eye(9, 5), {"bands": 0}, "0 bands of 5"),
    ],
)
def test_errors_of_from_matrix(weight, options, message):
    with pytest.raises(InputError, match=message):
        Spectrum.from_matrix(weight, name="lm_head", **options)


@given(st.integers(1, 6000).flatmap(lambda d: st.tuples(st.just(d), st.integers(1, min(d, 100)))))
def test_bands_cover_every_direction_once(case):
    d, count = case
    edges = hollow(d, count).edges
    sizes = np.diff(edges)
    assert edges[0] == 0 and edges[-1] == d and len(sizes) == count
    assert sizes.min() >= 1 and abs(sizes - d / count).max() <= 1


def test_the_dark_band_of_5120_directions_has_256():
    assert np.diff(hollow(5120, 20).edges).tolist() == [256] * 20


def test_bands_are_the_singular_directions_in_order(spectrum):
    assert torch.equal(torch.cat([band.orthonormal() for band in spectrum], dim=1), spectrum.vectors)
    assert torch.equal(spectrum.bands(3, 19).orthonormal(), spectrum.vectors[:, 4:38])
    assert torch.equal(spectrum.dark().basis, spectrum.band(20).basis)
    wide = spectrum.with_bands(3)
    assert [band.rank for band in wide] == [13, 14, 13] and wide.fingerprint == spectrum.fingerprint
    assert sorted(spectrum.values.tolist(), reverse=True) == spectrum.values.tolist()


@pytest.mark.parametrize(("j", "k"), [(0, 3), (5, 4), (7, 21), (-1, -1)])
def test_bands_outside_the_spectrum(spectrum, j, k):
    with pytest.raises(InputError, match=f"bands {j} to {k}: the spectrum has bands 1 to 20"):
        spectrum.bands(j, k)


@pytest.mark.parametrize(("twins", "warns"), [((37, 38), True), ((38, 39), False), ((0, 1), False)])
def test_only_an_edge_between_equal_singular_values_is_reported(planted, twins, warns):
    values = torch.linspace(10, 1, 40, dtype=torch.float64)
    values[twins[1]] = values[twins[0]]
    weight = planted(values)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        spectrum = Spectrum.from_matrix(weight, name="W_U")
        spectrum.with_bands(10)  # edges at multiples of 4 alone
    assert [w.category for w in caught] == [SpectralWarning] * warns
    assert all("W_U" in str(w.message) and "after direction 38 (" in str(w.message) for w in caught)


def test_singular_values_that_are_rounding_alone_have_no_order():
    values = torch.cat([torch.linspace(9, 1, 5).double(), torch.linspace(1e-15, 1e-16, 35).double()])
    with pytest.warns(SpectralWarning) as caught:
        spectrum = Spectrum(torch.eye(40).double(), values)
    (warning,) = caught
    assert "rank 5 of 40): bands 3 to 20 divide" in str(warning.message)
    assert spectrum.rank == 5 and spectrum.null().rank == spectrum.subspace("null").rank == 35
    assert not spectrum.null().project(torch.eye(40).double())[:5].any()


def test_no_edge_inside_the_null_space_is_no_warning() -> None:
    values = torch.cat([torch.linspace(9, 1, 35).double(), torch.zeros(5).double()])
    spectrum = Spectrum(torch.eye(40).double(), values, count=8)
    assert spectrum.rank == 35 and spectrum.dark().rank == 5 == spectrum.null().rank
    full = Spectrum(torch.eye(40).double(), torch.linspace(9, 1, 40).double())
    assert full.rank == 40 and full.null().rank == 0


SPECS = {
    "1": range(2),
    "20": range(38, 40),
    "1-8,20": [*range(16), 38, 39],
    "3, 2,2-4": range(2, 8),
    "dark": range(38, 40),
    "dark:0.1": range(36, 40),
    "head:0.4": range(16),
    "head:1": range(40),
    "middle:0.4-0.9": range(16, 36),
    "head:.05,dark": [0, 1, 38, 39],
    "all": range(40),
    "none": [],
}


@pytest.mark.parametrize("spec", SPECS)
def test_band_specifications(spectrum, spec):
    space, columns = spectrum.subspace(spec), list(SPECS[spec])
    assert torch.equal(space.orthonormal(), spectrum.vectors[:, columns])
    assert space.rank == len(columns) and space.name == spec


def test_random_specification(spectrum):
    drawn = spectrum.subspace("random:13", seed=4)
    assert drawn.rank == 13 and torch.equal(drawn.basis, random_subspace(40, 13, 4).basis)


def test_fractions(spectrum):
    for space, span in [
        (spectrum.head(0.25), slice(0, 10)),
        (spectrum.middle(0.25, 0.75), slice(10, 30)),
        (spectrum.dark(0.25), slice(30, 40)),
        (spectrum.dark(1.0), slice(0, 40)),
    ]:
        assert torch.equal(space.orthonormal(), spectrum.vectors[:, span])


@pytest.mark.parametrize(
    ("spec", "bad"),
    [
        ("1-8,21", "21"),
        ("0", "bands 0"),
        ("8-1", "8 to 1"),
        ("1,,2", "''"),
        ("1-2-3", "'1-2-3'"),
        ("dark,shallow", "'shallow'"),
        ("random:13,1", "'random:13'"),
        ("random:99", "rank 99"),
        ("head:1.5", r"head 1\.5"),
        ("dark:1.5", r"dark 1\.5"),
        ("dark:0", "dark 0"),
        ("head:0.001", r"head 0\.001"),
        ("middle:0.9-0.4", r"0\.9 to 0\.4"),
        ("", "''"),
    ],
)
def test_bad_specification_is_named(spectrum, spec, bad):
    with pytest.raises(InputError, match=bad):
        spectrum.subspace(spec)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_shares_against_scipy(planted, dtype):
    weight = planted(decaying(100.0), ROWS)
    spectrum = Spectrum.from_matrix(weight, bands=7)
    x = (torch.randn(2, 5, D, generator=torch.Generator().manual_seed(1)) * 50).to(dtype)
    x[..., 0] *= 1000  # a massive activation
    shares = spectrum.shares(x)
    squares = (x.double().numpy() @ right_vectors(weight)) ** 2
    parts = (
        np.add.reduceat(squares, spectrum.edges[:-1], axis=-1) / (x.double().numpy() ** 2).sum(-1)[..., None]
    )
    tight = dtype == torch.float64
    np.testing.assert_allclose(shares, parts, rtol=1e-10 if tight else 1e-3, atol=1e-13 if tight else 1e-5)
    np.testing.assert_allclose(shares.sum(-1), 1, rtol=1e-14 if tight else 1e-6)


def test_shares_of_random_vectors_are_rank_over_width(spectrum):
    n, d = 4000, spectrum.d
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for space in (spectrum, spectrum.with_bands(3)):
        rank = np.diff(space.edges)
        error = np.sqrt(2 * rank * (d - rank) / (d**2 * (d + 2)) / n)  # of the mean of Beta(r/2, (d-r)/2)
        assert (abs(space.shares(x).mean(0).numpy() - rank / d) < 4 * error).all()


def test_rotating_the_residual_basis_leaves_shares_unchanged(planted):
    weight = planted(decaying(100.0), ROWS)
    rotation = torch.from_numpy(scipy.stats.ortho_group.rvs(D, random_state=3))
    x = torch.randn(8, D, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    plain, rotated = Spectrum.from_matrix(weight), Spectrum.from_matrix(weight @ rotation)
    torch.testing.assert_close(rotated.shares(x @ rotation), plain.shares(x), rtol=1e-8, atol=1e-10)
    assert not torch.allclose(rotated.shares(x), plain.shares(x), atol=1e-3)


@pytest.mark.usefixtures("unchecked")
def test_shares_of_another_width(spectrum):
    with pytest.raises(InputError, match="width 41 on a spectrum of width 40"):
        spectrum.shares(torch.ones(2, 41))


def test_repr_names_matrix_and_convention(spectrum):
    assert repr(spectrum).startswith("Spectrum(W_U, raw, d=40, 20 bands, singular values 30 to 0.3")
