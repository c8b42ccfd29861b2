"""Outlier tokens of image encoders: patches whose norm stands out, their onset, and their locations."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from spectral_sinks.data import pixels as pixel_data
from spectral_sinks.data.pixels import Pixels
from spectral_sinks.errors import InputError, renamed_argument
from spectral_sinks.interventions.sites import Site
from spectral_sinks.interventions.tracing import trace
from spectral_sinks.measure.memory import batches
from spectral_sinks.measure.residual.massive import RATIO, Z, high_norm_cutoff, robust_levels
from spectral_sinks.measure.results import Result
from spectral_sinks.measure.vision.image_attention import ImageAttention
from spectral_sinks.models.vision import VisionModel
from spectral_sinks.stats import mean_interval

PUBLISHED = 150.0
"""Norm above which a patch is an outlier at the output of DINOv2-g, chosen by hand (Darcet et al. 2024)."""

RULE = (
    f"robust: a patch's norm lies over {Z:g} robust standard deviations above the median of all patches at "
    f"that layer, and above {RATIO:g} medians"
)
"""The rule for outliers unless a cut-off is given [ours]."""

Rule = Literal["robust", "published"] | float


@dataclass(frozen=True, eq=False, repr=False)
class Outliers(Result):
    """Norms of tokens at the embedding (site 0) and the exit of layer l (site l + 1), and the outliers."""

    model: str
    rule: str
    pixels: Pixels
    norm: Float[NDArray[np.float64], "images sites tokens"]
    cutoff: Float[NDArray[np.float64], " sites"]
    """Norm above which a patch is an outlier. Norms behind the last token of a smaller image are NaN."""
    median: Float[NDArray[np.float64], " sites"]
    """Median norm of all patches."""
    spread: Float[NDArray[np.float64], " sites"]
    """1.4826 times the median deviation from that median."""

    @property
    def patches(self) -> Float[NDArray[np.float64], "images sites patches"]:
        """Norms of the patches."""
        return self.norm[..., len(self.pixels.model.prefix) :]

    @property
    def member(self) -> Bool[NDArray[np.bool_], "images sites patches"]:
        """Which patches are outliers."""
        return self.patches > self.cutoff[:, None]

    @property
    def strongest(self) -> int | None:
        """The first layer with the most outliers (-1: the embedding); None without any."""
        share = self.member.mean((0, 2))
        return int(share.argmax()) - 1 if share.any() else None

    @property
    def onset_layer(self) -> int | None:
        """The first layer at which half of the strongest layer's outliers are outliers; None without any.

        This definition is [ours].
        """
        if self.strongest is None:
            return None
        there = self.member[:, self.strongest + 1]
        kept = (self.member & there[:, None]).sum((0, 2)) / there.sum()
        return int(np.flatnonzero(kept >= 0.5)[0]) - 1

    def summary(self) -> pd.DataFrame:
        """Return one row per layer (-1: the embedding), with the share of patches that are outliers.

        `share` has its interval, `low` and `high`. The other columns are the number of `images` that have
        any; the `cutoff`; the `median` and the `largest` norm of patches; and, under its name, the mean norm
        of each prefix token over the median of the patches.
        """
        rows: list[dict[str, Any]] = []
        count = (~np.isnan(self.patches[:, 0])).sum(1)
        for site in range(self.norm.shape[1]):
            each = self.member[:, site].sum(1) / count
            low, high = mean_interval(each)
            row = {"layer": site - 1, "share": float(each.mean()), "low": low, "high": high}
            row |= {"images": int((each > 0).sum()), "cutoff": float(self.cutoff[site])}
            row |= {"median": float(self.median[site]), "largest": float(np.nanmax(self.patches[:, site]))}
            for place, name in enumerate(self.pixels.model.prefix):
                row[name] = float(self.norm[:, site, place].mean() / self.median[site])
            rows.append(row)
        return pd.DataFrame(rows)

    @property
    def table(self) -> pd.DataFrame:
        """One row per outlier: `image`, `layer`, `row`, `column`, `norm`, `ratio` to the median, and `z`."""
        image, site, patch = np.nonzero(self.member)
        norm = self.patches[image, site, patch]
        columns = np.array([columns for _, columns in self.pixels.grids])
        row, column = np.divmod(patch, columns[image])
        table = {"image": image, "layer": site - 1, "row": row, "column": column, "norm": norm}
        table |= {"ratio": norm / self.median[site], "z": (norm - self.median[site]) / self.spread[site]}
        return pd.DataFrame(table)

    def frequency(self, layer: int) -> Float[NDArray[np.float64], "rows columns"]:
        """Return the share of images in which each patch is an outlier at a layer."""
        return self.member[:, layer + 1].mean(0).reshape(self.pixels.grid)

    def map(self, image: int, layer: int) -> Float[NDArray[np.float64], "rows columns"]:
        """Return the norms of the patches of one image at a layer."""
        rows, columns = self.pixels.grids[image]
        return self.patches[image, layer + 1, : rows * columns].reshape(rows, columns)

    def record(self) -> dict[str, Any]:
        """Return the findings as a dictionary that JSON can hold."""
        peak = None if self.strongest is None else self.summary().iloc[self.strongest + 1]
        return {
            "model": self.model,
            "rule": self.rule,
            "images": len(self.pixels),
            "tokens": self.norm.shape[-1],
            "patches": self.patches.shape[-1],
            "outlier_share": 0.0 if peak is None else float(peak["share"]),
            "outlier_share_interval": None if peak is None else [float(peak["low"]), float(peak["high"])],
            "strongest_layer": self.strongest,
            "onset_layer": self.onset_layer,
            "largest_ratio": float((np.nanmax(self.patches, (0, 2)) / self.median).max()),
        }


@renamed_argument("given", "pixels")
def outliers(
    model: VisionModel,
    pixels: Pixels,
    *,
    rule: Rule = "robust",
    measured: Outliers | ImageAttention | None = None,
    batch_size: int | None = None,
) -> Outliers:
    """Find the outlier patches of an encoder at the embedding and at every layer's exit.

    Norms are taken before the final norm.

    Args:
        model: The encoder.
        pixels: Its pixels.
        rule: "robust" (`RULE`), "published" (norm above 150; made for the output of DINOv2-g), or a norm.
        measured: Outliers, or the result of `vision_sinks`, of the same model and pixels. Their norms are
            judged by `rule`, without a pass.
        batch_size: Images in a pass.

    Raises:
        InputError: Another rule, or `measured` of other pixels.

    """
    if not (rule in ("robust", "published") or (isinstance(rule, int | float) and rule > 0)):
        raise InputError(f"rule {rule!r}: give 'robust', 'published' or a norm above 0")
    if measured is not None and measured.pixels is not pixels:
        raise InputError("what was measured is of other pixels: give what was measured of these")
    if measured is None:
        norm = _norms(model, pixels, batch_size)
    else:
        norm = measured.norm if isinstance(measured, Outliers) else measured.residuals.norm.astype(np.float64)
    patches = np.moveaxis(norm[..., len(model.prefix) :], 1, 2)  # [images, patches, sites]
    levels = robust_levels(patches[~np.isnan(patches[..., 0])])
    if rule == "robust":
        cutoff, name = high_norm_cutoff(levels), RULE
    else:
        fixed = PUBLISHED if rule == "published" else float(rule)
        cutoff, name = np.full_like(levels[0], fixed), f"norm above {fixed:g}"
    return Outliers(model.name, name, pixels, norm, cutoff, *levels)


def _norms(
    model: VisionModel, pixels: Pixels, batch_size: int | None
) -> Float[NDArray[np.float64], "images sites tokens"]:
    """Measure the norm of every token at the embedding and at every layer's exit."""
    sites = [Site("embedding"), *(Site("exit", layer) for layer in range(model.layers))]
    norm = np.full((len(pixels), len(sites), pixels.length), np.nan)
    for places, batch in batches(model, pixels, batch_size):
        sizes: list[Tensor] = []

        def measure(x: Tensor, sizes: list[Tensor] = sizes) -> Tensor:
            sizes.append(x.double().norm(dim=-1).cpu())
            return x

        trace(model, batch.to(model.device), dict.fromkeys(sites, measure), readout=lambda *_: None)
        norm[places, :, : sizes[0].shape[1]] = torch.stack(sizes, dim=1)
    return norm


