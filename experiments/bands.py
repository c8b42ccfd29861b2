"""(c) NLL and sink strength as a function of the number of bands kept, at the exit of every layer.

Question: does the loss stay high until the last 5 % of the spectrum are included, and can the middle be
removed at little cost if they are kept (Cancedda 2024, section 4 and Fig. 5 to 9)?
Design: Phi keeps bands 1 to k. Psi (reading u-e) removes only what lies in both tails. Omega keeps bands 1 to
k and the last band. Each filter acts on all tokens at the exit of one layer. The measures are the NLL, and
the mean attention that position 0 receives in the layers above.
Control: Rnd removes random subspaces of the rank that Phi removes.
"""

import pandas as pd

import spectral_sinks as ss


def run(study: ss.experiments.Study) -> ss.experiments.Finding:
    layers = range(study.model.layers)
    table = pd.concat([study.ladder(ss.Site("exit", layer)) for layer in layers], ignore_index=True)
    study.save(table, "bands")
    ss.figures.ladder(table, study.figure("bands"), "layer", "exit of layer")

    last = study.unembedding.count - 1
    answers = [
        ss.experiments.without_last_band(table[table["layer"] == layer], f"exit {layer}", last)
        for layer in layers
    ]
    layer = max(layers[:-1], key=lambda index: answers[index]["value"])
    rows = table[table["layer"] == layer].set_index(["filter", "kept"])
    for k in (8, 12, 16):
        omega, phi = rows.loc[("Omega", k)], rows.loc[("Phi", k)]
        answers.append(
            ss.experiments.answer(
                f"exit {layer}: NLL difference, Omega {k}",
                float(omega["mean"]),
                f"Phi 1:{k} {phi['mean']:+.4f} [{phi['low']:+.4f}, {phi['high']:+.4f}]",
                (omega["low"], omega["high"]),
            )
        )
    return ss.experiments.Finding(answers)
