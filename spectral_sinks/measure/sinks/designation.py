"""Designate a sink: find the lightest intervention that makes a given position or token the sink."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd

from spectral_sinks.data.texts import Windows
from spectral_sinks.errors import renamed_argument
from spectral_sinks.interventions.sites import Site
from spectral_sinks.interventions.tracing import Interventions
from spectral_sinks.measure.results import Result
from spectral_sinks.measure.sinks.attempts import Attempts, Found, site_of
from spectral_sinks.measure.sinks.sink import scalars
from spectral_sinks.models.attention_capture import AttentionHook
from spectral_sinks.models.attention_sdpa import TOKENS
from spectral_sinks.models.language import LanguageModel
from spectral_sinks.spectra.spectrum import Spectrum
from spectral_sinks.spectra.subspace import Subspace, random_subspaces
from spectral_sinks.stats import Estimate

NONE = "none works"

DESIGNATION = (
    "an intervention works if the designated sink receives more attention than any other position (mean over "
    "layers and heads, and over the queries after it among the first tokens), and more than 0.3 in one head. "
    "The sink is dark if, in the residual read by the layer that attends to it most, it keeps more of its "
    "energy in the dark tail than in any random subspace of that rank, and more than the other tokens do"
)
"""The rule of `designate`. "More" means that the whole interval over documents lies above."""


@dataclass(frozen=True, eq=False, repr=False)
class Designation(Result):
    """The result of `designate`: the intervention that works, its cost, and whether the new sink is dark."""

    model: str
    target: str
    old: int
    """The position that received the most attention before."""
    intervention: str
    """Name of the lightest intervention that works, or "none works"."""
    changes: tuple[AttentionHook | Interventions, ...]
    """The intervention itself, as `compare` takes it. Empty where none works or nothing is needed."""
    documents: int
    left_out: int
    """Number of windows without the token."""
    baseline_nll: Estimate
    """Nats per token in the untouched model."""
    nll: Estimate
    """Nats per token under the intervention. `least` and `most` are the range under the same intervention at
    random other positions or tokens."""
    delta_nll: Estimate
    mass_before: Estimate
    """Attention to the designated sink in the untouched model, mean over layers and heads."""
    mass: Estimate
    old_mass_before: Estimate
    """Attention to the old sink in the untouched model."""
    old_mass: Estimate
    verdict: Literal["dark", "dark by the intervention", "not dark", "unknown"]
    """Whether the new sink is dark. "dark by the intervention" means that the intervention gave it the old
    sink's residual or dark tail. "unknown" means that none works or that no spectrum was given."""
    site: Site
    """The site at which darkness is tested: what is read by the layer that attends to the sink most."""
    share_before: Estimate
    """Share of the token's energy in the dark tail, in the untouched model. `least` and `most` are the range
    over random subspaces of its rank."""
    share: Estimate
    others: Estimate
    """Dark share of the other tokens, under the intervention."""
    tried: pd.DataFrame
    """One row per attempt, the lightest first, then the controls: the scaled norm and random directions of
    the old sink."""
    where: pd.DataFrame
    """Attention received by each `position` in each `layer`, `before` and `after`, mean over documents and
    heads."""

    @property
    def works(self) -> bool:
        return self.intervention != NONE

    @property
    def table(self) -> pd.DataFrame:
        """The attempts, as in `tried`."""
        return self.tried

    def summary(self) -> pd.DataFrame:
        """Return one row; an estimate is `NAME`, `NAME_low`, `NAME_high`, `NAME_least`, `NAME_most`."""
        return pd.DataFrame([self.record()])

    def record(self) -> dict[str, Any]:
        """Return the row of `summary` as a dictionary that JSON can hold."""
        return scalars(self) | {"works": self.works}

    def __repr__(self) -> str:
        columns = ["name", "works", "delta_nll", "delta_nll_low", "delta_nll_high", "mass", "old_mass"]
        table = self.tried[[*columns, "reason"]].to_string(index=False, float_format="%.4f")
        return (
            f"{self.target} as the sink of {self.model}, in place of position {self.old}: "
            f"{self.intervention}\n"
            f"NLL {self.baseline_nll.value:.4f} -> {self.nll.value:.4f}; attention "
            f"{self.mass_before.value:.3f} -> {self.mass.value:.3f}; dark: {self.verdict}\n{table}"
        )


