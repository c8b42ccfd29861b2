"""Projectors, set algebra, random subspaces and principal angles, against explicit matrices and scipy."""

from dataclasses import FrozenInstanceError
from typing import get_args

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from spectral_sinks.cli.parsing import Draws
from spectral_sinks.errors import InputError
from spectral_sinks.spectra.spectrum import Spectrum
from spectral_sinks.spectra.subspace import (
    DRAWN_BYTES,
    MOST_DRAWS,
    Subspace,
    intersection,
    principal_cosines,
    random_subspace,
    random_subspaces,
)

RANKS = st.integers(1, 40).flatmap(lambda d: st.tuples(st.just(d), st.integers(0, d)))
ROUNDING = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def projector(columns):
    """Make the `d x d` projector on a column span by least squares, without an orthonormal basis."""
    return np.asarray(columns) @ np.linalg.pinv(np.asarray(columns))


@pytest.fixture(scope="module")
def spectrum(planted):
    return Spectrum.from_matrix(planted(torch.linspace(10, 1, 40)), use_cache=False)


@given(RANKS, st.integers(0, 99), st.booleans())
def test_projector_identities(case, seed, other_side):
    (d, rank), identity = case, torch.eye(case[0], dtype=torch.float64)
    space = random_subspace(d, d - rank, seed).complement() if other_side else random_subspace(d, rank, seed)
    matrix = space.project(identity)
    assert space.rank == rank and space.d == d
    close = {"rtol": 0, "atol": 1e-13}
    torch.testing.assert_close(matrix @ matrix, matrix, **close)
    torch.testing.assert_close(matrix, matrix.T, **close)
    torch.testing.assert_close(matrix.trace().item(), float(rank), **close | {"atol": 1e-11})
    torch.testing.assert_close(matrix + space.complement().project(identity), identity, **close)
    torch.testing.assert_close(space.reject(identity), space.complement().project(identity), **close)
    basis = space.orthonormal()
    assert basis.shape == (d, rank)
    torch.testing.assert_close(basis @ basis.T, matrix, **close)


@given(RANKS, st.sampled_from(list(ROUNDING)), st.integers(0, 99))
def test_project_and_reject_split_vectors_of_any_dtype(case, dtype, seed):
    space = random_subspace(*case, seed=seed)
    x = gaussian(2, 3, case[0], seed=seed).to(dtype)
    exact = x.double().numpy()
    matrix = projector(space.orthonormal())
    inside, outside = space.project(x), space.reject(x)
    assert inside.dtype == outside.dtype == dtype
    atol = ROUNDING[dtype] * max(1, abs(exact).max())
    np.testing.assert_allclose(inside.double(), exact @ matrix, rtol=0, atol=atol)
    np.testing.assert_allclose(outside.double(), exact - exact @ matrix, rtol=0, atol=atol)
    energy = ((exact @ matrix) ** 2).sum(-1) / (exact**2).sum(-1)
    np.testing.assert_allclose(space.share(x), energy, rtol=0, atol=1e-12 if dtype == torch.float64 else 1e-5)


@given(RANKS)
def test_the_thinner_basis_is_stored(case):
    d, rank = case
    assert random_subspace(d, rank).basis.shape[1] == min(rank, d - rank)
    members = torch.arange(d) < rank
    space = Subspace.of_members(torch.eye(d, dtype=torch.float64), members, "first", "")
    assert space.basis.shape[1] == min(rank, d - rank) and space.rank == rank
    assert space.complement().basis is space.basis


@given(st.sets(st.integers(1, 20), min_size=1), st.sets(st.integers(1, 20), min_size=1))
def test_set_algebra_is_exact_on_one_spectrum(spectrum, a, b):
    def of(bands):
        return spectrum.subspace(",".join(map(str, sorted(bands))) or "none")

    for result, bands in [
        (of(a) | of(b), a | b),
        (of(a) & of(b), a & b),
        (of(a) - of(b), a - b),
        (of(a).complement(), set(range(1, 21)) - a),
        (of(a).complement() - of(b), set(range(1, 21)) - a - b),
    ]:
        columns = [column for j in sorted(bands) for column in (2 * j - 2, 2 * j - 1)]
        assert torch.equal(result.orthonormal(), spectrum.vectors[:, columns])


