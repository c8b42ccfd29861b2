"""Massive activations: tokens whose residuals stand out, by the published rule and by a robust one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from spectral_sinks.data.pixels import Pixels
from spectral_sinks.data.texts import Windows
from spectral_sinks.errors import renamed_argument
from spectral_sinks.interventions.sites import Site
from spectral_sinks.measure.attention.by_position import Inputs, PositionAttention, opened, watch
from spectral_sinks.measure.residual.band_energy import residual_sites
from spectral_sinks.models.attention_sdpa import TOKENS
from spectral_sinks.models.base import Transformer
from spectral_sinks.models.language import LanguageModel
from spectral_sinks.remote.client import remotely
from spectral_sinks.spectra.edits import EditFunction
from spectral_sinks.spectra.subspace import Subspace
from spectral_sinks.spectra.subspace import shares as shares_in

ACTIVATION, TIMES = 100.0, 1000.0
"""An activation is massive if it is above the first, and at least the second times the median of its hidden
state (Sun et al. 2024)."""

Z, RATIO = 10.0, 2.0
"""A token has high norm if its robust z-score in its layer is above the first, and its norm above the second
times the median [ours]."""


def robust_levels(
    norms: Float[NDArray[np.floating], "tokens sites"],
) -> Float[NDArray[np.float64], "2 sites"]:
    """Median norm at each site, and 1.4826 times the median deviation from it (at least 1e-6 medians)."""
    norms = norms.astype(np.float64)
    median = np.median(norms, axis=0)
    spread = 1.4826 * np.median(np.abs(norms - median), axis=0)
    return np.stack([median, np.maximum(spread, 1e-6 * median)])


def high_norm_cutoff(levels: Float[NDArray[np.float64], "2 sites"]) -> Float[NDArray[np.float64], "sites"]:
    """Norm at each site beyond which a token is high: robust z above 10, and above two medians [ours]."""
    median, spread = levels
    return np.maximum(median + Z * spread, RATIO * median)


@dataclass(frozen=True, eq=False)
class Residuals:
    """Size of every token's residual at the embedding (site 0) and at the exit of each layer l (site l + 1).

    Values behind the end of a shorter window are NaN.
    """

    norm: Float[NDArray[np.float32], "windows sites tokens"]
    peak: Float[NDArray[np.float32], "windows sites tokens"]
    """Magnitude of the largest activation."""
    dimension: Int[NDArray[np.int64], "windows sites tokens"]
    """The channel of the largest activation."""
    median: Float[NDArray[np.float32], "windows sites"]
    """Median magnitude of the activations in a window's hidden state."""
    shares: Mapping[str, Float[NDArray[np.float32], "windows sites tokens"]] = field(
        default_factory=dict[str, NDArray[np.float32]]
    )
    """Share of the energy inside each subspace whose shares were asked for, by its name."""
    marked: Bool[NDArray[np.bool_], "windows tokens"] | None = None
    """The tokens whose shares in further subspaces were asked for; None for none."""
    marked_shares: Float[NDArray[np.float32], "marked sites spaces"] | None = None
    """The shares of these tokens, in the order of `marked`."""

    def massive(self) -> Bool[NDArray[np.bool_], "windows sites tokens"]:
        """Return the tokens with an activation above 100 and 1000 medians or more (Sun et al. 2024)."""
        return (self.peak > ACTIVATION) & (self.peak >= TIMES * self.median[..., None])

    def levels(
        self, usual: Bool[NDArray[np.bool_], "windows tokens"]
    ) -> Float[NDArray[np.float64], "2 sites"]:
        """Return the median norm of usual tokens by site, and 1.4826 times the median deviation from it."""
        return robust_levels(np.moveaxis(self.norm, 1, 2)[usual])

    def z(self, levels: Float[NDArray[np.float64], "2 sites"]) -> NDArray[np.float64]:
        """Return the robust z-score of every norm at its site, `[windows, sites, tokens]`."""
        median, spread = levels[..., None]
        return (self.norm - median) / spread

    def high(
        self, levels: Float[NDArray[np.float64], "2 sites"]
    ) -> Bool[NDArray[np.bool_], "windows sites tokens"]:
        """Return the tokens of high norm: z above 10, and norm above twice the median [ours]."""
        return self.norm.astype(np.float64) > high_norm_cutoff(levels)[:, None]


