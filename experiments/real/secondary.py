"""One sink or several: do other tokens draw attention, and do they carry what position 0 carries?

Question: which tokens besides position 0 are sinks, over which layers? Where their norm is high, is their
residual that of position 0 (direction and spectral profile)? What happens to them when the first token is
masked, and to the first when they are?
Design: `find_sinks` lists the tokens on 48 documents. Their occurrences among the first 32 positions are
measured in the layer that gives the token the most attention: attention relative to uniform, norm over the
median, cosine of the mean residual with that of position 0, and correlation of the energy by band with that
of position 0. Then the key of position 0, and the keys of all listed tokens, are masked in every layer.
Control: the tokens that occur most often there and are not listed; as many of them are masked instead.
"""

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import pandas as pd
import torch
from real_study import TOKENS, RealStudy, residuals

import spectral_sinks as ss

DOCUMENTS, LISTED, OPENING = 48, 3, 32
"""Documents; tokens that are followed, the most attended first; and positions whose occurrences count."""

HIGH = 2.0
"""Norm over the median above which an occurrence has high norm."""


def relative(study: RealStudy, windows: ss.Windows, edits: Sequence[Any] = ()) -> np.ndarray:
    """Return the attention to each position over that under uniform attention, `[windows, layers, T]`.

    Mean over heads; the query at the position itself is left out.
    """
    later = torch.arange(TOKENS)[:, None] > torch.arange(TOKENS)
    even = (later / torch.arange(1, TOKENS + 1)[:, None]).sum(0)
    found: list[torch.Tensor] = []
    order: list[int] = []
    for places, ids in windows.batches(16):
        seen: dict[int, torch.Tensor] = {}

        def look(call: ss.attention.AttentionCall, seen: dict[int, torch.Tensor] = seen) -> None:
            weights = call.weights(slice(0, TOKENS))[..., :TOKENS]
            seen[call.layer] = (weights.mean(1) * later).sum(1).cpu() / even

        with ExitStack() as stack:
            for edit in (*edits, look):
                stack.enter_context(ss.attending(study.model, edit))
            ss.trace(study.model, ids, {}, readout=lambda final, *_: final.mean())
        found.append(torch.stack([seen[layer] for layer in sorted(seen)], 1))
        order += places
    return torch.cat(found).double().numpy()[np.argsort(order)]


def profile(study: RealStudy, x: torch.Tensor) -> np.ndarray:
    """Return the mean share of the energy in each band of the folded spectrum."""
    return study.unembedding.shares(x.float()).double().mean(0).numpy()


def run(study: RealStudy) -> ss.experiments.Finding:
    model = study.model
    texts = ss.documents(limit=DOCUMENTS)
    windows = ss.cut(texts, model, length=TOKENS, per_document=1, bos="auto")
    windows = ss.Windows.of_ids([row for row in windows.rows if len(row) == TOKENS], model)
    ids = torch.stack(list(windows.rows)).numpy()
    sinks = ss.find_sinks(model, windows, study.unembedding, draws=study.draws)
    summary = sinks.summary()
    study.save(summary, "secondary_sinks")
    listed = [sink for sink in sinks.sinks if sink.position is None][:LISTED]
    tokens = [token_id(model, ids, str(sink.token)) for sink in listed]
    # the most frequent tokens of the opening that are no sinks
    counts = Counter(ids[:, 1:OPENING].ravel().tolist())
    others = [token for token, _ in counts.most_common(LISTED + 20) if token not in tokens]
    others = others[: max(LISTED, len(tokens))]
    untouched = relative(study, windows)
    # a control token is looked at in the layer of the strongest listed one
    layer = listed[0].layer if listed else study.strongest
    chosen = [(token, "sink", sink.layer) for token, sink in zip(tokens, listed, strict=True)]
    chosen += [(token, "control", layer) for token in others]
    rows = [describe(study, windows, ids, untouched, *one) for one in chosen]
    table = pd.DataFrame(rows)
    study.save(table, "secondary_tokens")
    masked = masks(study, windows, ids, untouched, tokens, others) if tokens else pd.DataFrame()
    if len(masked):
        study.save(masked, "secondary_masked")
    return ss.experiments.Finding(answers(table, masked), verdict=verdict(table, masked))


def token_id(model: ss.LanguageModel, ids: np.ndarray, text: str) -> int:
    """Return the most frequent id that decodes to a text."""
    counts = Counter(ids.ravel().tolist())
    return next(token for token, _ in counts.most_common() if model.tokenizer.decode([token]) == text)


