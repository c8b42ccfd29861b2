"""Logit spectroscopy: the logit lens, built up band by band of the residual stream."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from spectral_sinks.data.texts import Windows
from spectral_sinks.errors import InputError
from spectral_sinks.interventions.sites import Site
from spectral_sinks.interventions.tracing import trace
from spectral_sinks.measure.memory import batches
from spectral_sinks.measure.nll.scoring import Sample, chunk
from spectral_sinks.measure.residual.band_energy import residual_sites
from spectral_sinks.models.effective_weights import constant
from spectral_sinks.models.language import LanguageModel
from spectral_sinks.remote.client import remotely
from spectral_sinks.spectra.spectrum import Spectrum

TOGETHER, ALONE = "bands 1 to k", "band k alone"
"""The two readings of a band."""

KEYS = ("document", "site", "layer", "basis", "reading", "band")

TOLERANCE = 1e-2
"""Relative error above which a final norm does not count as the product of a scale, a gain and a centring."""


@dataclass(frozen=True, eq=False)
class Reader:
    """Final norm and unembedding in the basis of a spectrum, in which logits are a sum over directions.

    With gain g, centring C (LayerNorm only), bias b and basis V, the logits of a residual x are `scale(x) (x
    V) (W_U diag(g) C V)^T + W_U b`. The scale is computed from the *whole* residual, whichever bands are
    read. So bands add up exactly, which they would not if each set of bands had its own norm.
    """

    spectrum: Spectrum
    columns: Float[Tensor, "vocabulary d"]
    constant: Float[Tensor, "vocabulary"]

    @classmethod
    def of(cls, model: LanguageModel, spectrum: Spectrum) -> "Reader":
        """Return the reader of a model, which takes as much memory as the unembedding in float32."""
        if spectrum.d != model.d:
            raise InputError(f"a spectrum of width {spectrum.d} for {model.name} of width {model.d}")
        model.require_weights("a lens by band")
        if model.reads_through:
            raise InputError(
                f"the logits of {model.name} are not a sum over bands of the residual, which its head reads "
                f"through {model.reads_through}"
            )
        weight = model.unembedding_weight.detach().float()
        reading = spectrum.vectors.to(weight.device, weight.dtype)
        if model.centres_residual:
            reading = reading - reading.mean(0)
        reading = model.final_gain.to(weight.device)[:, None] * reading
        # The bias of the norm passes the unembedding, that of the unembedding does not
        norm, head = (constant(part, model.d, model.dtype).to(weight.device) for part in _parts(model))
        factor = model.layout.traits.logit_factor
        return cls(spectrum, factor * (weight @ reading), factor * (weight @ norm + head))

    def steps(
        self, coordinates: Float[Tensor, "rows d"], bands: Sequence[int] | None = None
    ) -> Iterator[tuple[int, Float[Tensor, "rows vocabulary"], Float[Tensor, "rows vocabulary"]]]:
        """Yield, for each band, its number, the logits of bands 1 to it, and the logits of it alone.

        All bands are read by default. Both logits include the constant. `coordinates` are those of the scaled
        residual in the basis. The running logits are changed in place by the next step. Bands between those
        requested are added at once.
        """
        running = self.constant.expand(len(coordinates), -1).clone()
        edges, done = self.spectrum.edges, 0
        for band in range(1, self.spectrum.count + 1) if bands is None else sorted(set(bands)):
            a, b = edges[band - 1], edges[band]
            if a > done:
                running.addmm_(coordinates[:, done:a], self.columns[:, done:a].T)
            part = coordinates[:, a:b] @ self.columns[:, a:b].T
            running += part
            done = b
            yield band, running, part.add_(self.constant)


def norm_scale(model: LanguageModel, x: Float[Tensor, "rows d"]) -> Float[Tensor, "rows 1"]:
    """Return the scale that the final norm applies to each residual, besides its gain, float32.

    It is measured by running the norm. Raises InputError where the norm is not a scale, a gain and a
    centring.
    """
    norm, _ = _parts(model)
    with torch.no_grad():
        normed = norm.forward(x).float()
    x = x.float()
    normed = normed - constant(norm, model.d, model.dtype).to(x.device)
    linear = (x - x.mean(-1, keepdim=True) if model.centres_residual else x) * model.final_gain.to(x.device)
    found = (normed * linear).sum(-1, keepdim=True) / linear.square().sum(-1, keepdim=True).clamp_min(1e-30)
    if (normed - found * linear).norm() > TOLERANCE * normed.norm():
        raise InputError(
            f"the final norm of {model.name} is not a scale times a gain: it cannot be split by band"
        )
    return found


def band_lens(
    model: LanguageModel,
    windows: Windows,
    spectra: Mapping[str, Spectrum],
    sites: Sequence[Site] | None = None,
    *,
    bands: Sequence[int] | None = None,
    alone: bool = True,
    batch_size: int | None = None,
    predict: int | Sample | None = None,
) -> pd.DataFrame:
    """Read the next-token distribution from bands 1 to k of the residual, and from band k alone.

    All bands at the last exit are the model itself, and at another exit the logit lens. Each band is added to
    the logits of the bands before it, with the scale that the final norm has for the whole residual.

    Args:
        model: a causal language model.
        windows: the text.
        spectra: the spectra to read with, by name.
        sites: the sites to read at; by default the embedding and all exits.
        bands: the bands k; all by default.
        alone: whether to read band k alone as well.
        batch_size: windows in a pass.
        predict: number of predictions of each window that are read, drawn at random with seed 0; a `Sample`
            has a seed of its own. None reads all. The time is nearly in proportion to it. `attrs["predict"]`
            of the table says how many were read.

    Returns:
        One row per `document`, `site` (its kind), `layer` (-1 for the embedding), `basis` (a key of
        `spectra`), `reading` ("bands 1 to k" or "band k alone") and `band`. The values are `nll` of the next
        token in nats; `kl`, the divergence KL(model || lens) in nats; and `top1`, how often both have the
        same most likely token.

    Raises:
        InputError: for a spectrum of another width, for bands that it does not have, for an encoder whose
            logits are not a sum over bands, and for a sample of fewer than two predictions.

    """
    sites = residual_sites(model) if sites is None else list(sites)
    for spectrum in spectra.values():
        if bands is not None and not set(bands) <= set(range(1, spectrum.count + 1)):
            raise InputError(f"bands {sorted(bands)}: {spectrum!r} has bands 1 to {spectrum.count}")
    readings, sample = (TOGETHER, ALONE) if alone else (TOGETHER,), Sample.of(predict)
    made = (
        spectra if model.remote else {name: Reader.of(model, spectrum) for name, spectrum in spectra.items()}
    )
    rows: list[dict[str, Any]] = []
    for places, ids in batches(model, windows, batch_size):
        chosen = None if sample is None else sample.drawn_each(places, ids.shape[1] - 1)
        found = _scored(model, ids.to(model.device), made, sites, readings, bands, chosen)
        for (site, name, reading, band), parts in found.items():
            scores = torch.cat(parts).view(len(ids), -1, 3).mean(1)
            layer = -1 if site.kind == "embedding" else site.layer
            for place, (nll, kl, top1) in zip(places, scores.tolist(), strict=True):
                key = (windows.document[place], site.kind, layer, name, reading, band)
                rows.append(dict(zip(KEYS, key, strict=True)) | {"nll": nll, "kl": kl, "top1": top1})
    table = pd.DataFrame(rows).groupby(list(KEYS), sort=False, as_index=False).mean()
    if sample is not None:
        table.attrs["predict"] = sample.count
    return table


@remotely
def _scored(
    model: LanguageModel,
    ids: Int[Tensor, "batch tokens"],
    readers: Mapping[str, "Reader | Spectrum"],
    sites: Sequence[Site],
    readings: Sequence[str],
    bands: Sequence[int] | None,
    chosen: Int[Tensor, "batch scored"] | None,
) -> dict[tuple[Site, str, str, int], list[Tensor]]:
    """Score every prediction of a batch, or those chosen, by site, basis, reading and band, in parts."""
    made = {name: Reader.of(model, r) if isinstance(r, Spectrum) else r for name, r in readers.items()}
    width = ids.shape[1] - 1
    places = torch.arange(width).expand(len(ids), -1) if chosen is None else chosen
    rows = torch.arange(len(ids))[:, None].expand_as(places)

    def at(x: Tensor, after: int = 0) -> Tensor:
        return x[rows.to(x.device), after + places.to(x.device)].flatten(0, 1)

    reads = dict.fromkeys(sites, at)
    residuals, final = trace(model, ids, {}, reads, readout=lambda final, read, weights: (read, final))
    targets, truth = at(ids, after=1), at(final)
    step = chunk(model, truth.device)
    found: dict[tuple[Site, str, str, int], list[Tensor]] = {}
    for start in range(0, len(truth), step):
        here = slice(start, start + step)
        # The model's own distribution is computed once for each chunk of predictions
        goal = Goal.of(model, truth[here], targets[here])
        parts = (residuals[site][here] for site in sites)
        scaled = [x.float() * norm_scale(model, x) for x in parts]
        for name, reader in made.items():
            scorer = Scorer(model, reader, goal)
            for site, x in zip(sites, scaled, strict=True):
                for (reading, band), scores in scorer.scores(x, readings, bands).items():
                    found.setdefault((site, name, reading, band), []).append(scores.cpu())
    return found


@dataclass(frozen=True, eq=False)
class Goal:
    """The targets that predictions are scored against: the next tokens, and the model's own distribution."""

    targets: Tensor
    probabilities: Float[Tensor, "rows vocabulary"]
    negentropy: Float[Tensor, "rows"]
    top: Tensor

    @classmethod
    def of(cls, model: LanguageModel, final: Float[Tensor, "rows d"], targets: Tensor) -> "Goal":
        logarithms = model.unembed(final).float().log_softmax(-1)
        probabilities = logarithms.exp()
        return cls(targets, probabilities, (probabilities * logarithms).sum(-1), logarithms.argmax(-1))


