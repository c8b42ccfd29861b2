"""Intervals, tests and null distributions, with documents as the unit of resampling."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from spectral_sinks.errors import InputError

__all__ = [
    "Estimate",
    "document_means",
    "holm",
    "largest_within",
    "mean_interval",
    "null_p",
    "null_rank",
    "rank_correlation",
    "sequential_p",
    "sign_flip",
    "summarise",
    "t_interval",
]

RESAMPLES = 4999


def mean_interval(values: ArrayLike, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Return the BCa bootstrap interval of the mean of one value per document.

    It is (nan, nan) for fewer than two values, and for values that are not finite.
    """
    sample = np.asarray(values, dtype=np.float64)
    if sample.size < 2 or not np.isfinite(sample).all():
        return float("nan"), float("nan")
    if np.ptp(sample) <= 1e-12 * max(1.0, float(np.abs(sample).max())):
        return float(sample.min()), float(sample.max())
    found = stats.bootstrap(
        (sample,),
        np.mean,
        confidence_level=level,
        n_resamples=RESAMPLES,
        method="BCa",
        rng=np.random.default_rng(seed),
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def t_interval(values: ArrayLike, level: float = 0.95) -> tuple[float, float]:
    """Return Student's t interval of the mean, for the few seeds of a training run; (nan, nan) for fewer than
    two.
    """
    sample = np.asarray(values, dtype=np.float64)
    if sample.size < 2:
        return float("nan"), float("nan")
    if np.ptp(sample) == 0:
        return float(sample[0]), float(sample[0])
    low, high = stats.t.interval(level, sample.size - 1, sample.mean(), stats.sem(sample))
    return float(low), float(high)


def sign_flip(values: ArrayLike, seed: int = 0) -> float:
    """Return the two-sided p value of a paired permutation test that the mean difference is zero."""
    sample = np.asarray(values, dtype=np.float64)
    found = stats.permutation_test(
        (sample,),
        lambda x, axis: np.mean(x, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        rng=np.random.default_rng(seed),
    )
    return float(found.pvalue)


def null_rank(observed: float, null: Sequence[float]) -> int:
    """Return how many draws of a null distribution reach the observed value; 0 if it exceeds all of them."""
    return int(np.sum(np.asarray(null) >= observed))


def null_p(observed: float, null: Sequence[float]) -> float:
    """Return the one-sided p value from n draws of a null: (draws that reach the value + 1) / (n + 1)."""
    return (null_rank(observed, null) + 1) / (len(null) + 1)


def holm(p_values: ArrayLike) -> list[float]:
    """Return Holm's adjusted p values, in the order given.

    They bound the family-wise error (Holm 1979). Raises InputError for p values outside 0 to 1.
    """
    p = np.asarray(p_values, dtype=np.float64)
    if p.size and not ((p >= 0) & (p <= 1)).all():
        raise InputError(f"p values from {p.min():g} to {p.max():g}: expected 0 to 1")
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(p.size, 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted.tolist()


def largest_within(
    costs: ArrayLike, sizes: ArrayLike, budget: float, level: float = 0.95, seed: int = 0
) -> tuple[float, float, float]:
    """Return the largest size whose mean cost over documents is within a budget, and its bootstrap interval.

    The size is 0 if no size is within the budget. The interval is a percentile interval, because the result
    can only take the values of `sizes`: documents are resampled, and the largest size is found again in each
    sample. It is NaN for fewer than two documents.

    Args:
        costs: `[documents, sizes]`.
        sizes: the sizes.
        budget: the largest mean cost allowed.
        level: the level of the interval.
        seed: the seed of the resampling.

    Raises:
        InputError: for costs of another shape or that are not finite.

    """
    table, size = np.asarray(costs, dtype=np.float64), np.asarray(sizes, dtype=np.float64)
    if table.ndim != 2 or size.shape != table.shape[1:] or not np.isfinite(table).all():
        raise InputError(
            f"costs of shape {table.shape} for {size.size} sizes: expected finite [documents, sizes]"
        )

    def largest(mean: NDArray[np.float64]) -> NDArray[np.float64] | np.float64:
        return np.where(mean <= budget, size, 0.0).max(-1, initial=0.0)

    found = float(largest(table.mean(0)))
    if len(table) < 2:
        return found, float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(len(table), np.full(len(table), 1 / len(table)), size=RESAMPLES) / len(table)
    tail = (1 - level) / 2
    low, high = np.quantile(largest(weights @ table), [tail, 1 - tail], method="inverted_cdf")
    return found, float(low), float(high)


def sequential_p(
    observed: float, draw: Callable[[int], float], *, h: int = 10, n: int = 999
) -> tuple[float, int]:
    """Return a one-sided Monte Carlo p value that stops drawing once the answer is clear, and the draws it
    used.

    `draw(i)` is draw i = 0, 1, ... of the null. Sampling stops as soon as `h` draws reach the observed value,
    and then p is `h / used`. Otherwise it stops after `n` draws, and p is (draws that reach it + 1) / (n +
    1), as without early stopping. Large p values, the uninteresting ones, take about `h / p` draws instead of
    n.

    The error rate is exact. Under the null, for draws exchangeable with the observed value, `P(p <= a) <= a`
    for every a, with equality at each value that p can take. Ties only make p larger. Raises InputError
    unless 1 <= h <= n. (Besag & Clifford 1991, Biometrika 78)
    """
    if not 1 <= h <= n:
        raise InputError(f"stopping after {h} of at most {n} draws: expected 1 <= h <= n")
    reached = 0
    for used in range(1, n + 1):
        reached += bool(draw(used - 1) >= observed)
        if reached == h:
            return h / used, used
    return (reached + 1) / (n + 1), n


def rank_correlation(x: ArrayLike, y: ArrayLike, given: Sequence[ArrayLike] = ()) -> float:
    """Return Spearman's rank correlation, or the partial rank correlation with `given`.

    The partial correlation removes from both ranks what the ranks of `given` explain linearly. The result is
    NaN for fewer values than three plus the number of `given`, and if either side does not vary.
    """
    ranked = [stats.rankdata(np.asarray(values, dtype=np.float64)) for values in (x, y, *given)]
    a, b, *others = ranked
    if len(a) < 3 + len(others):
        return float("nan")
    design = np.column_stack([np.ones(len(a)), *others])
    a, b = (v - design @ np.linalg.lstsq(design, v, rcond=None)[0] for v in (a, b))
    scale = np.linalg.norm(a) * np.linalg.norm(b)
    if min(np.linalg.norm(a), np.linalg.norm(b)) <= 1e-9 * len(a):
        return float("nan")
    return float(np.clip(a @ b / scale, -1, 1))


def document_means(
    values: ArrayLike, documents: ArrayLike | Sequence[int], weights: ArrayLike | None = None
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return weighted means over the windows of each document.

    Args:
        values: `[windows, ...]`; a NaN makes only the mean of its own document NaN.
        documents: the document of each window, `[windows]`.
        weights: the weight of each window, such as its number of predicted tokens; equal by default.

    Returns:
        The documents in ascending order, `[documents]`, and their means, `[documents, ...]`.

    """
    owners = np.asarray(documents, dtype=np.int64)
    order = np.argsort(owners, kind="stable")
    owners = owners[order]
    starts = np.flatnonzero(np.append(True, owners[1:] != owners[:-1])[: len(owners)])
    sample = np.asarray(values, dtype=np.float64)[order]
    weight = np.ones(len(owners)) if weights is None else np.asarray(weights, dtype=np.float64)[order]
    weight = weight.reshape(-1, *[1] * (sample.ndim - 1))  # [windows, 1, ...]
    sums = np.add.reduceat(sample * weight, starts, axis=0)
    return owners[starts], sums / np.add.reduceat(weight, starts, axis=0)


def summarise(frame: pd.DataFrame, by: Sequence[str], value: str) -> pd.DataFrame:
    """Return a column's mean over documents and its 95 % interval, by group: `mean`, `low`, `high`, `n`."""
    rows: list[dict[str, object]] = []
    for key, group in frame.groupby(list(by), sort=False):
        per_document = group.groupby("document")[value].mean()
        low, high = mean_interval(per_document.to_numpy())
        row: dict[str, object] = dict(zip(by, key, strict=True))
        row |= {"mean": per_document.mean(), "low": low, "high": high, "n": len(per_document)}
        rows.append(row)
    return pd.DataFrame(rows)


@dataclass(frozen=True)
class Estimate:
    """A mean over documents, its 95 % interval, and the range of its random controls."""

    value: float
    low: float
    high: float
    least: float = float("nan")
    most: float = float("nan")

    @classmethod
    def of(cls, values: ArrayLike, controls: ArrayLike | None = None) -> "Estimate":
        """Make an estimate from one value per document and, for the controls, one value per random draw."""
        sample = np.asarray(values, dtype=np.float64)
        drawn = np.asarray([] if controls is None else controls, dtype=np.float64)
        drawn = drawn if drawn.size else np.array([np.nan])
        return cls(float(sample.mean()), *mean_interval(sample), float(drawn.min()), float(drawn.max()))

    def columns(self, name: str) -> dict[str, float]:
        """Return the mean and its interval as columns of a table: `name`, `name_low`, `name_high`."""
        return {name: self.value, f"{name}_low": self.low, f"{name}_high": self.high}

    def all_columns(self, name: str) -> dict[str, float]:
        """Return `columns`, and `name_least` and `name_most` for the range of the controls; numbers only."""
        ranges = {f"{name}_least": self.least, f"{name}_most": self.most}
        return {key: value for key, value in (self.columns(name) | ranges).items() if value == value}
