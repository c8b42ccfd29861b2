"""The attention that tokens of images receive, by kind: the prefix at fixed positions, and patches."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from numpy.typing import NDArray

from spectral_sinks.measure.attention.by_position import PositionAttention
from spectral_sinks.measure.circuits.heads import NO_OP
from spectral_sinks.measure.residual.massive import Residuals
from spectral_sinks.models.attention_sdpa import TOKENS
from spectral_sinks.stats import Estimate


@dataclass(frozen=True, eq=False)
class ImageAttention:
    """The attention to every token of images, and the norm of what its value writes.

    Each image is a document, and intervals are over images.
    """

    model: str
    epsilon: float
    prefix: tuple[str, ...]
    grid: tuple[int, int]
    """Rows and columns of patches."""
    attention: PositionAttention
    written: Float[NDArray[np.float32], "images layers heads tokens"]
    """Norm of what each token's value writes, `||W_O v_k||`."""
    residuals: Residuals

    @property
    def length(self) -> int:
        """T, the number of tokens of an image."""
        return self.attention.length

    @property
    def relative(self) -> float:
        """alpha_k above which a token is a sink relative to uniform attention, 1 / T."""
        return self.epsilon * TOKENS / self.length

    @cached_property
    def members(self) -> Bool[NDArray[np.bool_], "images tokens"]:
        """The sinks of each image."""
        return self.above(self.epsilon)

    def above(self, threshold: float) -> Bool[NDArray[np.bool_], "images tokens"]:
        """Return the tokens to which at least one head gives more than a threshold."""
        return np.any(self.attention.alpha > threshold, axis=(1, 2))

    @cached_property
    def weighted(self) -> Float[NDArray[np.float64], "images layers heads tokens"]:
        """Each token's share of a head's norm-weighted attention, over all queries [published].

        (Kobayashi et al. 2020)
        """
        moved = self.attention.alpha * self.written
        with np.errstate(invalid="ignore"):
            return moved / moved.sum(-1, keepdims=True)

    @property
    def value_ratio(self) -> Float[NDArray[np.float64], "images layers heads tokens"]:
        """Norm of what each token's value writes, over the mean of all tokens."""
        with np.errstate(invalid="ignore"):
            return self.written / self.written.mean(-1, keepdims=True, dtype=np.float64)

    @cached_property
    def kinds(self) -> dict[str, Bool[NDArray[np.bool_], "images tokens"]]:
        """Masks of the tokens of each kind; "sink patch" is part of "patch"."""
        ids = self.attention.ids
        found = {name: ids == place for place, name in enumerate((*self.prefix, "patch"))}
        return found | {"sink patch": found["patch"] & self.members}

    def by_head(self) -> pd.DataFrame:
        """Return one row per `document` (image), `layer`, `head` and `kind` of token.

        `tokens` is the number of tokens of the kind. `mass` is the attention to all of them (the sum of their
        alpha_k), and `uniform` its value under uniform attention. `largest` is the largest alpha_k, and
        `above` the share of the tokens above epsilon. `weighted` is their share of norm-weighted attention,
        and `value_ratio` the mean. `no_op_mass` is the mass on those that are sinks and whose value ratio is
        at most 0.2. `largest`, `above` and `value_ratio` are NaN without a token of the kind.
        """
        alpha = self.attention.alpha
        no_op = np.where(self.members[:, None, None] & (self.value_ratio <= NO_OP), alpha, 0.0)
        index = pd.MultiIndex.from_product(map(range, alpha.shape[:3]), names=["document", "layer", "head"])
        parts: list[pd.DataFrame] = []
        for kind, member in self.kinds.items():
            here = member[:, None, None]
            count = np.broadcast_to(here.sum(-1), alpha.shape[:3])
            columns = {
                "tokens": count,
                "mass": total_of(alpha, here),
                "uniform": count / self.length,
                "largest": np.where(count > 0, np.where(here, alpha, -1).max(-1), np.nan),
                "above": _share(total_of(alpha > self.epsilon, here), count),
                "weighted": total_of(self.weighted, here),
                "value_ratio": _share(total_of(self.value_ratio, here), count),
                "no_op_mass": total_of(no_op, here),
            }
            table = pd.DataFrame({name: values.ravel() for name, values in columns.items()}, index)
            table.insert(0, "kind", kind)
            parts.append(table.reset_index())
        return pd.concat(parts, ignore_index=True)

    def by_kind(self) -> pd.DataFrame:
        """Return one row per `kind`, with `_low` and `_high` over images.

        `sink_rate` is Sink^eps_k: the share of (layer, head) with alpha_k above epsilon, mean over the tokens
        of the kind. `any_rate` is the share of (layer, head) with any such token. `mass` and `weighted` are
        means over heads and layers, and `uniform` is the mass under uniform attention. `share_of_images` is
        the share of images with such a sink.
        """
        table = self.by_head()
        table["sink_rate"], table["any_rate"] = (
            table["above"],
            (table["largest"] > self.epsilon).astype(float),
        )
        rows: list[dict[str, Any]] = []
        for kind, part in table.groupby("kind", sort=False):
            means = part.groupby("document")
            row: dict[str, Any] = {"kind": kind}
            for name in ("sink_rate", "any_rate", "mass", "weighted"):
                row |= interval(name, means[name].mean().dropna())
            row["uniform"] = float(part["uniform"].mean())
            row["share_of_images"] = float((means["any_rate"].max() > 0).mean())
            rows.append(row)
        return pd.DataFrame(rows)

    def by_layer(self) -> pd.DataFrame:
        """Return how much of each `layer`'s attention goes to sinks, and to sinks that write nothing.

        `mass` is the attention to all sinks of the image together, and `uniform` its value under uniform
        attention. `no_op_mass` is the part of it in heads in which that sink's value ratio is at most 0.2.
        All are means over heads and queries, with `_low` and `_high`.
        """
        here = self.members[:, None, None]
        mass = total_of(self.attention.alpha, here).mean(2)
        no_op = total_of(self.attention.alpha, here & (self.value_ratio <= NO_OP)).mean(2)
        uniform = float(self.members.sum(1).mean() / self.length)
        rows = [
            {"layer": layer, **interval("mass", mass[:, layer]), **interval("no_op_mass", no_op[:, layer])}
            for layer in range(mass.shape[1])
        ]
        return pd.DataFrame(rows).assign(uniform=uniform)

    def patches(self) -> pd.DataFrame:
        """Return how many patches are sinks, by the absolute and the relative `rule`.

        `threshold` applies to alpha_k, and `times_uniform` is its multiple of uniform attention. `per_image`
        is the mean number of such patches, `share_of_patches` their share, and `share_of_images` the share of
        images that have any. Both `per_image` and `share_of_images` have `_low` and `_high`.
        """
        rows: list[dict[str, Any]] = []
        for rule, threshold in (("absolute", self.epsilon), ("relative", self.relative)):
            count = (self.above(threshold) & self.kinds["patch"]).sum(1)
            row: dict[str, Any] = {"rule": rule, "threshold": threshold}
            row |= {"times_uniform": threshold * self.length, **interval("per_image", count)}
            row |= {"share_of_patches": row["per_image"] / (self.grid[0] * self.grid[1])}
            rows.append(row | interval("share_of_images", count > 0))
        return pd.DataFrame(rows)

    def maps(self, layer: int, head: int | None = None) -> Float[NDArray[np.float64], "images rows columns"]:
        """Return the alpha_k of every patch of an image, in one head or as the mean over a layer's heads."""
        alpha = self.attention.alpha[:, layer]
        chosen = alpha.mean(1) if head is None else alpha[:, head]
        return chosen[:, len(self.prefix) :].reshape(-1, *self.grid)


def total_of(values: NDArray[Any], here: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return the sum over some tokens."""
    return np.where(here, values, 0.0).sum(-1)


def _share(total: NDArray[Any], count: NDArray[Any]) -> NDArray[np.float64]:
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def interval(name: str, values: Any) -> dict[str, float]:
    """Return the mean over images with its interval."""
    if not len(values):
        return {name: float("nan"), f"{name}_low": float("nan"), f"{name}_high": float("nan")}
    found = Estimate.of(values)
    return {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}
