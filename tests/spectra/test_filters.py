"""Filters against explicit float64 matrices: what is kept, what fills the gap, at which tokens."""

from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
import torch

import spectral_sinks as ss
from spectral_sinks.errors import InputError
from spectral_sinks.spectra.filters import Filter, Mean, Noise, Swap, Zero, keep, omega, phi, psi, remove, rnd
from spectral_sinks.spectra.spectrum import Spectrum
from spectral_sinks.spectra.subspace import random_subspace

D, T = 40, 6
EYE = torch.eye(D, dtype=torch.float64)
IDS = torch.tensor([[1, 7, 7, 3, 9, 3], [1, 3, 5, 5, 7, 2], [1, 2, 2, 2, 2, 2]])
MASK = torch.tensor([False, True, True, False, False, True])
WHERE = {
    "first": ("first", torch.arange(T).eq(0).expand(3, T)),
    "all-but-first": ("all-but-first", torch.arange(T).ne(0).expand(3, T)),
    "mask of positions": (MASK, MASK.expand(3, T)),
    "mask by document": (IDS > 3, IDS > 3),
    "token ids": ({3, 7}, torch.isin(IDS, torch.tensor([3, 7]))),
    "a list of ids": ([5], IDS == 5),
    "no ids": (frozenset(), torch.zeros(3, T, dtype=torch.bool)),
}


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def matrix(act):
    """Write a filter as a linear map: row i is what becomes of unit vector i."""
    return act(EYE)


@pytest.fixture
def x():
    x = gaussian(3, T, D, seed=1)
    x[:, 0, 5] += 300  # a massive activation at the first token
    x[:, :, 7] = -0.0
    return x


@pytest.fixture(scope="module")
def u(planted):
    return Spectrum.from_matrix(planted(torch.linspace(10, 1, D)), use_cache=False)


@pytest.fixture(scope="module")
def e(u):
    """Another spectrum; its tail shares directions 30 to 33 with that of `u`, the rest is turned."""
    shared, rest = u.vectors[:, 30:34], torch.cat([u.vectors[:, :30], u.vectors[:, 34:]], dim=1)
    turned = rest @ torch.linalg.qr(gaussian(D - 4, D - 4, seed=2)).Q
    vectors = torch.cat([turned, shared], dim=1)
    return Spectrum(vectors, torch.linspace(10, 1, D, dtype=torch.float64), "W_E")


def tail(spectrum, j):
    """Projector on bands j + 1 onwards (two directions each), by an explicit product."""
    columns = spectrum.vectors[:, 2 * j :]
    return columns @ columns.T


def same_bits(a, b):
    """Compare bit for bit, so that -0.0 is not 0.0."""
    return a.dtype == b.dtype and torch.equal(
        a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)
    )


def close(actual, expected, atol=1e-11):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)


def test_phi_keeps_its_bands(u, x):
    for j, k in [(1, 1), (1, 13), (5, 9), (20, 20)]:
        columns = u.vectors[:, 2 * j - 2 : 2 * k]
        close(matrix(phi(u, j, k)), columns @ columns.T)
        close(phi(u, j, k)(x), x @ columns @ columns.T)
        assert phi(u, j, k).rank == D - columns.shape[1] and phi(u, j, k).name == f"Phi {j}:{k}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_keep_and_its_complement_sum_to_the_input(u, x, dtype):
    kept, x = keep(u.subspace("1-7,20")), x.to(dtype)
    atol = 1e-11 if dtype == torch.float64 else 1e-3
    for other in (kept.complement(), remove(u.subspace("1-7,20")), keep(u.subspace("8-19"))):
        close(kept(x) + other(x), x, atol)
    assert kept.complement().rank == D - kept.rank


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_filters_that_remove_nothing_change_no_bit(u, e, x, dtype):
    x = x.to(dtype)
    nothing = [
        phi(u, 1, 20),
        remove(u.subspace("none")),
        rnd(D, 0),
        keep(random_subspace(D, D)),
        omega(u, 20),
    ]
    nothing += [psi(u, e, 20, reading) for reading in ("u-e", "e-u", "intersection")]
    for act in nothing:
        for fill in (Zero(), Noise(), Swap(), Mean(gaussian(T, D))):
            assert act.rank == 0 and same_bits(act.filled(fill)(x), x)


