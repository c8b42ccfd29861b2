"""Decide whether a model has a sink and whether it is dark, by one stated rule."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import pandas as pd

from spectral_sinks.data.texts import Windows
from spectral_sinks.errors import InputError
from spectral_sinks.interventions.sites import Site
from spectral_sinks.interventions.tracing import Interventions
from spectral_sinks.measure.attention.received import EPSILON, attention_by_head, uniform_attention
from spectral_sinks.measure.nll.effects import Effect, evaluate_all
from spectral_sinks.measure.residual.matrix_spectrum import by_convention
from spectral_sinks.measure.results import Result
from spectral_sinks.measure.sinks.dark_share import carrier_shares
from spectral_sinks.measure.sinks.sink import flat_row, scalars
from spectral_sinks.models.attention_sdpa import TOKENS
from spectral_sinks.models.language import LanguageModel
from spectral_sinks.spectra.conventions import disagreement
from spectral_sinks.spectra.filters import remove
from spectral_sinks.spectra.spectrum import Spectrum
from spectral_sinks.spectra.subspace import random_subspaces
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

BY_CONVENTION = ("verdict", "reason", "share", "others", "cut", "delta", "reached")
"""The fields of a verdict that depend on the convention."""


@dataclass(frozen=True, repr=False)
class SinkVerdict(Result):
    """The measurements of one model, and the verdict that follows from them by `RULE`."""

    model: str
    convention: str
    """The convention of the spectrum whose dark tail is tested."""
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
    alternatives: "tuple[SinkVerdict, ...]" = ()
    """The verdicts under the other conventions, from the same passes."""

    listed: ClassVar[tuple[str, ...]] = (
        *("verdict", "reason", "layer", "onset", "site", "rank", "documents", "nll", "rate", "head", "mass"),
        *("share", "others", "cut", "delta", "reached", "draws"),
    )

    @property
    def headline(self) -> str:
        """The verdict, its convention, and what other conventions say."""
        said = f"{self.model}: {self.verdict} ({self.convention} convention)"
        return f"{said}; {self.disagreement}" if self.disagreement else said

    @property
    def conventions(self) -> "dict[str, SinkVerdict]":
        """The verdict itself and its alternatives, by convention."""
        return {verdict.convention: verdict for verdict in (self, *self.alternatives)}

    @property
    def disagreement(self) -> str:
        """Where conventions disagree: "dark under folded; not dark under raw", or ""."""
        return disagreement({name: each.verdict for name, each in self.conventions.items()})

    @property
    def table(self) -> pd.DataFrame:
        """The table of `summary`: a verdict has one row."""
        return self.summary()

    def summary(self) -> pd.DataFrame:
        """Return one row; an estimate is `NAME`, `NAME_low`, `NAME_high`, `NAME_least`, `NAME_most`.

        What another convention gives is named as in `verdict_folded`, `share_folded` and `share_folded_low`.
        """
        return pd.DataFrame([self.record()])

    def record(self) -> dict[str, Any]:
        """Return the row of `summary` as a dictionary that JSON can hold."""
        row = scalars(self)
        for other in self.alternatives:
            row |= flat_row({f"{name}_{other.convention}": getattr(other, name) for name in BY_CONVENTION})
        return row


def sink_verdict(
    model: LanguageModel,
    windows: Windows,
    spectrum: Spectrum | Sequence[Spectrum],
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
        spectrum: the spectrum whose dark tail is tested; or several of one matrix, as from `read_spectra`, of
            which the first decides. The verdicts under the others come from the same passes.
        name: the name of the model in the result; by default its own.
        draws: number of random subspaces.
        batch_size: windows in a pass.

    Raises:
        InputError: where attention cannot be read, windows are shorter than 64 tokens, or there are fewer
            than two documents, which have no interval; for a spectrum of another width, and for several
            spectra that differ in more than their convention.

    """
    model.require_head("a verdict")
    spectra = by_convention(model, spectrum)
    if windows.record["documents"] < 2:
        raise InputError("a verdict needs intervals: give at least two documents")
    if not model.causal and (shortest := min(windows.lengths)) < TOKENS:
        raise InputError(
            f"a verdict needs windows of {TOKENS} tokens, and the shortest has {shortest}: give longer texts"
        )
    # The layer and the head with the strongest sink, and the onset
    heads = attention_by_head(model, windows, batch_size=batch_size)
    by_layer = heads.groupby(["layer", "document"])["attention"].mean()
    mass = by_layer.groupby("layer").mean()
    layer = int(mass.idxmax())
    site = Site("exit", layer - 1) if layer else Site("embedding")
    strongest = heads.groupby(["layer", "head"])["attention"].mean().idxmax()
    head = Estimate.of(heads.set_index(["layer", "head"]).loc[strongest, "attention"])
    uniform = uniform_attention() if model.causal else uniform_attention(length=windows.length, causal=False)
    over = mass[mass > ONSET * uniform]

    # The dark shares of position 0, and what removing each dark tail does
    darks = {convention: each.dark() for convention, each in spectra.items()}
    rank = next(iter(darks.values())).rank
    randoms = random_subspaces(model.d, rank, draws, least=1)
    shares = carrier_shares(model, windows, site, darks, randoms, batch_size)
    cells: dict[str, Interventions] = {f"dark {name}": {site: remove(dark)} for name, dark in darks.items()}
    cells |= {f"random {seed}": {site: remove(drawn)} for seed, drawn in enumerate(randoms)}
    effects = evaluate_all(model, windows, cells, batch_size=batch_size)

    def cut(effect: Effect) -> pd.Series:
        return 1 - effect.table[f"sink_mass_{layer}"] / effect.table[f"baseline_sink_mass_{layer}"]

    controls = [effects[f"random {seed}"] for seed in range(draws)]
    deltas = [effect.delta_nll for effect in controls]
    cuts = [cut(effect).mean() for effect in controls]

    def under(convention: str) -> SinkVerdict:
        effect = effects[f"dark {convention}"]
        share, others = shares[convention].share, shares[convention].others
        lost = Estimate.of(cut(effect), cuts)
        verdict, reason = judge(head, share, others, lost)
        return SinkVerdict(
            name or model.name,
            convention,
            verdict,
            reason,
            layer,
            int(over.index[0]) if len(over) else None,
            site,
            rank,
            windows.record["documents"],
            windows.opens_with_bos,
            draws,
            nll=Estimate.of(effect.table["baseline_nll"]),
            rate=Estimate.of((heads["attention"] > EPSILON).groupby(heads["document"]).mean()),
            head=head,
            mass=Estimate.of(by_layer.loc[layer]),
            share=share,
            others=others,
            cut=lost,
            delta=Estimate.of(effect.table["delta_nll"], deltas),
            reached=null_rank(effect.delta_nll, deltas),
        )

    first, *others = map(under, spectra)
    return replace(first, alternatives=tuple(others))


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
