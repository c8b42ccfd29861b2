"""(e) Readers and writers of the dark band: the share of each band in every matrix at the residual stream.

Question: which heads and MLPs read the directions that the vocabulary cannot read, and which write them
(Cancedda 2024, section 3)?
Design: the energy of W_q, W_k, W_v, W_gate, W_up (readers) and W_o, W_down (writers) is split by bands of the
unembedding, per head and layer. The matrices are taken as stored, and with the gain of the norm through which
they read or write folded in.
Control: the share of each matrix in random subspaces of the rank of the dark band, whose mean (r/d) and
standard deviation are known exactly. The quantities are exact for the weights, so they have no interval.
"""

import numpy as np
import pandas as pd

import spectral_sinks as ss

KEYS = ["part", "layer", "unit"]


def run(study: ss.experiments.Study) -> ss.experiments.Finding:
    # shares of every matrix in each band and in random subspaces
    u, d = study.unembedding, study.unembedding.d
    rank = u.dark().rank
    spans = {f"band {j}": u.band(j) for j in range(1, u.count + 1)}
    spans |= {f"random {seed}": ss.random_subspace(d, rank, seed) for seed in range(study.draws)}
    table = pd.concat(
        [ss.residual.weight_shares(study.model, spans, convention=name) for name in ("raw", "folded")],
        ignore_index=True,
    )
    bands = table[table["subspace"].str.startswith("band")]
    bands = bands.assign(band=bands["subspace"].str[5:].astype(int)).drop(columns="subspace")
    random = table[table["subspace"].str.startswith("random")]
    spread = random.groupby([*KEYS, "convention"], observed=True)["share"].agg(["min", "max"])
    dark = bands[bands["band"] == u.count].set_index([*KEYS, "convention"]).join(spread).reset_index()
    dark = dark.rename(columns={"min": "random_low", "max": "random_high"})
    dark = dark.assign(
        z=(dark["share"] - rank / d) / dark["null_sd"].replace(0, np.nan),
        beyond=np.sign(dark["share"] - dark["random_high"]).clip(lower=0)
        - np.sign(dark["random_low"] - dark["share"]).clip(lower=0),
    )
    dark = dark.sort_values(["convention", "share"], ascending=[False, False])
    study.save(bands[[*KEYS, "convention", "band", "rank", "share", "null_sd"]], "weights")
    study.save(dark.drop(columns=["band"]), "weights_dark")
    ss.figures.weights(bands[bands["convention"] == "raw"], dark, u.count, rank / d, study.figure("weights"))

    # answers by role, by matrix and for the darkest of each role
    raw, answers = dark[dark["convention"] == "raw"], []
    for role, rows in (("readers", dark[~dark["writes"]]), ("writers", dark[dark["writes"]])):
        means = rows.groupby("convention")["share"].mean()
        answers.append(
            ss.experiments.answer(
                f"{role}: dark share, mean over matrices",
                float(means["raw"]),
                f"chance {rank / d:.4f}; gain folded in: {means['folded']:.4f}",
            )
        )
    for part, rows in raw.groupby("part", observed=True, sort=True):
        above, below, n = int((rows["beyond"] > 0).sum()), int((rows["beyond"] < 0).sum()), len(rows)
        answers.append(
            ss.experiments.answer(
                f"W_{part}: share of its matrices darker than all random subspaces",
                above / n,
                f"{above} of {n}; less dark than all: {below}; by chance {n / (study.draws + 1):.1f} each",
            )
        )
    for role, rows in (("reader", raw[~raw["writes"]]), ("writer", raw[raw["writes"]])):
        top = rows.iloc[0]
        place = f"{top['layer']}" + ("" if top["unit"] < 0 else f".{top['unit']}")
        answers.append(
            ss.experiments.answer(
                f"darkest {role}, W_{top['part']} {place}: dark share",
                float(top["share"]),
                f"random {top['random_low']:.3f} to {top['random_high']:.3f}, z {top['z']:.1f}",
            )
        )
    return ss.experiments.Finding(answers)
