"""What is tried to make a position or token the sink, and how each attempt is judged."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from numpy.typing import NDArray
from torch import Tensor

from spectral_sinks.data.texts import Windows
from spectral_sinks.errors import InputError
from spectral_sinks.interventions.attention_edits import CopyKey, MaskKey, Restrict
from spectral_sinks.interventions.sites import Site
from spectral_sinks.measure.attention.received import EPSILON
from spectral_sinks.measure.nll.remote_batch import by_job
from spectral_sinks.measure.sinks.comparison import other_positions
from spectral_sinks.measure.sinks.edit_effects import CombinedEdit, observe
from spectral_sinks.models.attention_capture import AttentionHook
from spectral_sinks.models.language import LanguageModel
from spectral_sinks.remote.client import remotely
from spectral_sinks.spectra.edits import Edit
from spectral_sinks.spectra.filters import At, Tokens, remove
from spectral_sinks.spectra.scaling import Copied, carry, scale
from spectral_sinks.spectra.subspace import Subspace, random_subspace
from spectral_sinks.stats import Estimate, document_means

MASK = "mask the old sink"

LIGHTEST_FIRST = (
    "nothing",
    "restrict to itself",
    MASK,
    f"restrict to itself, {MASK}",
    "old sink's key and value",
    f"old sink's key and value, {MASK}",
    "old sink's dark band",
    f"old sink's dark band, {MASK}",
    "old sink's residual",
    f"old sink's residual, {MASK}",
)
"""What is tried, in this order [ours]. Masks alone: one row of attention, one column, both. Then the token is
given what the old sink has: key and value in every layer, as others see it; the dark band of its residual, at
what the layer reads that attends to it most; the whole residual there, so that its own content is lost."""

SCALE = "scale its norm"
"""The known negative control: at that site the token's norm becomes the old sink's."""

RANDOM = "old sink's random band"
"""The control of the dark band: as many directions of the same residual, followed by the seed."""

TIE = 1e-4
"""A lead up to this is a tie: two copies of one key differ by rounding [ours]."""

Found = Mapping[str, NDArray[np.float64]]
"""By document: `nll`; `mass [layers, heads]` of the designated sink; `given [layers, tokens]` by the mean of
heads; `others [tokens]`, what the other tokens are given by the mean of layers and heads; `norm_ratio`,
`old_norm_ratio [sites]`, `shares`, `other_shares [sites, spaces]`, where site l is what layer l reads."""


@dataclass(frozen=True)
class Try:
    """One attempt: what it cost and where attention went."""

    name: str
    works: bool
    reason: str
    delta_nll: Estimate
    mass: Estimate
    """Attention given to the designated sink, mean over layers and heads."""
    old_mass: Estimate
    """The same of the old sink."""
    head: Estimate
    """Attention that the strongest head gives the designated sink."""
    lead: Estimate
    """Attention given to the designated sink beyond that given to the strongest other position."""
    rival: int
    """That position."""
    norm_ratio: float
    """Of the designated sink to the median of the others, at what the layer reads that attends to it most."""

    def row(self) -> dict[str, Any]:
        return row(self)


class Attempts:
    """The passes behind one designation: each makes or takes apart a sink on the same windows."""

    def __init__(
        self,
        model: LanguageModel,
        windows: Windows,
        position: int | None,
        token: int | None,
        dark: Subspace | None,
        tokens: int,
        batch_size: int,
    ) -> None:
        if (position is None) == (token is None):
            raise InputError("which sink? give a position or a token: designate(model, windows, 4), token=13")
        Restrict(position, token=token).check(model)
        lengths = {len(one) for one in windows.rows}
        if len(lengths) > 1:
            raise InputError(f"windows of {min(lengths)} to {max(lengths)} tokens: cut them to one length")
        self.model, self.position, self.token, self.dark = model, position, token, dark
        self.tokens, self.batch_size = min(tokens, lengths.pop()), batch_size
        if position is not None and position >= self.tokens - 1:
            raise InputError(
                f"position {position}: no query comes after it among the first {self.tokens} tokens; give "
                f"0 to {self.tokens - 2}, or longer windows and a larger `tokens`"
            )
        self.ids = torch.stack(windows.rows)
        has = self.queries(self.ids).any(1)
        self.left_out = int((~has).sum())
        self.ids = self.ids[has]
        self.document = np.array(windows.document)[has.numpy()]
        if not has.any():
            raise InputError(f"token {token} has no query after it among the first {self.tokens} tokens")
        if len(set(self.document.tolist())) < 2:
            raise InputError("a designation needs intervals: give at least two documents that have the sink")
        self.old = 0
        (base,) = self.run([CombinedEdit()])
        self.old = int(base["others"].mean(0).argmax())
        layer = int(base["given"][..., self.old].mean(0).argmax())
        self.site = site_of(layer)
        """What the layer reads that attends to the old sink most."""

    def marks(self, ids: Tensor) -> Bool[Tensor, "windows length"]:
        """Where the designated sink is."""
        return ids == self.token if self.position is None else _column(self.position, ids)

    def queries(self, ids: Tensor) -> Bool[Tensor, "windows tokens"]:
        """The queries that count: after the first occurrence, and not the designated sink's own."""
        marks = self.marks(ids)[:, : self.tokens]
        return (marks.cumsum(1) > 0) & ~marks

    def controls(self, count: int) -> list[str]:
        """What shall not work, or not as well."""
        random = self.dark is not None and any("dark" in name for name in self.names)
        return [SCALE, *(f"{RANDOM} {seed}" for seed in range(count if random else 0))]

    @property
    def names(self) -> list[str]:
        """Which of `LIGHTEST_FIRST` can be tried: a token can take what an earlier one has only."""
        later = self.position is not None and self.position < self.old
        return [
            name
            for name in LIGHTEST_FIRST
            if not (later and name.startswith("old sink")) and not (self.dark is None and "dark" in name)
        ]

    def parts(self, name: str, other: int | None = None) -> CombinedEdit:
        """One of `LIGHTEST_FIRST` or of the controls, here or at another position or token."""
        position, token = self.position, self.token
        if other is not None:
            position, token = (other, None) if token is None else (None, other)
        at: Tokens = At(position) if token is None and position is not None else frozenset({token or 0})
        looks: list[AttentionHook] = []
        edits: dict[Site, Edit] = {}
        if name.startswith("restrict"):
            looks.append(Restrict(position, token=token))
        elif name.startswith("old sink's dark band") and self.dark is not None:
            edits[self.site] = remove(self.dark, Copied(self.old), at)
        elif name.startswith(RANDOM) and self.dark is not None:
            band = random_subspace(self.model.d, self.dark.rank, int(name.removeprefix(RANDOM)))
            edits[self.site] = remove(band, Copied(self.old), at)
        elif name.startswith("old sink's key"):
            looks.append(CopyKey(position, token=token, source=self.old))
        elif name.startswith("old sink's residual"):
            edits[self.site] = carry(self.model.d, self.old, at)
        elif name == SCALE:
            edits[self.site] = scale(self.model.d, self._factor, at)
        if name.endswith(MASK):
            looks.append(MaskKey(self.old, since=position or 0))
        return CombinedEdit(tuple(looks), edits)

    @property
    def _factor(self) -> float:
        (base,), site = self.run([CombinedEdit()]), layer_of(self.site)
        return float(base["old_norm_ratio"][:, site].mean() / base["norm_ratio"][:, site].mean())

    def others(self, generator: np.random.Generator, count: int) -> list[int]:
        """Random positions, or tokens of the texts drawn by how often they occur."""
        if self.position is not None:
            taken = {*range(self.old + 1), self.position}
            count = min(count, self.tokens - 1 - len(taken))
            return other_positions(generator, self.tokens, count, taken)
        drawn = generator.permutation(self.ids[:, self.old + 1 :].flatten().numpy())
        return [token for token in dict.fromkeys(drawn.tolist()) if token != self.token][:count]

    def run(self, several: Sequence[CombinedEdit], spaces: Sequence[Subspace] = ()) -> list[Found]:
        """A pass over all windows under each of several changes, means by document."""
        found: list[dict[str, list[Tensor]]] = [{} for _ in several]
        for ids in self.ids.split(self.batch_size):
            marks, queries = self.marks(ids), self.queries(ids)
            given = (marks, queries, self.old, spaces)

            def passes(
                some: Sequence[CombinedEdit], ids: Tensor = ids, given: tuple[Any, ...] = given
            ) -> list[dict[str, Tensor]]:
                return _shown(self.model, ids, some, *given)

            for into, part in zip(found, by_job(self.model, ids, several, passes), strict=True):
                for name, value in part.items():
                    into.setdefault(name, []).append(value)
        return [
            {
                name: document_means(torch.cat(values).numpy(), self.document)[1]
                for name, values in one.items()
            }
            for one in found
        ]

    def judge(self, name: str, found: Found, base: Found) -> Try:
        """What a pass shows, by `DESIGNATION`."""
        mass, among = found["mass"].mean((1, 2)), found["others"]
        rival = int(among.mean(0).argmax())
        heads = found["mass"].reshape(len(mass), -1)
        head = Estimate.of(heads[:, heads.mean(0).argmax()])
        lead = Estimate.of(mass - among[:, rival])
        lacking: list[str] = []
        if not lead.low > TIE:
            lacking.append(
                f"it is given {mass.mean():.3f}, position {rival} {among[:, rival].mean():.3f} (lead "
                f"{lead.value:.3f} [{lead.low:.3f}, {lead.high:.3f}])"
            )
        if not head.low > EPSILON:
            lacking.append(f"its strongest head gives it {head.value:.3f} [{head.low:.3f}, {head.high:.3f}]")
        layer = int(found["mass"].mean((0, 2)).argmax())
        return Try(
            name,
            not lacking,
            "; ".join(lacking) or f"ahead of position {rival} by {lead.value:.3f}",
            delta_nll=Estimate.of(found["nll"] - base["nll"]),
            mass=Estimate.of(mass),
            old_mass=Estimate.of(found["given"][..., self.old].mean(1)),
            head=head,
            lead=lead,
            rival=rival,
            norm_ratio=float(found["norm_ratio"][:, layer].mean()),
        )


