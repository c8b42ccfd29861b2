"""Statistics against scipy called directly, and against what is known of the samples."""

import itertools

import numpy as np
import pandas as pd
import pytest
from scipy import stats

import spectral_sinks as ss
from spectral_sinks.stats import document_means


def test_the_interval_is_scipys_bca() -> None:
    sample = np.random.default_rng(3).gamma(1.0, size=25)
    expected = stats.bootstrap(
        (sample,), np.mean, n_resamples=4999, method="BCa", rng=np.random.default_rng(0)
    ).confidence_interval
    assert ss.stats.mean_interval(sample) == (expected.low, expected.high)
    assert ss.stats.mean_interval(sample) == ss.stats.mean_interval(sample.tolist()), "the same seed"
    narrow, wide = ss.stats.mean_interval(sample, 0.5), ss.stats.mean_interval(sample, 0.99)
    assert wide[0] < expected.low < narrow[0] < sample.mean() < narrow[1] < expected.high < wide[1]


def test_rank_correlation_is_scipys() -> None:
    draw = np.random.default_rng(1)
    x, z = draw.normal(size=60), draw.integers(0, 5, 60)
    y = x + z + draw.normal(size=60)
    assert ss.stats.rank_correlation(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)
    ranks = [stats.rankdata(v) for v in (x, y, z)]
    xy, xz, yz = (np.corrcoef(ranks[a], ranks[b])[0, 1] for a, b in ((0, 1), (0, 2), (1, 2)))
    partial = (xy - xz * yz) / np.sqrt((1 - xz**2) * (1 - yz**2))
    assert ss.stats.rank_correlation(x, y, [z]) == pytest.approx(partial)
    assert partial > xy, "what z does to y is taken out"
    assert abs(ss.stats.rank_correlation(z + draw.normal(0, 0.01, 60), y - x, [z, x])) < 0.35


def test_rank_correlation_of_too_little() -> None:
    assert np.isnan(ss.stats.rank_correlation([1, 2], [3, 4]))
    assert np.isnan(ss.stats.rank_correlation([1, 1, 1, 1], [1, 2, 3, 4]))
    assert np.isnan(ss.stats.rank_correlation([1, 2, 3, 4, 5], [2, 1, 4, 3, 5], [[1, 2, 3, 4, 5]])), (
        "it is given"
    )


def test_the_interval_covers_the_mean() -> None:
    draws = np.random.default_rng(0).normal(1.0, 2.0, size=(60, 30))
    covered = [low < 1.0 < high for low, high in (ss.stats.mean_interval(sample) for sample in draws)]
    assert 0.85 <= np.mean(covered) <= 1.0
    widths = [high - low for low, high in (ss.stats.mean_interval(sample) for sample in draws[:20])]
    assert np.mean(widths) == pytest.approx(2 * 1.96 * 2 / 30**0.5, rel=0.15)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], (np.nan, np.nan)),
        ([1.0], (np.nan, np.nan)),
        ([1.0, np.nan, 2.0], (np.nan, np.nan)),
        ([1.0, np.inf], (np.nan, np.nan)),
        ([0.0, 0.0, 0.0], (0.0, 0.0)),
        ([2.5, 2.5], (2.5, 2.5)),
        ([1e9, 1e9 + 1e-7], (1e9, 1e9 + 1e-7)),
    ],
)
def test_samples_without_a_bootstrap(values: list[float], expected: tuple[float, float]) -> None:
    np.testing.assert_array_equal(ss.stats.mean_interval(values), expected)


def test_two_values_have_an_interval() -> None:
    low, high = ss.stats.mean_interval([1.0, 2.0])
    assert 1.0 <= low <= high <= 2.0


def test_sign_flips_counted_by_hand() -> None:
    sample = np.array([0.5, 1.2, -0.3, 0.9, 2.0, 0.7, -0.1])
    means = np.array([np.mean(sample * signs) for signs in itertools.product((1, -1), repeat=7)])
    above = np.mean(means >= sample.mean() - 1e-12)
    assert ss.stats.sign_flip(sample) == pytest.approx(2 * above)
    assert ss.stats.sign_flip(-sample) == pytest.approx(ss.stats.sign_flip(sample)), "two-sided"
    assert ss.stats.sign_flip(np.full(20, 1.0)) < 1e-3
    assert ss.stats.sign_flip([1.0, -1.0, 2.0, -2.0]) == pytest.approx(1.0)


