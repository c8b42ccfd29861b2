"""One pass under an intervention: NLL, attention received by each position, and residuals."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from spectral_sinks.errors import InputError
from spectral_sinks.interventions.attention_base import AtToken
from spectral_sinks.interventions.attention_edits import CopyKey
from spectral_sinks.interventions.extra_keys import Prefix
from spectral_sinks.interventions.sites import Site
from spectral_sinks.interventions.tracing import Interventions, trace
from spectral_sinks.measure.nll.scoring import Reference, score, untouched
from spectral_sinks.measure.residual.band_energy import residual_sites
from spectral_sinks.models.attention_capture import AttentionCall, AttentionHook, attending
from spectral_sinks.models.language import LanguageModel
from spectral_sinks.spectra.edits import Edit, as_edits
from spectral_sinks.spectra.subspace import Subspace

Change = AttentionHook | Interventions | Prefix
"""An attention edit, edits at sites, or tokens before the text."""

Changes = Change | Sequence[Change]
"""One intervention, or several that act together."""


@dataclass(frozen=True)
class CombinedEdit:
    """Interventions by what they act on: attention (`attention`), sites (`edits`) and the text (`prefix`)."""

    attention: tuple[AttentionHook, ...] = ()
    edits: Mapping[Site, Edit] = field(default_factory=dict[Site, Edit])
    prefix: Prefix = field(default_factory=lambda: Prefix(()))

    @classmethod
    def of(cls, changes: Changes) -> "CombinedEdit":
        """Sort interventions. Raises InputError for any other object, and for two edits at one site."""
        attention: list[AttentionHook] = []
        edits: dict[Site, Edit] = {}
        prefix = Prefix(())
        given: Sequence[Any] = changes if isinstance(changes, Sequence) else [changes]
        for change in given:
            if isinstance(change, Prefix):
                prefix = Prefix((*change.ids, *prefix.ids))
            elif isinstance(change, Mapping):
                if twice := [site for site in change if site in edits]:
                    raise InputError(f"two edits at {twice[0]}: make them one function")
                edits |= as_edits(change)
            elif callable(change):
                attention.append(cast(AttentionHook, change))
            else:
                raise InputError(
                    f"{change!r} is not an intervention: give functions of an AttentionCall such as "
                    "MaskKey(0), a mapping from sites to edits, a Prefix, or a list of them"
                )
        return cls(tuple(attention), edits, prefix)

    @property
    def act(self) -> bool:
        """Whether there is anything to change."""
        return bool(self.attention or self.edits or self.prefix.ids)

    @property
    def position(self) -> int | None:
        """The one position at which the interventions act; None where there is none, or several."""
        found = {look.position for look in self.attention if isinstance(look, AtToken)}
        for edit in self.edits.values():
            found |= {None} if edit.positions is None else edit.positions
        return found.pop() if len(found) == 1 else None

    @property
    def source(self) -> int:
        """The last position that the interventions copy from; -1 where they copy nothing."""
        copied = [edit.copies_from for edit in self.edits.values()]
        return max([-1, *copied, *(look.source for look in self.attention if isinstance(look, CopyKey))])

    def at_position(self, position: int) -> "CombinedEdit":
        """Return the same interventions at another position."""
        attention = [replace(k, position=position) if isinstance(k, AtToken) else k for k in self.attention]
        edits = {site: edit.at_position(position) for site, edit in self.edits.items()}
        return CombinedEdit(tuple(attention), edits, self.prefix)


@dataclass(frozen=True)
class EditEffect:
    """The measurements of one pass over a batch of windows.

    Positions are those of the text without its prefix.
    """

    nll: Float[Tensor, "batch"]
    """Nats per token, mean over the predicted tokens of the text itself."""
    kl: Float[Tensor, "batch"]
    """KL(untouched || edited) of the next-token distributions, in nats."""
    given: Float[Tensor, "batch layers heads tokens"]
    """Attention received by each position, mean over the queries that count."""
    prefix: Float[Tensor, "batch layers heads"]
    """Attention received by the prefix. The rest, up to 1, went to no token (a learned sink, a dropped
    weight)."""
    norms: Float[Tensor, "batch sites positions"]
    """Norm of the residual at the embedding and at each exit."""
    shares: Float[Tensor, "batch sites positions spaces"]
    """Share of the residual's energy in each of the given subspaces."""

    @property
    def unspent(self) -> Float[Tensor, "batch layers heads"]:
        """Attention that went to no token."""
        return 1 - self.prefix - self.given.sum(-1)

    def chosen(self, chosen: Bool[Tensor, "batch positions"]) -> dict[str, Tensor]:
        """Return the measurements of some tokens of each window.

        Attention is summed over these tokens, and the residuals are averaged, by site. `norm_ratio` is
        relative to the median of the other tokens. `shares` and `other_shares` are shares of energy.
        """
        here = chosen[:, None].double()
        among = chosen[:, None, None, : self.given.shape[-1]]
        others = self.norms.masked_fill(chosen[:, None], torch.nan).nanquantile(0.5, -1)
        norm = (self.norms * here).sum(-1) / here.sum(-1)
        return {
            "mass": (self.given * among).sum(-1),
            "norm_ratio": norm / others,
            "shares": (self.shares * here[..., None]).sum(2) / here.sum(-1)[..., None],
            "other_shares": (self.shares * (1 - here)[..., None]).sum(2) / (1 - here).sum(-1)[..., None],
        }