@remotely
def _shown(
    model: LanguageModel,
    ids: Int[Tensor, "batch length"],
    several: Sequence[CombinedEdit],
    marks: Bool[Tensor, "batch length"],
    queries: Bool[Tensor, "batch tokens"],
    old: int,
    spaces: Sequence[Subspace],
) -> list[dict[str, Tensor]]:
    """What `Found` holds, by window, of a pass under each of several changes."""
    found: list[dict[str, Tensor]] = []
    for parts in several:
        seen, _ = observe(model, ids, parts, queries, spaces=spaces)
        part = {"nll": seen.nll, "given": seen.given.mean(2)} | seen.chosen(marks)
        part["others"] = part["given"].mean(1).masked_fill(marks[:, : queries.shape[1]], 0.0)
        part["old_norm_ratio"] = seen.chosen(_column(old, ids))["norm_ratio"]
        found.append(part)
    return found


def site_of(layer: int) -> Site:
    """What a layer reads."""
    return Site("exit", layer - 1) if layer else Site("embedding")


def layer_of(site: Site) -> int:
    """The layer that reads a site."""
    return 0 if site.kind == "embedding" else site.layer + 1


def row(value: Any) -> dict[str, Any]:
    """The scalars of a result, each `Estimate` as its parts."""
    found: dict[str, Any] = {}
    for name, one in vars(value).items():
        if isinstance(one, Estimate):
            parts = vars(one).items()
            found |= {name if part == "value" else f"{name}_{part}": x for part, x in parts if x == x}
        elif isinstance(one, str | int | float | Site):
            found[name] = str(one) if isinstance(one, Site) else one
    return found


def _column(position: int, ids: Tensor) -> Bool[Tensor, "windows length"]:
    return (torch.arange(ids.shape[1]) == position).expand(ids.shape)
