"""(a) The spectra of the unembedding and the embedding, and the position of one dark tail in the other.

Question: does the vocabulary leave a tail of the residual stream unread, and does the embedding write little
in the same directions that the unembedding reads little (Cancedda 2024, Eq. 2, Fig. 3)?
Design: the singular values of both matrices, and the share of the E-dark subspace in each band of U.
Control: random subspaces of the same rank. The quantities are exact for the weights, so they have no
interval.
"""

import pandas as pd

import spectral_sinks as ss


def run(study: ss.experiments.Study) -> ss.experiments.Finding:
    u, e = study.unembedding, study.embedding
    values = pd.concat(
        pd.DataFrame({"matrix": s.matrix, "index": range(1, s.d + 1), "value": s.values.numpy()})
        for s in (u, e)
    )
    dark = e.dark()
    share = u.shares(dark.orthonormal().T).mean(0)
    draws = pd.DataFrame(
        u.shares(ss.random_subspace(u.d, dark.rank, seed).orthonormal().T).mean(0).numpy()
        for seed in range(study.draws)
    )
    alignment = pd.DataFrame(
        {
            "band": range(1, u.count + 1),
            "share": share.numpy(),
            "random_low": draws.min().to_numpy(),
            "random_high": draws.max().to_numpy(),
        }
    )
    study.save(values, "spectrum_values")
    study.save(alignment, "spectrum_alignment")
    ss.figures.spectrum(values, alignment, study.figure("spectrum"))
    tail = u.values.square()[-u.dark().rank :].sum() / u.values.square().sum()
    random = f"{study.draws} random: {draws.iloc[:, -1].min():.3f} to {draws.iloc[:, -1].max():.3f}"
    return ss.experiments.Finding(
        [
            ss.experiments.answer(
                "W_U: largest / smallest singular value", float(u.values[0] / u.values[-1])
            ),
            ss.experiments.answer(
                "W_U: energy share of the dark band", float(tail), f"flat: {u.dark().rank / u.d:.3f}"
            ),
            ss.experiments.answer("share of E-dark in U-dark", float(share[-1]), random),
        ]
    )