def test_the_rank_in_a_null_distribution() -> None:
    null = [0.1, 0.5, 0.3, 0.5]
    assert [ss.stats.null_rank(observed, null) for observed in (0.6, 0.5, 0.2, 0.0)] == [0, 2, 3, 4]


def test_the_p_value_of_a_rank() -> None:
    null = [0.1, 0.5, 0.3, 0.5]
    assert [ss.stats.null_p(x, null) for x in (0.6, 0.5, 0.2, 0.0)] == pytest.approx([0.2, 0.6, 0.8, 1.0])
    assert ss.stats.null_p(1.0, []) == 1.0, "without draws there is no evidence"


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ([], []),
        ([0.02], [0.02]),
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),  # Holm's own steps: x4, x3, x2, x1
        ([0.9, 0.8, 0.7], [1.0, 1.0, 1.0]),
        ([0.02, 0.02], [0.04, 0.04]),
    ],
)
def test_holm_by_hand(raw: list[float], expected: list[float]) -> None:
    assert ss.stats.holm(raw) == pytest.approx(expected)


def test_holm_keeps_the_family_wise_error() -> None:
    draws = np.random.default_rng(0).uniform(size=(4000, 6))
    wrong = [min(ss.stats.holm(p)) <= 0.1 for p in draws]
    assert np.mean(wrong) == pytest.approx(1 - (1 - 0.1 / 6) ** 6, abs=0.015)
    adjusted = np.array([ss.stats.holm(p) for p in draws])
    in_order = np.take_along_axis(adjusted, np.argsort(draws), axis=1)
    assert (adjusted >= draws).all() and (np.diff(in_order) >= 0).all()
    with pytest.raises(ss.InputError, match="expected 0 to 1"):
        ss.stats.holm([0.5, 1.5])


def test_the_largest_size_within_a_budget() -> None:
    costs = np.array([[0.0, 0.02, 0.2], [0.0, 0.04, 0.4]])
    sizes = [0.1, 0.2, 0.3]
    found = [ss.stats.largest_within(costs, sizes, budget)[0] for budget in (-0.1, 0.01, 0.03, 0.29, 0.31)]
    assert found == [0.0, 0.1, 0.2, 0.2, 0.3]
    assert ss.stats.largest_within(costs[:, ::-1], sizes[::-1], 0.03)[0] == 0.2, "in any order"
    _, low, high = ss.stats.largest_within(costs, sizes, 0.03)
    assert (low, high) == (0.1, 0.2), "0.02, 0.03 or 0.04: a quarter of resamples is beyond the budget"
    single = ss.stats.largest_within(costs[:1], sizes, 0.03)
    assert single[0] == 0.2 and np.isnan(single[1:]).all()


def test_the_interval_of_the_largest_size_is_the_bootstraps() -> None:
    rng = np.random.default_rng(5)
    costs = np.linspace(0, 1, 11) + rng.normal(0, 0.3, (12, 1)) + rng.normal(0, 0.02, (12, 11))
    sizes = np.arange(11.0)
    found, low, high = ss.stats.largest_within(costs, sizes, 0.5)
    redrawn = [costs[rng.integers(0, 12, 12)].mean(0) <= 0.5 for _ in range(3000)]
    again = np.quantile([max(sizes[within], default=0) for within in redrawn], [0.025, 0.975])
    assert low <= found <= high and low < high
    assert (low, high) == pytest.approx(tuple(again), abs=1)


@pytest.mark.parametrize("bad", [np.zeros(3), np.zeros((2, 4)), np.full((2, 3), np.nan)])
def test_costs_that_fit_no_sizes(bad: np.ndarray) -> None:
    with pytest.raises(ss.InputError, match="expected finite"):
        ss.stats.largest_within(bad, [1, 2, 3], 0.1)


@pytest.mark.parametrize(("h", "n"), [(1, 1), (1, 5), (2, 5), (3, 6), (6, 6)])
def test_the_error_rate_of_sequential_draws_over_all_orders(h: int, n: int) -> None:
    found = []
    for order in itertools.permutations(range(n + 1)):
        p, used = ss.stats.sequential_p(order[0], lambda i, order=order: order[i + 1], h=h, n=n)
        reach = np.cumsum(np.array(order[1:]) >= order[0])
        stopped = np.flatnonzero(reach == h)
        assert used == (stopped[0] + 1 if stopped.size else n)
        assert p == (h / used if stopped.size else (reach[-1] + 1) / (n + 1))
        found.append(p)
    for level in set(found):
        assert np.mean(np.array(found) <= level) == pytest.approx(level), "exact wherever p can be"