@torch.no_grad()
def neighbour_cosines(pixels: Pixels, image: int) -> Float[NDArray[np.float64], "rows columns"]:
    """Return the mean cosine of each patch to its neighbours above, below, left and right.

    The patches are taken after the patch embedding.
    """
    model = pixels.model
    x = model.patch_embedding.forward(pixels[image][None].to(model.device, model.dtype))[0].double()
    x = x / x.norm(dim=0).clamp_min(torch.finfo(x.dtype).tiny)
    down, right = (x[:, 1:] * x[:, :-1]).sum(0), (x[:, :, 1:] * x[:, :, :-1]).sum(0)
    total, count = torch.zeros_like(x[0]), torch.zeros_like(x[0])
    for alike, first, second in (
        (down, np.s_[1:, :], np.s_[:-1, :]),
        (right, np.s_[:, 1:], np.s_[:, :-1]),
    ):
        for side in (first, second):
            total[side] += alike
            count[side] += 1
    return (total / count.clamp_min(1)).cpu().numpy()


def border_distance(grid: tuple[int, int]) -> NDArray[np.int64]:
    """Return the number of patches between each patch and the nearest border, `[rows, columns]`."""
    rows, columns = (np.minimum(np.arange(n), np.arange(n)[::-1]) for n in grid)
    return np.minimum(rows[:, None], columns)


@renamed_argument("given", "pixels")
def outlier_onset(
    checkpoints: Iterable[tuple[int, VisionModel]],
    pixels: Pixels,
    *,
    rule: Rule = "robust",
    batch_size: int | None = None,
) -> pd.DataFrame:
    """Measure the outliers of a training run's checkpoints, one row per `step` and layer.

    The other columns are those of `Outliers.summary`.
    """
    tables: list[pd.DataFrame] = []
    for step, model in checkpoints:
        found = outliers(model, pixel_data.pixels(pixels.images, model), rule=rule, batch_size=batch_size)
        tables.append(found.summary().assign(step=step))
    if not tables:
        raise InputError("no checkpoints: give pairs of a step and a model")
    return pd.concat(tables, ignore_index=True)
