"""Clean directions: how much of a difference of means is the sink, and what does that part do?

Question: a steering vector is the difference of the mean residuals of two kinds of text. What share of it is
the sink, and is the rest as good a vector at a lower cost?
Design: the kinds are the articles with many and with few digits, from documents after those of the study:
the first 400 characters of each. Such texts differ in their number of tokens, so the sink token has another
weight in each mean. The vector is taken at the exit that the layer with the strongest sink reads, over all
tokens; over the tokens that `sink_mask` leaves; and cleaned by `clean`. Each is added to all tokens, at the
same norm: once and twice the median norm of tokens. What it should do is measured by the probability of
tokens with a digit.
Control: random directions of the same norm.
"""

from typing import Any

import numpy as np
import pandas as pd
import torch

import spectral_sinks as ss

CHARACTERS, TEXTS = 400, 64
DOSES = (1.0, 2.0)
NAMES = {"nll": "NLL", "mass_above": "attention to position 0 above", "digits": "probability of digits"}


def kinds(study: ss.experiments.Study) -> tuple[list[torch.Tensor], np.ndarray]:
    """Return the token ids of texts that the study does not use, and which of them have many digits."""
    count = len(set(study.windows.document))
    texts = [text[:CHARACTERS] for text in ss.documents(limit=count + TEXTS)[count:]]
    digits = np.array([sum(c.isdigit() for c in text) for text in texts])
    opens = "always" if study.windows.opens_with_bos else "auto"
    cut = [ss.cut([text], study.model, per_document=1, bos=opens) for text in texts]
    return [one.rows[0] for one in cut], digits > np.median(digits)


def means(
    study: ss.experiments.Study, rows: list[torch.Tensor], many: np.ndarray, rule: ss.SinkRule
) -> dict[str, torch.Tensor]:
    """Return the difference of means over all tokens, and over those that are not masked."""
    found: dict[str, list[list[torch.Tensor]]] = {"raw": [[], []], "masked": [[], []]}
    for row, kind in zip(rows, many, strict=True):
        x = ss.trace(
            study.model,
            row[None].to(study.model.device),
            {},
            [rule.site],
            readout=lambda final, read, weights: read[rule.site][0].double().cpu(),
        )
        mask = ss.sink_mask(study.model, row[None], rule)[0]
        found["raw"][int(kind)].append(x)
        found["masked"][int(kind)].append(x[~mask])
    return {name: torch.cat(b).mean(0) - torch.cat(a).mean(0) for name, (a, b) in found.items()}


def median_norm(study: ss.experiments.Study, site: ss.Site) -> float:
    """Return the median norm of all tokens at a site."""
    norms = [
        ss.trace(
            study.model,
            ids.to(study.model.device),
            {},
            [site],
            readout=lambda final, read, weights: read[site].double().norm(dim=-1).cpu(),
        )
        for ids in torch.stack(study.windows.rows).split(16)
    ]
    return float(torch.cat(norms).median())


def steered(
    study: ss.experiments.Study, site: ss.Site, vector: torch.Tensor, digits: torch.Tensor
) -> dict[str, Any]:
    """Return NLL by document, the sink in the layers above, and the probability of digits."""
    model = study.model
    first = site.layer + 1 if site.kind == "exit" else 0
    nll: list[torch.Tensor] = []
    mass: list[torch.Tensor] = []
    mentioned: list[torch.Tensor] = []
    for ids in torch.stack(study.windows.rows).split(8):
        ids = ids.to(model.device)

        def readout(
            final: torch.Tensor, read: Any, weights: list[torch.Tensor], ids: torch.Tensor = ids
        ) -> tuple[torch.Tensor, ...]:
            logits = model.unembed(final[:, :-1]).log_softmax(-1)
            loss = -logits.gather(-1, ids[:, 1:, None])[..., 0].double().mean(1)
            named = logits[..., digits].exp().sum(-1).double().mean(1)
            return loss, torch.stack(weights[first:], 1).double().mean((1, 2)), named

        parts = ss.trace(
            model,
            ids,
            {site: lambda x: x + vector.to(x)},
            readout=readout,
            attention=lambda maps: maps[..., 0].mean(-1),
        )
        for into, part in zip((nll, mass, mentioned), parts, strict=True):
            into.append(part.cpu())
    named = {"nll": nll, "mass_above": mass, "digits": mentioned}
    return {name: torch.cat(values).numpy() for name, values in named.items()}


