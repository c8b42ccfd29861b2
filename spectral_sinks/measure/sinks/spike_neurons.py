"""Which neurons and heads write the spike: the large residual of the sink that later layers attend to."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from spectral_sinks.data.texts import Windows
from spectral_sinks.errors import InputError
from spectral_sinks.interventions.silencing import silenced
from spectral_sinks.interventions.sites import Site
from spectral_sinks.interventions.tracing import trace
from spectral_sinks.measure.attention.received import EPSILON
from spectral_sinks.measure.memory import batches
from spectral_sinks.measure.nll.scoring import predicted, score
from spectral_sinks.measure.results import Result
from spectral_sinks.measure.sinks.neuron_contributions import contributions
from spectral_sinks.models.experts import SHARED, mixture_of
from spectral_sinks.models.language import LanguageModel
from spectral_sinks.models.layout import has
from spectral_sinks.models.masked_lm import masked_ids
from spectral_sinks.models.weights import mlp_weights
from spectral_sinks.spectra.edits import EditFunction
from spectral_sinks.stats import Estimate, document_means, rank_correlation

PAIRS = 3
"""Singular pairs of the down projection that are shown [ours]."""

MEASURED = ("nll", "mass_above", "norm_ratio")
"""What is measured with neurons silent."""


@dataclass(frozen=True, eq=False, repr=False)
class SpikeWriters(Result):
    """The layer, the neurons and the heads that write the carrier of a sink, and passes without the neurons.

    The carrier is the mean residual of the sink that the layer with the strongest attention to it reads.
    """

    model: str
    position: int
    """The position of the sink."""
    strongest: int
    """The layer that gives the sink the most attention, the first layer aside."""
    layer: int
    """The onset layer: the one below whose MLP adds most along the carrier."""
    cosine: float
    """Cosine of what that MLP writes at the sink with the carrier."""
    layers: pd.DataFrame
    """One row per layer: the norm of what the MLP writes at the sink (`written_first`) and at other tokens
    (`written_others`); what MLP and attention add along the carrier (`along_carrier`,
    `attention_along_carrier`, NaN in a layer without them)."""
    neurons: pd.DataFrame
    """One row per neuron of the onset layer's MLP, the one that writes most first: `layer`, `neuron`; at the
    sink, its mean `activation` and its `contribution` along what the MLP writes there, which add up to the
    norm of that (but for a bias); at other tokens, `contribution_others` and the size of what it writes,
    `size_others`. `predicted` is what the weights alone say: the length of what the neuron writes for the
    input of length 1 that excites it most; `predicted_rank` is its rank, from 1. In a mixture of experts, an
    activation counts times the weight of the token's routing (0 at a token of another expert), neurons are
    numbered through all experts, and `expert` says to which one a neuron belongs (-1 for the shared expert).
    """
    heads: pd.DataFrame
    """One row per head below the layer with the strongest sink: what it writes along the carrier at the sink
    and, in the mean, at other tokens, before a norm after attention. Empty where heads cannot be told
    apart."""
    pairs: pd.DataFrame
    """The leading singular pairs of the down projection, in a mixture that of the expert whose neuron writes
    most: `value`, `share` of its energy, `cosine` of the written direction with the carrier (magnitude), the
    `neuron` of the largest part of the other side, that part (`loading`, share of 1), and the neuron's
    measured `rank`."""
    table: pd.DataFrame
    """One row per document and set of silent neurons: `count`, `kind` (largest at the sink, largest at other
    tokens, or random), `draw`, `nll`, `delta_nll`, the attention to the sink in the layers above the onset
    (`mass_above`) and its norm over the median of the others at the onset's exit (`norm_ratio`). Count 0 is
    the untouched model."""

    def silent(self) -> pd.DataFrame:
        """Return the means over documents by set of silent neurons.

        `low` and `high` are the interval of `delta_nll`.
        """
        rows: list[dict[str, Any]] = []
        for (count, kind, draw), part in self.table.groupby(["count", "kind", "draw"], sort=False):
            cost = Estimate.of(part["delta_nll"])
            row = {"count": count, "kind": kind, "draw": draw, "delta_nll": cost.value, "low": cost.low}
            rows.append(row | {"high": cost.high} | part[["mass_above", "norm_ratio"]].mean().to_dict())
        return pd.DataFrame(rows)

    def summary(self) -> pd.DataFrame:
        """Return one row per number of silent neurons, those that write most, beside as many random ones.

        The columns are `count`, the `share` of the spike that they write, `delta_nll`, `mass_above` and
        `norm_ratio`, each with `_low` and `_high` over documents and `_least` and `_most` over random sets.
        """
        total = self.neurons["contribution"].sum()
        rows: list[dict[str, Any]] = []
        for count in sorted(set(self.table["count"])):
            here = self.table[self.table["count"] == count]
            own = here[here["kind"].isin(["", self._kind])]
            drawn = here[here["kind"] == "random"].groupby("draw").mean(numeric_only=True)
            row: dict[str, Any] = {"count": count}
            row["share"] = float(self.neurons["contribution"].head(count).sum() / total)
            for name in ("delta_nll", "mass_above", "norm_ratio"):
                row |= Estimate.of(own[name], drawn[name] if count else None).all_columns(name)
            rows.append(row)
        return pd.DataFrame(rows)

    @property
    def _kind(self) -> str:
        return f"largest at position {self.position}"

    @property
    def agreement(self) -> dict[str, float]:
        """How well the weights alone predict the measured ranking.

        `rank_correlation` is Spearman's over all neurons; `top_ten` is the number of the ten neurons that
        write most among the ten predicted ones, and `chance` what random neurons would give.
        """
        top = self.neurons.head(10)
        return {
            "rank_correlation": rank_correlation(self.neurons["contribution"], self.neurons["predicted"]),
            "top_ten": int((top["predicted_rank"] <= 10).sum()),
            "chance": len(top) * min(10, len(self.neurons)) / len(self.neurons),
        }

    def record(self) -> dict[str, Any]:
        """Return the layer, its ten neurons that write most, the pairs and the summary, as JSON can hold."""
        return {
            "model": self.model,
            "position": self.position,
            "strongest_layer": self.strongest,
            "layer": self.layer,
            "cosine": self.cosine,
            "neurons": self.neurons.head(10).to_dict("records"),
            "heads": self.heads.head(10).to_dict("records"),
            "pairs": self.pairs.to_dict("records"),
            "agreement": self.agreement,
            "silent": self.summary().to_dict("records"),
        }


def spike_writers(
    model: LanguageModel,
    windows: Windows,
    *,
    position: int = 0,
    layer: int | None = None,
    counts: Sequence[int] = (1, 3, 10),
    draws: int = 20,
    batch_size: int | None = None,
) -> SpikeWriters:
    """Find the MLP neurons that write the spike of a sink, and measure what is left when they are silent.

    The onset layer is the one, below the layer with the strongest sink, whose MLP adds most along the
    residual of the sink that this layer reads. A neuron's contribution is its activation times its output
    weights, with the gain and the scale of a norm after the MLP, along what the MLP writes at the sink.
    Neurons are silenced at all tokens, and compared with as many neurons that write most at other tokens and
    with random ones. In a mixture, the random ones are of those experts that the sink passes, and the router
    is left as it is.

    The prediction from the weights alone ranks neurons by the length of their output weights times the
    largest response to an input of length 1: of a gated neuron, `(|g| |u| + |g . u|) / 2` for its gate and up
    rows; otherwise the length of its row.

    Args:
        model: a language model whose weights are in this process.
        windows: the text.
        position: the position of the sink.
        layer: the onset layer; by default it is found as above.
        counts: the numbers of neurons that are silenced.
        draws: the random sets of each size.
        batch_size: windows in a pass.

    Raises:
        InputError: if no head gives the position more than 0.3 of its attention; if no MLP writes along the
            carrier; for experts whose matrices are not known; for a position, a layer or counts that the
            model or the windows do not have; and for a model on a server.

    Sources: Sun et al. 2024 (massive activations); Jiang et al. 2025 (register neurons of image encoders).

    """
    if model.remote is not None:
        raise InputError(f"{model.name} is on a server, and neurons are silenced by hooks: load it here")
    shortest = min(windows.lengths)
    if not 0 <= position < shortest:
        raise InputError(f"position {position}: the windows have {shortest} tokens, 0 to {shortest - 1}")
    last = max(model.attention_layers, default=0)
    if last < 1 or (layer is not None and not 0 <= layer < last):
        named = "" if layer is None else f"layer {layer}: "
        raise InputError(
            f"{named}the onset layer lies below another layer of softmax attention, and the last of "
            f"{model.name} is {last}"
        )
    flow = _flow(model, windows, position, batch_size)
    strongest = 1 + int(flow.mass[1:].mean(1).argmax())
    if not flow.mass.max() > EPSILON:
        raise InputError(
            f"no sink at position {position} of {model.name}: its strongest head gives it "
            f"{flow.mass.max():.3f} of the attention; give its position (find_sinks)"
        )
    carrier = torch.nn.functional.normalize(flow.residual[strongest - 1], dim=0)
    layers = flow.layers(carrier)
    below = layers["along_carrier"].iloc[:strongest]
    if layer is None:
        if not below.max() > 0:
            raise InputError(
                f"no MLP of {model.name} below layer {strongest} writes along the carrier of position "
                f"{position}: the spike has another source; name a layer to look at it nevertheless"
            )
        layer = int(below.idxmax())
    written = flow.mlp[layer]
    neurons = contributions(model, windows, position, layer, written, batch_size)
    most = len(neurons) if mixture_of(model, layer) is None else int((neurons["activation"] != 0).sum())
    if wrong := [count for count in counts if not 1 <= count <= most]:
        has = f"has {most}" if most == len(neurons) else f"has {most} that act at position {position}"
        raise InputError(f"{wrong[0]} silent neurons: layer {layer} {has}")
    pairs = _pairs(model, layer, carrier, neurons)
    heads = _heads(model, windows, position, carrier, strongest, batch_size)
    table = _silent(model, windows, position, layer, neurons, counts, draws, batch_size)
    cosine = float(torch.nn.functional.cosine_similarity(written, carrier, dim=0))
    return SpikeWriters(model.name, position, strongest, layer, cosine, layers, neurons, heads, pairs, table)


@dataclass(frozen=True, eq=False)
class _Flow:
    """Means over windows of what the untouched model does at the sink."""

    residual: Float[Tensor, "layers d"]
    """The residual at each exit."""
    mlp: Float[Tensor, "layers d"]
    """What each MLP writes; NaN in a layer without one."""
    attention: Float[Tensor, "layers d"]
    norms: Float[Tensor, "layers two"]
    """Norm of what each MLP writes at the sink and at other tokens."""
    mass: Float[NDArray[np.float64], "layers heads"]

    def layers(self, carrier: Float[Tensor, "d"]) -> pd.DataFrame:
        return pd.DataFrame(
            {
                "layer": range(len(self.mlp)),
                "written_first": self.norms[:, 0].numpy(),
                "written_others": self.norms[:, 1].numpy(),
                "along_carrier": (self.mlp @ carrier).numpy(),
                "attention_along_carrier": (self.attention @ carrier).numpy(),
            }
        )


def _flow(model: LanguageModel, windows: Windows, position: int, batch_size: int | None) -> _Flow:
    inside = [model.module.get_submodule(f"{model.layout.layers}.{layer}") for layer in range(model.layers)]
    lacking = model.layout.traits.lacking
    mlps = [Site("mlp", layer) for layer, block in enumerate(inside) if has(block, model.layout.mlp)]
    attentions = [Site("attention", layer) for layer in model.attention_layers if "attention" not in lacking]
    exits = [Site("exit", layer) for layer in range(model.layers)]
    sums = {site: torch.zeros(model.d, dtype=torch.float64) for site in (*mlps, *attentions, *exits)}
    norms = torch.full((model.layers, 2), torch.nan, dtype=torch.float64)
    norms[[site.layer for site in mlps]] = 0
    masses: list[Tensor] = []

    for _, ids in batches(model, windows, batch_size):
        # OPT and Llama 4 return the outputs of an MLP one token after the other
        def at_position(x: Tensor, ids: Tensor = ids) -> Tensor:
            return x.view(*ids.shape, -1)[:, position].double().sum(0).cpu()

        def with_sizes(x: Tensor, ids: Tensor = ids) -> tuple[Tensor, Tensor]:
            return at_position(x, ids), x.view(*ids.shape, -1).double().norm(dim=-1).cpu()

        read, mass = trace(
            model,
            ids.to(model.device),
            {},
            dict.fromkeys(sums, at_position) | dict.fromkeys(mlps, with_sizes),
            readout=lambda final, read, weights: (read, torch.stack(weights, 1).double().cpu()),
            attention=_to(position, model.causal),
        )
        masses.append(mass)
        for site in (*attentions, *exits):
            sums[site] += read[site]
        for site in mlps:
            at, size = read[site]
            sums[site] += at
            others = (size.sum(1) - size[:, position]) / (size.shape[1] - 1)
            norms[site.layer] += torch.stack([size[:, position].sum(), others.sum()])
    count = len(windows)

    def of(sites: list[Site]) -> Tensor:
        found = torch.full((model.layers, model.d), torch.nan, dtype=torch.float64)
        for site in sites:
            found[site.layer] = sums[site] / count
        return found

    mass = np.zeros((model.layers, model.heads))
    mass[list(model.attention_layers)] = torch.cat(masses).mean(0).numpy()
    return _Flow(of(exits), of(mlps), of(attentions), norms / count, mass)


def _to(position: int, causal: bool) -> EditFunction:
    """Return a function of attention maps: the attention that a position receives, mean over queries."""
    start = position if causal else 0
    return lambda maps: maps[..., start:, position].mean(-1)


def _pairs(
    model: LanguageModel, layer: int, carrier: Float[Tensor, "d"], neurons: pd.DataFrame
) -> pd.DataFrame:
    """Return the leading singular pairs of the down projection, in a mixture that of the expert that writes
    most.
    """
    mixture = mixture_of(model, layer)
    top = SHARED if mixture is None else int(neurons["expert"].iloc[0])
    downs = (w for w in mlp_weights(model, layer) if w.part == "down" and w.unit == top)
    down = next(downs).folded().double().cpu()
    start = 0 if mixture is None else mixture.routed if top == SHARED else top * mixture.width
    u, s, vh = torch.linalg.svd(down, full_matrices=False)
    rank = {neuron: place for place, neuron in enumerate(neurons["neuron"], start=1)}
    rows: list[dict[str, Any]] = []
    for index in range(min(PAIRS, len(s))):
        row = int(u[:, index].abs().argmax())
        neuron = start + row
        rows.append(
            {
                "pair": index + 1,
                "value": float(s[index]),
                "share": float(s[index] ** 2 / s.square().sum()),
                "cosine": float((vh[index] @ carrier).abs()),
                "neuron": neuron,
                "loading": float(u[row, index] ** 2),
                "rank": rank[neuron],
            }
        )
    return pd.DataFrame(rows)


def _heads(
    model: LanguageModel,
    windows: Windows,
    position: int,
    carrier: Float[Tensor, "d"],
    strongest: int,
    batch_size: int | None,
) -> pd.DataFrame:
    """Return what each head below a layer writes along the carrier."""
    columns = ["layer", "head", "along_carrier", "along_carrier_others"]
    if "head" in model.layout.traits.lacking or "heads" in model.layout.traits.lacking:
        return pd.DataFrame(columns=columns)
    sums: dict[Site, Tensor] = {}

    def recorder(site: Site) -> EditFunction:
        def record(x: Tensor) -> Tensor:
            along = x.detach().double().cpu() @ carrier
            others = (along.sum(1) - along[:, position]) / (along.shape[1] - 1)
            sums[site] = sums.get(site, 0) + torch.stack([along[:, position].sum(), others.sum()])
            return x

        return record

    for layer in (layer for layer in model.attention_layers if layer < strongest):
        edits = {site: recorder(site) for site in (Site("head", layer, head) for head in range(model.heads))}
        for _, ids in batches(model, windows, batch_size):
            trace(model, ids.to(model.device), edits, readout=lambda *_: None)
    rows = [(site.layer, site.head, *(part / len(windows)).tolist()) for site, part in sums.items()]
    found = pd.DataFrame(rows, columns=columns)
    return found.sort_values("along_carrier", ascending=False, ignore_index=True)


def _silent(
    model: LanguageModel,
    windows: Windows,
    position: int,
    layer: int,
    neurons: pd.DataFrame,
    counts: Sequence[int],
    draws: int,
    batch_size: int | None,
) -> pd.DataFrame:
    """Return the table of documents with sets of neurons silent."""
    rng = np.random.default_rng(0)
    # in a mixture, among the neurons of those experts that the sink passes
    passed = neurons.loc[neurons["activation"] != 0, "neuron"].sort_values().to_numpy()
    pool: Any = len(neurons) if mixture_of(model, layer) is None else passed
    busiest = neurons.sort_values("size_others", ascending=False)["neuron"]
    sets: dict[tuple[int, str, str], list[int]] = {(0, "", ""): []}
    for count in counts:
        sets[count, f"largest at position {position}", ""] = neurons["neuron"].head(count).tolist()
        sets[count, "largest at other tokens", ""] = busiest.head(count).tolist()
        for draw in range(draws):
            sets[count, "random", str(draw)] = rng.choice(pool, count, replace=False).tolist()
    found: list[pd.DataFrame] = []
    for (count, kind, draw), chosen in sets.items():
        documents, values = _measured(model, windows, position, layer, chosen, batch_size)
        part = pd.DataFrame(values, columns=list(MEASURED)).assign(document=documents)
        found.append(part.assign(count=count, kind=kind, draw=draw))
        part_nll = found[0].set_index("document")["nll"]
        found[-1]["delta_nll"] = found[-1]["nll"] - found[-1]["document"].map(part_nll)
    return pd.concat(found, ignore_index=True)


def _measured(
    model: LanguageModel,
    windows: Windows,
    position: int,
    layer: int,
    neurons: Sequence[int],
    batch_size: int | None,
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return NLL, the sink above and its norm, by document, with some neurons of a layer silent."""
    site = Site("exit", layer)
    above = [place for place, at in enumerate(model.attention_layers) if at > layer]
    owners: list[int] = []
    tokens: list[int] = []
    parts: list[Tensor] = []
    with silenced(model, neurons=[(layer, neuron) for neuron in neurons]):
        for places, ids in batches(model, windows, batch_size):
            ids = ids.to(model.device)

            def readout(
                final: Tensor, read: dict[Site, Tensor], weights: list[Tensor], ids: Tensor = ids
            ) -> Tensor:
                nll = score(model, final, ids).nll.double().mean(1)
                mass = torch.stack([weights[place] for place in above], 1).double().mean((1, 2))
                norms = read[site].double().norm(dim=-1)
                rest = torch.arange(norms.shape[1], device=norms.device) != position
                ratio = norms[:, position] / norms[:, rest].median(1).values
                return torch.stack([x.cpu() for x in (nll, mass, ratio)], 1)

            read = ids if model.causal else masked_ids(model, ids)
            attention = _to(position, model.causal)
            parts.append(trace(model, read, {}, [site], readout=readout, attention=attention))
            owners += [windows.document[place] for place in places]
            tokens += [predicted(model, ids.shape[1])] * len(places)
    return document_means(torch.cat(parts).numpy(), owners, tokens)
