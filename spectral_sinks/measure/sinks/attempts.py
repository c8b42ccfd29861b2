"""The interventions that may turn a position or token into the sink, and the test that each has to pass."""

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
from spectral_sinks.measure.memory import batch_size_for
from spectral_sinks.measure.nll.remote_batch import by_job
from spectral_sinks.measure.sinks.comparison import other_positions
from spectral_sinks.measure.sinks.edit_effects import CombinedEdit, measure_edits
from spectral_sinks.measure.sinks.sink import scalars
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
"""The interventions that are tried, in this order [ours]. Masks come first: the row of the token, the column
of the old sink, and both. Then the token receives a part of the old sink: its key and value in every layer,
as other tokens see them; the dark tail of its residual, at the site read by the layer that attends to the old
sink most; or the whole residual there, which erases the token's own content."""

SCALE = "scale its norm"
"""The known negative control: the token's norm at that site becomes the old sink's norm."""

RANDOM = "old sink's random band"
"""The control of the dark tail, followed by a seed: as many random directions of the same residual."""

TIE = 1e-4
"""A lead up to this size counts as a tie, since two copies of one key differ by rounding [ours]."""

Found = Mapping[str, NDArray[np.float64]]
"""Results of one pass, by document.

- `nll`: nats per token.
- `mass` `[layers, heads]`: attention to the designated sink.
- `given` `[layers, tokens]`: attention to each position, mean over heads.
- `others` `[tokens]`: attention to each token outside the designated sink, mean over layers and heads.
- `norm_ratio`, `old_norm_ratio` `[sites]`: norm of the designated and of the old sink over the median of the
  rest. Site l is what layer l reads.
- `shares`, `other_shares` `[sites, spaces]`: shares of energy of the designated sink and of the other tokens.
"""


@dataclass(frozen=True)
class Try:
    """One attempt: whether it worked, what it cost, and where attention went."""

    name: str
    works: bool
    reason: str
    delta_nll: Estimate
    mass: Estimate
    """Attention to the designated sink, mean over layers and heads."""
    old_mass: Estimate
    """Attention to the old sink, mean over layers and heads."""
    head: Estimate
    """Attention to the designated sink in the strongest head."""
    lead: Estimate
    """Attention to the designated sink minus attention to the strongest other position."""
    rival: int
    """The strongest other position."""
    norm_ratio: float
    """Norm of the designated sink over the median of the other tokens, at the site read by the layer that
    attends to it most."""

    def record(self) -> dict[str, Any]:
        """Return the fields as a dictionary that JSON can hold."""
        return scalars(self)


