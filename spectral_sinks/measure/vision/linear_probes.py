"""Linear probes of what outlier tokens hold: their own position and pixels (local), or the class (global)."""

import warnings
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from spectral_sinks.data.pixels import Pixels
from spectral_sinks.errors import InputError, SpectralWarning
from spectral_sinks.interventions.sites import Site
from spectral_sinks.interventions.tracing import trace
from spectral_sinks.measure.memory import batches
from spectral_sinks.measure.vision.outlier_tokens import Outliers
from spectral_sinks.measure.vision.ridge import PENALTIES, LinearProbe, ridge, split
from spectral_sinks.models.vision import VisionModel
from spectral_sinks.stats import mean_interval

ROWS = 20_000
"""Number of patches that a local probe is fitted on, at most. They are drawn from the images for fitting."""


def token_probes(
    found: Outliers, layer: int | None = None, *, seed: int = 0, batch_size: int | None = None
) -> pd.DataFrame:
    """Measure what linear probes read from outliers, other patches and [CLS] (Darcet et al. 2024, 2.1).

    The features are the residual at the exit of `layer` after the final norm. All probes are ridge
    regressions on standardised features, fitted on half of the images and tested on the other half.

    - "position accuracy" and "position distance" (in patches): a classifier of a patch's position, fitted on
      patches of both kinds together.
    - "pixel error": squared error of a patch's normalised pixels; predicting their mean gives 1.
    - "class accuracy", where the images have labels: a classifier of the image from one of its tokens (a
      random outlier, another random patch, or [CLS]), in images that have both kinds of patches. "shuffled"
      is the probe of an outlier, fitted on shuffled labels.

    Args:
        found: the outliers.
        layer: the layer (-1: the embedding); by default the one with most outliers.
        seed: of the random patches and of the halves.
        batch_size: images in a pass.

    Returns:
        One row per `question` and `tokens` ("outliers", "others", "difference" of both in an image, "cls",
        "shuffled"): the `mean` over `images` images, with `low` and `high`.

    Raises:
        InputError: where there are no outliers, for fewer than four images, and for images of several shapes.

    """
    layer = found.strongest if layer is None else layer
    if layer is not None and not -1 <= layer < found.norm.shape[1] - 1:
        raise InputError(f"layer {layer}: {found.model} has layers 0 to {found.norm.shape[1] - 2}, or -1")
    if layer is None or not found.member[:, layer + 1].any():
        raise InputError(f"{found.model} has no outliers at layer {layer}: there is nothing to compare")
    pixels, grid = found.pixels, found.pixels.grid
    if len(pixels) < 4:
        raise InputError(f"probes of {len(pixels)} images: give at least four, half of which are held out")
    return probe_tokens(
        token_features(pixels.model, pixels, layer, batch_size),
        torch.from_numpy(found.member[:, layer + 1].copy()),
        torch.stack([patches_of(pixels[place], pixels.model.patch_size) for place in range(len(pixels))]),
        grid,
        pixels.labels,
        seed,
    )


def token_features(
    model: VisionModel, pixels: Pixels, layer: int, batch_size: int | None = None
) -> Float[Tensor, "images tokens d"]:
    """Return the residual at a layer's exit (-1: the embedding) after the final norm, float32."""
    site = Site("embedding") if layer < 0 else Site("exit", layer)
    norm = model.module.get_submodule(model.layout.final_norm)

    def readout(final: Tensor, read: dict[Site, Tensor], _: list[Tensor]) -> Tensor:
        return read[site]

    parts: list[Tensor] = []
    for _, batch in batches(model, pixels, batch_size):
        residual = trace(model, batch.to(model.device), {}, [site], readout=readout, last=site.layer)
        with torch.no_grad():
            parts.append(norm(residual).float().cpu())
    return torch.cat(parts)


def patches_of(image: Float[Tensor, "channels height width"], size: int) -> Float[Tensor, "patches values"]:
    """Return the pixels of each patch, row by row."""
    cut = image.unfold(1, size, size).unfold(2, size, size)
    return cut.permute(1, 2, 0, 3, 4).flatten(2).flatten(0, 1).float()


