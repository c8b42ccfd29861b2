"""Two subspaces against planted angles and linear algebra done another way; chance against many draws."""

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import spectral_sinks as ss


def planted(cosines: list[float], d: int = 12, seed: int = 0) -> tuple[ss.Subspace, ss.Subspace]:
    """Two subspaces with the cosines given between them, in a random frame."""
    generator = torch.Generator().manual_seed(seed)
    frame = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q
    k = len(cosines)
    c = torch.tensor(cosines, dtype=torch.float64)
    a, away = frame[:, :k], frame[:, k : 2 * k]
    turn = torch.linalg.qr(torch.randn(k, k, generator=generator, dtype=torch.float64)).Q
    return ss.Subspace(a @ turn, "a"), ss.Subspace((a * c + away * (1 - c**2).sqrt()) @ turn, "b")


def projector(subspace: ss.Subspace) -> Tensor:
    return subspace.orthonormal() @ subspace.orthonormal().T


def test_nearest_and_farthest_of_planted_angles() -> None:
    a, b = planted([0.99, 0.9, 0.3, 0.1])
    near, far = ss.spectra.nearest(a, b, 2), ss.spectra.farthest(a, b, 2)
    assert ss.spectra.principal_cosines(near, b).tolist() == pytest.approx([0.99, 0.9])
    assert ss.spectra.principal_cosines(far, b).tolist() == pytest.approx([0.3, 0.1])
    assert torch.allclose(projector(near) + projector(far), projector(a), atol=1e-12)


def test_directions_beyond_the_smaller_subspace_are_the_farthest() -> None:
    a, _ = planted([0.5] * 4)
    b = ss.Subspace(a.basis[:, :1], "one of a")
    assert ss.spectra.nearest(a, b, 1).share(b.basis[:, 0]) == pytest.approx(1)
    assert torch.allclose(
        ss.spectra.farthest(a, b, 3).basis.T @ b.basis, torch.zeros(3, 1).double(), atol=1e-12
    )
    assert ss.spectra.nearest(a, b, 0).rank == ss.spectra.farthest(a, b, 0).rank == 0


@given(cosines=st.lists(st.floats(0, 0.999), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_union_is_the_span_of_both_columns(cosines: list[float], seed: int) -> None:
    a, b = planted(cosines, seed=seed)
    both, rest = ss.spectra.union(a, b), ss.spectra.outside(a, b)
    columns = scipy.linalg.orth(torch.cat([a.basis, b.basis], dim=1).numpy(), rcond=1e-8)
    assert both.rank == columns.shape[1] == 2 * len(cosines)
    assert np.allclose(projector(both), columns @ columns.T, atol=1e-8)
    assert torch.allclose(projector(both), projector(b) + projector(rest), atol=1e-8)


def test_what_lies_inside_has_no_outside() -> None:
    a, b = planted([1.0, 0.5])
    assert ss.spectra.outside(a, b).rank == 1 and ss.spectra.union(a, b).rank == 3
    assert ss.spectra.outside(a, a).rank == 0 and torch.allclose(
        projector(ss.spectra.union(a, a)), projector(a)
    )
    thick = a.complement()
    assert ss.spectra.outside(thick, a).rank == 10 and ss.spectra.union(a, thick).rank == 12


@pytest.mark.parametrize(
    "call", [ss.spectra.outside, ss.spectra.union, lambda a, b: ss.spectra.nearest(a, b, 1)]
)
def test_another_width(call: object) -> None:
    with pytest.raises(ss.InputError, match="subspaces of width 12 and 8"):
        call(planted([0.5])[0], ss.random_subspace(8, 2))  # pyright: ignore[reportCallIssue]


def test_more_directions_than_there_are() -> None:
    a, b = planted([0.5, 0.2])
    for call in (ss.spectra.nearest, ss.spectra.farthest):
        with pytest.raises(ss.InputError, match=r"3 directions of .* expected 0 to 2"):
            call(a, b, 3)


@pytest.mark.parametrize(("d", "rank", "rows"), [(16, 3, 1), (16, 3, 40), (20, 15, 4), (2, 1, 1)])
def test_deviation_of_random_shares(d: int, rank: int, rows: int) -> None:
    weight = torch.randn(rows, d, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    values = torch.linalg.svdvals(weight).square()
    exact = ss.spectra.share_deviation(d, rank, float(values.sum() ** 2 / values.square().sum()))
    shares = [
        float((weight @ ss.random_subspace(d, rank, s).orthonormal()).square().sum() / values.sum())
        for s in range(4000)
    ]
    assert np.mean(shares) == pytest.approx(rank / d, abs=5 * exact / 4000**0.5 + 1e-12)
    assert np.std(shares) == pytest.approx(exact, rel=0.06)


def test_deviation_at_the_ends() -> None:
    assert ss.spectra.share_deviation(8, 3, 8.0) == 0, (
        "a matrix that spreads evenly has the same share in all"
    )
    assert ss.spectra.share_deviation(8, 8, 1.0) == ss.spectra.share_deviation(8, 0, 1.0) == 0
    for wrong in ((8, 9, 2.0), (8, 2, 0.5), (8, 2, 9.0), (1, 1, 1.0)):
        with pytest.raises(ss.InputError, match="effective rank"):
            ss.spectra.share_deviation(*wrong)


def test_random_bases() -> None:
    a, b = ss.spectra.random_spectrum(32, 5, seed=1), ss.spectra.random_spectrum(32, 5, seed=2)
    assert torch.allclose(a.vectors.T @ a.vectors, torch.eye(32).double(), atol=1e-12)
    assert a.count == 5 and not torch.allclose(a.vectors, b.vectors)
    assert torch.equal(a.vectors, ss.spectra.random_spectrum(32, 5, seed=1).vectors)