class Scorer:
    """Scores the logits that a reader builds up.

    KL needs the expected logit under the model's own distribution p. It is the row `p W` of width d, computed
    once, times the coordinates. So no band needs another pass over the vocabulary, unless a soft cap makes
    logits nonlinear.
    """

    def __init__(self, model: LanguageModel, reader: Reader, goal: Goal) -> None:
        self.model, self.reader, self.goal = model, reader, goal
        self.capped = model.logit_cap is not None
        self.expected = goal.probabilities @ reader.columns
        self.base = goal.probabilities @ reader.constant

    def scores(
        self, scaled: Float[Tensor, "rows d"], readings: Sequence[str], bands: Sequence[int] | None
    ) -> dict[tuple[str, int], Float[Tensor, "rows 3"]]:
        """Return NLL, KL and agreement of every prediction, by reading and band, from scaled residuals."""
        coordinates = scaled @ self.reader.spectrum.vectors.to(scaled.device, scaled.dtype)
        sums = torch.nn.functional.pad((coordinates * self.expected).double().cumsum(-1), (1, 0))
        found: dict[tuple[str, int], Tensor] = {}
        edges = self.reader.spectrum.edges
        for band, running, part in self.reader.steps(coordinates, bands):
            for reading, logits, start in ((TOGETHER, running, 0), (ALONE, part, edges[band - 1])):
                if reading in readings:
                    cross = self.base + sums[:, edges[band]] - sums[:, start]  # expected logit
                    found[reading, band] = self._score(logits, cross)
        return found

    def _score(
        self, logits: Float[Tensor, "rows vocabulary"], cross: Float[Tensor, "rows"]
    ) -> Float[Tensor, "rows 3"]:
        goal = self.goal
        if self.capped:
            logits = self.model.capped(logits)
            cross = (goal.probabilities * logits).sum(-1)
        most = logits.amax(-1, keepdim=True)
        # Log of the sum of the exponentials
        total = ((logits - most).exp_().sum(-1).log() + most[:, 0]).double()
        nll = total - logits.gather(-1, goal.targets[:, None])[:, 0]
        agrees = logits.gather(-1, goal.top[:, None]) >= most
        return torch.stack([nll, total - cross + goal.negentropy, agrees[:, 0].double()], dim=-1)


def _parts(model: LanguageModel) -> tuple[Any, Any]:
    """Return the modules of the final norm and of the unembedding."""
    get = model.module.get_submodule
    return get(model.layout.final_norm), get(model.layout.unembedding)