@renamed_argument("tokens", "length")
def designate(
    model: LanguageModel,
    windows: Windows,
    position: int | None = None,
    *,
    token: int | None = None,
    spectrum: Spectrum | None = None,
    controls: int = 5,
    draws: int = 20,
    seed: int = 0,
    length: int = TOKENS,
    batch_size: int | None = None,
) -> Designation:
    """Make a position or a token the sink, by the lightest intervention of a fixed list that works.

    All interventions of the list are tried, whether or not a lighter one works, and each is judged by the
    rule `DESIGNATION`. "none works" is a possible answer. The old sink is the position that receives the most
    attention. It is masked only for queries from the new sink on (for a token: for all queries). For a token,
    the edit acts at every occurrence, and the attention to all occurrences counts together. Windows without
    the token are left out.

    Args:
        model: a language model.
        windows: the text, in windows of one length.
        position: the position to designate; give either this or `token`.
        token: the token id to designate.
        spectrum: gives the dark tail.
        controls: number of random other positions or tokens at which the chosen intervention is repeated, and
            of random subspaces that replace the dark tail.
        draws: number of random subspaces that the dark share is compared with.
        seed: of the random positions or tokens.
        length: number of first tokens over which attention is measured.
        batch_size: windows in a pass.

    Raises:
        InputError: unless exactly one of position and token is given; for windows of different lengths; for a
            position or token that they do not have; and for fewer than two documents.

    """
    dark = None if spectrum is None else spectrum.dark()
    attempts = Attempts(model, windows, position, token, dark, length, batch_size)
    spaces: list[Subspace] = []
    if dark is not None:
        spaces = [dark, *random_subspaces(model.d, dark.rank, draws, least=1)]
    passes = _passes(attempts, attempts.names, spaces)
    # Judge every attempt and every control against the untouched pass
    before = passes["nothing"]
    tried = {name: attempts.judge(name, found, before) for name, found in passes.items()}
    controlled = _passes(attempts, attempts.controls(controls))
    against = [attempts.judge(name, found, before) for name, found in controlled.items()]
    intervention = next((name for name, one in tried.items() if one.works), NONE)
    after, judged = passes.get(intervention, before), tried.get(intervention, tried["nothing"])
    parts = attempts.parts(intervention)

    # Repeat the chosen intervention at random other positions or tokens
    moved: list[float] = []
    if parts.attention or parts.edits:
        others = attempts.others(np.random.default_rng(seed), controls)
        moved = [
            float(found["nll"].mean())
            for found in attempts.run([attempts.parts(intervention, o) for o in others])
        ]
    # Test darkness at what the layer reads that attends to the new sink most
    layer = int(after["mass"].mean((0, 2)).argmax())
    share_before, share, rest = (_share(found, layer) for found in (before, after, _others(after)))
    verdict = "not dark"
    if share.low > share.most and share.low > rest.high:
        verdict = "dark by the intervention" if parts.edits else "dark"
    return Designation(
        model.name,
        f"position {position}" if position is not None else f"token {token}",
        attempts.old,
        intervention,
        (*parts.attention, *([parts.edits] if parts.edits else [])),
        len(before["nll"]),
        attempts.left_out,
        baseline_nll=Estimate.of(before["nll"]),
        nll=Estimate.of(after["nll"], moved or None),
        delta_nll=Estimate.of(
            after["nll"] - before["nll"], [nll - before["nll"].mean() for nll in moved] or None
        ),
        mass_before=tried["nothing"].mass,
        mass=judged.mass,
        old_mass_before=tried["nothing"].old_mass,
        old_mass=judged.old_mass,
        verdict="unknown" if dark is None or intervention == NONE else verdict,
        site=site_of(layer),
        share_before=share_before,
        share=share,
        others=rest,
        tried=pd.DataFrame([one.record() for one in (*tried.values(), *against)]),
        where=_where(before, after),
    )


def _passes(attempts: Attempts, names: Sequence[str], spaces: Sequence[Subspace] = ()) -> dict[str, Found]:
    return dict(zip(names, attempts.run([attempts.parts(name) for name in names], spaces), strict=True))


def _share(found: Found, layer: int) -> Estimate:
    """Return the dark share at what a layer reads, with random subspaces; NaN without a spectrum."""
    shares = found["shares"][:, layer]
    if not shares.shape[1]:
        return Estimate(*[float("nan")] * 3)
    return Estimate.of(shares[:, 0], shares[:, 1:].mean(0) if shares.shape[1] > 1 else None)


def _others(found: Found) -> Found:
    """Return the same results with the shares of the other tokens."""
    return dict(found) | {"shares": found["other_shares"]}


def _where(before: Found, after: Found) -> pd.DataFrame:
    means = {name: found["given"].mean(0) for name, found in (("before", before), ("after", after))}
    index = pd.MultiIndex.from_product(map(range, means["before"].shape), names=["layer", "position"])
    return pd.DataFrame({name: mean.ravel() for name, mean in means.items()}, index=index).reset_index()