def test_set_algebra_of_two_spectra_is_refused(spectrum, planted):
    other = Spectrum.from_matrix(planted(torch.linspace(10, 1, 40), seed=1))
    for stranger in (other.dark(), random_subspace(40, 2), Subspace.spanning(spectrum.dark().basis)):
        for combine in (Subspace.__or__, Subspace.__and__, Subspace.__sub__):
            with pytest.raises(InputError, match=r"not subspaces of one spectrum.*intersection\(a, b\)"):
                combine(spectrum.dark(), stranger)
            with pytest.raises(InputError, match="not subspaces of one spectrum"):
                combine(stranger, spectrum.dark())


def test_spectra_without_a_fingerprint_are_told_apart_by_their_vectors():
    one, two = (
        Spectrum(torch.eye(4).double().flip(i), torch.arange(4, 0, -1).double(), count=4) for i in (0, 1)
    )
    assert (one.band(1) | one.with_bands(2).band(2)).rank == 3
    with pytest.raises(InputError, match="not subspaces of one spectrum"):
        one.band(1) | two.band(1)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("basis", "message"),
    [
        (2 * torch.eye(5, 2), "'mine' is not orthonormal .error 3"),
        (torch.ones(5, 2) / 5**0.5, "not orthonormal .error 1"),
        (torch.full((5, 2), torch.nan), "not orthonormal"),
        (torch.eye(2, 5), r"shape \(2, 5\): expected d x k with k <= d"),
        (torch.ones(5), r"shape \(5,\): expected d x k"),
    ],
)
def test_a_basis_that_is_none(basis, message):
    with pytest.raises(InputError, match=message):
        Subspace(basis, "mine")


def test_a_basis_in_half_precision_passes():
    space = random_subspace(256, 64).to("cpu", torch.bfloat16)
    assert space.basis.dtype == torch.bfloat16
    x = gaussian(3, 256)
    torch.testing.assert_close(space.project(x), random_subspace(256, 64).project(x), rtol=0, atol=0.05)


def test_spanning():
    columns = gaussian(30, 4) * torch.tensor([1.0, 1e-12, 1e6, 1])  # the scale of a column says nothing
    space = Subspace.spanning(columns, "mine")
    truth = projector(columns / columns.norm(dim=0))
    np.testing.assert_allclose(space.project(torch.eye(30).double()), truth, atol=1e-12)
    assert (space.rank, space.name) == (4, "mine")
    assert Subspace.spanning(torch.zeros(30, 0)).rank == 0


@pytest.mark.usefixtures("unchecked")
def test_spanning_needs_independent_columns():
    columns = gaussian(30, 4)
    for bad in (columns[:, [0, 1, 0]], columns @ gaussian(4, 5), 0 * columns, columns[:3]):
        with pytest.raises(InputError, match="'mine' are not linearly independent"):
            Subspace.spanning(bad, "mine")
    with pytest.raises(InputError, match=r"shape \(30,\) for 'mine': expected d x k"):
        Subspace.spanning(columns[:, 0], "mine")


@pytest.mark.usefixtures("unchecked")
def test_vectors_of_another_width():
    space = random_subspace(8, 3)
    for act in (space.project, space.reject, space.share):
        with pytest.raises(InputError, match=r"'random 3 .seed 0.'.*width 8, got vectors of width 9"):
            act(torch.ones(2, 9))
    for compare in (principal_cosines, intersection):
        with pytest.raises(InputError, match="width 8 and 9"):
            compare(space, random_subspace(9, 3))


@pytest.mark.parametrize("ranks", [(3, 5), (5, 3), (20, 15), (0, 4), (24, 6), (4, 4)])
def test_principal_cosines_against_scipy(ranks):
    a, b = random_subspace(24, ranks[0], 1), random_subspace(24, ranks[1], 2)
    cosines = principal_cosines(a, b)
    assert cosines.shape == (min(ranks),)
    if min(ranks):
        angles = scipy.linalg.subspace_angles(a.orthonormal().numpy(), b.orthonormal().numpy())
        np.testing.assert_allclose(cosines, np.sort(np.cos(angles))[::-1], atol=1e-12)
        assert cosines.max() <= 1