def measure_edits(
    model: LanguageModel,
    ids: Int[Tensor, "batch length"],
    parts: CombinedEdit,
    queries: Bool[Tensor, "batch tokens"],
    *,
    spaces: Sequence[Subspace] = (),
    reference: Reference | None = None,
) -> tuple[EditEffect, Reference | None]:
    """Run one pass under some interventions, through `attending` even where nothing changes.

    Args:
        model: a language model.
        ids: the token ids of the windows.
        parts: the interventions.
        queries: marks, in each window, the queries among the first tokens whose attention counts.
        spaces: the subspaces whose share of energy is measured.
        reference: the untouched pass to compare with. Without it this pass makes one.

    Returns:
        The measurements, and the reference if this pass made one, else None.

    Raises:
        InputError: where the prefix and the text are longer than the context.

    """
    size = len(parts.prefix.ids)
    text = parts.prefix(ids.to(model.device))
    if model.context is not None and text.shape[1] > model.context:
        raise InputError(
            f"a prefix of {size} tokens before windows of {ids.shape[1]}: {model.name} has a context of "
            f"{model.context}"
        )
    last = size + queries.shape[1]
    # Each row averages over the queries that count, [batch, prefix + tokens]
    rows = torch.nn.functional.pad(queries / queries.sum(1, keepdim=True), (size, 0)).to(model.device)
    received: dict[int, Tensor] = {}

    def watch(call: AttentionCall) -> None:
        total = torch.zeros((), device=call.query.device)
        for block in call.blocks():
            if block.start < last:
                here = slice(block.start, min(block.stop, last))
                weights = call.weights(here)[..., :last]
                total = total + torch.einsum("bi,bhik->bhk", rows[:, here].to(weights.dtype), weights)
        received[call.layer] = total.detach().cpu().double()

    sites = residual_sites(model)

    # NLL, KL and residuals are those of the text, without the prefix
    def sizes(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x[:, size:]
        norms = x.double().norm(dim=-1)
        shares = [space.share(x).double() for space in spaces]
        stacked = torch.stack(shares, -1) if shares else norms.new_zeros(*norms.shape, 0)
        return norms.cpu(), stacked.cpu()

    def readout(final: Tensor, read: dict[Site, Any], _: list[Tensor]) -> tuple[Any, ...]:
        own = final[:, size:]
        if reference is None:
            scores, made = untouched(model, own, ids)
        else:
            scores, made = score(model, own, ids, reference), None
        kl = torch.zeros_like(scores.nll) if scores.kl is None else scores.kl
        norms, shares = (torch.stack(each, 1) for each in zip(*(read[site] for site in sites), strict=True))
        return scores.nll.double().mean(1).cpu(), kl.double().mean(1).cpu(), norms, shares, made

    with ExitStack() as stack:
        # `watch` is last, so it sees attention after all edits
        for look in (*parts.attention, watch):
            stack.enter_context(attending(model, look))
        nll, kl, norms, shares, made = trace(
            model, text, parts.edits, dict.fromkeys(sites, sizes), readout=readout
        )
    given = torch.stack([received[layer] for layer in range(model.layers)], 1)
    return EditEffect(nll, kl, given[..., size:], given[..., :size].sum(-1), norms, shares), made
