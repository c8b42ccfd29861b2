"""Find the attention sinks of a model, with the attention and norms of every position."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int, Shaped
from numpy.typing import NDArray
from torch import Tensor

from spectral_sinks.data.pixels import Pixels
from spectral_sinks.data.texts import Windows
from spectral_sinks.errors import InputError, SpectralWarning, renamed_argument
from spectral_sinks.measure.attention.by_position import PositionAttention, opened
from spectral_sinks.measure.attention.received import EPSILON
from spectral_sinks.measure.residual.massive import (
    Residuals,
    attention_and_residuals,
    massive_table,
    repeated_windows,
    usual_levels,
)
from spectral_sinks.measure.residual.matrix_spectrum import by_convention
from spectral_sinks.measure.results import Result
from spectral_sinks.measure.sinks.dark_share import as_json
from spectral_sinks.measure.sinks.rule import RULE, eligible, marked, places_of
from spectral_sinks.measure.sinks.sink import SHOWN, Sink, counted_sinks, measure_sinks, sink_rows
from spectral_sinks.models.attention_sdpa import TOKENS
from spectral_sinks.models.language import LanguageModel
from spectral_sinks.spectra.spectrum import Spectrum
from spectral_sinks.spectra.subspace import random_subspaces
from spectral_sinks.stats import Estimate


@dataclass(frozen=True, eq=False, repr=False)
class Sinks(Result):
    """The sinks that `find_sinks` found, with the attention and residuals that they were found from."""

    model: str
    epsilon: float
    conventions: tuple[str, ...]
    """The conventions under which dark shares were measured; the first decides which sinks are dark."""
    sinks: tuple[Sink, ...]
    """The sinks, the one that receives the most attention first."""
    members: Bool[NDArray[np.bool_], "windows tokens"]
    """The tokens that belong to these sinks."""
    attention: PositionAttention
    residuals: Residuals
    massive: pd.DataFrame
    """Massive activations and tokens of high norm, as from `massive_activations`."""
    levels: Float[NDArray[np.float64], "2 sites"]
    """Median norm of usual tokens at each site, and their robust spread."""
    sink_rate: Estimate
    """Sink^eps of position 0."""
    sink_rate_of_seen: Estimate
    """Sink^eps of position 0 where the mean is over only the queries that can see it (sliding windows)."""
    total_mass: Estimate
    """Attention to all sinks together, mean over queries, heads and layers."""
    uniform_total_mass: float
    """The value of `total_mass` under uniform attention."""
    high_norm_mass: Estimate
    """Attention to all tokens of high norm together, whether or not they are sinks. A token counts in a layer
    if the residual that the layer reads has high norm."""
    uniform_high_norm_mass: float
    """The value of `high_norm_mass` under uniform attention."""
    high_norm_share: float
    """Share of (text, layer, position) with high norm."""
    to_sink_logit: Estimate
    """Attention that goes to a learned logit without a value."""
    repeated: int
    """Number of windows in which one token fills at least half of the positions."""

    listed: ClassVar[tuple[str, ...]] = SHOWN

    @property
    def headline(self) -> str:
        """How many sinks there are, and in how many windows of which model."""
        return f"{counted_sinks(self.sinks)} of {self.model} in {len(self.attention.windows)} windows"

    @property
    def convention(self) -> str:
        """The convention that decides which sinks are dark."""
        return self.conventions[0]

    @property
    def length(self) -> int:
        """T, the number of tokens read in each window."""
        return self.attention.length

    @property
    def roles(self) -> tuple[tuple[str, ...], ...] | None:
        """The role of each token that was read; None for windows that are not chats."""
        windows = self.attention.windows
        return windows.roles if isinstance(windows, Windows) else None

    @property
    def positions(self) -> tuple[int, ...]:
        """The positions among the sinks."""
        return tuple(sorted(sink.position for sink in self.sinks if sink.position is not None))

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The token ids of the sinks that are tied to a token and not to a position."""
        elsewhere = self.members.copy()
        elsewhere[:, list(self.positions)] = False
        return tuple(np.unique(self.attention.ids[elsewhere]).tolist())

    @property
    def dispersed(self) -> bool:
        """Whether windows repeat one token and attention goes to tokens of high norm that are not sinks.

        Where one token repeats, all of its occurrences may look like a first token. Then no position stands
        out, and Sink^eps is low although attention does nothing else. The threshold is [ours]: the mass on
        tokens of high norm is more than twice the mass on sinks.
        """
        return self.repeated > 0 and self.high_norm_mass.value > 2 * self.total_mass.value

    @property
    def onset_layer(self) -> int | None:
        """Onset layer of the largest sink; None if there is no sink."""
        return self.sinks[0].onset_layer if self.sinks else None

    @property
    def table(self) -> pd.DataFrame:
        """The attention by document, layer and head, as in `by_head`."""
        return self.by_head()

    def mask(self, ids: Int[Tensor, "batch tokens"]) -> Bool[Tensor, "batch tokens"]:
        """Mark the sinks in other token ids: the listed positions, and every occurrence of the listed tokens.

        No model is run. A mask by the norm of the residual is made by `sink_mask`, from a `SinkRule`.
        """
        return marked(ids, self.positions, self.token_ids)

    def channels(self) -> pd.DataFrame:
        """Return the channels in which tokens of high norm have their largest activation, one row each.

        The columns are `channel`; the number of `documents` and of (token, site) pairs, `tokens`; the
        `first` and `last` layer at whose exit it is the largest (-1: the embedding); the largest `activation`
        and its ratio to the median activation, `median_ratio`; and whether it is `massive` by the published
        rule (Sun et al. 2024). The channel of most pairs comes first.
        """
        found = self.massive.groupby("dimension").agg(
            documents=("document", "nunique"),
            tokens=("document", "size"),
            first=("layer", "min"),
            last=("layer", "max"),
            activation=("activation", "max"),
            median_ratio=("median_ratio", "max"),
            massive=("massive", "any"),
        )
        found = found.rename_axis("channel").reset_index()
        return found.sort_values(["tokens", "channel"], ascending=[False, True], ignore_index=True)

    def summary(self) -> pd.DataFrame:
        """Return one row per sink, the most attended first: the fields of `Sink`, each estimate with its
        range.

        The columns `dark_share`, `other_dark_share` and `dark` are under the first convention. Those of
        another are named as in `dark_share_folded`. The table is empty if there is no sink.
        """
        return sink_rows(self.sinks, self.conventions)

    def by_head(self) -> pd.DataFrame:
        """Return the attention by `document`, `layer` and `head`.

        The columns are `mass` (to all sinks together, mean over queries), `first` (to position 0), and
        `to_sink_logit`.
        """
        mass = self.attention.by_document(self.attention.mass(self.members[:, None]))
        rest = self.attention.by_document(self.attention.to_sink_logit)
        owners = np.unique(self.attention.windows.document)
        index = pd.MultiIndex.from_product([owners, *map(range, mass.shape[1:])])
        first = self.attention.by_document(self.attention.alpha[..., 0])
        columns = {"mass": mass, "first": first, "to_sink_logit": rest}
        table = pd.DataFrame({name: values.ravel() for name, values in columns.items()}, index)
        return table.rename_axis(["document", "layer", "head"]).reset_index()

    def rates(self) -> pd.DataFrame:
        """Return Sink^eps_k by `position`: its `mean` over documents, with an interval `low` to `high`."""
        rates = self.attention.rate(self.epsilon).T
        rows = [Estimate.of(row[~np.isnan(row)]) for row in rates]
        table = pd.DataFrame(
            [(row.value, row.low, row.high) for row in rows], columns=["mean", "low", "high"]
        )
        return table.rename_axis("position").reset_index()

    def by_role(self) -> pd.DataFrame:
        """Return the attention that the tokens of each role receive, in windows of chats; one row per role.

        The rows are in the order of `share`. Intervals are over documents. The columns are:

        - `role`: the role of a message, or "template" for the tokens that the chat template writes;
        - `documents`, `tokens`, `sink_tokens`: the documents with this role, its tokens, and those of them
          that belong to sinks;
        - `attention`, `attention_low`, `attention_high`: attention received (alpha_k) by a token of the role,
          mean over tokens, heads and layers, in the documents with this role;
        - `share`, `share_low`, `share_high`: share of all attention received that goes to the role, mean over
          all documents; the shares of all roles add up to 1;
        - `uniform_share`: the value of `share` under uniform attention;
        - `sink_share`, `sink_share_low`, `sink_share_high`: the part of `share` that goes to sinks.

        Raises InputError for windows that are not chats.
        """
        if (roles := self.roles) is None:
            raise InputError("these windows have no roles: cut chats with ss.cut(chats, model, chat=True)")
        attention = self.attention
        names = np.full(attention.ids.shape, "", dtype=object)
        for row, said in zip(names, roles, strict=True):
            row[: len(said)] = said
        # Mean over heads and layers, and the share of each token in the attention of its window
        alpha = attention.alpha.mean((1, 2))
        total = np.nan_to_num(attention.total.astype(np.float64)).sum((1, 2))
        share = total / total.sum(1, keepdims=True)
        rows: list[dict[str, Any]] = []
        for role in dict.fromkeys(name for said in roles for name in said):
            member = names == role
            count = member.sum(1)
            received = np.where(member, alpha, 0.0).sum(1) / np.where(count, count, np.nan)
            by_document = attention.by_document(received)
            present = ~np.isnan(by_document)
            rows.append(
                {
                    "role": role,
                    "documents": int(present.sum()),
                    "tokens": int(count.sum()),
                    "sink_tokens": int((member & self.members).sum()),
                    **Estimate.of(by_document[present]).columns("attention"),
                    **Estimate.of(attention.by_document((share * member).sum(1))).columns("share"),
                    "uniform_share": float(attention.by_document(attention.uniform(member[:, None])).mean()),
                    **Estimate.of(attention.by_document((share * (member & self.members)).sum(1))).columns(
                        "sink_share"
                    ),
                }
            )
        return pd.DataFrame(rows).sort_values("share", ascending=False, ignore_index=True)

    def norms(self) -> pd.DataFrame:
        """Return the norm by `layer` (-1: the embedding) and `position`.

        The column `norm_ratio` is in units of the median norm of usual tokens.
        """
        ratio = self.attention.by_document(self.residuals.norm / self.levels[0, :, None]).mean(0)
        index = pd.MultiIndex.from_product([range(-1, ratio.shape[0] - 1), range(ratio.shape[1])])
        table = pd.DataFrame({"norm_ratio": ratio.ravel()}, index)
        return table.rename_axis(["layer", "position"]).reset_index()

    def record(self) -> dict[str, Any]:
        """Return everything except the tables and arrays, as a dictionary that JSON can hold."""
        published = self.massive[self.massive["massive"]]
        return {
            "model": self.model,
            "epsilon": self.epsilon,
            "convention": self.convention,
            "conventions": list(self.conventions),
            "tokens_per_window": self.length,
            "windows": len(self.attention.windows),
            **as_json("sink_rate", self.sink_rate),
            **as_json("sink_rate_of_seen", self.sink_rate_of_seen),
            "sink_rate_by_position": self.attention.rate(self.epsilon).mean(0).tolist(),
            "sinks": [sink.record() for sink in self.sinks],
            "onset_layer": self.onset_layer,
            **as_json("total_sink_mass", self.total_mass),
            **as_json("high_norm_mass", self.high_norm_mass),
            "uniform_total_sink_mass": self.uniform_total_mass,
            "uniform_high_norm_mass": self.uniform_high_norm_mass,
            "high_norm_share": self.high_norm_share,
            "massive_documents": int(published["document"].nunique()),
            "dispersal": self.dispersed,
            "repeated_windows": self.repeated,
            **as_json("to_sink_logit", self.to_sink_logit),
            "rule": RULE,
            **({} if self.roles is None else {"roles": self.by_role().to_dict("records")}),
        }


