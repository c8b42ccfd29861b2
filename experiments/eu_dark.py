"""(g) E-dark and U-dark: where the two tails overlap, and which of them carries the effect.

Question: does the embedding write little in the same directions that the unembedding reads little? Do the
loss and the sink depend on one tail, on the other, on their intersection, or on the part outside the other
(Cancedda 2024, Eq. 2, Fig. 3)?
Design: principal angles and the alignment by band are measured first. Then U-dark, E-dark and their union are
removed at all tokens, at one exit at a time. At the exit below the strongest sink, further parts are removed:
the part of each tail outside the other, the half of each that is nearest to and farthest from the other, and
their intersection (within 45 degrees) where it exists.
Control: random subspaces of each rank that is removed, and a line fitted to their NLL by the energy that they
remove. A tied model has a single tail unless the gain of the final norm is folded in, so under the raw
convention nothing is compared, and the answer says so.
"""

import numpy as np
import pandas as pd

import spectral_sinks as ss

ALIKE = 0.9999
"""The smallest cosine between two tails, above which they are the same one."""


def run(study: ss.experiments.Study) -> ss.experiments.Finding:
    model, u, e = study.model, study.unembedding.dark(), study.embedding.dark()
    cosines = ss.spectra.principal_cosines(e, u)
    if model.tied and float(cosines.min()) > ALIKE:
        return ss.experiments.Finding(
            [ss.experiments.answer("tied model: E-dark is U-dark, smallest cosine", float(cosines.min()))]
        )
    # both tails and their union, removed at every exit of the study
    overlap, alignment = _overlap(study, u, e)
    u, e = u.named("U-dark"), e.named("E-dark")
    main = {"U-dark": u, "E-dark": e, "union": ss.spectra.union(u, e)}
    exits = [ss.Site("exit", layer) for layer in study.exits]
    cells = {f"{name}/{site.layer}": {site: ss.remove(s)} for site in exits for name, s in main.items()}
    cells |= {
        f"random {u.rank} #{seed}/{site.layer}": {site: ss.rnd(u.d, u.rank, seed)}
        for site in exits
        for seed in range(study.draws)
    }
    found = study.evaluate(cells, "eu_dark, exits")
    mass = found[f"U-dark/{study.exits[0]}"].baseline_sink_mass
    layer = 0 if mass is None or model.layers < 2 else max(range(1, model.layers), key=lambda k: mass[k]) - 1

    # parts of the tails, removed at the exit below the strongest sink
    half = u.rank // 2
    shared = ss.spectra.intersection(u, e).named("intersection")
    parts = {"U outside E": ss.spectra.outside(u, e), "E outside U": ss.spectra.outside(e, u)}
    parts |= {
        "U nearest E": ss.spectra.nearest(u, e, half),
        "U farthest from E": ss.spectra.farthest(u, e, half),
    }
    parts |= {
        "E nearest U": ss.spectra.nearest(e, u, half),
        "E farthest from U": ss.spectra.farthest(e, u, half),
    }
    parts |= {"intersection": shared} if shared.rank else {}
    ranks = {s.rank for s in [*main.values(), *parts.values()]} - {0, u.rank}
    here = ss.Site("exit", layer)
    cells = {f"{name}/{layer}": {here: ss.remove(s)} for name, s in parts.items() if s.rank}
    cells |= {
        f"random {rank} #{seed}/{layer}": {here: ss.rnd(u.d, rank, seed)}
        for rank in sorted(ranks)
        for seed in range(study.draws)
    }
    found |= study.evaluate(cells, "eu_dark, parts")

    table = pd.DataFrame([_row(name, effect) for name, effect in found.items()])
    study.save(table, "eu_dark")
    study.save(overlap, "eu_dark_angles")
    study.save(alignment, "eu_dark_alignment")
    ss.figures.eu_dark(table, overlap, alignment, layer, study.figure("eu_dark"))

    # answers, with the excess over the line of the random subspaces
    largest = overlap.iloc[0]
    answers = [
        ss.experiments.answer(
            "largest cosine between E-dark and U-dark",
            float(largest["cosine"]),
            f"{study.draws} random: {largest['random_low']:.3f} to {largest['random_high']:.3f}",
        ),
        ss.experiments.answer("rank of the intersection (45 degrees)", shared.rank),
    ]
    at = table[table["layer"] == layer]
    drawn = at[at["random"]]
    slope, level = np.polyfit(drawn["energy"], drawn["delta_nll"], 1)
    beyond = at["delta_nll"] - (level + slope * at["energy"])
    chance = beyond[drawn.index]
    for name in [*main, *(name for name, s in parts.items() if s.rank)]:
        row = at[at["name"] == name].iloc[0]
        null = at[(at["rank"] == row["rank"]) & at["random"]]
        answers.append(
            ss.experiments.answer(
                f"exit {layer}: NLL difference without {name} (rank {row['rank']})",
                found[f"{name}/{layer}"].table["delta_nll"],
                f"random: {null['delta_nll'].min():+.4f} to {null['delta_nll'].max():+.4f}; "
                f"energy removed {row['energy']:.3f}, random {null['energy'].mean():.3f}",
            )
        )
        if name in main:
            answers.append(
                ss.experiments.answer(
                    f"exit {layer}: NLL difference without {name}, beyond the line of random ones by energy",
                    float(beyond[row.name]),
                    f"{len(drawn)} random: {chance.min():+.4f} to {chance.max():+.4f}",
                    tuple(row[["low", "high"]] - row["delta_nll"] + beyond[row.name]),
                )
            )
        if not np.isnan(row["sink_next"]):
            answers.append(
                ss.experiments.answer(
                    f"exit {layer}: share of the next layer's sink mass cut without {name}",
                    float(row["sink_cut"]),
                    f"random: {null['sink_cut'].min():+.3f} to {null['sink_cut'].max():+.3f}",
                    (row["sink_cut_low"], row["sink_cut_high"]),
                )
            )
    return ss.experiments.Finding(answers)