def probe_tokens(
    tokens: Float[Tensor, "images tokens d"],
    outlier: Bool[Tensor, "images patches"],
    pixels: Float[Tensor, "images patches values"],
    grid: tuple[int, int],
    labels: Int[Tensor, "images"] | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Run the probes of `token_probes` on given features.

    Args:
        tokens: the features. Tokens before the patches are the prefix, whose first token is [CLS].
        outlier: which patches are outliers.
        pixels: the pixels of each patch.
        grid: rows and columns of patches.
        labels: the class of each image.
        seed: of the random patches and of the halves.

    """
    count, patches = outlier.shape
    x = tokens[:, -patches:]
    generator = torch.Generator().manual_seed(seed)
    taught, tested = split(torch.zeros(count, dtype=torch.long) if labels is None else labels, 0.5, seed)
    rows = local(x, outlier, pixels, grid, taught, tested, generator)
    if labels is not None:
        cls = tokens[:, 0] if tokens.shape[1] > patches else None
        rows += whole(x, outlier, cls, labels, taught, tested, generator)
    return pd.DataFrame(rows)


def local(
    x: Tensor,
    outlier: Tensor,
    pixels: Tensor,
    grid: tuple[int, int],
    taught: Tensor,
    tested: Tensor,
    generator: torch.Generator,
) -> list[dict[str, Any]]:
    """Return the rows of the probes for a patch's own position and pixels.

    Args:
        x: the features of the patches, `[images, patches, d]`.
        outlier: which patches are outliers.
        pixels: the pixels of each patch.
        grid: rows and columns of patches.
        taught: the images that the probes are fitted on.
        tested: the images that they are tested on.
        generator: draws the patches that the probes are fitted on.

    """
    patches = x.shape[1]
    place = torch.arange(patches).expand(len(taught), -1).flatten()
    chosen = torch.randperm(len(place), generator=generator)[:ROWS]
    known, values = x[taught].flatten(0, 1)[chosen], pixels[taught].flatten(0, 1)[chosen]
    # A classifier of the position, and the distance of its answers
    where = LinearProbe.fitted(known, place[chosen])
    guess = where.predict(x[tested].flatten(0, 1)).view(len(tested), patches)
    truth = torch.arange(patches).expand_as(guess)
    apart = torch.stack([guess // grid[1] - truth // grid[1], guess % grid[1] - truth % grid[1]]).double()
    # The ridge penalty of the pixel probe is chosen on a fifth of its rows
    fifth = len(chosen) // 5
    penalty = min(
        PENALTIES,
        key=lambda p: float(
            (ridge(known[fifth:], values[fifth:], p)(known[:fifth]) - values[:fifth]).square().mean()
        ),
    )
    drawn = ridge(known, values, penalty)(x[tested].flatten(0, 1)).view(*guess.shape, -1)
    mean = values.double().mean(0)
    size = (values.double() - mean).square().sum(-1).mean()
    error = (drawn - pixels[tested].double()).square().sum(-1) / size
    quantities = {
        "position accuracy": (guess == truth).double(),
        "position distance": apart.norm(dim=0),
        "pixel error": error,
    }
    found: list[dict[str, Any]] = []
    for question, value in quantities.items():
        member = outlier[tested]
        means = [_mean_where(value, mask) for mask in (member, ~member)]
        for name, sample in zip(
            ("outliers", "others", "difference"), (*means, means[0] - means[1]), strict=True
        ):
            found.append(_row(question, name, sample))
    return found


def whole(
    x: Tensor,
    outlier: Tensor,
    cls: Tensor | None,
    labels: Tensor,
    taught: Tensor,
    tested: Tensor,
    generator: torch.Generator,
) -> list[dict[str, Any]]:
    """Return the rows of the probes for the class of the image from one of its tokens.

    Args:
        x: the features of the patches, `[images, patches, d]`.
        outlier: which patches are outliers.
        cls: the features of [CLS], `[images, d]`; None if there is no such token.
        labels: the class of each image.
        taught: the images that the probes are fitted on.
        tested: the images that they are tested on.
        generator: draws one patch of each image, and shuffles labels.

    """
    # One random patch of each kind, in images that have both kinds
    both = outlier.any(1) & (~outlier).any(1)
    taught, tested = taught[both[taught]], tested[both[tested]]
    weights = torch.rand(outlier.shape, generator=generator)
    kinds: dict[str, Tensor] = {}
    for name, member in (("outliers", outlier), ("others", ~outlier)):
        place = torch.where(member, weights, -1.0).argmax(1)
        kinds[name] = x[torch.arange(len(x)), place]
    if cls is not None:
        kinds["cls"] = cls
    shuffled = labels[taught][torch.randperm(len(taught), generator=generator)]
    try:
        right = {
            name: LinearProbe.fitted(token[taught], labels[taught]).predict(token[tested]) == labels[tested]
            for name, token in kinds.items()
        }
        null = LinearProbe.fitted(kinds["outliers"][taught], shuffled).predict(kinds["outliers"][tested])
    except InputError as error:
        warnings.warn(f"no class probe: {error}", SpectralWarning, stacklevel=4)
        return []
    samples = {name: value.double() for name, value in right.items()}
    samples["difference"] = samples["outliers"] - samples["others"]
    samples["shuffled"] = (null == labels[tested]).double()
    return [_row("class accuracy", name, sample) for name, sample in samples.items()]


def _mean_where(value: Tensor, member: Tensor) -> Tensor:
    """Return the mean of each row over some of its entries; NaN where there are none."""
    return (value * member).sum(1) / member.sum(1)


def _row(question: str, tokens: str, sample: Tensor) -> dict[str, Any]:
    values = sample[~sample.isnan()].numpy()
    low, high = mean_interval(values)
    mean = float(np.mean(values)) if len(values) else float("nan")
    return {
        "question": question,
        "tokens": tokens,
        "mean": mean,
        "low": low,
        "high": high,
        "images": len(values),
    }
