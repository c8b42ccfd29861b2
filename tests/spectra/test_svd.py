"""The decomposition by rounds of Gram matrices, against planted spectra, scipy and extended precision."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from spectral_sinks.spectra import svd as module
from spectral_sinks.spectra.svd import CEILING, FLOOR, cut_after, right_singular

D, ROWS = 120, 500
EPS = np.finfo(float).eps
CPU = torch.device("cpu")


def basis(rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64)).Q


def made(values, rows=ROWS, seed=0):
    """Make a float64 matrix with the singular values given, and its right singular vectors."""
    values = torch.as_tensor(values, dtype=torch.float64)
    right = basis(len(values), len(values), 2 * seed + 1)
    return basis(rows, len(values), 2 * seed) * values @ right.T, right


def decomposed(matrix, block=256):
    reads = []

    def rows():
        reads.append(1)
        yield from matrix.split(block)

    values, vectors = right_singular(rows, matrix.shape[1], CPU)
    return values.numpy(), vectors.numpy(), len(reads)


def sine(a, b):
    """Sine of the largest principal angle between the spans of two orthonormal bases."""
    return np.linalg.norm(a - b @ (b.T @ a), 2)


def reachable(values, rank):
    """Sine to which float64 knows the last `rank` directions: rounding of the matrix over the gap."""
    return 1e-13 + 20 * EPS * values[0] / (values[-rank - 1] - values[-rank])


def even(condition):
    return condition ** -np.linspace(0, 1, D)


def steep(condition):
    t = np.linspace(0, 1, D)
    return condition ** -(0.1 * np.sqrt(t) + 0.3 * t + 0.6 * t**8)


def outlier(condition):
    """One direction far above all others, so nearly all are settled in a second round."""
    return np.concatenate([[condition], np.linspace(2, 1, D - 1)])


def cliff(condition):
    return np.concatenate([np.linspace(2, 1, D // 2), np.linspace(2, 1, D - D // 2) / condition])


@pytest.mark.parametrize("shape", [even, steep, outlier, cliff])
@pytest.mark.parametrize("condition", [10.0, 1e2, 1e3, 1e4, 1e6, 1e8, 1e10, 1e12])
def test_planted_spectra(shape, condition):
    planted = shape(condition)
    matrix, right = made(planted)
    values, vectors, _ = decomposed(matrix)
    _, theirs, truth = scipy.linalg.svd(matrix.numpy(), full_matrices=False)
    for rank in (1, 6, 30, 61, 90, D - 1):
        for true in (truth.T, right.numpy()):
            error = sine(vectors[:, -rank:], true[:, -rank:])
            assert error < reachable(planted, rank)
            assert error < 1e-9 or reachable(planted, rank) > 1e-9
    rounding = 20 * EPS * planted[0] / planted
    assert (abs(values / theirs - 1) < rounding + 1e-11).all()
    assert (abs(values / planted - 1) < rounding + 1e-11).all()
    assert abs(vectors.T @ vectors - np.eye(D)).max() < 1e-14


@pytest.mark.parametrize(("condition", "times"), [(1e4, 3), (1e6, 300), (1e8, 3e4)])
def test_these_bounds_tell_a_plain_gram_matrix_apart(condition, times):
    planted = even(condition)
    matrix, right = made(planted)
    squares, vectors = np.linalg.eigh(matrix.numpy().T @ matrix.numpy())
    assert sine(vectors[:, :6], right.numpy()[:, -6:]) > times * reachable(planted, 6)
    error = abs(np.sqrt(squares[0].clip(0)) / planted[-1] - 1)
    assert error > times * (20 * EPS * condition + 1e-11)


def extended(matrix):
    """Right singular vectors and values by one-sided Jacobi rotations in extended precision."""
    work = matrix.astype(np.longdouble)
    n = work.shape[1]
    right = np.eye(n, dtype=np.longdouble)
    for _ in range(12):
        for i in range(n):
            for j in range(i + 1, n):
                a, b, c = work[:, i] @ work[:, i], work[:, j] @ work[:, j], work[:, i] @ work[:, j]
                if c == 0:
                    continue
                zeta = (b - a) / (2 * c)
                t = np.copysign(1, zeta) / (abs(zeta) + np.sqrt(1 + zeta**2))
                cosine = 1 / np.sqrt(1 + t**2)
                turn = cosine * np.array([[1, t], [-t, 1]], dtype=np.longdouble)
                work[:, [i, j]], right[:, [i, j]] = work[:, [i, j]] @ turn, right[:, [i, j]] @ turn
    values = np.sqrt((work**2).sum(0))
    order = np.argsort(-values)
    return values[order], right[:, order]


@pytest.mark.skipif(np.finfo(np.longdouble).eps > 1e-18, reason="no extended precision on this processor")
@pytest.mark.parametrize("condition", [1e3, 1e6, 1e9, 1e12])
def test_no_worse_than_the_svd_in_float64_against_extended_precision(condition):
    matrix, _ = made(condition ** -np.linspace(0, 1, 16), 40, seed=3)
    truth, right = extended(matrix.numpy())
    values, vectors, _ = decomposed(matrix)
    _, theirs, rows = scipy.linalg.svd(matrix.numpy())
    floor = 4 * EPS * condition
    for rank in range(1, 16):
        true = right[:, -rank:].astype(float)
        scipys = sine(rows[-rank:].T, true)
        assert sine(vectors[:, -rank:], true) < 4 * scipys + 10 * EPS * truth[0] / truth[-rank - 1] / FLOOR
    assert (abs(values - truth) / truth).max() < 4 * (abs(theirs - truth) / truth).max() + floor


@pytest.mark.parametrize("shape", [even, steep])
def test_every_factor_of_a_hundred_in_condition_is_one_more_reading(shape):
    assert FLOOR == 1e-2
    conditions = [99, 101, 9e3, 9e5, 9e7, 9e9, 9e11]
    reads = [decomposed(made(shape(condition))[0])[2] for condition in conditions]
    assert reads == [1, 2, 2, 3, 4, 5, 6]


@given(st.lists(st.floats(-10, 0), min_size=2, max_size=60))
def test_the_cut_is_at_a_gap_wide_enough(exponents):
    values = 10 ** np.sort(exponents)[::-1]
    assume(values[-1] < FLOOR * values[0])
    cut = cut_after(torch.from_numpy(values**2))
    above, below = values[cut - 1], values[cut]
    assert 1 <= cut < len(values)
    assert above >= FLOOR * values[0] * (1 - 1e-12) and below <= CEILING * values[0] * (1 + 1e-12)
    assert math.log(above / below) >= math.log(CEILING / FLOOR) / len(values) * (1 - 1e-9)


@pytest.mark.parametrize(
    ("shares", "cut"),
    [
        ([1, 0.5, 0.02, 0.001], 3),
        ([1, 0.5, 0.02, 0.0], 3),
        ([1, 0.5, 0.04, 0.001], 3),
        ([1, 0.001, 0.0001], 1),
        ([1, 0.02, 0.02 - 1e-9, 0.01 + 1e-9, 0.01, 0.009999, 0.001], 3),
        ([1, *[0.025] * 3, 0.0201, 0.02, *[0.011] * 4, 0.00999], 6),
    ],
)
def test_the_cut_is_the_last_gap_that_is_wide_enough(shares, cut):
    assert cut_after(torch.tensor(shares, dtype=torch.float64) ** 2) == cut


@pytest.mark.parametrize("level", [0.3, 0.02, 1e-2, 1e-5])
def test_equal_singular_values_are_one_subspace(level):
    values = np.concatenate([np.linspace(2, 1, 40), np.full(60, level), np.linspace(1e-7, 1e-8, 20)])
    matrix, right = made(values)
    found, vectors, _ = decomposed(matrix)
    cluster = sine(vectors[:, 40:100], right.numpy()[:, 40:100])
    assert cluster < 20 * EPS * values[0] / min(1 - level, level) / FLOOR
    np.testing.assert_allclose(found[40:100], level, rtol=1e-9)


def test_blocks_change_nothing():
    matrix, _ = made(even(1e6))
    whole, vectors, _ = decomposed(matrix, ROWS)
    for block in (1, 7, 97, 499):
        values, other, _ = decomposed(matrix, block)
        np.testing.assert_allclose(values, whole, rtol=1e-9)
        for rank in (1, 6, 60):
            assert sine(vectors[:, -rank:], other[:, -rank:]) < reachable(even(1e6), rank)


@given(st.lists(st.one_of(st.just(-math.inf), st.floats(-15, 0)), min_size=1, max_size=30), st.integers(0, 9))
def test_any_spectrum_gives_an_orthonormal_basis_that_diagonalises(exponents, seed):
    planted = 10 ** np.sort(exponents)[::-1] * 3
    matrix, _ = made(planted, 50, seed)
    values, vectors, _ = decomposed(matrix, 16)
    read = matrix.numpy() @ vectors
    assert abs(vectors.T @ vectors - np.eye(len(planted))).max() < 1e-13
    rounding = 50 * EPS * planted[0]
    assert (abs(np.linalg.norm(read, axis=0) - values) <= rounding / FLOOR).all()
    assert (abs(values - planted) <= rounding / FLOOR).all()
    crossed = abs(read.T @ read - np.diag(values**2))
    assert (crossed <= rounding / FLOOR * np.maximum.outer(values, values) + rounding**2).all()
    assert (np.diff(values) <= 0).all()


@pytest.mark.parametrize("rank", [0, 1, 17, 119])
def test_a_matrix_of_lower_rank(rank):
    planted = np.where(np.arange(D) < rank, even(100.0), 0)
    matrix, right = made(planted)
    values, vectors, _ = decomposed(matrix)
    assert sine(vectors[:, rank:], right.numpy()[:, rank:]) < 1e-12
    assert (values[rank:] <= D * EPS * values[0]).all()
    assert abs(vectors.T @ vectors - np.eye(D)).max() < 1e-14


def test_fewer_rows_than_directions_end_at_rounding():
    matrix = torch.randn(10, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values, vectors, reads = decomposed(matrix)
    np.testing.assert_allclose(values[:10], scipy.linalg.svdvals(matrix.numpy()), rtol=1e-12)
    assert (values[10:] <= 30 * EPS * values[0]).all() and reads == 2
    assert abs(vectors.T @ vectors - np.eye(30)).max() < 1e-14


@pytest.mark.parametrize("shape", [steep, outlier])
def test_the_path_of_other_devices_agrees(monkeypatch, shape):
    """What runs on a GPU, run here on the CPU."""
    matrix, right = made(shape(1e6))
    values, vectors, _ = decomposed(matrix)
    monkeypatch.setattr(module, "_by_lapack", lambda _: False)
    monkeypatch.delattr(module.scipy.linalg.blas, "dsyrk")
    others, other, _ = decomposed(matrix)
    np.testing.assert_allclose(others, values, rtol=1e-9)
    for true in (vectors, right.numpy()):
        assert sine(other[:, -6:], true[:, -6:]) < reachable(shape(1e6), 6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    matrix, right = made(steep(1e6))
    cuda = matrix.cuda()
    values, vectors = right_singular(lambda: iter(cuda.split(256)), D, cuda.device)
    assert values.is_cuda and vectors.is_cuda
    assert sine(vectors.cpu().numpy()[:, -6:], right.numpy()[:, -6:]) < reachable(steep(1e6), 6)


PEAK = """
import torch
from spectral_sinks.spectra import spectrum

def status(name):
    line, = (line for line in open("/proc/self/status") if line.startswith(name))
    return 1024 * int(line.split()[1])

d = 1500
weight = torch.randn(4000, d, generator=torch.Generator().manual_seed(0))
weight[:, :{strong}] *= 1000
spectrum.Spectrum.from_matrix(weight[:2000, :400].contiguous(), bands=1, use_cache=False)  # libraries are up
with open("/proc/self/clear_refs", "w") as peak:
    peak.write("5")
before = status("VmRSS")
spectrum.Spectrum.from_matrix(weight, bands=1, use_cache=False)
print((status("VmHWM") - before - 8 * d * 1024) / (8 * d * d))
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux to see the peak")
@pytest.mark.parametrize("strong", [1, 900])
def test_memory_beyond_the_matrix_is_four_d_by_d_and_a_block(strong):
    # glibc would keep freed blocks of less than 32 MB, which those of a real model are not
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    run = subprocess.run(
        [sys.executable, "-c", PEAK.format(strong=strong)], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < 4