def describe(
    study: RealStudy,
    windows: ss.Windows,
    ids: np.ndarray,
    untouched: np.ndarray,
    token: int,
    kind: str,
    layer: int,
) -> dict[str, Any]:
    """Measure the occurrences of a token in one layer."""
    site = ss.Site("exit", layer - 1) if layer else ss.Site("embedding")
    x = residuals(study.model, windows, site)
    member = ids == token
    member[:, [0, *range(OPENING, TOKENS)]] = False
    norms = x.norm(dim=-1)
    ratio = (norms / norms[:, 1:].median(1, keepdim=True).values).numpy()
    high = member & (ratio > HIGH)
    carrier = x[:, 0].mean(0)
    whole = profile(study, x[:, 0])
    found = {
        "token": study.model.tokenizer.decode([token]),
        "kind": kind,
        "layer": layer,
        "occurrences": int(member.sum()),
        "high_norm": int(high.sum()),
        "norm_ratio": float(np.median(ratio[member])),
    }
    holding = member.any(1)
    attention = [untouched[w, layer, member[w]].mean() for w in np.flatnonzero(holding)]
    low, high_end = ss.stats.mean_interval(attention)
    found |= {"attention": float(np.mean(attention)), "low": low, "high": high_end}
    for name, chosen in (("all", member), ("high", high)):
        if chosen.any():
            mean = x[torch.from_numpy(chosen)].mean(0)
            bands = profile(study, x[torch.from_numpy(chosen)])
            found |= {
                f"cosine_{name}": float(torch.cosine_similarity(mean, carrier, 0)),
                f"profile_{name}": float(np.corrcoef(bands, whole)[0, 1]),
                f"dark_{name}": float(bands[-1]),
            }
    return found | {"dark_first": float(whole[-1])}


def masks(
    study: RealStudy,
    windows: ss.Windows,
    ids: np.ndarray,
    untouched: np.ndarray,
    tokens: list[int],
    others: list[int],
) -> pd.DataFrame:
    """Return attention over uniform to position 0 and to the listed tokens, under each mask, by layer."""
    edits = {
        "nothing": None,
        "position 0": [ss.attention.MaskKey(0)],
        "listed tokens": [ss.attention.MaskKey(token=token) for token in tokens],
        "control tokens": [ss.attention.MaskKey(token=token) for token in others],
    }
    member = np.isin(ids, tokens)
    member[:, [0, *range(OPENING, TOKENS)]] = False
    rows: list[dict[str, Any]] = []
    for name, edit in edits.items():
        seen = untouched if edit is None else relative(study, windows, edit)
        for layer in range(study.model.layers):
            first = seen[:, layer, 0]
            rest = [seen[w, layer, member[w]].mean() for w in np.flatnonzero(member.any(1))]
            row: dict[str, Any] = {"masked": name, "layer": layer}
            for kind, values in (("first", first), ("listed", rest)):
                low, high = ss.stats.mean_interval(values)
                row |= {kind: float(np.mean(values)), f"{kind}_low": low, f"{kind}_high": high}
            rows.append(row)
    return pd.DataFrame(rows)


def answers(table: pd.DataFrame, masked: pd.DataFrame) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for row in table.to_dict("records"):
        found.append(
            ss.experiments.answer(
                f"{row['token']!r} ({row['kind']}), layer {row['layer']}: attention over uniform",
                row["attention"],
                f"{row['high_norm']} of {row['occurrences']} occurrences with high norm; cosine with "
                f"position 0 {row['cosine_all']:.3f}, of those {row.get('cosine_high', np.nan):.3f}; "
                f"correlation of profiles {row['profile_all']:.3f}; dark share {row['dark_all']:.3f}, "
                f"position 0 {row['dark_first']:.3f}",
                (row["low"], row["high"]),
            )
        )
    if len(masked):
        by = masked.groupby("masked")[["first", "listed"]].mean()
        found += [
            ss.experiments.answer(
                f"{name} masked: attention over uniform to the listed tokens, mean over layers",
                float(by.loc[name, "listed"]),
                f"position 0: {by.loc[name, 'first']:.2f}",
            )
            for name in by.index
        ]
    return found


def verdict(table: pd.DataFrame, masked: pd.DataFrame) -> str:
    listed, control = (table[table["kind"] == kind] for kind in ("sink", "control"))
    if not len(listed):
        return "does not hold here: no token other than position 0 is a sink by the rule"
    strong = listed[listed.get("cosine_high", pd.Series(dtype=float)).fillna(0) > 0.9]
    word = "holds" if len(strong) == len(listed) else "holds partly" if len(strong) else "does not hold here"
    by = masked.groupby("masked")["listed"].mean()
    return (
        f"{word}: {', '.join(repr(token) for token in listed['token'])} are sinks; where their norm is high "
        f"{len(strong)} of {len(listed)} have a cosine above 0.9 with position 0 (control tokens, all "
        f"occurrences, at most {control['cosine_all'].max():.2f}); with position 0 masked they draw "
        f"{by['position 0']:.2f} times uniform attention where it was {by['nothing']:.2f}"
    )
