"""LOST finds what is planted, exactly, and agrees with a plain loop over patches."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import spectral_sinks as ss


def planted(grid: tuple[int, int], box: tuple[int, int, int, int], d: int = 8, noise: float = 0.0) -> Tensor:
    """One direction inside the box, and another outside that correlates negatively with it."""
    x0, y0, x1, y1 = box
    generator = torch.Generator().manual_seed(0)
    features = noise * torch.randn(*grid, d, generator=generator, dtype=torch.float64)
    features[..., 1] += 1.0
    features[y0:y1, x0:x1, 0] += 1.0
    features[y0:y1, x0:x1, 1] -= 1.5
    return features


def by_hand(features: Tensor, bias: float = 0.0, candidates: int = 100) -> tuple[set[int], int, list[int]]:
    """The patches of the object, the seed and all degrees, patch by patch."""
    rows, columns, _ = features.shape
    patches = [features[y, x].tolist() for y in range(rows) for x in range(columns)]

    def product(p: int, q: int) -> float:
        return sum(a * b for a, b in zip(patches[p], patches[q], strict=True)) + bias

    every = range(len(patches))
    degrees = [sum(product(p, q) > 0 for q in every if q != p) for p in every]
    order = sorted(every, key=lambda p: (degrees[p], p))
    seed = order[0]
    expanded = [p for p in order[:candidates] if product(seed, p) > 0]
    alike = {p for p in every if sum(product(p, q) for q in expanded) > 0}
    part, edge = set[int](), [seed] if seed in alike else []
    while edge:
        p = edge.pop()
        part.add(p)
        y, x = divmod(p, columns)
        for v, u in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
            if 0 <= v < rows and 0 <= u < columns and (q := v * columns + u) in alike - part:
                edge.append(q)
    return part, seed, degrees


@pytest.mark.parametrize("box", [(0, 0, 2, 2), (3, 1, 6, 4), (7, 5, 8, 6), (1, 0, 2, 6), (0, 5, 8, 6)])
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_a_planted_box_is_found(box: tuple[int, int, int, int], noise: float) -> None:
    found = ss.vision.lost(planted((6, 8), box, noise=noise))
    x0, y0, x1, y1 = box
    expected = np.zeros((6, 8), dtype=bool)
    expected[y0:y1, x0:x1] = True
    assert found.box == box and found.found
    assert np.array_equal(found.mask, expected)
    assert expected[found.seed] and found.degree is not None
    size = (x1 - x0) * (y1 - y0)
    assert (found.degree[expected] == size - 1).all() and (found.degree[~expected] == 48 - size - 1).all()


def test_two_objects_give_the_part_with_the_seed() -> None:
    features = planted((6, 8), (0, 0, 2, 2))
    features[4:6, 5:8] = features[0, 0]
    found = ss.vision.lost(features)
    assert found.box == (0, 0, 2, 2) and found.mask.sum() == 4
    touching = planted((4, 4), (0, 0, 1, 1))
    touching[1, 1] = touching[0, 0]
    assert ss.vision.lost(touching).box == (0, 0, 1, 1), "corners that touch are not connected"


def test_what_lies_in_most_of_the_image_is_the_background() -> None:
    found = ss.vision.lost(planted((4, 4), (0, 0, 4, 3)))
    assert found.box == (0, 3, 4, 4)


@given(
    st.integers(1, 5),
    st.integers(1, 6),
    st.integers(1, 4),
    st.integers(0, 10**6),
    st.sampled_from([-0.5, 0.0, 0.5]),
    st.sampled_from([1, 3, 100]),
)
@settings(max_examples=60, deadline=None)
def test_against_a_loop(rows: int, columns: int, d: int, seed: int, bias: float, candidates: int) -> None:
    x = torch.randn(rows, columns, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = ss.vision.lost(x, bias=bias, candidates=candidates)
    part, start, degrees = by_hand(x, bias, candidates)
    assert found.degree is not None and found.degree.ravel().tolist() == degrees
    assert found.seed == divmod(start, columns)
    assert set(np.flatnonzero(found.mask).tolist()) == part
    if part:
        ys, xs = zip(*(divmod(p, columns) for p in part), strict=True)
        assert found.box == (min(xs), min(ys), max(xs) + 1, max(ys) + 1)
    else:
        assert found.box is None
    assert found.found == (0 < len(part) < rows * columns)


@given(st.integers(0, 10**6), st.floats(0.1, 50))
@settings(max_examples=20, deadline=None)
def test_turning_and_scaling_features_changes_nothing(seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(5, 6, 8, generator=generator, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64)).Q
    before, after = ss.vision.lost(x), ss.vision.lost(scale * x @ turn)
    assert before.seed == after.seed and np.array_equal(before.mask, after.mask)
    mirrored = ss.vision.lost(planted((5, 6), (1, 1, 3, 4)).flip(1))
    assert mirrored.box == (3, 1, 5, 4)


def test_the_candidates_bound_the_expansion() -> None:
    """Of a chain in which each patch correlates with the next alone, one candidate gives the seed's own."""
    x = torch.eye(5, dtype=torch.float64)[None] + 0.6 * torch.eye(5, dtype=torch.float64).roll(1, 0)[None]
    x[0, 0, 4] = 0
    few, more = ss.vision.lost(x, candidates=1), ss.vision.lost(x)
    assert few.box == (0, 0, 2, 1)
    assert more.box is not None and more.box[2] >= 2
    assert by_hand(x, candidates=1)[0] == {0, 1}