@remotely
def attention_and_residuals(
    model: Transformer,
    windows: Inputs,
    batch_size: int | None = None,
    subspaces: Mapping[str, Subspace] | None = None,
    marked: Bool[NDArray[np.bool_], "windows tokens"] | None = None,
    of_marked: Sequence[Subspace] = (),
) -> tuple[PositionAttention, Residuals]:
    """Return the attention received by every position and the size of every residual, for whole windows.

    The shares of the residuals in some subspaces are measured in the same passes.

    Args:
        model: a language model or an image encoder.
        windows: the windows, which are not cut.
        batch_size: windows in a pass.
        subspaces: the subspaces in which the share of every token is measured, by name.
        marked: tokens whose shares in further subspaces are measured.
        of_marked: those subspaces.

    """
    spaces = {} if subspaces is None else dict(subspaces)
    sites = residual_sites(model)
    shape = (len(windows), len(sites), windows.length)
    norm, peak = (np.full(shape, np.nan, dtype=np.float32) for _ in range(2))
    dimension, median = np.zeros(shape, dtype=np.int64), np.zeros(shape[:2], dtype=np.float32)
    shares = {name: np.full(shape, np.nan, dtype=np.float32) for name in spaces}
    order = (
        np.zeros((0, 0), dtype=np.int64)
        if marked is None
        else (marked.ravel().cumsum() - 1).reshape(marked.shape)
    )
    count = 0 if marked is None else int(marked.sum())
    of_each = np.full((count, len(sites), len(of_marked)), np.nan, dtype=np.float32)
    here: list[int] = []

    def before(places: list[int]) -> None:
        here[:] = places

    # Numbers are written where they arise: small tensors that are kept between large ones divide the memory
    def recorder(index: int) -> EditFunction:
        def record(x: Tensor) -> Tensor:
            at = (here, index, slice(x.shape[1]))
            norm[at], peak[at], dimension[at], median[here, index] = residual_sizes(x)
            inside = shares_in([*spaces.values()], x).float().cpu()
            for name, values in zip(spaces, inside.unbind(-1), strict=True):
                shares[name][at] = values
            if count and marked is not None:
                row, token = (np.asarray(each) for each in np.nonzero(marked[here, : x.shape[1]]))
                chosen = x[torch.from_numpy(row).to(x.device), torch.from_numpy(token).to(x.device)]
                members = order[np.asarray(here)[row], token]
                of_each[members, index] = shares_in(of_marked, chosen).float().cpu().numpy()
            return x

        return record

    # Edits that change nothing record the sizes, in the same passes that read attention
    edits: dict[Site, EditFunction] = {site: recorder(index) for index, site in enumerate(sites)}
    attention = watch(model, windows, batch_size, edits, before)
    return attention, Residuals(norm, peak, dimension, median, shares, marked, of_each if count else None)


def residual_sizes(x: Float[Tensor, "batch tokens d"]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return each token's norm, largest magnitude and its channel, and the median magnitude of each row."""
    magnitude = x.float().abs()
    peaks, where = magnitude.max(-1)
    return magnitude.norm(dim=-1).cpu(), peaks.cpu(), where.cpu(), _medians(magnitude.flatten(1)).cpu()


def _medians(values: Float[Tensor, "rows values"]) -> Float[Tensor, "rows"]:
    """Return the lower median of each row, as torch defines it."""
    if values.device.type != "cpu":
        return values.median(1).values
    middle = (values.shape[1] - 1) // 2  # NumPy's selection takes a fifth of the time of torch's on a CPU
    return torch.from_numpy(np.partition(values.numpy(), middle, axis=1)[:, middle].copy())


def repeated_windows(windows: Windows) -> Bool[NDArray[np.bool_], "windows"]:
    """Return the windows in which one token fills at least half of the positions."""
    return np.array([int(row.bincount().max()) >= len(row) / 2 for row in windows.rows])


def usual_levels(
    model: Transformer, attention: PositionAttention, residuals: Residuals, batch_size: int | None = None
) -> Float[NDArray[np.float64], "2 sites"]:
    """Return `Residuals.levels` of usual tokens: those after the first, or the patches of images.

    Windows that repeat one token are left out. If all windows do, all of their tokens may have high norm.
    Then the levels come from the same windows with random tokens (seed 0) after the first [ours].
    """
    windows = attention.windows
    if isinstance(windows, Pixels):
        return residuals.levels(attention.ids == len(windows.model.prefix))
    varied = ~repeated_windows(windows)
    if not varied.any():
        assert isinstance(model, LanguageModel)
        generator = torch.Generator().manual_seed(0)
        rows = [
            torch.cat([row[:1], torch.randint(model.vocabulary, (len(row) - 1,), generator=generator)])
            for row in windows.rows
        ]
        attention, residuals = attention_and_residuals(model, Windows.of_ids(rows, model), batch_size)
        varied = np.ones_like(varied)
    usual = (attention.ids >= 0) & varied[:, None]
    usual[:, 0] = False
    return residuals.levels(usual)


@renamed_argument("tokens", "length")
def massive_activations(
    model: Transformer, windows: Inputs, *, length: int = TOKENS, batch_size: int | None = None
) -> pd.DataFrame:
    """Find the tokens whose residuals stand out by either rule, one row per token and layer.

    Args:
        model: a language model or an image encoder.
        windows: windows of text, or images.
        length: number of tokens read in each window.
        batch_size: windows in a pass.

    Returns:
        One row per `document`, `window`, `layer` (the layer whose exit it is; -1 for the embedding) and
        `position`. `token` is the id (for images the kind of token: its index in the prefix, or the number of
        prefix tokens for a patch). `activation` is the largest magnitude, at channel `dimension`, and
        `median_ratio` is its ratio to the median of the hidden state. `norm_ratio` is the norm over the
        median of usual tokens, and `z` its robust z-score. `massive` marks the published rule (Sun et al.
        2024), `high_norm` the robust one.

    Raises:
        InputError: as `attention_by_position` does.

    """
    attention, residuals = attention_and_residuals(model, opened(model, windows, length), batch_size)
    return massive_table(attention, residuals, usual_levels(model, attention, residuals, batch_size))


def massive_table(
    attention: PositionAttention, residuals: Residuals, levels: Float[NDArray[np.float64], "2 sites"]
) -> pd.DataFrame:
    """Return the rows of `massive_activations`."""
    massive, high = residuals.massive(), residuals.high(levels)
    window, site, position = np.nonzero(massive | high)
    at = (window, site, position)
    table = {
        "document": np.asarray(attention.windows.document)[window],
        "window": window,
        "layer": site - 1,
        "position": position,
        "token": attention.ids[window, position],
        "dimension": residuals.dimension[at],
        "activation": residuals.peak[at],
        "median_ratio": residuals.peak[at] / residuals.median[window, site],
        "norm_ratio": residuals.norm[at] / levels[0, site],
        "z": residuals.z(levels)[at],
        "massive": massive[at],
        "high_norm": high[at],
    }
    return pd.DataFrame(table)