class Attempts:
    """The passes behind one designation: each creates or removes a sink on the same windows."""

    def __init__(
        self,
        model: LanguageModel,
        windows: Windows,
        position: int | None,
        token: int | None,
        dark: Subspace | None,
        length: int,
        batch_size: int | None,
    ) -> None:
        """Run the untouched pass and find the old sink.

        Args:
            model: a language model.
            windows: the text, in windows of one length.
            position: the position to designate; give either this or `token`.
            token: the token id to designate.
            dark: the dark tail; without it, interventions on it are not tried.
            length: number of first tokens over which attention is measured.
            batch_size: windows in a pass.

        Raises:
            InputError: unless exactly one of position and token is given; for windows of different lengths;
                for a position or token that has no query after it; and for fewer than two documents.

        """
        if (position is None) == (token is None):
            raise InputError("which sink? give a position or a token: designate(model, windows, 4), token=13")
        Restrict(position, token=token).check(model)
        lengths = {len(one) for one in windows.rows}
        if len(lengths) > 1:
            raise InputError(f"windows of {min(lengths)} to {max(lengths)} tokens: cut them to one length")
        self.model, self.position, self.token, self.dark = model, position, token, dark
        whole = lengths.pop()
        self.length, self.batch_size = min(length, whole), batch_size_for(model, whole, batch_size)
        if position is not None and position >= self.length - 1:
            raise InputError(
                f"position {position}: no query comes after it among the first {self.length} tokens; give "
                f"0 to {self.length - 2}, or longer windows and a larger `length`"
            )
        # Leave out windows in which no query follows the designated sink
        self.ids = torch.stack(windows.rows)
        has = self.queries(self.ids).any(1)
        self.left_out = int((~has).sum())
        self.ids = self.ids[has]
        self.document = np.array(windows.document)[has.numpy()]
        if not has.any():
            raise InputError(f"token {token} has no query after it among the first {self.length} tokens")
        if len(set(self.document.tolist())) < 2:
            raise InputError("a designation needs intervals: give at least two documents that have the sink")
        # The old sink is the position that receives the most attention in the untouched pass
        self.old = 0
        (base,) = self.run([CombinedEdit()])
        self.old = int(base["others"].mean(0).argmax())
        layer = int(base["given"][..., self.old].mean(0).argmax())
        self.site = site_of(layer)
        """The site read by the layer that attends to the old sink most."""

    def marks(self, ids: Tensor) -> Bool[Tensor, "windows length"]:
        """Return where the designated sink is."""
        return ids == self.token if self.position is None else _column(self.position, ids)

    def queries(self, ids: Tensor) -> Bool[Tensor, "windows tokens"]:
        """Return the queries that count.

        They come after the first occurrence, and the designated sink's own queries are excluded.
        """
        marks = self.marks(ids)[:, : self.length]
        return (marks.cumsum(1) > 0) & ~marks

    def controls(self, count: int) -> list[str]:
        """Return the names of the controls, which should not work, or not as well."""
        random = self.dark is not None and any("dark" in name for name in self.names)
        return [SCALE, *(f"{RANDOM} {seed}" for seed in range(count if random else 0))]

    @property
    def names(self) -> list[str]:
        """Names of the interventions in `LIGHTEST_FIRST` that can be tried.

        A token can only receive a part of an earlier token.
        """
        later = self.position is not None and self.position < self.old
        return [
            name
            for name in LIGHTEST_FIRST
            if not (later and name.startswith("old sink")) and not (self.dark is None and "dark" in name)
        ]

    def parts(self, name: str, other: int | None = None) -> CombinedEdit:
        """Return one intervention of `LIGHTEST_FIRST` or of the controls.

        It acts on the designated sink, or on another position or token if `other` is given.
        """
        position, token = self.position, self.token
        if other is not None:
            position, token = (other, None) if token is None else (None, other)
        at: Tokens = At(position) if token is None and position is not None else frozenset({token or 0})
        attention: list[AttentionHook] = []
        edits: dict[Site, Edit] = {}
        if name.startswith("restrict"):
            attention.append(Restrict(position, token=token))
        elif name.startswith("old sink's dark band") and self.dark is not None:
            edits[self.site] = remove(self.dark, Copied(self.old), at)
        elif name.startswith(RANDOM) and self.dark is not None:
            band = random_subspace(self.model.d, self.dark.rank, int(name.removeprefix(RANDOM)))
            edits[self.site] = remove(band, Copied(self.old), at)
        elif name.startswith("old sink's key"):
            attention.append(CopyKey(position, token=token, source=self.old))
        elif name.startswith("old sink's residual"):
            edits[self.site] = carry(self.model.d, self.old, at)
        elif name == SCALE:
            edits[self.site] = scale(self.model.d, self._factor, at)
        if name.endswith(MASK):
            attention.append(MaskKey(self.old, since=position or 0))
        return CombinedEdit(tuple(attention), edits)

    @property
    def _factor(self) -> float:
        """Norm of the old sink over the norm of the designated one, untouched, at `site`."""
        (base,), site = self.run([CombinedEdit()]), layer_of(self.site)
        return float(base["old_norm_ratio"][:, site].mean() / base["norm_ratio"][:, site].mean())

    def others(self, generator: np.random.Generator, count: int) -> list[int]:
        """Draw random other positions, or random other tokens by their frequency in the texts."""
        if self.position is not None:
            taken = {*range(self.old + 1), self.position}
            count = min(count, self.length - 1 - len(taken))
            return other_positions(generator, self.length, count, taken)
        drawn = generator.permutation(self.ids[:, self.old + 1 :].flatten().numpy())
        return [token for token in dict.fromkeys(drawn.tolist()) if token != self.token][:count]

    def run(self, several: Sequence[CombinedEdit], spaces: Sequence[Subspace] = ()) -> list[Found]:
        """Run all windows under each of several interventions, and return the means by document."""
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
        """Return the outcome of a pass by the rule `DESIGNATION`."""
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
        # The norm is reported at the site read by the layer that attends to the sink most
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
    """Run one batch under each of several interventions; return the entries of `Found` by window."""
    found: list[dict[str, Tensor]] = []
    for parts in several:
        seen, _ = measure_edits(model, ids, parts, queries, spaces=spaces)
        part = {"nll": seen.nll, "given": seen.given.mean(2)} | seen.chosen(marks)
        part["others"] = part["given"].mean(1).masked_fill(marks[:, : queries.shape[1]], 0.0)
        part["old_norm_ratio"] = seen.chosen(_column(old, ids))["norm_ratio"]
        found.append(part)
    return found


def site_of(layer: int) -> Site:
    """Return the site that a layer reads."""
    return Site("exit", layer - 1) if layer else Site("embedding")


def layer_of(site: Site) -> int:
    """Return the layer that reads a site."""
    return 0 if site.kind == "embedding" else site.layer + 1


def _column(position: int, ids: Tensor) -> Bool[Tensor, "windows length"]:
    """Return a mask of one position, with the shape of `ids`."""
    return (torch.arange(ids.shape[1]) == position).expand(ids.shape)