def test_what_does_not_correlate_is_not_alike() -> None:
    """Of patches at right angles each is alone: a product of 0 counts for nothing."""
    found = ss.vision.lost(torch.eye(6, dtype=torch.float64).reshape(2, 3, 6))
    assert found.box == (0, 0, 1, 1) and found.degree is not None and not found.degree.any()


def test_nothing_stands_out() -> None:
    single = ss.vision.lost(torch.ones(1, 1, 3))
    assert single.box == (0, 0, 1, 1) and not single.found
    uniform = ss.vision.lost(torch.ones(3, 4, 2))
    assert uniform.box == (0, 0, 4, 3) and not uniform.found
    empty = ss.vision.lost(torch.zeros(3, 4, 2))
    assert empty.box is None and not empty.found
    assert np.isnan(empty.in_pixels(14, (42, 56))).all()


def test_a_bias_sets_apart_what_all_correlates() -> None:
    x = planted((6, 8), (2, 1, 4, 3))
    x[..., 2] = 2.0
    assert not ss.vision.lost(x).found
    assert ss.vision.lost(x, bias=-4.0).box == (2, 1, 4, 3)


def test_boxes_in_pixels() -> None:
    found = ss.vision.lost(planted((6, 8), (3, 1, 6, 4)))
    assert found.in_pixels(14, (84, 112)).tolist() == [42, 14, 84, 56]
    assert found.in_pixels(14, (90, 120), (180, 60)).tolist() == [21, 28, 42, 112]


def test_dino_seg_keeps_the_largest_part() -> None:
    attention = torch.tensor(
        [
            [0.30, 0.00, 0.00, 0.01],
            [0.01, 0.00, 0.20, 0.10],
            [0.01, 0.00, 0.15, 0.01],
            [0.00, 0.21, 0.00, 0.00],
        ]
    )
    found = ss.vision.dino_seg(attention, mass=0.9)
    assert found.box == (2, 1, 4, 3) and found.seed == (1, 2) and found.mask.sum() == 3
    assert found.degree is None and found.found
    assert ss.vision.dino_seg(attention, mass=0.3).box == (0, 0, 1, 1)
    assert ss.vision.dino_seg(attention, mass=0.6).mask.sum() == 1
    assert ss.vision.dino_seg(torch.ones(2, 3), mass=1.0).found is False


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_dino_seg_against_the_published_threshold(rows: int, columns: int, seed: int) -> None:
    """Kept in their code: patches whose share, summed from the smallest on, passes 1 - 0.6."""
    weights = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    value, index = (weights / weights.sum()).flatten().sort()
    kept = torch.zeros(rows * columns, dtype=torch.bool)
    kept[index] = value.cumsum(0) > 1 - 0.6
    found = ss.vision.dino_seg(weights)
    inside = torch.from_numpy(found.mask).flatten()
    assert bool((kept >= inside).all()) and bool(inside.any())
    outside = torch.from_numpy(found.mask).logical_not() & kept.reshape(rows, columns)
    grown = torch.nn.functional.max_pool2d(inside.reshape(1, 1, rows, columns).double(), (3, 1), 1, (1, 0))
    wider = torch.nn.functional.max_pool2d(inside.reshape(1, 1, rows, columns).double(), (1, 3), 1, (0, 1))
    assert not bool(((grown + wider)[0, 0] > 0)[outside].any()), "nothing kept touches the part"
    assert weights.flatten()[inside].max() == weights[found.seed]


@pytest.mark.usefixtures("unchecked")
def test_bad_input() -> None:
    with pytest.raises(ss.InputError, match=r"shape \(4, 3\)"):
        ss.vision.lost(torch.ones(4, 3))
    with pytest.raises(ss.InputError, match="expected"):
        ss.vision.lost(torch.ones(0, 3, 2))
    with pytest.raises(ss.InputError, match="NaN"):
        ss.vision.lost(torch.full((2, 2, 2), torch.nan))
    with pytest.raises(ss.InputError, match="0 candidates"):
        ss.vision.lost(torch.ones(2, 2, 2), candidates=0)
    for bad in (torch.zeros(2, 2), torch.ones(4), -torch.ones(2, 2), torch.full((2, 2), torch.nan)):
        with pytest.raises(ss.InputError, match="none negative"):
            ss.vision.dino_seg(bad)
    with pytest.raises(ss.InputError, match="mass 0"):
        ss.vision.dino_seg(torch.ones(2, 2), mass=0)
