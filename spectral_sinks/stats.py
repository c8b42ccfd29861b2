"""Intervals, tests and null distributions; the unit of resampling is the document."""

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
    """BCa bootstrap interval of the mean of one value per document; (nan, nan) for fewer than two."""
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
    """Student's t interval of the mean, for the few seeds of a training; (nan, nan) for fewer than two."""
    sample = np.asarray(values, dtype=np.float64)
    if sample.size < 2:
        return float("nan"), float("nan")
    if np.ptp(sample) == 0:
        return float(sample[0]), float(sample[0])
    low, high = stats.t.interval(level, sample.size - 1, sample.mean(), stats.sem(sample))
    return float(low), float(high)


def sign_flip(values: ArrayLike, seed: int = 0) -> float:
    """Two-sided p value of a paired permutation test that the mean difference is zero."""
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
    """How many draws of a null distribution reach the observed value: 0 when it is beyond them all."""
    return int(np.sum(np.asarray(null) >= observed))


def null_p(observed: float, null: Sequence[float]) -> float:
    """One-sided p value from a null of n draws: (draws that reach the observed value + 1) / (n + 1)."""
    return (null_rank(observed, null) + 1) / (len(null) + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p values, in the order given; they bound the family-wise error (Holm 1979)."""
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
    """The largest size whose mean cost over documents is within a budget, and its bootstrap interval.

    `costs` is `[documents, sizes]`. Documents are resampled and the largest size is found anew: percentiles,
    since it takes only the values of `sizes`. 0 where no size is within the budget; the interval is NaN with
    fewer than two documents. Raises InputError for costs of another shape or not finite.
    """
    table, size = np.asarray(costs, dtype=np.float64), np.asarray(sizes, dtype=np.float64)
    if table.ndim != 2 or size.shape != table.shape[1:] or not np.isfinite(table).all():
        raise InputError(
            f"costs of shape {table.shape} for {size.size} sizes: expected finite [documents, sizes]"
        )

    def largest(mean: NDArray[np.float64]) -> NDArray[np.float64]:
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
    """One-sided Monte Carlo p value that stops drawing once the answer is clear, and the draws it used.

    `draw(i)` is draw i = 0, 1, ... of the null. Draws are taken until `h` of them reach the observed value:
    p is then `h / used`; or until `n` are spent: then (how many reach it + 1) / (n + 1), as without stopping.
    The error rate is kept exactly: under the null, for draws exchangeable with the observed value,
    `P(p <= a) <= a` for every a, with equality at each value that p can take; ties only make p larger.
    Large p values, the uninteresting ones, cost about `h / p` draws instead of n. Raises InputError unless
    1 <= h <= n. (Besag & Clifford 1991, Biometrika 78)
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
    """Spearman's rank correlation; with `given`, of what their ranks do not explain linearly (partial).

    NaN for fewer than three values beyond those given, or where nothing varies.
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
    values: ArrayLike, documents: ArrayLike, weights: ArrayLike | None = None
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Weighted means over the windows of each document.

    Args:
        values: `[windows, ...]`; a NaN makes the mean of its own document NaN, and no other.
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
    """Mean over documents of a column, with its 95 % interval, by group: `mean`, `low`, `high`, `n`."""
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
        """From a value per document, and a value per random draw."""
        sample = np.asarray(values, dtype=np.float64)
        drawn = np.asarray([np.nan] if controls is None else controls, dtype=np.float64)
        return cls(float(sample.mean()), *mean_interval(sample), float(drawn.min()), float(drawn.max()))

    def columns(self, name: str) -> dict[str, float]:
        """The mean and its interval as columns of a table: `name`, `name_low`, `name_high`."""
        return {name: self.value, f"{name}_low": self.low, f"{name}_high": self.high}
