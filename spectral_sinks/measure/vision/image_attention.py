"""The attention that tokens of images receive, by kind: the prefix at fixed positions, and patches."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from numpy.typing import NDArray

from spectral_sinks.data.pixels import Pixels
from spectral_sinks.measure.attention.by_position import PositionAttention
from spectral_sinks.measure.circuits.heads import NO_OP
from spectral_sinks.measure.residual.massive import Residuals
from spectral_sinks.models.attention_sdpa import TOKENS
from spectral_sinks.stats import Estimate


@dataclass(frozen=True, eq=False, repr=False)
class ImageAttention:
    """The attention to every token of images, and the norm of what its value writes.

    Each image is a document, and intervals are over images.
    """

    model: str
    epsilon: float
    prefix: tuple[str, ...]
    attention: PositionAttention
    written: Float[NDArray[np.float32], "images layers heads tokens"]
    """Norm of what each token's value writes, `||W_O v_k||`."""
    residuals: Residuals

    @property
    def pixels(self) -> Pixels:
        """The images."""
        assert isinstance(self.attention.windows, Pixels)
        return self.attention.windows

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches. Raises InputError if they differ between images."""
        return self.pixels.grid

    @property
    def length(self) -> int:
        """T, the number of tokens of an image; of the largest image if they differ."""
        return self.attention.length

    @property
    def uniform(self) -> Float[NDArray[np.float64], "images"]:
        """alpha_k of every token of an image under uniform attention, 1 / T."""
        return 1 / self.attention.lengths

    @property
    def relative(self) -> float:
        """alpha_k above which a token is a sink relative to uniform attention, mean over images."""
        return self.epsilon * TOKENS * float(self.uniform.mean())

    @cached_property
    def members(self) -> Bool[NDArray[np.bool_], "images tokens"]:
        """The sinks of each image."""
        return self.above(self.epsilon)

    def above(
        self, threshold: float | Float[NDArray[np.float64], "images"]
    ) -> Bool[NDArray[np.bool_], "images tokens"]:
        """Return the tokens to which at least one head gives more than a threshold."""
        least = np.asarray(threshold, dtype=np.float64).reshape(-1, 1, 1, 1)
        return np.any(self.attention.alpha > least, axis=(1, 2))

    @cached_property
    def weighted(self) -> Float[NDArray[np.float64], "images layers heads tokens"]:
        """Each token's share of a head's norm-weighted attention, over all queries [published].

        (Kobayashi et al. 2020)
        """
        moved = self.attention.alpha * self.written
        with np.errstate(invalid="ignore"):
            return moved / np.nansum(moved, -1, keepdims=True)

    @property
    def value_ratio(self) -> Float[NDArray[np.float64], "images layers heads tokens"]:
        """Norm of what each token's value writes, over the mean of all tokens."""
        with np.errstate(invalid="ignore"):
            return self.written / np.nanmean(self.written, -1, keepdims=True, dtype=np.float64)

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
                "uniform": count * self.uniform[:, None, None],
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
        """Return where the attention of each `layer` goes, and how much of it to sinks that write nothing.

        `mass` is the attention to all sinks of the image together, and `uniform` its value under uniform
        attention. `no_op_mass` is the part of it in heads in which that sink's value ratio is at most 0.2.
        `to_cls` and so on is the attention to each token of the prefix, `to_top_patch` that to the one patch
        of the image which draws most in this layer, and `to_other_patches` the rest. All are means over heads
        and queries, with `_low` and `_high`. `no_op_heads` is the number of heads by the rule of `heads`.
        """
        here = self.members[:, None, None]
        mass = total_of(self.attention.alpha, here).mean(2)
        no_op = total_of(self.attention.alpha, here & (self.value_ratio <= NO_OP)).mean(2)
        uniform = float((self.members.sum(1) * self.uniform).mean())
        shares = {f"to_{name}": share for name, share in self._by_token().items()}
        counts = self.heads().groupby("layer")["no_op"].sum()
        rows: list[dict[str, Any]] = []
        for layer in range(mass.shape[1]):
            row = {"layer": layer, **interval("mass", mass[:, layer])}
            row |= interval("no_op_mass", no_op[:, layer])
            for name, share in shares.items():
                row |= interval(name, share[:, layer])
            rows.append(row | {"no_op_heads": int(counts[layer])})
        table = pd.DataFrame(rows)
        table.insert(4, "uniform", uniform)
        return table

    def _by_token(self) -> dict[str, Float[NDArray[np.float64], "images layers"]]:
        """Return the attention to each token of the prefix, the patch that draws most, and all others."""
        mean = self.attention.alpha.mean(2)
        start = len(self.prefix)
        shares = {name: mean[..., place] for place, name in enumerate(self.prefix)}
        most = np.nanmax(mean[..., start:], axis=-1)
        return shares | {"top_patch": most, "other_patches": np.nansum(mean[..., start:], axis=-1) - most}

    def heads(self) -> pd.DataFrame:
        """Return what each head attends to most, one row per `layer` and `head`.

        `attention` is the alpha_k of the token that draws most in an image, `kind` the kind that it has in
        most images, and `value_ratio` its value ratio. `no_op_mass` is the attention to sinks whose value
        ratio is at most 0.2. All are means over images; `attention` and `no_op_mass` have `_low` and `_high`.
        `no_op` says whether `no_op_mass` is above epsilon: whether the head spends so much of its attention
        on tokens that write nothing.
        """
        alpha, ratio = self.attention.alpha, self.value_ratio
        top = np.nanargmax(alpha, axis=-1)[..., None]
        most, its = (np.take_along_axis(values, top, -1)[..., 0] for values in (alpha, ratio))
        wasted = total_of(alpha, self.members[:, None, None] & (ratio <= NO_OP))
        names = (*self.prefix, "patch")
        kinds = np.take_along_axis(self.attention.ids[:, None, None], top, -1)[..., 0]
        rows: list[dict[str, Any]] = []
        for layer, head in np.ndindex(alpha.shape[1:3]):
            kind = names[int(np.bincount(kinds[:, layer, head]).argmax())]
            row: dict[str, Any] = {"layer": layer, "head": head, "kind": kind}
            row |= interval("attention", most[:, layer, head])
            row["value_ratio"] = float(its[:, layer, head].mean())
            row |= interval("no_op_mass", wasted[:, layer, head])
            rows.append(row | {"no_op": row["no_op_mass"] > self.epsilon})
        return pd.DataFrame(rows)

    def patches(self) -> pd.DataFrame:
        """Return how many patches are sinks, by the absolute and the relative `rule`.

        `threshold` applies to alpha_k, and `times_uniform` is its multiple of uniform attention. `per_image`
        is the mean number of such patches, `share_of_patches` their share, and `share_of_images` the share of
        images that have any. Both `per_image` and `share_of_images` have `_low` and `_high`.
        """
        rows: list[dict[str, Any]] = []
        each = {"absolute": self.epsilon, "relative": self.epsilon * TOKENS * self.uniform}
        whole = self.kinds["patch"].sum(1)
        for rule, least in each.items():
            count = (self.above(least) & self.kinds["patch"]).sum(1)
            threshold = float(np.mean(least))
            row: dict[str, Any] = {"rule": rule, "threshold": threshold}
            row |= {"times_uniform": float((least / self.uniform).mean()), **interval("per_image", count)}
            row |= {"share_of_patches": float((count / whole).mean())}
            rows.append(row | interval("share_of_images", count > 0))
        return pd.DataFrame(rows)

    def maps(self, layer: int, head: int | None = None) -> Float[NDArray[np.float64], "images rows columns"]:
        """Return the alpha_k of every patch of all images, in one head or as the mean over a layer's heads.

        Raises InputError for images of several shapes; `map` returns the map of one.
        """
        self.pixels.require_one_shape()
        return np.stack([self.map(image, layer, head) for image in range(len(self.pixels))])

    def map(
        self, image: int, layer: int, head: int | None = None
    ) -> Float[NDArray[np.float64], "rows columns"]:
        """Return the alpha_k of every patch of an image, in one head or as the mean over a layer's heads."""
        alpha = self.attention.alpha[image, layer]
        chosen = alpha.mean(0) if head is None else alpha[head]
        return chosen[len(self.prefix) : self.pixels.lengths[image]].reshape(self.pixels.grids[image])


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
