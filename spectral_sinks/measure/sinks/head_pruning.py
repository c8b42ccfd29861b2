"""How many heads can be removed, and which first: those that attend to the sink, no-op heads, light heads."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

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
from spectral_sinks.measure.circuits.heads import head_use
from spectral_sinks.measure.memory import batches
from spectral_sinks.measure.nll.scoring import Sample, predicted, score
from spectral_sinks.measure.results import Result
from spectral_sinks.models.language import LanguageModel
from spectral_sinks.models.masked_lm import masked_ids
from spectral_sinks.models.weights import attention_weights
from spectral_sinks.stats import Estimate, document_means, largest_within

Order = Literal["attention", "no-op", "weights", "random"]
"""By what heads are removed: the attention that they give to the sink, their no-op score, or the norm of
their value and output matrices, smallest first; or at random."""

BUDGETS = (0.01, 0.05, 0.1)
"""Costs in nats within which heads are counted [ours]."""

STEPS = 12
"""Numbers of removed heads that are tried by default, at most [ours]."""


@dataclass(frozen=True, eq=False, repr=False)
class HeadRemoval(Result):
    """The NLL of a model with more and more heads removed, in several orders."""

    model: str
    position: int
    """The position of the sink."""
    heads: pd.DataFrame
    """One row per head: `attention` to the sink, `to_sink_logit` and `value_ratio`, as in `head_use`; the
    `no_op` score, attention times 1 - value ratio (0 where that is negative), plus the attention to a learned
    logit, which writes nothing; and `weight`, the norm of W_V W_O."""
    table: pd.DataFrame
    """One row per document, `order`, `draw` (of random orders) and number of `removed` heads: `nll` and
    `delta_nll`."""
    predict: int | None = None
    """Number of predictions of each window that were scored; None if all were."""

    def summary(self) -> pd.DataFrame:
        """Return one row per order and number of removed heads: `delta_nll`, with its range.

        The interval `_low` to `_high` is over documents. For random orders, the value is the mean over draws,
        and `_least` and `_most` are the range over draws.
        """
        rows: list[dict[str, Any]] = []
        for (order, removed), part in self.table.groupby(["order", "removed"], sort=False):
            by_document = part.groupby("document")["delta_nll"].mean()
            drawn = part.groupby("draw")["delta_nll"].mean() if order == "random" else None
            row = {"order": order, "removed": removed}
            rows.append(row | Estimate.of(by_document, drawn).all_columns("delta_nll"))
        return pd.DataFrame(rows)

    def within(self, budgets: Sequence[float] = BUDGETS) -> pd.DataFrame:
        """Return how many heads can go within each cost: the largest number tried whose mean cost is within.

        The columns are `order`, `budget`, `heads`, and `low` to `high` over bootstrap samples of documents.
        For random orders, `heads` is the mean over draws, and `least` and `most` are their range.
        """
        rows: list[dict[str, Any]] = []
        for order, part in self.table.groupby("order", sort=False):
            draws = [
                each.pivot(index="document", columns="removed", values="delta_nll")
                for _, each in part.groupby("draw")
            ]
            for budget in budgets:
                found = np.array([largest_within(each, each.columns, budget) for each in draws])
                row: dict[str, Any] = {"order": order, "budget": budget, "heads": found[:, 0].mean()}
                if order == "random":
                    row |= {"least": found[:, 0].min(), "most": found[:, 0].max()}
                else:
                    row |= {"low": found[0, 1], "high": found[0, 2]}
                rows.append(row)
        return pd.DataFrame(rows)

    def record(self) -> dict[str, Any]:
        """Return the heads that can go and the costs, as a dictionary that JSON can hold."""
        return {
            "model": self.model,
            "position": self.position,
            "heads": len(self.heads),
            **({} if self.predict is None else {"predict": self.predict}),
            "within": self.within().to_dict("records"),
            "costs": self.summary().to_dict("records"),
        }


def head_removal(
    model: LanguageModel,
    windows: Windows,
    *,
    position: int = 0,
    scored_on: Windows | None = None,
    orders: Sequence[Order] = get_args(Order),
    counts: Sequence[int] | None = None,
    draws: int = 20,
    predict: int | Sample | None = None,
    batch_size: int | None = None,
) -> HeadRemoval:
    """Remove heads in several orders, and measure the NLL against the number of removed heads.

    What W_O reads from a removed head is zero, at all tokens. "attention" removes the heads first that give
    the sink, or a learned logit (gpt-oss), most of their attention; "no-op" those that give most to a sink
    that writes little, by attention times 1 - value ratio, plus the attention to a learned logit; "weights"
    those with the smallest norm of W_V W_O; "random" is the control. A gate before W_O counts in the value
    ratio, and not in the norms, since it depends on the text. Layers without softmax attention have no heads.

    Args:
        model: a language model whose weights are in this process.
        windows: the text on which the NLL is measured.
        position: the position of the sink.
        scored_on: the text on which attention and value ratios are measured; by default `windows`.
        orders: the orders.
        counts: the numbers of removed heads; by default at most 12 from 1 to all, in even ratios.
        draws: the number of random orders.
        predict: number of predictions of each window that are scored, the same ones for all orders and
            counts, as in `evaluate_all`; by default all are. The intervals over documents contain what the
            sample adds.
        batch_size: windows in a pass.

    Raises:
        InputError: if no head gives the position, or a learned logit, more than 0.3 of its attention; for
            counts that the model does not have, and unknown orders; where heads cannot be told apart; for a
            sample of fewer than two predictions; and for a model on a server.

    Sources: Michel et al. 2019 (removal of heads); Fesser et al. 2026 (value ratio).

    """
    if model.remote is not None:
        raise InputError(f"{model.name} is on a server, and heads are silenced by hooks: load it here")
    chosen: Any = [orders] if isinstance(orders, str) else orders
    orders = list(dict.fromkeys(chosen))
    if unknown := [order for order in orders if order not in get_args(Order)]:
        raise InputError(f"order {unknown[0]!r}: choose from {', '.join(get_args(Order))}")
    total = len(model.attention_layers) * model.heads
    tried = np.unique(np.geomspace(1, total, STEPS).round().astype(int))
    steps: Sequence[int] = tried.tolist() if counts is None else list(dict.fromkeys(counts))
    if not steps or not orders or draws < 0 or (list(orders) == ["random"] and not draws):
        raise InputError(
            f"{len(steps)} numbers of heads, {len(orders)} orders and {draws} random draws: nothing would be "
            "removed; give at least one of each"
        )
    if wrong := [count for count in steps if not 1 <= count <= total]:
        raise InputError(f"{wrong[0]} heads: {model.name} has {total}")
    heads = _scores(model, windows if scored_on is None else scored_on, position, batch_size)
    if not (heads["attention"] + heads["to_sink_logit"]).max() > EPSILON:
        raise InputError(
            f"no sink at position {position} of {model.name}: its strongest head gives it "
            f"{heads['attention'].max():.3f} of the attention; give its position (find_sinks)"
        )
    sample = Sample.of(predict)
    before = _nll(model, windows, (), sample, batch_size)
    rows: list[pd.DataFrame] = []
    for order, draw, ranked in _ranked(heads, orders, draws):
        for count in steps:
            found = _nll(model, windows, ranked[:count], sample, batch_size)
            part = pd.DataFrame({"document": found.index, "nll": found, "delta_nll": found - before})
            rows.append(part.assign(order=order, draw=draw, removed=count))
    scored = None if sample is None else sample.count
    return HeadRemoval(model.name, position, heads, pd.concat(rows, ignore_index=True), scored)


def _scores(model: LanguageModel, windows: Windows, position: int, batch_size: int | None) -> pd.DataFrame:
    """Return the table of heads."""
    for layer in model.attention_layers:
        Site("head", layer, 0).check(model)
    use = head_use(model, windows, position, batch_size=batch_size)
    means = use.groupby(["layer", "head"])[["attention", "to_sink_logit", "value_ratio"]].mean().reset_index()
    weight = np.concatenate([_norms(model, layer) for layer in model.attention_layers])
    no_op = means["attention"] * (1 - means["value_ratio"]).clip(lower=0)
    return means.assign(no_op=no_op + means["to_sink_logit"], weight=weight)


def _norms(model: LanguageModel, layer: int) -> Float[NDArray[np.float64], "heads"]:
    """Return the Frobenius norm of W_V W_O of each head, with the gains of norms before and after."""
    weights = list(attention_weights(model, layer))
    values = [weight.folded().double() for weight in weights if weight.part == "v"]
    writes = [weight.folded().double() for weight in weights if weight.part == "o"]
    shared = len(writes) // len(values)
    return np.array([float((values[i // shared].T @ write).norm()) for i, write in enumerate(writes)])


def _ranked(
    heads: pd.DataFrame, orders: Sequence[Order], draws: int
) -> list[tuple[Order, int, list[tuple[int, int]]]]:
    """Return each order with its draw and the heads, the first to be removed first."""
    pairs: list[tuple[int, int]] = list(zip(heads["layer"].tolist(), heads["head"].tolist(), strict=True))
    keys = {
        "attention": -heads["attention"] - heads["to_sink_logit"],
        "no-op": -heads["no_op"],
        "weights": heads["weight"],
    }
    found: list[tuple[Order, int, list[tuple[int, int]]]] = []
    for order in orders:
        for draw in range(draws if order == "random" else 1):
            if order == "random":
                places = np.random.default_rng(draw).permutation(len(pairs))
            else:
                places = np.argsort(keys[order].to_numpy(), kind="stable")
            found.append((order, draw, [pairs[place] for place in places]))
    return found


def _nll(
    model: LanguageModel,
    windows: Windows,
    heads: Sequence[tuple[int, int]],
    sample: Sample | None,
    batch_size: int | None,
) -> pd.Series:
    """Return the NLL by document with some heads removed, over all predictions or a sample of them."""
    owners: list[int] = []
    tokens: list[int] = []
    parts: list[Tensor] = []
    with silenced(model, heads=heads):
        for places, ids in batches(model, windows, batch_size):
            ids = ids.to(model.device)
            every = predicted(model, ids.shape[1])
            chosen = None if sample is None else sample.drawn_each(places, every)

            def mean_nll(final: Tensor, *_: Any, ids: Tensor = ids, chosen: Tensor | None = chosen) -> Tensor:
                return score(model, final, ids, chosen=chosen).nll.double().mean(1).cpu()

            parts.append(trace(model, ids if model.causal else masked_ids(model, ids), {}, readout=mean_nll))
            owners += [windows.document[place] for place in places]
            tokens += [every] * len(places)
    documents, values = document_means(torch.cat(parts).numpy(), owners, tokens)
    return pd.Series(values, pd.Index(documents, name="document"))
