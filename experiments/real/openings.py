"""What opens a text: the sink and the NLL with and without BOS.

Question: is the sink the token or the position? Without BOS, what takes its place, and what does it cost?
Design: the same documents are cut with BOS and without it. `find_sinks` lists the sinks of each, with dark
shares under the folded convention, and the NLL is compared on the same tokens.
Control: the other opening; and the same documents with a random token of the text as their first token.
"""

from typing import Any

import numpy as np
import pandas as pd
import torch
from real_study import TOKENS, RealStudy

import spectral_sinks as ss


def openings(study: RealStudy) -> dict[str, ss.Windows]:
    """Return the windows of each opening; the text of all is the same."""
    model = study.model
    texts = ss.documents(limit=len(set(study.windows.document)))
    made = {
        "BOS": ss.cut(texts, model, length=TOKENS, per_document=1, bos="always"),
        "no BOS": ss.cut(texts, model, length=TOKENS, per_document=1, bos="never"),
    }
    rng = np.random.default_rng(0)
    rows = [row.clone() for row in made["no BOS"].rows]
    for row in rows:
        row[0] = row[int(rng.integers(1, len(row)))]
    made["no BOS, random first token"] = ss.Windows.of_ids(rows, model, made["no BOS"].document)
    return made


def nll(study: RealStudy, windows: ss.Windows, skipped: int) -> np.ndarray:
    """Return the NLL of each window after its first tokens."""
    values = [
        ss.nll.continuation_nll(study.model, ids[:, :skipped], ids[:, None, skipped:], rows=16)
        for _, ids in windows.batches(16)
    ]
    return torch.cat(values).double().numpy().ravel()


def run(study: RealStudy) -> ss.experiments.Finding:
    made, rows, sinks = openings(study), [], []
    answers: list[dict[str, Any]] = []
    for name, windows in made.items():
        # the same tokens are predicted: the text's own, from the second one on that all windows hold
        opened = name == "BOS"
        same = [row[opened:][: TOKENS - 1] for row in windows.rows]
        cut = [torch.cat([row[: int(opened)], part]) for row, part in zip(windows.rows, same, strict=True)]
        values = nll(study, ss.Windows.of_ids(cut, study.model, windows.document), 1 + opened)
        found = ss.find_sinks(study.model, windows, study.unembedding, draws=study.draws)
        rate = found.sink_rate
        rows += [
            {"opening": name, "document": document, "nll": value}
            for document, value in zip(windows.document, values, strict=True)
        ]
        sinks += [
            {"opening": name, "sink_rate": rate.value, **row} for row in found.summary().to_dict("records")
        ]
        strongest = found.sinks[0] if found.sinks else None
        said = (
            "no sink by the rule"
            if strongest is None
            else (
                f"strongest: position {strongest.position}, token {strongest.token!r}, layer "
                f"{strongest.layer}, attention {strongest.attention_mass.value:.3f}, dark share "
                f"{strongest.dark_share.value:.3f}"
            )
        )
        answers.append(
            ss.experiments.answer(f"{name}: Sink^0.3 of position 0", rate.value, said, (rate.low, rate.high))
        )
        answers.append(ss.experiments.answer(f"{name}: NLL of the text's tokens", values))
    table = pd.DataFrame(rows)
    study.save(table, "openings")
    study.save(pd.DataFrame(sinks), "openings_sinks")
    by = table.pivot(index="document", columns="opening", values="nll")
    worse = by["no BOS"] - by["BOS"]
    answers.append(ss.experiments.answer("NLL without BOS minus with BOS, same tokens", worse))
    rates = {name: row["value"] for name, row in zip(made, answers[::2], strict=False)}
    low, high = ss.stats.mean_interval(worse)
    kind = "the position" if rates["no BOS"] > rates["BOS"] / 2 else "the token"
    verdict = (
        f"holds: the sink is {kind} (Sink^0.3 {rates['BOS']:.3f} with BOS, {rates['no BOS']:.3f} without); "
        f"without BOS the NLL differs by {worse.mean():+.3f} [{low:+.3f}, {high:+.3f}] nats"
    )
    return ss.experiments.Finding(answers, verdict=verdict)
