"""What the experiments on real models share: spectra of each convention, and the exits to look at."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

import spectral_sinks as ss

CONVENTIONS = ("raw", "folded", "centred")

TOKENS = 64
"""Tokens in a window: the T at which sinks are judged, and a length that two cores can bear."""

ONSET = 2.0
"""A layer has the sink if its mean attention to position 0 exceeds this many times uniform attention."""


@dataclass(frozen=True)
class RealStudy(ss.experiments.Study):
    """A model, windows, spectra of the unembedding by convention, and the rule for the exits.

    `unembedding` is the folded spectrum, so that experiments which use one spectrum use that.
    """

    spectra: dict[str, ss.Spectrum] = field(default_factory=dict)
    name: str = ""
    """Name of the model in figures."""
    spread: int = 3
    """Number of exits that are spread evenly over the depth, beside the two that the sink decides."""

    @cached_property
    def sink_mass(self) -> pd.Series:
        """Attention received by position 0, by layer: mean over heads, then over documents."""
        heads = ss.attention_by_head(self.model, self.windows)
        by_document = heads.groupby(["layer", "document"])["attention"].mean()
        return by_document.groupby("layer").mean()

    @cached_property
    def onset(self) -> int:
        """First layer with a sink; the layer with the strongest one if none has more than twice uniform."""
        over = self.sink_mass[self.sink_mass > ONSET * ss.attention.uniform_attention()]
        return int(over.index[0]) if len(over) else self.strongest

    @cached_property
    def strongest(self) -> int:
        """The layer that gives position 0 the most attention, after the first layer."""
        return int(self.sink_mass.iloc[1:].idxmax())

    @cached_property
    def exits(self) -> list[int]:
        """The exits that are edited: what the onset layer and the strongest layer read, and a spread."""
        last = self.model.layers - 1
        spread = [round(last * part / (self.spread + 1)) for part in range(1, self.spread + 1)]
        return sorted({max(self.onset - 1, 0), self.strongest - 1, *spread})

    @cached_property
    def layers(self) -> list[int]:
        """The layers of the exits that are edited, and the one whose MLP writes most to position 0.

        Only layers below that with the strongest sink count as writers.
        """
        sites = [ss.Site("mlp", layer) for layer in range(self.strongest)]
        written = ss.energy(self.model, self.windows, self.unembedding, sites)
        first = written[written["position_class"] != "other"]
        writer = int(first.groupby("layer")["norm"].mean().idxmax())
        return sorted({*self.exits, writer})

    @cached_property
    def below_sink(self) -> int:
        """The exit that the layer with the strongest sink reads."""
        return self.strongest - 1


def prepare(
    model: ss.LanguageModel, name: str, out: Path, documents: int, spread: int = 3, bos: Any = "auto"
) -> RealStudy:
    """Return the study of a loaded model on the shipped corpus, with one window of each document."""
    windows = ss.cut(ss.documents(limit=documents), model, length=TOKENS, per_document=1, bos=bos)
    spectra = {name: ss.read_spectrum(model, convention=name) for name in CONVENTIONS}
    embedding = ss.read_spectrum(model, "embedding")
    out.mkdir(parents=True, exist_ok=True)
    return RealStudy(
        model,
        windows,
        spectra["folded"],
        embedding,
        out,
        silent=True,
        spectra=spectra,
        name=name,
        spread=spread,
    )


def residuals(model: ss.LanguageModel, windows: ss.Windows, site: ss.Site) -> torch.Tensor:
    """Return what passes at a site, `[windows, tokens, d]`, in the order of the windows."""
    found: list[torch.Tensor] = []
    order: list[int] = []
    for places, ids in windows.batches(16):
        ids = ids.to(model.device)
        found.append(ss.trace(model, ids, {}, [site], readout=lambda final, read, weights: read[site].cpu()))
        order += places
    return torch.cat(found)[torch.tensor(order).argsort()]


def difference(effect: ss.Effect) -> dict[str, float]:
    """Return the NLL difference of an effect with its interval over documents."""
    low, high = effect.delta_nll_interval
    return {"delta_nll": effect.delta_nll, "low": low, "high": high}


def mass_above(effect: ss.Effect, layer: int) -> dict[str, float]:
    """Return the attention to position 0 in the next layer and in all layers above, with baselines."""
    table, found = effect.table, {}
    layers = range(layer + 1, sum(column.startswith("baseline_sink_mass_") for column in table))
    for prefix, name in (("", "mass"), ("baseline_", "baseline_mass")):
        columns = [f"{prefix}sink_mass_{above}" for above in layers]
        found[f"{name}_next"] = float(table[columns[0]].mean())
        found[f"{name}_above"] = float(table[columns].mean().mean())
    return found


def paired(effects: dict[str, ss.Effect], one: str, other: str) -> dict[str, float]:
    """Return the mean difference of two effects' NLL over documents, with its interval and sign-flip p."""
    a, b = (effects[name].table.set_index("document")["delta_nll"] for name in (one, other))
    low, high = ss.stats.mean_interval(a - b)
    return {"value": float((a - b).mean()), "low": low, "high": high, "p": ss.stats.sign_flip(a - b)}


def words(values: Any) -> str:
    """Return the range of some values as text."""
    values = np.asarray(values)
    return f"{values.min():+.3f} to {values.max():+.3f}"