def digit_tokens(model: ss.LanguageModel) -> torch.Tensor:
    """Return the ids of the tokens that hold a digit."""
    words = [model.tokenizer.decode([token]) for token in range(len(model.tokenizer))]
    return torch.tensor([token for token, word in enumerate(words) if any(c.isdigit() for c in word)])


def run(study: ss.experiments.Study) -> ss.experiments.Finding:
    rule = study.sink_rule
    rows, many = kinds(study)
    vectors = means(study, rows, many, rule)
    cleaned = {name: ss.clean(vector, rule) for name, vector in vectors.items()}
    shares = pd.concat([one.table.assign(vector=name) for name, one in cleaned.items()], ignore_index=True)
    study.save(shares, "steering_shares")
    vectors |= {f"{name}, cleaned": one.vector for name, one in cleaned.items()}
    usual = median_norm(study, rule.site)
    digits = digit_tokens(study.model)
    base = steered(study, rule.site, torch.zeros(study.model.d), digits)
    given = {(name, ""): vector for name, vector in vectors.items()}
    for draw in range(study.draws):
        generator = torch.Generator().manual_seed(draw)
        given["random", str(draw)] = torch.randn(study.model.d, generator=generator)
    found: list[dict[str, Any]] = []
    for dose in DOSES:
        for (name, draw), vector in given.items():
            one = steered(study, rule.site, dose * usual * vector / vector.norm(), digits)
            row: dict[str, Any] = {"vector": name, "draw": draw, "dose": dose}
            for column in base:
                delta = one[column] - base[column]
                low, high = ss.stats.mean_interval(delta)
                row |= {f"delta_{column}": delta.mean(), f"{column}_low": low, f"{column}_high": high}
            found.append(row)
    table = study.save(pd.DataFrame(found), "steering")
    return finding(shares, table, base)


def finding(shares: pd.DataFrame, table: pd.DataFrame, base: dict[str, np.ndarray]) -> ss.experiments.Finding:
    answers: list[dict[str, Any]] = []
    for row in shares.to_dict("records"):
        control = f"random direction {row['random']:.3f}, 95 % of draws up to {row['random_high']:.3f}"
        answers.append(
            ss.experiments.answer(f"{row['vector']} vector: share in {row['part']}", row["share"], control)
        )
    for row in table[table["draw"] == ""].to_dict("records"):
        drawn = table[(table["vector"] == "random") & (table["dose"] == row["dose"])]
        for column, name in NAMES.items():
            values = drawn[f"delta_{column}"]
            answers.append(
                ss.experiments.answer(
                    f"{row['vector']}, dose {row['dose']:g}: difference in {name}",
                    row[f"delta_{column}"],
                    f"random {values.min():+.3f} to {values.max():+.3f}; untouched {base[column].mean():.3f}",
                    (row[f"{column}_low"], row[f"{column}_high"]),
                )
            )
    removed = shares[(shares["vector"] == "raw") & (shares["part"] == "removed")].iloc[0]
    at = table[(table["draw"] == "") & (table["dose"] == DOSES[0])].set_index("vector")
    raw, clean = at.loc["raw"], at.loc["raw, cleaned"]
    better = clean["delta_nll"] < raw["delta_nll"] and clean["delta_digits"] >= raw["delta_digits"]
    word = "holds" if better and removed["share"] > removed["random_high"] else "does not hold here"
    return ss.experiments.Finding(
        answers,
        verdict=f"{word}: {removed['share']:.0%} of the raw vector is the sink's (random "
        f"{removed['random']:.0%}); at equal norm the clean one costs {clean['delta_nll']:+.3f} nats where "
        f"the raw one costs {raw['delta_nll']:+.3f}, and changes the probability of digits by "
        f"{clean['delta_digits']:+.4f} instead of {raw['delta_digits']:+.4f}",
    )
