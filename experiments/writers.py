"""Who writes the spike: the neurons and heads that make the residual of the sink large.

Question: do a few neurons of one MLP write the residual that carries the sink, does the sink go when they are
silent, and do the weights alone name them?
Design: `ss.spike_writers`, whose documentation states the rule. The 1, 3 and 10 neurons that write most at
position 0 are silenced at all tokens. Windows have 64 tokens.
Control: as many neurons that write most at other tokens, and random ones.
"""

from typing import Any

import spectral_sinks as ss


def run(study: ss.experiments.Study) -> ss.experiments.Finding:
    found = ss.spike_writers(study.model, study.openings, draws=study.draws)
    study.save(found.layers, "writers_layers")
    study.save(found.neurons.head(100), "writers_neurons")
    study.save(found.heads, "writers_heads")
    study.save(found.pairs, "writers_pairs")
    study.save(found.silent(), "writers_silenced")
    summary = study.save(found.summary(), "writers").set_index("count")
    neurons, agreement = found.neurons, found.agreement
    top = neurons.iloc[0]
    answers: list[dict[str, Any]] = [
        ss.experiments.answer(
            f"layer {found.layer} of {study.model.layers}: norm that its MLP writes at position 0",
            float(neurons["contribution"].sum()),
            f"at other tokens {found.layers['written_others'][found.layer]:.1f}",
        ),
        ss.experiments.answer("cosine of it with the carrier", found.cosine),
        ss.experiments.answer(
            "largest that a head below writes along the carrier", float(found.heads["along_carrier"].max())
        ),
    ]
    for count, row in summary.drop(index=0).iterrows():
        for column, name in (
            ("delta_nll", "NLL difference"), ("mass_above", "attention to position 0 above"),
            ("norm_ratio", "norm ratio"),
        ):  # fmt: skip
            said = f"random {row[f'{column}_least']:.3f} to {row[f'{column}_most']:.3f}; untouched "
            answers.append(
                ss.experiments.answer(
                    f"{count} neurons silent: {name}",
                    float(row[column]),
                    said + f"{summary.loc[0, column]:.3f}",
                    (row[f"{column}_low"], row[f"{column}_high"]),
                )
            )
        chance = f"chance {count / len(neurons):.4f}"
        answers.append(
            ss.experiments.answer(f"share of the spike from {count} neurons", float(row["share"]), chance)
        )
    answers.append(
        ss.experiments.answer(
            f"rank of the first neuron among {len(neurons)} by the weights alone", int(top["predicted_rank"])
        )
    )
    answers.append(
        ss.experiments.answer(
            "neurons among the first ten of both rankings",
            agreement["top_ten"],
            f"chance {agreement['chance']:.2f}; rank correlation {agreement['rank_correlation']:.2f}",
        )
    )
    pair = found.pairs.iloc[0]
    answers.append(
        ss.experiments.answer(
            "cosine of the leading written direction of the down projection with the carrier",
            float(pair["cosine"]),
            f"its largest neuron has rank {int(pair['rank'])} and {pair['loading']:.3f} of the other side",
        )
    )
    share, mass = float(summary.loc[3, "share"]), float(summary.loc[3, "mass_above"])
    word = "holds" if share > 0.5 and mass < summary.loc[3, "mass_above_least"] else "does not hold here"
    verdict = (
        f"{word}: three neurons of layer {found.layer} write {share:.0%} of the spike; without them the "
        f"attention to position 0 in the layers above is {mass:.3f} where it was "
        f"{summary.loc[0, 'mass_above']:.3f}; by the weights alone the first of them has rank "
        f"{int(top['predicted_rank'])}"
    )
    return ss.experiments.Finding(answers, verdict=verdict)