@pytest.mark.parametrize("fill", [Zero(), Noise(3), Swap()], ids=repr)
@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_selected_tokens_change(u, x, where, fill, dtype):
    tokens, selected = WHERE[where]
    everywhere, x = remove(u.bands(9, 20), fill), x.to(dtype)
    out, full = everywhere.at(tokens)(x, IDS), everywhere(x)
    assert same_bits(out[~selected], x[~selected])
    assert same_bits(out[selected], full[selected])
    assert (full != x).any(-1).all()  # so the line above says something
    if not isinstance(tokens, (set, list, frozenset)):
        assert torch.equal(everywhere.at(tokens)(x), out)


def test_fill_by_the_mean(u, x):
    dark, p = u.bands(9, 20), tail(u, 8)
    mean = gaussian(T + 3, D, seed=4)
    close(remove(dark, Mean(mean))(x), x - x @ p + mean[:T] @ p)
    close(remove(dark, Mean(mean[0]))(x), x - x @ p + mean[0] @ p)
    with pytest.raises(InputError, match="taken over 4 positions, the text has 6"):
        remove(dark, Mean(mean[:4]))(x)


def test_fill_by_another_document(u, x):
    p = tail(u, 8)
    out = remove(u.bands(9, 20), Swap())(x)
    for i in range(3):
        close(out[i], x[i] - x[i] @ p + x[i - 1] @ p)
    x[:, 0] = x[0, 0]  # all documents begin with one token
    close(remove(u.bands(9, 20), Swap())(x)[:, 0], x[:, 0])
    for single in (x[:1], x[0]):
        with pytest.raises(InputError, match=r"needs \[batch >= 2, tokens, d\], got shape"):
            remove(u.bands(9, 20), Swap())(single)


@pytest.mark.parametrize("bands", ["17-20", "3-20"])
def test_fill_by_noise(u, x, bands):
    dark = u.subspace(bands)
    columns = dark.orthonormal()
    p = columns @ columns.T
    out = remove(dark, Noise(11))(x)
    removed, noise = x @ p, out - (x - x @ p)
    close(noise @ p, noise)
    close(noise.norm(dim=-1), removed.norm(dim=-1))
    assert torch.cosine_similarity(noise, removed, dim=-1).abs().max() < 0.95
    assert torch.equal(out, remove(dark, Noise(11))(x))
    assert (out - remove(dark, Noise(12))(x)).norm(dim=-1).min() > 0.1 * noise.norm(dim=-1).min()
    close(
        out[1:], remove(dark, Noise(11))(x[1:])
    )  # a BLAS product may round a batch and a single differently
    kept_only = x - x @ p
    close(remove(dark, Noise())(kept_only), kept_only)


def test_any_function_fills(u, x):
    p = tail(u, 15)
    reflected = Filter(u.bands(16, 20), fill=lambda removed, blocked: -removed)
    close(reflected(x), x - 2 * x @ p)


@pytest.mark.parametrize("j", [0, 4, 15, 18, 19])
def test_psi_by_its_three_readings(u, e, x, j):
    p_u, p_e = tail(u, j), tail(e, j)
    close(matrix(psi(u, e, j, "u-e")), EYE - p_e @ p_u)  # rows: P_u P_e x is x^T P_e P_u
    close(matrix(psi(u, e, j, "e-u")), EYE - p_u @ p_e)
    weights, vectors = torch.linalg.eigh(p_u + p_e)  # 1 + cosine on a bisector, 1 - cosine across it
    common = vectors[:, weights > 1 + 0.5**0.5]
    close(matrix(psi(u, e, j, "intersection")), EYE - common @ common.T, 1e-10)
    close(psi(u, e, j)(x), x - x @ p_e @ p_u)


