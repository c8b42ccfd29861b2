"""Decide whether a model has a sink and whether it is dark, by one stated rule."""

from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor

from spectral_sinks.data.texts import Windows
from spectral_sinks.errors import InputError
from spectral_sinks.interventions.sites import Site
from spectral_sinks.interventions.tracing import Interventions, trace
from spectral_sinks.measure.attention.received import EPSILON, attention_by_head, uniform_attention
from spectral_sinks.measure.memory import batches
from spectral_sinks.measure.nll.effects import Effect, evaluate_all
from spectral_sinks.measure.sinks.sink import scalars
from spectral_sinks.models.language import LanguageModel
from spectral_sinks.spectra.filters import remove
from spectral_sinks.spectra.spectrum import Spectrum
from spectral_sinks.spectra.subspace import Subspace, random_subspace
from spectral_sinks.stats import Estimate, null_rank

ONSET = 2.0
"""A layer has the sink if its mean attention received exceeds this many times uniform attention [ours]."""

RULE = (
    "no sink: in no head does the 95 % interval of the attention received by position 0 at T = 64 lie above "
    "0.3. dark: in the residual that the layer with the strongest sink reads, position 0 keeps more of its "
    "energy in the dark tail than in any random subspace of that rank, and more than the other tokens do; "
    "removing the tail also reduces that layer's sink by more than removing any random subspace. not dark: "
    "otherwise"
)
"""The rule of `sink_verdict`. "More" means that the whole interval lies above."""

Verdict = Literal["dark", "not dark", "no sink"]


@dataclass(frozen=True)
class SinkVerdict:
    """The measurements of one model, and the verdict that follows from them by `RULE`."""

    model: str
    verdict: Verdict
    reason: str
    layer: int
    """The layer with the strongest sink."""
    onset: int | None
    """First layer whose sink mass exceeds twice that of uniform attention; None where there is none."""
    site: Site
    """What that layer reads: the site at which the dark share is measured and the filter acts."""
    rank: int
    documents: int
    opens_with_bos: bool
    draws: int
    nll: Estimate
    """Nats per token in the untouched model."""
    rate: Estimate
    """Sink^0.3: share of (text, layer, head) with attention received above 0.3."""
    head: Estimate
    """Attention received in the strongest head."""
    mass: Estimate
    """Mean attention received in the strongest layer."""
    share: Estimate
    """Share of the energy of position 0 in the dark tail."""
    others: Estimate
    """Dark share of the other tokens."""
    cut: Estimate
    """Share of the strongest layer's sink mass that is lost without the dark tail."""
    delta: Estimate
    """Difference in NLL without the dark tail, nats per token."""
    reached: int
    """Number of random draws whose difference in NLL reaches that of the dark tail."""

    @property
    def table(self) -> pd.DataFrame:
        """The table of `summary`: a verdict has one row."""
        return self.summary()

    def summary(self) -> pd.DataFrame:
        """Return one row; an estimate is `NAME`, `NAME_low`, `NAME_high`, `NAME_least`, `NAME_most`."""
        return pd.DataFrame([self.record()])

    def record(self) -> dict[str, Any]:
        """Return the row of `summary` as a dictionary that JSON can hold."""
        return scalars(self)


