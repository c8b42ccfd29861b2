"""Several: is there one sink, or is there another behind it, and how many tokens are dark?

Question: if the first sink is removed, does a second one appear at once? How many tokens are as dark as BOS?
How many first tokens does a stream of text need?
Design: the sink is edited in four ways. The key of position 0 is masked; its attention weight is dropped
without renormalisation; and the dark band is removed at the exit below the strongest sink, from the first
token alone and from all tokens. Among the first 64 tokens, the measures are the position other than 0 that
receives most attention, the heads that give any such position more than 0.3 (among positions with half of the
queries, as in `find_sinks`), and where the attention goes instead. For streaming, the first 0 to 8 tokens and
the most recent quarter of the window are kept. The NLL is taken from the middle of the window on, where
predictions see only the kept tokens of the first quarter.
Control: each edit at random other positions, or with random subspaces of the rank of the band; shares in
random subspaces for the dark shares; as many other kept positions; and position 0 kept with random others
instead of the tokens that follow it.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import pandas as pd
import torch

import spectral_sinks as ss

TOKENS, EPSILON, BATCH = 64, 0.3, 16
ELSEWHERE, DRAWS, KEPT = 10, 5, (0, 1, 2, 4, 8)
"""Number of random other positions per edit; of random sets of kept positions per count; and those counts."""

WHERE = ("first", "itself", "previous", "2 to 8 back", "further back", "none")
"""Targets of a query's attention. "first" is position 0, at any distance."""

SECOND, OBSERVED = "sinks elsewhere by the rule of find_sinks", "observed"

Cell = tuple[Sequence[Any], dict[ss.Site, Any]]
"""Attention edits, and edits at sites."""


def measure(
    model: ss.LanguageModel, windows: ss.Windows, spectrum: ss.Spectrum, below: int, draws: int = 20
) -> dict[str, pd.DataFrame]:
    """Measure all tables of this experiment for a causal model.

    A model trained without position 0 as a key is measured inside `with ss.attending(model, MaskKey(0)):`.

    Args:
        model: a causal language model.
        windows: windows of at least 40 tokens.
        spectrum: the spectrum whose dark band is used.
        below: the layer at whose exit darkness is measured.
        draws: number of random subspaces.

    Returns:
        The tables, by the suffix of their file names.

    Raises:
        InputError: for another kind of model, and for shorter windows.

    """
    if not model.causal or min(len(row) for row in windows.rows) < 40:
        raise ss.InputError("this experiment needs a causal model and windows of at least 40 tokens")
    moved, positions = intervened(model, windows, spectrum, below, draws)
    tokens, dark, curve = dark_tokens(model, windows, spectrum, below, draws)
    found = {"": moved, "_positions": positions, "_tokens": tokens, "_dark": dark, "_curve": curve}
    return found | {"_streaming": streaming(model, windows)}