def test_psi_removes_the_planted_intersection(u, e):
    """At band 18 the tails share two singular directions of `u` and are orthogonal but for them."""
    swapped = u.vectors[:, [*range(4), *range(36, 38), *range(4, 36), 38, 39]]
    other = Spectrum(swapped, e.values, "W_E")
    common = u.vectors[:, 38:]
    for reading in ("u-e", "e-u", "intersection"):
        close(matrix(psi(u, other, 18, reading)), EYE - common @ common.T)


@pytest.mark.usefixtures("unchecked")
def test_errors_of_psi(u, e):
    for j in (4, 20):
        with pytest.raises(InputError, match="'both' of Psi: choose from u-e, e-u, intersection"):
            psi(u, e, j, "both")
    for j, tails in [(21, e), (-1, e), (4, e.with_bands(10))]:
        with pytest.raises(InputError, match=f"bands 1 to {j} of 20 and {tails.count}"):
            psi(u, tails, j)
    with pytest.raises(InputError, match="no complementary filter"):
        psi(u, e, 4).complement()
    with pytest.raises(InputError, match="differ in width"):
        Filter(random_subspace(8, 2), random_subspace(9, 2))


@pytest.mark.parametrize("j", [1, 10, 18, 19, 20])
def test_omega_keeps_head_and_tail(u, x, j):
    head, dark = u.vectors[:, : 2 * j], u.vectors[:, 38:]
    expected = head @ head.T + (dark @ dark.T if j < 20 else 0)
    close(matrix(omega(u, j)), expected)
    assert omega(u, j).rank == max(0, 38 - 2 * j)
    if j < 20:
        close(omega(u, j)(x), phi(u, 1, j)(x) + phi(u, 20, 20)(x))


@pytest.mark.parametrize("rank", [0, 1, 13, 30, D])
def test_rnd_removes_its_rank(rank):
    act = rnd(D, rank, seed=5)
    operator = matrix(act)
    close(operator @ operator, operator)
    close(operator.trace(), D - rank)
    assert act.rank == rank and torch.equal(operator, matrix(rnd(D, rank, seed=5)))
    if 0 < rank < D:
        assert (operator - matrix(rnd(D, rank, seed=6))).abs().max() > 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("fill", [Zero(), Swap()], ids=repr)
def test_low_precision_is_as_good_as_rounding_the_exact_result(u, e, x, dtype, fill):
    x = x.to(dtype)
    for act in (remove(u.dark(), fill), phi(u, 1, 5).filled(fill), psi(u, e, 9).filled(fill)):
        exact, out = act(x.double()), act(x)
        assert out.dtype == dtype and exact.dtype == torch.float64
        inside = 1e-6 * x.double().norm(dim=-1, keepdim=True)  # float32 within
        assert ((out.double() - exact).abs() <= (exact.to(dtype).double() - exact).abs() + inside).all()


def test_a_filter_is_a_forward_hook(u, x):
    layer = torch.nn.Linear(D, D, dtype=torch.float64)
    act = remove(u.dark()).at("all-but-first")
    plain = layer(x).detach()
    handle = layer.register_forward_hook(lambda module, given, output: act(output))
    hooked = layer(x).detach()
    handle.remove()
    close(hooked[:, 1:], plain[:, 1:] @ (EYE - tail(u, 19)))
    assert torch.equal(hooked[:, 0], plain[:, 0])
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(act(x).sum(), x)
    close(gradient[0, 1], (EYE - tail(u, 19)).sum(0))


def test_filters_are_values(u):
    act = remove(u.dark())
    for value, name in [(act, "tokens"), (Noise(), "seed"), (Mean(torch.ones(D)), "reference"), (u, "count")]:
        with pytest.raises(FrozenInstanceError):
            setattr(value, name, 3)
    assert act.at("first").tokens == "first" and act.tokens == "all"
    assert act.filled(Noise(4)).fill == Noise(4) and act.fill == Zero()
    assert repr(act.at({3})) == "Filter('remove dark', rank 2 of 40, Zero(), some tokens)"
    assert keep(u.dark()).name == "keep dark" and replace(act, name="mine").name == "mine"


