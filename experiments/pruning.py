"""Heads that can go: is a head that attends to the sink one that the model does not need?

Question: how many heads can be removed within a small cost, if those go first that attend to the sink, or
those whose sink writes nothing?
Design: heads are removed, most expendable first, by the attention that they give to position 0, by their
no-op score (attention times 1 - value ratio), and by the norm of W_V W_O, smallest first. Scores come from
documents after those of the study, costs from the study's texts, with 64 tokens in a window.
Control: random orders, as many as the study has draws.
"""

from typing import Any

import spectral_sinks as ss

BUDGETS = (0.01, 0.05, 0.1)


def run(study: ss.experiments.Study) -> ss.experiments.Finding:
    other = study.unseen(length=64)
    found = ss.sinks.head_removal(
        study.model, study.openings, scored_on=other, draws=study.draws, predict=study.predict
    )
    study.save(found.heads, "pruning_heads")
    study.save(found.summary(), "pruning")
    within = study.save(found.within(BUDGETS), "pruning_within")
    by = within.set_index(["order", "budget"])
    answers: list[dict[str, Any]] = []
    for (order, budget), row in by.iterrows():  # pyright: ignore[reportGeneralTypeIssues]
        if order != "random":
            drawn = by.loc[("random", budget)]
            answers.append(
                ss.experiments.answer(
                    f"heads of {len(found.heads)} that go within {budget:g} nats, by {order}",
                    float(row["heads"]),
                    f"random {drawn['least']:g} to {drawn['most']:g}, mean {drawn['heads']:.1f}",
                    (row["low"], row["high"]),
                )
            )
    drawn = by.loc[("random", 0.05)]
    best = {name: by.loc[(name, 0.05), "heads"] for name in ("attention", "no-op", "weights")}
    beyond = [name for name, heads in best.items() if heads > drawn["most"]]
    ours = [name for name in ("attention", "no-op") if name in beyond]
    word = "holds" if len(ours) == 2 else "holds partly" if ours else "does not hold here"
    said = ", ".join(f"{heads:g} by {name}" for name, heads in best.items())
    return ss.experiments.Finding(
        answers,
        verdict=f"{word}: within 0.05 nats {said}, and at most {drawn['most']:g} of {len(found.heads)} heads "
        "in random orders",
    )