@pytest.mark.parametrize("shared", [0, 1, 3])
@pytest.mark.parametrize("complemented", [False, True])
def test_intersection_finds_what_was_planted(shared, complemented):
    """Orthogonal but for `shared` common directions, so that the intersection is exact."""
    frame = random_subspace(40, 20, 7).basis
    common = frame[:, :shared] @ torch.linalg.qr(gaussian(shared, shared)).Q
    a = Subspace.spanning(torch.cat([common, frame[:, 5:9]], dim=1), "a")
    b = Subspace.spanning(torch.cat([frame[:, 10:16], frame[:, :shared]], dim=1), "b")
    if complemented:  # the same subspace, stored as the complement of its complement
        b = Subspace(b.complement().orthonormal(), "b").complement()
    found = intersection(a, b)
    assert found.rank == shared
    truth = frame[:, :shared] @ frame[:, :shared].T
    torch.testing.assert_close(found.project(torch.eye(40).double()), truth, rtol=0, atol=1e-12)


def test_intersection_keeps_bisectors_up_to_the_angle():
    """Planes whose principal angles are 30 and 80 degrees."""
    angles = np.deg2rad([30, 80])
    a = torch.eye(6, 2).double()
    b = torch.zeros(6, 2).double()
    b[[0, 1], [0, 1]], b[[2, 3], [0, 1]] = torch.from_numpy(np.cos(angles)), torch.from_numpy(np.sin(angles))
    bisector = torch.tensor([np.cos(angles[0] / 2), 0, np.sin(angles[0] / 2), 0, 0, 0])
    found = intersection(Subspace(a), Subspace(b))
    torch.testing.assert_close(found.project(torch.eye(6).double()), torch.outer(bisector, bisector))
    assert intersection(Subspace(a), Subspace(b), cosine=0.9).rank == 0
    assert intersection(Subspace(a), Subspace(b), cosine=0.1).rank == 2


def test_random_subspaces_follow_their_seed():
    assert torch.equal(random_subspace(30, 7, 3).basis, random_subspace(30, 7, 3).basis)
    assert not torch.allclose(random_subspace(30, 7, 3).basis, random_subspace(30, 7, 4).basis)
    state = torch.get_rng_state()
    random_subspace(30, 7, 3)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("rank", [2, 9])
def test_random_subspaces_are_uniform(rank):
    """The share of any fixed vector is Beta(r/2, (d-r)/2) under the Haar measure."""
    d, n = 12, 600
    fixed = torch.cat([torch.eye(d).double()[:2], gaussian(1, d), torch.ones(1, d).double()])
    shares = torch.stack([random_subspace(d, rank, seed).share(fixed) for seed in range(n)]).numpy()
    law = scipy.stats.beta(rank / 2, (d - rank) / 2)
    np.testing.assert_allclose(shares.mean(0), rank / d, atol=4 * law.std() / n**0.5)
    assert all(scipy.stats.kstest(column, law.cdf).pvalue > 1e-3 for column in shares.T)


def test_random_subspaces_of_extreme_rank():
    x = gaussian(3, 9)
    assert not random_subspace(9, 0).project(x).any() and torch.equal(random_subspace(9, 0).reject(x), x)
    assert torch.equal(random_subspace(9, 9).project(x), x) and not random_subspace(9, 9).reject(x).any()
    for rank in (-1, 10):
        with pytest.raises(InputError, match=f"rank {rank}: expected 0 to 9"):
            random_subspace(9, rank)


def test_names(spectrum):
    dark = spectrum.dark()
    assert dark.complement().name == "all but dark" and dark.named("U-dark").name == "U-dark"
    assert (spectrum.band(1) | dark).name == "band 1 | dark"
    assert repr(dark) == "Subspace('dark', rank 2 of 40)"
    with pytest.raises(FrozenInstanceError):
        dark.name = "light"


def test_a_number_of_random_subspaces() -> None:
    drawn = random_subspaces(32, 3, 4)
    assert [space.name for space in drawn] == [random_subspace(32, 3, seed).name for seed in range(4)]
    assert all(torch.equal(a.basis, random_subspace(32, 3, s).basis) for s, a in enumerate(drawn))
    assert random_subspaces(32, 3, 0) == []
    for d, rank, count, least, most in (
        (32, 3, -1, 0, MOST_DRAWS),
        (32, 3, 10_000_000, 0, MOST_DRAWS),
        (32, 3, 0, 1, MOST_DRAWS),
        (4096, 205, 1000, 0, DRAWN_BYTES // (8 * 4096 * 205)),
    ):
        with pytest.raises(
            InputError, match=f"^{count} random subspaces of rank .*: give {least} to {most}$"
        ):
            random_subspaces(d, rank, count, least=least)
    assert get_args(Draws)[1].most == MOST_DRAWS, "the command line says the same"