def test_sequential_draws_under_the_null_and_away_from_it() -> None:
    rng = np.random.default_rng(0)
    found = [ss.stats.sequential_p(rng.normal(), lambda _: rng.normal(), h=5, n=99) for _ in range(4000)]
    p, used = np.array(found).T
    for level in (0.01, 0.05, 0.1, 0.25, 0.5, 0.9):
        assert np.mean(p <= level) <= level + 3 * (level * (1 - level) / 4000) ** 0.5
    assert used.mean() < 25, "a quarter of the draws"
    assert ss.stats.sequential_p(9.0, lambda _: rng.normal(), h=5, n=99) == (0.01, 99), (
        "what is extreme costs all"
    )
    tied = [
        ss.stats.sequential_p(int(rng.integers(3)), lambda _: int(rng.integers(3)), h=5, n=99)[0]
        for _ in range(4000)
    ]
    assert np.mean(np.array(tied) <= 0.05) <= 0.05


@pytest.mark.parametrize(("h", "n"), [(0, 5), (6, 5)])
def test_sequential_draws_that_cannot_stop(h: int, n: int) -> None:
    with pytest.raises(ss.InputError, match=f"after {h} of at most {n} draws"):
        ss.stats.sequential_p(0.0, float, h=h, n=n)


def test_summarise_resamples_documents() -> None:
    rng = np.random.default_rng(1)
    frame = pd.DataFrame(
        [
            {"layer": layer, "filter": name, "document": d, "row": r, "value": rng.normal(layer, 1)}
            for layer in (0, 1)
            for name in ("a", "b")
            for d in range(12)
            for r in range(1 + d % 3)
        ]
    )
    table = ss.stats.summarise(frame, ["layer", "filter"], "value")
    assert list(table.columns) == ["layer", "filter", "mean", "low", "high", "n"] and len(table) == 4
    for row in table.itertuples():
        part = frame[(frame["layer"] == row.layer) & (frame["filter"] == row.filter)]
        values = [group["value"].mean() for _, group in part.groupby("document")]
        assert row.n == 12, "documents, not rows"
        assert row.mean == pytest.approx(np.mean(values))
        assert (row.low, row.high) == pytest.approx(ss.stats.mean_interval(values))
    assert ss.stats.summarise(frame, ["layer"], "value")["layer"].tolist() == [0, 1]


def test_t_interval() -> None:
    sample = np.random.default_rng(0).normal(2.0, 1.0, (4000, 3))
    found = np.array([ss.stats.t_interval(row) for row in sample])
    assert np.mean((found[:, 0] <= 2) & (found[:, 1] >= 2)) == pytest.approx(0.95, abs=0.015)
    low, high = ss.stats.t_interval([1.0, 2.0, 3.0])
    assert (low + high) / 2 == pytest.approx(2.0) and high - 2.0 == pytest.approx(
        4.30265 / np.sqrt(3), rel=1e-4
    )
    assert np.isnan(ss.stats.t_interval([1.0])).all() and ss.stats.t_interval([1.0, 1.0]) == (1.0, 1.0)


def test_document_means_are_those_of_a_plain_loop() -> None:
    generator = np.random.default_rng(0)
    documents = [7, 2, 7, 2, 5, 7]
    weights = [3.0, 1.0, 2.0, 5.0, 4.0, 1.0]
    values = generator.normal(size=(6, 2, 3))
    values[4, 1, 0] = np.nan
    for weight in (weights, None):
        owners, means = document_means(values, documents, weight)
        assert owners.tolist() == [2, 5, 7]
        for document, mean in zip(owners, means, strict=True):
            total, summed = 0.0, np.zeros((2, 3))
            for window, owner in enumerate(documents):
                if owner == document:
                    share = 1.0 if weight is None else weight[window]
                    total, summed = total + share, summed + share * values[window]
            np.testing.assert_allclose(mean, summed / total, atol=1e-14)
    assert np.isnan(document_means(values, documents)[1]).sum() == 1, "a NaN stays in its document"
    owners, means = document_means(np.empty((0, 3)), [])
    assert owners.shape == (0,) and means.shape == (0, 3)