@renamed_argument("tokens", "length")
def find_sinks(
    model: LanguageModel,
    windows: Windows,
    spectrum: Spectrum | Sequence[Spectrum],
    *,
    length: int = TOKENS,
    epsilon: float = EPSILON,
    draws: int = 20,
    batch_size: int | None = None,
) -> Sinks:
    """Find the attention sinks of a language model in the first `length` tokens of each window.

    The rule is the entry `rule` of `Sinks.record`. A `SpectralWarning` is issued where windows repeat one
    token.

    Args:
        model: a language model.
        windows: the text.
        spectrum: the spectrum whose dark tail is tested; or several of one matrix, as from `read_spectra`, of
            which the first decides. Their dark shares are measured in the same passes.
        length: T, the number of tokens read in each window; 64 by default.
        epsilon: attention received above which a head has a sink; 0.3 by default.
        draws: number of random subspaces that the dark tail is compared with; with 0, the sinks have a dark
            share, and it is not said whether they are dark.
        batch_size: windows in a pass.

    Raises:
        InputError: as `attention_by_position` does, for a spectrum of another width, for several spectra that
            differ in more than their convention, for an epsilon outside 0 to 1, and for more random subspaces
            than fit into memory, or fewer than none.

    """
    if not 0 <= epsilon < 1:
        raise InputError(f"epsilon {epsilon}: attention received lies between 0 and 1")
    spectra = by_convention(model, spectrum)
    read = opened(model, windows, length)
    if isinstance(read, Pixels):
        raise InputError("sinks of images are found by kind of token: vision_sinks(model, pixels)")
    darks = {name: each.dark() for name, each in spectra.items()}
    # One set of passes gives the attention, the norms and the dark shares of all positions
    # The tokens that can be listed are few, so that random subspaces cost little there
    able = eligible(np.stack(read.rows), read.document) if model.causal else None
    randoms = random_subspaces(model.d, next(iter(darks.values())).rank, draws)
    attention, residuals = attention_and_residuals(model, read, batch_size, darks, able, randoms)
    levels = usual_levels(model, attention, residuals, batch_size)
    high = residuals.high(levels)
    # Site l is what layer l reads; the last exit is read by no layer
    reads = high[:, :-1]
    # Which tokens are sinks, and which of the rest they are compared with
    places = places_of(attention, epsilon)
    members = np.any([np.zeros_like(high[:, 0]), *(place.member for place in places)], axis=0)
    others = (attention.ids >= 0) & ~members
    sinks = measure_sinks(
        model, attention, residuals, high, spectra, places, others, epsilon, draws, batch_size
    )

    def measured(values: Shaped[NDArray[np.generic], "windows layers heads"]) -> Estimate:
        return Estimate.of(attention.by_document(values.mean((1, 2))))

    def by_document(values: Shaped[NDArray[np.generic], "windows"]) -> float:
        return float(attention.by_document(values).mean())

    found = Sinks(
        model=model.name,
        epsilon=epsilon,
        conventions=tuple(spectra),
        sinks=tuple(sinks),
        members=members,
        attention=attention,
        residuals=residuals,
        massive=massive_table(attention, residuals, levels),
        levels=levels,
        sink_rate=Estimate.of(attention.rate(epsilon)[:, 0]),
        sink_rate_of_seen=measured(attention.alpha_seen[..., 0] > epsilon),
        total_mass=measured(attention.mass(members[:, None])),
        high_norm_mass=measured(attention.mass(reads)),
        uniform_total_mass=by_document(attention.uniform(members[:, None]).mean(-1)),
        uniform_high_norm_mass=by_document(attention.uniform(reads).mean(-1)),
        high_norm_share=by_document(reads.mean(1).sum(-1) / attention.lengths),
        to_sink_logit=measured(attention.to_sink_logit),
        repeated=int(repeated_windows(read).sum()),
    )
    if found.repeated:
        over = (
            f"dispersal: {found.high_norm_share:.0%} of the tokens have high norm and receive "
            f"{found.high_norm_mass.value:.0%} of the attention together, so a low sink rate does not mean "
            "that there are no sinks"
            if found.dispersed
            else "their sink rate says little about other texts"
        )
        warnings.warn(
            f"{found.repeated} of {len(attention.windows)} windows repeat one token; {over}",
            SpectralWarning,
            stacklevel=2,
        )
    return found
