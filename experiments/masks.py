"""Masks of sink tokens: do they mark in other texts what `find_sinks` sees there, and what do they change?

Question: does a rule that is learned on some texts mark the sinks of others, and how much do these few tokens
decide what a PCA or a k-means of residuals finds?
Design: the rule is learned on documents after those of the study, and compared with the sinks that
`find_sinks` lists in the study's texts. The batch is the residual that the layer with the strongest sink
reads. The variance is around the mean of the batch. k-means has two clusters and begins at the two farthest
of a few tokens (k-means++), five times.
Control: as many random tokens left out, with as many draws as the study has.
"""

from typing import Any

import numpy as np
import pandas as pd
import torch

import spectral_sinks as ss

SEEDS = 5


def residuals(study: ss.experiments.Study, site: ss.Site) -> torch.Tensor:
    """Return the residual of every token at a site, float64."""
    parts = [
        ss.trace(
            study.model,
            ids.to(study.model.device),
            {},
            [site],
            readout=lambda final, read, weights: read[site].double().cpu(),
        )
        for ids in torch.stack(study.windows.rows).split(16)
    ]
    return torch.cat(parts).flatten(0, 1)


def principal(x: torch.Tensor, carrier: torch.Tensor) -> dict[str, float]:
    """Return what the first component explains, its cosine with the carrier, and the effective rank."""
    values, vectors = torch.linalg.eigh(torch.cov(x.T))
    shares = values / values.sum()
    return {
        "first_component": float(shares[-1]),
        "cosine_with_carrier": float((vectors[:, -1] @ carrier).abs()),
        "effective_rank": float(1 / shares.square().sum()),
    }


def two_means(x: torch.Tensor, seed: int) -> torch.Tensor:
    """Return which tokens are in the smaller of two clusters."""
    generator = torch.Generator().manual_seed(seed)
    first = x[torch.randint(len(x), (1,), generator=generator)]
    distance = (x - first).square().sum(1)
    centres = torch.cat([first, x[torch.multinomial(distance, 1, generator=generator)]])
    member = torch.zeros(len(x), dtype=torch.long)
    for _ in range(100):
        nearest = torch.cdist(x, centres).argmin(1)
        if torch.equal(nearest, member) or len(nearest.unique()) < 2:
            break
        member = nearest
        centres = torch.stack([x[member == k].mean(0) for k in (0, 1)])
    return member == member.bincount(minlength=2).argmin()


def described(x: torch.Tensor, mask: torch.Tensor, carrier: torch.Tensor) -> dict[str, Any]:
    """Return what PCA and k-means find in some tokens, of which `mask` marks the sinks."""
    found: dict[str, Any] = principal(x, carrier)
    clusters = [two_means(x, seed) for seed in range(SEEDS)]
    found["smaller_cluster"] = float(np.mean([float(one.double().mean()) for one in clusters]))
    found["sinks_in_it"] = float(np.mean([float(mask[one].double().mean()) for one in clusters]))
    return found


def run(study: ss.experiments.Study) -> ss.experiments.Finding:
    rule = study.sink_rule
    held = ss.find_sinks(study.model, study.windows, study.unembedding, draws=0)
    agreement = ss.sinks.mask_agreement(study.model, held, rule).summary()
    study.save(agreement, "masks")
    study.save(rule.table, "masks_rule")
    # the batch, with the masked tokens, without them, and without as many random ones
    x = residuals(study, rule.site)
    ids = torch.stack(study.windows.rows)
    mask = ss.sink_mask(study.model, ids, rule).flatten()
    carrier = rule.carrier().double()
    energy = (x - x.mean(0)).square().sum(1)
    share = float(energy[mask].sum() / energy.sum())
    rows = [{"tokens": "all", "draw": "", **described(x, mask, carrier)}]
    rows.append({"tokens": "without sinks", "draw": "", **described(x[~mask], mask[~mask], carrier)})
    drawn: list[float] = []
    for draw in range(study.draws):
        generator = torch.Generator().manual_seed(draw)
        chosen = torch.zeros_like(mask)
        chosen[torch.randperm(len(mask), generator=generator)[: int(mask.sum())]] = True
        drawn.append(float(energy[chosen].sum() / energy.sum()))
        rows.append({"tokens": "random", "draw": str(draw), **described(x[~chosen], mask[~chosen], carrier)})
    table = study.save(pd.DataFrame(rows), "masks_residuals")
    return finding(agreement, table, share, drawn, mask, str(rule.site))


def finding(
    agreement: pd.DataFrame,
    table: pd.DataFrame,
    share: float,
    drawn: list[float],
    mask: torch.Tensor,
    site: str,
) -> ss.experiments.Finding:
    answers: list[dict[str, Any]] = []
    for row in agreement.to_dict("records"):
        for name in ("precision", "recall"):
            if row[name] == row[name]:
                answers.append(
                    ss.experiments.answer(
                        f"{name} of the mask by {row['by']}",
                        row[name],
                        f"{row['masked']} tokens masked, {row['seen']} listed by find_sinks",
                        (row[f"{name}_low"], row[f"{name}_high"]),
                    )
                )
    tokens = float(mask.double().mean())
    answers.append(ss.experiments.answer(f"{site}: share of tokens that are masked", tokens))
    answers.append(
        ss.experiments.answer(
            f"{site}: share of the variance that they hold",
            share,
            f"as many random tokens {min(drawn):.4f} to {max(drawn):.4f}",
        )
    )
    by = table[table["draw"] == ""].set_index("tokens")
    random = table[table["tokens"] == "random"]
    for column, name in (
        ("first_component", "variance that the first component explains"),
        ("cosine_with_carrier", "cosine of the first component with the carrier"),
        ("effective_rank", "effective rank"),
        ("smaller_cluster", "share of tokens in the smaller of two clusters"),
        ("sinks_in_it", "share of masked tokens in it"),
    ):
        for kind in ("all", "without sinks"):
            said = f"without random tokens {random[column].min():.3f} to {random[column].max():.3f}"
            answers.append(ss.experiments.answer(f"{kind}: {name}", float(by.loc[kind, column]), said))
    norm = agreement.set_index("by").loc["norm"]
    good = min(norm["precision"], norm["recall"]) > 0.9
    word = (
        "holds"
        if good and share > max(drawn)
        else "holds partly"
        if share > max(drawn)
        else "does not hold here"
    )
    return ss.experiments.Finding(
        answers,
        verdict=f"{word}: the mask by norm has precision {norm['precision']:.2f} and recall "
        f"{norm['recall']:.2f} on other texts; {tokens:.1%} of the tokens hold {share:.0%} of the variance",
    )