def _overlap(
    study: ss.experiments.Study, u: ss.Subspace, e: ss.Subspace
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the principal cosines, and the share of each tail in every band of the other spectrum.

    Both have the range of random subspaces.
    """
    drawn = [ss.random_subspace(u.d, u.rank, seed) for seed in range(study.draws)]
    null = pd.DataFrame([ss.spectra.principal_cosines(s, u).numpy() for s in drawn])
    overlap = pd.DataFrame(
        {
            "pair": range(1, len(null.columns) + 1),
            "cosine": ss.spectra.principal_cosines(e, u).numpy(),
            "random_low": null.min().to_numpy(),
            "random_high": null.max().to_numpy(),
        }
    )
    tables: list[pd.DataFrame] = []
    for tail, of, basis in (("E-dark", e, study.unembedding), ("U-dark", u, study.embedding)):
        share = pd.DataFrame([basis.shares(s.orthonormal().T).mean(0).numpy() for s in drawn])
        tables.append(
            pd.DataFrame(
                {
                    "tail": tail,
                    "band": range(1, basis.count + 1),
                    "share": basis.shares(of.orthonormal().T).mean(0).numpy(),
                    "random_low": share.min().to_numpy(),
                    "random_high": share.max().to_numpy(),
                }
            )
        )
    return overlap, pd.concat(tables, ignore_index=True)


def _row(name: str, effect: ss.Effect) -> dict[str, object]:
    """Return the row of one removal: rank, removed energy, NLL, and the sink mass of the next layer.

    The sink mass is NaN where the next layer has none.
    """
    label, layer = name.split("/")
    low, high = effect.delta_nll_interval
    column = f"sink_mass_{int(layer) + 1}"
    lost = pd.Series(float("nan"), effect.table.index)
    masses = {"sink_next": float("nan"), "sink_before": float("nan")}
    if column in effect.table:
        after, before = effect.table[column], effect.table[f"baseline_{column}"]
        lost = 1 - after / before
        masses = {"sink_next": float(after.mean()), "sink_before": float(before.mean())}
    cut_low, cut_high = ss.stats.mean_interval(lost)
    return {
        "name": label,
        "layer": int(layer),
        "random": label.startswith("random"),
        "rank": effect.rank,
        "energy": float(effect.table["removed_energy_share"].mean()),
        "delta_nll": effect.delta_nll,
        "low": low,
        "high": high,
        **masses,
        "sink_cut": float(lost.mean()),
        "sink_cut_low": cut_low,
        "sink_cut_high": cut_high,
        "n": len(effect.table),
    }