def sink_verdict(
    model: LanguageModel,
    windows: Windows,
    spectrum: Spectrum,
    *,
    name: str | None = None,
    draws: int = 20,
    batch_size: int | None = None,
) -> SinkVerdict:
    """Measure the sink at position 0, and judge by a stated rule whether it is dark.

    The rule compares the dark share of position 0, and the sink without the dark tail, with random subspaces.
    For an encoder, attention is measured over whole windows where the rule states T = 64.

    Args:
        model: a language model.
        windows: the text.
        spectrum: the spectrum whose dark tail is tested.
        name: the name of the model in the result; by default its own.
        draws: number of random subspaces.
        batch_size: windows in a pass.

    Raises:
        InputError: where attention cannot be read, windows are shorter than 64 tokens, or there are fewer
            than two documents, which have no interval.

    """
    if windows.record["documents"] < 2:
        raise InputError("a verdict needs intervals: give at least two documents")
    # The layer and the head with the strongest sink, and the onset
    heads = attention_by_head(model, windows, batch_size=batch_size)
    by_layer = heads.groupby(["layer", "document"])["attention"].mean()
    mass = by_layer.groupby("layer").mean()
    layer = int(mass.idxmax())
    site = Site("exit", layer - 1) if layer else Site("embedding")
    strongest = heads.groupby(["layer", "head"])["attention"].mean().idxmax()
    uniform = uniform_attention() if model.causal else uniform_attention(length=windows.length, causal=False)
    over = mass[mass > ONSET * uniform]

    # The dark share of position 0, and what removing the dark tail does
    dark = spectrum.dark()
    randoms = [random_subspace(model.d, dark.rank, seed) for seed in range(draws)]
    shares = carrier_shares(model, windows, site, dark, randoms, batch_size)
    cells: dict[str, Interventions] = {"dark": {site: remove(dark)}}
    cells |= {f"random {seed}": {site: remove(drawn)} for seed, drawn in enumerate(randoms)}
    effects = evaluate_all(model, windows, cells, batch_size=batch_size)

    def cut(effect: Effect) -> pd.Series:
        return 1 - effect.table[f"sink_mass_{layer}"] / effect.table[f"baseline_sink_mass_{layer}"]

    controls = [effect for name, effect in effects.items() if name != "dark"]
    deltas = [effect.delta_nll for effect in controls]
    found = {
        "head": Estimate.of(heads.set_index(["layer", "head"]).loc[strongest, "attention"]),
        "share": Estimate.of(shares["carrier"], shares.filter(like="random").mean()),
        "others": Estimate.of(shares["others"]),
        "cut": Estimate.of(cut(effects["dark"]), [cut(effect).mean() for effect in controls]),
    }
    verdict, reason = judge(**found)
    return SinkVerdict(
        name or model.name,
        verdict,
        reason,
        layer,
        int(over.index[0]) if len(over) else None,
        site,
        dark.rank,
        windows.record["documents"],
        windows.opens_with_bos,
        draws,
        nll=Estimate.of(effects["dark"].table["baseline_nll"]),
        rate=Estimate.of((heads["attention"] > EPSILON).groupby(heads["document"]).mean()),
        mass=Estimate.of(by_layer.loc[layer]),
        delta=Estimate.of(effects["dark"].table["delta_nll"], deltas),
        reached=null_rank(effects["dark"].delta_nll, deltas),
        **found,
    )


def judge(head: Estimate, share: Estimate, others: Estimate, cut: Estimate) -> tuple[Verdict, str]:
    """Return the verdict by `RULE`, and the comparison that decided it."""
    if not head.low > EPSILON:
        return "no sink", f"strongest head {head.value:.3f} [{head.low:.3f}, {head.high:.3f}]"
    lacking: list[str] = []
    if not share.low > share.most:
        lacking.append(f"dark share {share.value:.3f}, random up to {share.most:.3f}")
    if not share.low > others.high:
        lacking.append(f"dark share {share.value:.3f}, others {others.value:.3f}")
    if not cut.low > cut.most:
        lacking.append(f"sink cut by {cut.value:.3f}, random up to {cut.most:.3f}")
    if lacking:
        return "not dark", "; ".join(lacking)
    reason = f"dark share {share.value:.3f}, random up to {share.most:.3f}; "
    return "dark", reason + f"sink cut by {cut.value:.3f}, random up to {cut.most:.3f}"


def carrier_shares(
    model: LanguageModel,
    windows: Windows,
    site: Site,
    dark: Subspace,
    randoms: list[Subspace],
    batch_size: int | None = None,
) -> pd.DataFrame:
    """Return the dark shares of position 0 and of the other tokens, by document.

    The columns are `carrier` (position 0) and `others` (mean of the rest). The columns `random 0`, `random
    1`, ... are the shares of position 0 in random subspaces.

    Args:
        model: a language model.
        windows: the text.
        site: the site of the residuals.
        dark: the dark tail.
        randoms: the random subspaces.
        batch_size: windows in a pass.

    """
    names = ["carrier", "others", *(f"random {seed}" for seed in range(len(randoms)))]
    tables: list[pd.DataFrame] = []
    for places, ids in batches(model, windows, batch_size):

        def readout(final: Tensor, read: dict[Site, Tensor], weights: list[Tensor]) -> Tensor:
            x = read[site]
            first = [space.share(x[:, 0]) for space in (dark, *randoms)]
            return torch.stack([first[0], dark.share(x[:, 1:]).mean(1), *first[1:]], dim=1).cpu()

        found = trace(model, ids.to(model.device), {}, [site], readout=readout)
        index = pd.Index([windows.document[place] for place in places], name="document")
        tables.append(pd.DataFrame(found.double().numpy(), index, names))
    return pd.concat(tables).groupby("document").mean()