def test_bases_move_to_another_dtype(u, e, x):
    for act in (remove(u.dark()), psi(u, e, 12)):
        moved = act.to("cpu", torch.float32)
        assert moved.blocked.basis.dtype == torch.float32 and moved.rank == act.rank
        close(moved(x), act(x), 1e-3)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("tokens", "ids", "message"),
    [
        (torch.ones(T + 1, dtype=torch.bool), None, r"mask of shape \(7,\).*from \(3, 6\)"),
        (torch.ones(2, T, dtype=torch.bool), None, r"mask of shape \(2, 6\).*from \(3, 6\)"),
        (torch.ones(1, 3, T, dtype=torch.bool), None, r"mask of shape \(1, 3, 6\)"),
        (torch.tensor(True), None, r"mask of shape \(\)"),
        (torch.ones(T), None, r"dtype torch.float32.*expected bool \[tokens\] or \[batch, tokens\]"),
        ({3}, None, r"needs the ids: filter\(x, ids\)"),
        ({3}, IDS[:, 1:], r"ids of shape \(3, 5\) for tokens of shape \(3, 6\)"),
        ({3}, IDS[:2], r"ids of shape \(2, 6\)"),
    ],
)
def test_tokens_that_cannot_be_selected(u, x, tokens, ids, message):
    with pytest.raises(InputError, match=message):
        remove(u.dark()).at(tokens)(x, ids)


@pytest.mark.usefixtures("unchecked")
def test_inputs_that_cannot_be_filtered(u, x):
    with pytest.raises(InputError, match="'last': choose 'all', 'first', 'all-but-first', a mask or token"):
        remove(u.dark(), tokens="last")
    with pytest.raises(InputError, match=r"takes \[..., tokens, d\], got shape \(40,\)"):
        remove(u.dark())(x[0, 0])
    for act in (remove(u.dark()), phi(u, 1, 20)):
        with pytest.raises(InputError, match="width 40, got vectors of width 39"):
            act(x[..., 1:])
    with pytest.raises(InputError, match="width 40, got vectors of width 39"):
        remove(u.dark(), Mean(torch.ones(T, D - 1)))(x)


def test_scaled_amplified_and_carried_tokens_by_their_definition() -> None:
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1
    at = ss.At(1, 3)
    others = [0, 2, 4]
    scaled, amplified = ss.spectra.scale(8, 3.0, at)(x), ss.spectra.amplify(8, 3.0, at)(x)
    carried = ss.spectra.carry(8, 2, at)(x)
    for found in (scaled, amplified, carried):
        assert torch.equal(found[:, others], x[:, others])
    assert torch.allclose(scaled[:, [1, 3]], 3 * x[:, [1, 3]])
    assert torch.allclose(amplified.mean(-1), x.mean(-1))
    assert torch.allclose(amplified[:, [1, 3]].var(-1), 9 * x[:, [1, 3]].var(-1))
    assert torch.equal(carried[:, [1, 3]], x[:, [2, 2]])
    assert (ss.spectra.scale(8, 0.0)(x) == 0).all()
    assert torch.allclose(ss.spectra.amplify(8, 0.0)(x), x.mean(-1, keepdim=True).expand_as(x))
    last = ss.spectra.channels(8, [6, 1])
    assert torch.allclose(ss.remove(last)(x), x * torch.tensor([1.0, 0, 1, 1, 1, 1, 0, 1]))
    for wrong in (-0.1, float("inf")):
        with pytest.raises(ss.InputError, match="0 or more"):
            ss.spectra.scale(8, wrong)
    for channels in ([], [-1], [8]):
        with pytest.raises(ss.InputError, match="expected different ones"):
            ss.spectra.channels(8, channels)
