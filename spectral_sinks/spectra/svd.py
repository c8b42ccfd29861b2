"""Right singular vectors of a tall matrix in the memory of a few `d x d`, accurate down to the tail."""

# torch is typed only in part, scipy not at all:
# pyright: reportMissingTypeStubs=false
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import math
from collections.abc import Callable, Iterator

import scipy.linalg
import scipy.linalg.blas
import torch
from jaxtyping import Float
from torch import Tensor

Rows = Callable[[], Iterator[Float[Tensor, "block d"]]]
"""A function that reads a matrix from its first row to its last in blocks of float64.

A block is valid until the next one is read.
"""

FLOOR, CEILING = 1e-2, 3e-2
"""A round settles singular values down to between these shares of its largest [ours]."""


def right_singular(
    rows: Rows, d: int, device: torch.device
) -> tuple[Float[Tensor, "d"], Float[Tensor, "d d"]]:
    """Return singular values, largest first, and right singular vectors (columns) in float64, on `device`.

    The Gram matrix `W^T W` squares the condition number. It gives a direction of singular value s with an
    error of `eps (s_1 / s)^2` over the gap to its neighbours, where an SVD has `eps s_1 / s`. So its
    directions are accepted down to about 1 % of the largest singular value (FLOOR). The directions below,
    `V_t`, are computed in another round, from the Gram matrix of `W V_t`, which has lost its large part
    before it is squared; the rest of the head in the tail is removed. Rounds go on until the last singular
    value is within FLOOR of the tail's first, or until the tail is rounding error (`d eps s_1`).

    Up to condition number 1e2 the rows are read once, and once more for every further factor of 1e2 (three
    times at 1e6, four at 1e8, six at 1e12), each time for a shorter tail. The error is that of an SVD in
    float64, up to a factor of about `1 / FLOOR` in the directions just above a cut. At 1e12 both methods give
    the smallest singular value with a relative error of 1e-4. Singular values below `d eps s_1`, as those of
    a matrix of lower rank, are rounding errors in no order.

    A round for r directions takes at most three times the operations of the Gram matrix
    (`4 r / d + (r / d)^2` for a short tail). An SVD after QR is faster from about 1e8 on, which only float64
    matrices reach. The peak of memory beyond the rows is four `d x d` and a few blocks.
    """
    gram = torch.zeros(d, d, dtype=torch.float64, device=device)
    for block in rows():
        _add_gram(gram, block)
        del block  # its memory would add to that of eigh
    squares, vectors = _eigh(gram)
    del gram
    rounding = (d * torch.finfo(torch.float64).eps) ** 2 * squares[0]
    start = 0
    while squares[start] > rounding and squares[-1] < FLOOR**2 * squares[start]:
        start += cut_after(squares[start:])
        squares[start:] = _settle_tail(rows, squares[:start], vectors, start)
    return squares.clamp(min=0).sqrt(), vectors


def cut_after(squares: Float[Tensor, "n"]) -> int:
    """Return the number of directions before the last gap above FLOOR of at least `log(CEILING / FLOOR) / n`.

    Such a gap exists below CEILING, since at most n gaps lead from there to FLOOR. So equal singular values
    stay together, the rotation between head and tail is small enough for first order in any spectrum, and the
    tail is short.
    """
    share = squares.clamp(min=0).sqrt() / squares[0].sqrt()
    width = torch.where(share[:-1] >= FLOOR, -share.log().diff(), 0)
    enough = min(math.log(CEILING / FLOOR) / len(squares), float(width.max()))  # gaps may be equal
    return int((width >= enough).nonzero()[-1]) + 1


def _settle_tail(
    rows: Rows, head_squares: Float[Tensor, "head"], vectors: Float[Tensor, "d d"], cut: int
) -> Float[Tensor, "tail"]:
    """Return squared singular values of the columns of `vectors` from `cut` on; rotate them in place."""
    head, tail = vectors[:, :cut], vectors[:, cut:]
    gram, coupling = _read_tail(rows, head, tail)
    squares, turn = _eigh(gram)
    del gram
    tail.copy_(tail @ turn)
    rotation = (coupling @ turn) / (squares - head_squares[:, None])
    del turn, coupling
    tail.addmm_(head, rotation)
    head.addmm_(tail, rotation.T, alpha=-1)
    if torch.linalg.matrix_norm(rotation) > 1e-8:  # otherwise its square is below rounding in V^T V
        del rotation
        vectors.copy_(torch.linalg.qr(vectors).Q)
    return squares


def _read_tail(
    rows: Rows, head: Float[Tensor, "d head"], tail: Float[Tensor, "d tail"]
) -> tuple[Float[Tensor, "tail tail"], Float[Tensor, "head tail"]]:
    """Return the Gram matrix of `W tail` and its products with `W head`, in the cheaper order."""
    (d, settled), unsettled = head.shape, tail.shape[1]
    short = settled * (d + unsettled) < d * unsettled
    gram, cross = tail.new_zeros(unsettled, unsettled), tail.new_zeros(settled if short else d, unsettled)
    for block in rows():
        read = block @ tail
        cross.addmm_((block @ head if short else block).T, read)
        _add_gram(gram, read)
    return gram, cross if short else head.T @ cross


def _add_gram(gram: Float[Tensor, "n n"], block: Float[Tensor, "block n"]) -> None:
    """Add `block^T block`; BLAS adds it to the lower triangle only, at half the operations."""
    if _by_lapack(gram):
        scipy.linalg.blas.dsyrk(1.0, block.numpy().T, 1.0, gram.numpy().T, overwrite_c=True)
    else:
        gram.addmm_(block.T, block)


def _eigh(gram: Float[Tensor, "n n"]) -> tuple[Float[Tensor, "n"], Float[Tensor, "n n"]]:
    """Eigenvalues, largest first, and eigenvectors from the lower triangle, which may be overwritten."""
    if _by_lapack(gram):
        decomposed = scipy.linalg.eigh(
            gram.numpy().T, lower=False, driver="evd", overwrite_a=True, check_finite=False
        )
        squares, vectors = map(torch.from_numpy, decomposed)
    else:
        squares, vectors = torch.linalg.eigh(gram)
    return squares.flip(0), vectors.flip(1)


def _by_lapack(gram: Float[Tensor, "n n"]) -> bool:
    """Whether scipy computes it: on a CPU, where torch lacks `syrk` and its `eigh` copies its argument."""
    return not gram.is_cuda
