"""Modes against the singular value decomposition of all scores."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from spectral_sinks.spectra.qk_modes import Modes, random_parts


def gaussian(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def data(seed: int, size: int, queries: int, keys: int, rank: int) -> tuple[Tensor, Tensor]:
    """Queries with a mean of their own, and keys of some rank."""
    asked = gaussian(queries, size, seed=seed) * torch.linspace(3, 0.1, size) + gaussian(
        1, size, seed=seed + 1
    )
    return asked, gaussian(keys, rank, seed=seed + 2) @ gaussian(rank, size, seed=seed + 3)


def modes(queries: Tensor, keys: Tensor) -> Modes:
    return Modes.of(queries.T @ queries / len(queries), keys.T @ keys / len(keys))


sizes = st.tuples(
    st.integers(0, 999), st.integers(1, 8), st.integers(1, 12), st.integers(1, 12), st.integers(1, 8)
)


@given(sizes)
def test_modes_add_up_to_every_score_and_are_its_singular_vectors(drawn: tuple[int, ...]) -> None:
    queries, keys = data(*drawn)
    found = modes(queries, keys)
    scores = queries @ keys.T
    left, right = queries @ found.query, keys @ found.key
    assert torch.allclose(left * found.strength @ right.T, scores, atol=1e-6 * float(scores.norm()))
    values = torch.linalg.svdvals(scores) / (len(queries) * len(keys)) ** 0.5
    count = min(len(values), drawn[1])
    assert torch.allclose(found.strength[:count], values[:count], atol=1e-6 * float(values[0]))
    held = found.strength > 1e-4 * found.strength[0]
    for side in (left[:, held], right[:, held]):
        assert torch.allclose(side.T @ side / len(side), torch.eye(int(held.sum())).double(), atol=1e-5)


@given(st.integers(0, 999))
def test_another_basis_of_the_space_changes_no_side(seed: int) -> None:
    queries, keys = data(seed, 5, 20, 20, 5)
    change = gaussian(5, 5, seed=seed + 7) + 3 * torch.eye(5)
    turned = queries @ change, keys @ torch.linalg.inv(change).T
    plain, changed = modes(queries, keys), modes(*turned)
    assert torch.allclose(plain.strength, changed.strength, rtol=1e-6)
    one = queries @ plain.query[:, 0] * (keys @ plain.key[:, 0])
    two = turned[0] @ changed.query[:, 0] * (turned[1] @ changed.key[:, 0])
    if plain.strength[0] > 1.01 * plain.strength[1]:
        assert torch.allclose(one, two, atol=1e-5)


def test_parts_add_up_and_are_means_of_products() -> None:
    queries, keys = data(3, 6, 30, 30, 6)
    found, cross = modes(queries, keys), queries.T @ keys / 30
    expected = (found.strength * (queries @ found.query) * (keys @ found.key)).mean(0)
    assert torch.allclose(found.parts(cross), expected)
    assert torch.allclose(found.parts(cross).sum(), (queries * keys).sum(1).mean())
    order = torch.tensor([4, 0])
    assert torch.allclose(found.take(order).parts(cross), expected[order])
    drawn = random_parts(queries.T @ queries / 30, cross, 0)
    assert torch.allclose(drawn.sum(), cross.trace())
    assert not torch.allclose(drawn, random_parts(queries.T @ queries / 30, cross, 1))


def test_heads_are_taken_apart() -> None:
    both = [data(seed, 4, 9, 9, 4) for seed in (1, 2)]
    queries, keys = (torch.stack(parts) for parts in zip(*both, strict=True))
    stacked = Modes.of(queries.mT @ queries / 9, keys.mT @ keys / 9)
    for place, pair in enumerate(both):
        assert torch.allclose(stacked.strength[place], modes(*pair).strength)


def test_directions_that_hold_rounding_alone_are_no_modes() -> None:
    """Keys of rank 2 as float32 leaves them: what is beyond the rank is no mode."""
    queries, keys = (x.float().double() for x in data(3, 6, 30, 30, 2))
    found = modes(queries, keys)
    assert (found.strength[:2] > 0.01).all() and (found.strength[2:] < 1e-9).all()
    assert found.key.abs().max() < 1e3
