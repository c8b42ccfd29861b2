"""(d) The ladder of `bands.py` for the output of each MLP and each attention component.

Question: which component writes the content of the tail, and does filtering the tail of one early MLP cost
far more than filtering any other (Cancedda 2024, section 4)?
Design: Phi, Psi and Omega act on the output of one MLP or one attention component at a time, at all tokens.
All layers are taken in turn; in a real model, the layers of its study.
Control: Rnd removes random subspaces of the rank that Phi removes from the same output.
"""

import pandas as pd

import spectral_sinks as ss


def run(study: ss.experiments.Study) -> ss.experiments.Finding:
    sites = [ss.Site(kind, layer) for kind in ("mlp", "attention") for layer in study.layers]
    steps = {"kept": (1, 4, 8, 12, 16, 19, 20), "random_at": (8, 19)}
    tables = {site: study.ladder(site, **steps) for site in sites}
    table = pd.concat(list(tables.values()), ignore_index=True)
    study.save(table, "components")
    for kind in ("mlp", "attention"):
        part = table[table["site"] == kind]
        ss.figures.ladder(part, study.figure(f"components_{kind}"), "layer", kind)
    last = study.unembedding.count - 1
    return ss.experiments.Finding(
        [ss.experiments.without_last_band(rows, str(site), last) for site, rows in tables.items()]
    )