@ss.remotely
def observe(model: ss.LanguageModel, windows: ss.Windows, cell: Cell = ((), {})) -> dict[str, np.ndarray]:
    """Run one pass over the windows with the edits of a cell, and return arrays by window.

    `nll` and `late` are in nats per token, where `late` covers the second half of the window. `alpha`,
    `[layers, heads, T]`, is the attention received. `uniform`, `[T]`, is the same under uniform attention
    over the visible keys. `where` is the attention to each of `WHERE`, mean over queries, heads and layers.
    """
    # the kinds of target of each query, [kinds, T, T]
    shortest = min(len(row) for row in windows.rows)
    size, late = min(TOKENS, shortest), 2 * (shortest // 4)
    query, key = torch.arange(size)[:, None], torch.arange(size)
    back, queries = query - key, size - key
    others = (key > 0) & (query > 0)
    kinds = [(key == 0) & (query > 0), others & (back == 0), others & (back == 1)]
    kinds = torch.stack([*kinds, others & (back > 1) & (back < 9), others & (back > 8)]).float()
    parts: list[dict[str, torch.Tensor]] = []
    order: list[int] = []
    for places, ids in windows.batches(BATCH):
        seen: dict[int, tuple[torch.Tensor, ...]] = {}

        def look(call: ss.attention.AttentionCall, seen: dict[int, tuple[torch.Tensor, ...]] = seen) -> None:
            weights = call.weights(slice(0, size))[..., :size].cpu()
            visible = call.visible(slice(0, size))[..., :size].cpu().float().expand_as(weights)
            even = (visible / visible.sum(-1, keepdim=True)).sum(2) / queries
            where = torch.einsum("bhqk,cqk->bc", weights, kinds) / (size - 1) / weights.shape[1]
            seen[call.layer] = (weights.sum(2) / queries, even.mean(1), where)

        def readout(final: torch.Tensor, *_: Any, ids: torch.Tensor = ids) -> torch.Tensor:
            logits = model.unembed(final[:, :-1]).float().transpose(1, 2)
            return torch.nn.functional.cross_entropy(logits, ids[:, 1:].to(final.device), reduction="none")

        with ExitStack() as stack:
            for edit in (*cell[0], look):
                stack.enter_context(ss.attending(model, edit))
            nll = ss.trace(model, ids.to(model.device), cell[1], readout=readout).cpu()
        alpha, even, where = (torch.stack(part, 1) for part in zip(*seen.values(), strict=True))
        where = where.mean(1)
        where = torch.cat([where, 1 - where.sum(1, keepdim=True)], 1)
        means = {"nll": nll.mean(1), "late": nll[:, late:].mean(1)}
        parts.append(means | {"alpha": alpha, "uniform": even.mean(1), "where": where})
        order += places
    back_in_order = np.argsort(order)
    return {name: torch.cat([p[name] for p in parts]).double().numpy()[back_in_order] for name in parts[0]}


def intervened(
    model: ss.LanguageModel, windows: ss.Windows, spectrum: ss.Spectrum, below: int, draws: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Measure the effect of each edit of the sink.

    Args:
        model: a causal language model.
        windows: the text.
        spectrum: the spectrum whose dark band is removed.
        below: the layer at whose exit it is removed.
        draws: number of random subspaces.

    Returns:
        Two tables. The first has the mean of each `quantity` by edit (`intervention`) and `draw` ("observed"
        or a control); its `position` is the one other than 0 that receives most attention. The second has the
        attention by position.

    """
    # the edits and their controls, as cells
    site, dark = ss.Site("exit", below), ss.remove(spectrum.dark())
    base = observe(model, windows)
    half = base["alpha"].shape[-1] // 2
    drawn = np.random.default_rng(0).choice(np.arange(1, half + 1), min(ELSEWHERE, half), replace=False)
    cells: dict[tuple[str, str], Cell] = {("untouched", OBSERVED): ((), {})}
    for place in (0, *sorted(drawn.tolist())):
        draw = f"at {place}" if place else OBSERVED
        cells["key masked", draw] = ([ss.attention.MaskKey(place)], {})
        cells["weight dropped", draw] = ([ss.attention.MaskKey(place, renormalise=False)], {})
        cells["dark removed, BOS alone", draw] = ((), {site: dark.at(ss.At(place))})
    cells["dark removed, all tokens", OBSERVED] = ((), {site: dark})
    for seed in range(draws):
        cells["dark removed, all tokens", f"random {seed}"] = ((), {site: ss.rnd(model.d, dark.rank, seed)})
    # one pass for each cell
    rows, positions = [], []
    for (name, draw), cell in cells.items():
        seen = observe(model, windows, cell) if name != "untouched" else base
        mean, elsewhere = seen["alpha"].mean((1, 2)), seen["alpha"][..., 1 : half + 1] > EPSILON
        best = 1 + int(mean.mean(0)[1 : half + 1].argmax())
        values = {
            "NLL difference": seen["nll"] - base["nll"],
            "attention to position 0": mean[:, 0],
            "heads above 0.3 at position 0": (seen["alpha"][..., 0] > EPSILON).sum((1, 2)),
            "heads above 0.3 elsewhere": elsewhere.any(-1).sum((1, 2)),
            "texts with a head above 0.3 elsewhere": elsewhere.any((1, 2, 3)),
            SECOND: np.full(len(mean), sinks_elsewhere(windows, np.asarray(elsewhere.any((1, 2))))),
            "strongest elsewhere: attention": mean[:, best],
            "strongest elsewhere: over uniform": mean[:, best] / seen["uniform"][:, best],
            "strongest elsewhere: over untouched": mean[:, best] / base["alpha"].mean((1, 2))[:, best],
        }
        values |= dict(zip([f"to {kind}" for kind in WHERE], seen["where"].T, strict=True))
        change = (seen["where"] - base["where"]).T
        values |= dict(zip([f"more to {kind}" for kind in WHERE], change, strict=True))
        for quantity, sample in values.items():
            row = {"intervention": name, "draw": draw, "quantity": quantity, "position": best}
            rows.append(row | interval(windows, sample))
        if draw == OBSERVED:
            share = by_document(windows, np.asarray((seen["alpha"] > EPSILON).any((1, 2)))) > 0
            columns = {"attention": mean.mean(0), "uniform": seen["uniform"].mean(0)}
            columns |= {"share_of_documents": share.mean(0), "intervention": name}
            positions.append(pd.DataFrame(columns).rename_axis("position").reset_index().iloc[: half + 1])
    return pd.DataFrame(rows), pd.concat(positions, ignore_index=True)


def sinks_elsewhere(windows: ss.Windows, drawn: np.ndarray) -> int:
    """Count the positions and tokens that are sinks by the rule of `find_sinks`.

    `drawn`, `[windows, positions]`, marks where a head gives more than 0.3, from position 1 on.
    """
    ids = np.stack([row[1 : drawn.shape[1] + 1].numpy() for row in windows.rows])
    at = (by_document(windows, drawn) > 0).mean(0) >= 0.5
    found = int(at.sum())
    for token in np.unique(ids[drawn & ~at]):
        held = (ids == token) & ~at
        holding, drawing = (by_document(windows, x.any(1)) > 0 for x in (held, held & drawn))
        found += drawing.sum() >= max(3, len(holding) / 4, holding.sum() / 2)
    return found


def dark_tokens(
    model: ss.LanguageModel, windows: ss.Windows, spectrum: ss.Spectrum, below: int, draws: int
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Measure the dark tokens at an exit, without the first token.

    Args:
        model: a causal language model.
        windows: the text.
        spectrum: the spectrum whose dark band is used.
        below: the layer of the exit.
        draws: number of random subspaces.

    Returns:
        Three tables: dark tokens by token id, their share among all tokens, and the distribution of the dark
        share.

    """
    # the share of each token in the dark band and in random subspaces, and its dark norm relative to BOS
    dark, site = spectrum.dark(), ss.Site("exit", below)
    spaces = [dark, *(ss.random_subspace(model.d, dark.rank, seed) for seed in range(draws))]
    tables: list[pd.DataFrame] = []
    for places, ids in windows.batches(BATCH):

        def readout(_: Any, read: dict[ss.Site, torch.Tensor], __: Any) -> np.ndarray:
            x = read[site]
            columns = [*(space.share(x) for space in spaces), x.norm(dim=-1)]
            return torch.stack(columns, -1).double().cpu().numpy()

        x = ss.trace(model, ids.to(model.device), {}, [site], readout=readout)
        for place, row, values in zip(places, ids, x, strict=True):
            part = pd.DataFrame(values[1:, : len(spaces)]).add_prefix("share_")
            ratio = np.sqrt(values[:, 0] / values[0, 0]) * values[:, -1] / values[0, -1]
            part = part.assign(norm=ratio[1:], bos=values[0, 0], token=row[1:].numpy())
            tables.append(part.assign(document=windows.document[place]))
    # tokens that are as dark as BOS, darker than in any random subspace, or both
    table = pd.concat(tables, ignore_index=True)
    shares = table[[f"share_{k}" for k in range(len(spaces))]].to_numpy()
    likewise = shares > table["bos"].to_numpy()[:, None] / 2
    first = shares == shares.max(1, keepdims=True)
    table = table.assign(like_bos=likewise[:, 0], beyond_random=first[:, 0], loud=table["norm"] > 0.5)
    table = table.assign(both=table["like_bos"] & table["beyond_random"])
    rows = []
    for quantity, drawn in {
        "like_bos": likewise[:, 1:].mean(0),
        "beyond_random": first[:, 1:].mean(0),
        "both": (likewise & first)[:, 1:].mean(0),
        "loud": np.full(draws, np.nan),
    }.items():
        by = table.groupby("document")[quantity].mean()
        low, high = ss.stats.mean_interval(by)
        limits = {"random_low": drawn.min(), "random_high": drawn.max()}
        counts = {"tokens": int(table[quantity].sum()), "of": len(table)}
        rows.append({"quantity": quantity, "mean": by.mean(), "low": low, "high": high} | counts | limits)
    bos = float(table["bos"].mean())
    grid = np.append(np.arange(0, 0.9, 0.01), bos / 2)
    above = np.array([(shares > x).mean(0) for x in np.sort(grid)])
    curve = {"share": np.sort(grid), "dark": above[:, 0], "bos": bos}
    curve |= {"random_low": above[:, 1:].min(1), "random_high": above[:, 1:].max(1)}
    by = table.groupby("token")
    tokens = by[["like_bos", "beyond_random", "both"]].sum()
    tokens = tokens.assign(count=by.size(), dark_share=by["share_0"].mean(), texts=by["document"].nunique())
    tokens = tokens.reset_index().sort_values(["both", "count"], ascending=False)
    tokens["text"] = [text(model, token) for token in tokens["token"]]
    return tokens, pd.DataFrame(rows), pd.DataFrame(curve)


def streaming(model: ss.LanguageModel, windows: ss.Windows) -> pd.DataFrame:
    """Measure the NLL of late predictions when few tokens are kept, and what more kept tokens save.

    The NLL is above that of full attention, by `kept` and `which`. The kept tokens are the first ones, the
    "next" ones (those after position 0), others, or position 0 and others. "saved" is the NLL with one kept
    token minus the NLL with more. "saved beyond others" is the NLL with position 0 and others (mean over
    draws) minus the NLL with the first tokens. "saved by the next" is the NLL with none kept minus the NLL
    with the next tokens.
    """
    recent = min(len(row) for row in windows.rows) // 4
    base, generator = observe(model, windows)["late"], np.random.default_rng(0)
    others = np.arange(max(KEPT), recent)
    found: dict[tuple[int, str, int], np.ndarray] = {}
    for kept in KEPT:
        sets: dict[tuple[str, int], Any] = {("first", 0): kept}
        if kept:
            sets["next", 0] = range(1, kept + 1)
        for draw in range(DRAWS if kept else 0):
            chosen = generator.choice(others, min(kept, len(others)), replace=False).tolist()
            sets["others", draw] = chosen
            if kept > 1:
                sets["0 and others", draw] = [0, *chosen[1:]]
        for (which, draw), first in sets.items():
            seen = observe(model, windows, ([ss.attention.Streaming(first, recent)], {}))
            found[kept, which, draw] = seen["late"] - base
    rows = [
        {"kept": kept, "which": which, "draw": draw, "recent": recent} | interval(windows, values)
        for (kept, which, draw), values in found.items()
    ]
    for kept in KEPT[2:]:
        mixed = np.mean([found[kept, "0 and others", draw] for draw in range(DRAWS)], 0)
        first, after = found[kept, "first", 0], found[kept, "next", 0]
        for which, values in {
            "saved": found[1, "first", 0] - first,
            "saved beyond others": mixed - first,
            "saved by the next, without 0": found[0, "first", 0] - after,
        }.items():
            row = {"kept": kept, "which": which, "draw": 0, "recent": recent}
            rows.append(row | interval(windows, values))
    return pd.DataFrame(rows)


def by_document(windows: ss.Windows, values: np.ndarray) -> np.ndarray:
    """Return the mean over the windows of each document."""
    owners = np.asarray(windows.document)
    return np.stack([values[owners == owner].mean(0) for owner in np.unique(owners)])


def interval(windows: ss.Windows, values: np.ndarray) -> dict[str, float]:
    """Return the mean over documents and its 95 % interval."""
    sample = by_document(windows, values)
    low, high = ss.stats.mean_interval(sample)
    return {"mean": float(sample.mean()), "low": low, "high": high}


def text(model: ss.LanguageModel, token: int) -> str:
    """Return the text of a token as a Python literal, or its id if the model has no tokenizer."""
    return str(token) if model.tokenizer is None else repr(model.tokenizer.decode([token]))


def run(study: ss.experiments.Study) -> ss.experiments.Finding:
    model, u, below = study.model, study.unembedding, study.below_sink
    sinks = ss.find_sinks(model, study.windows, u, length=TOKENS, draws=study.draws).sinks
    tables = measure(model, study.windows, u, below, study.draws)
    for name, table in tables.items():
        dark = name in ("_tokens", "_dark", "_curve")
        study.save(table.assign(convention=u.convention) if dark else table, f"several{name}")
    moved, positions, stream = tables[""], tables["_positions"], tables["_streaming"]
    path = study.figure("several")
    ss.figures.several(moved, positions, tables["_dark"], tables["_curve"], stream, path)
    named = ", ".join(f"{sink.token or 'any token'} at {sink.position}" for sink in sinks) or "none"
    found = [ss.experiments.answer("sinks of the untouched model", len(sinks), named)]
    return ss.experiments.Finding(found + answers(tables, below), verdict=verdict(tables, len(sinks)))


def verdict(tables: dict[str, pd.DataFrame], sinks: int) -> str:
    """State whether the model has exactly one sink.

    It holds if there is one sink, no edit makes another one by the rule of `find_sinks`, and a stream of text
    gains nothing from more first tokens compared with BOS and as many other tokens.
    """
    moved, stream = tables[""], tables["_streaming"]
    rows = moved[(moved["quantity"] == SECOND) & (moved["draw"] == OBSERVED) & (moved["mean"] > 0)]
    second = rows[rows["intervention"] != "untouched"]["intervention"].tolist()
    more = stream[(stream["which"] == "saved beyond others") & (stream["low"] > 0)]["kept"].tolist()
    if sinks != 1:
        return f"does not hold here: {sinks} sinks in the untouched model"
    word = "does not hold here" if second else "holds partly" if more else "holds"
    said = f"a second one at once: {', '.join(second) or 'under no intervention'}"
    kept = ", ".join(map(str, more)) or "at no count"
    return f"{word}: one sink; {said}; more first tokens kept help beyond others: {kept}"


def answers(tables: dict[str, pd.DataFrame], below: int) -> list[dict[str, Any]]:
    found = []
    for (name, quantity), rows in tables[""].groupby(["intervention", "quantity"], sort=False):
        unchanged = name == "untouched" and quantity.startswith(("NLL", "strongest elsewhere: over unt"))
        if unchanged or quantity.startswith(("to ", "more to ", "strongest elsewhere: att")):
            continue
        row, drawn = rows[rows["draw"] == OBSERVED].iloc[0], rows[rows["draw"] != OBSERVED]["mean"]
        control = f"{len(drawn)} controls: {drawn.min():.4f} to {drawn.max():.4f}" if len(drawn) else ""
        at = f"position {row['position']}; " if quantity.startswith("strongest") else ""
        limits = (row["low"], row["high"])
        found.append(ss.experiments.answer(f"{name}: {quantity}", float(row["mean"]), at + control, limits))
    names = {
        "like_bos": "a dark share above half of BOS's",
        "beyond_random": "more in the dark than in any random subspace",
        "both": "both",
        "loud": "a dark norm above half of BOS's",
    }
    for row in tables["_dark"].to_dict("records"):
        control = f"{row['tokens']} of {row['of']}"
        if row["random_high"] == row["random_high"]:
            control += f"; the same of random subspaces: {row['random_low']:.4f} to {row['random_high']:.4f}"
        quantity = f"exit {below}: share of tokens with {names[row['quantity']]}"
        found.append(ss.experiments.answer(quantity, float(row["mean"]), control, (row["low"], row["high"])))
    stream = tables["_streaming"]
    for row in stream[~stream["which"].isin(["others", "0 and others"])].to_dict("records"):
        drawn = stream[(stream["kept"] == row["kept"]) & stream["which"].isin(["others", "0 and others"])]
        shown = [f"{w}: {m.min():+.4f} to {m.max():+.4f}" for w, m in drawn.groupby("which")["mean"]]
        which, what = ("next", "NLL difference") if row["which"] == "next" else ("first", row["which"])
        what = "NLL difference" if what == "first" else what
        name = f"streaming, {which} {row['kept']} and {row['recent']} recent: {what}"
        control = "; ".join(shown) if row["which"] == "first" else ""
        found.append(ss.experiments.answer(name, row["mean"], control, (row["low"], row["high"])))
    return found
