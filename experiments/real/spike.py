"""Which neurons write the spike? The MLP that adds most to what the layer with the strongest sink reads.

Question: is the residual that carries the sink written by a few neurons of one MLP, and does the sink go when
they are silent?
Design: the layer is the one, below that with the strongest sink, whose MLP adds most along the residual of
position 0 that the sink is read from. A neuron's contribution is its activation times its output weights,
with the gain and scale of the norm that follows the MLP in some families, along the direction of what the MLP
writes at position 0; contributions add up to the norm of that. The neurons with the largest ones are silenced
at all tokens: 1, 3, 10 and 30 of them.
Control: as many neurons that write most at other tokens, and 20 sets of as many random neurons.
"""

from typing import Any

import pandas as pd
from real_study import RealStudy, words

import spectral_sinks as ss

COUNTS = (1, 3, 10, 30)

LAYERS = ["layer", "written_first", "written_others", "along_carrier"]
NEURONS = ["neuron", "activation", "contribution", "contribution_others", "size_others"]


def run(study: RealStudy) -> ss.experiments.Finding:
    found = ss.spike_writers(study.model, study.windows, counts=COUNTS, draws=study.draws)
    study.save(found.layers[LAYERS], "spike_layers")
    study.save(found.neurons[NEURONS].head(100), "spike_neurons")
    silent = found.silent()
    before = silent[silent["count"] == 0].iloc[0][["mass_above", "norm_ratio"]].to_dict()
    table = study.save(silent[silent["count"] > 0], "spike_silenced")
    return ss.experiments.Finding(
        answers(study, found.layer, found.neurons, table, before),
        verdict=verdict(found.layer, found.neurons, table, before),
    )


def answers(
    study: RealStudy, layer: int, neurons: pd.DataFrame, table: pd.DataFrame, before: dict[str, float]
) -> list[dict[str, Any]]:
    total = neurons["contribution"].sum()
    found = [
        ss.experiments.answer(
            f"layer {layer} of {study.model.layers}: norm that its MLP writes at position 0", float(total)
        )
    ]
    for count in COUNTS:
        share = float(neurons["contribution"].head(count).sum() / total)
        found.append(
            ss.experiments.answer(
                f"share of it from the {count} largest of {len(neurons)} neurons",
                share,
                f"chance {count / len(neurons):.4f}",
            )
        )
        here = table[table["count"] == count]
        drawn = here[here["kind"] == "random"]
        for kind in ("largest at position 0", "largest at other tokens"):
            row = here[here["kind"] == kind].iloc[0]
            found.append(
                ss.experiments.answer(
                    f"NLL difference, {count} neurons silent ({kind})",
                    float(row["delta_nll"]),
                    f"random {words(drawn['delta_nll'])}; attention to position 0 above "
                    f"{before['mass_above']:.3f} to {row['mass_above']:.3f}, random at least "
                    f"{drawn['mass_above'].min():.3f}; norm ratio {before['norm_ratio']:.1f} to "
                    f"{row['norm_ratio']:.1f}",
                    (row["low"], row["high"]),
                )
            )
    return found


def verdict(layer: int, neurons: pd.DataFrame, table: pd.DataFrame, before: dict[str, float]) -> str:
    share = neurons["contribution"].head(3).sum() / neurons["contribution"].sum()
    three = table[table["count"] == 3]
    own = three[three["kind"] == "largest at position 0"].iloc[0]
    least = three.loc[three["kind"] == "random", "mass_above"].min()
    # the sink goes if the attention halves; less, beyond all random sets, is a part of it
    less = own["mass_above"] < least
    gone = less and own["mass_above"] <= before["mass_above"] / 2
    word = "does not hold here" if share <= 0.5 or not less else "holds" if gone else "holds partly"
    return (
        f"{word}: three neurons of layer {layer} write {share:.0%} of the spike; without them the attention "
        f"to position 0 in the layers above is {own['mass_above']:.3f} where it was "
        f"{before['mass_above']:.3f} (random at least {least:.3f}), at {own['delta_nll']:+.3f} nats"
    )
