"""Does the paper's picture hold on a real model, under either convention?

Question: what does the NLL lose when the spectrum is cut from the dark end, is the last step the large one,
is it better to keep the tail than to drop it, and is that the sink?
Design: at the exit below the strongest sink the bands 1 to j of 20 are kept (Phi), for j = 4, 8, 12, 16, 18
and 19. Omega keeps bands 1 to 14 and the last one, which is the paper's sink-preserving set. The dark band is
removed at the first token alone and at all others, and swapped between texts at all others: without BOS the
first tokens differ, so that a swap there would exchange the sinks themselves.
Control: 20 random subspaces that remove as many directions as the last step, and 20 as many as Omega does.
"""

from typing import Any

import pandas as pd
from real_study import RealStudy, difference, mass_above, paired, words

import spectral_sinks as ss

KEPT = (4, 8, 12, 16, 18, 19)
HEAD = 14
"""Bands that Omega keeps beside the last one: 0.7 of them, as in the paper."""

CONVENTIONS = ("raw", "folded")


def cells(study: RealStudy) -> dict[str, dict[ss.Site, Any]]:
    """Make the cells, named convention|edit|draw."""
    site, made = ss.Site("exit", study.below_sink), {}
    for name in CONVENTIONS:
        u = study.spectra[name]
        made |= {f"{name}|Phi 1:{j}|": ss.phi(u, 1, j) for j in (*KEPT, HEAD, HEAD + 1)}
        made[f"{name}|Omega {HEAD}|"] = ss.omega(u, HEAD)
        made[f"{name}|dark swapped, all others|"] = ss.remove(u.dark(), ss.Swap(), tokens="all-but-first")
        made[f"{name}|dark, first token|"] = ss.remove(u.dark(), tokens="first")
        made[f"{name}|dark, all others|"] = ss.remove(u.dark(), tokens="all-but-first")
    u = study.unembedding
    for seed in range(study.draws):
        made[f"random|as many as the last band|{seed}"] = ss.rnd(u.d, u.dark().rank, seed)
        made[f"random|as many as Omega {HEAD}|{seed}"] = ss.rnd(u.d, u.bands(HEAD + 1, 19).rank, seed)
    return {name: {site: edit} for name, edit in made.items()}


def run(study: RealStudy) -> ss.experiments.Finding:
    effects = study.evaluate(cells(study))
    rows: list[dict[str, Any]] = []
    for name, effect in effects.items():
        convention, edit, draw = name.split("|")
        rows.append(
            {"convention": convention, "edit": edit, "draw": draw, "layer": study.below_sink}
            | {"rank": effect.rank}
            | difference(effect)
            | mass_above(effect, study.below_sink)
        )
    table = pd.DataFrame(rows)
    study.save(table, "ladders")
    answers: list[dict[str, Any]] = []
    said: list[str] = []
    drawn = {kind: part["delta_nll"] for kind, part in table[table["convention"] == "random"].groupby("edit")}
    last, omega = drawn["as many as the last band"], drawn[f"as many as Omega {HEAD}"]
    for name in CONVENTIONS:
        for row in table[table["convention"] == name].to_dict("records"):
            control = {f"Phi 1:{KEPT[-1]}": last, f"Omega {HEAD}": omega}.get(row["edit"])
            answers.append(
                ss.experiments.answer(
                    f"exit {study.below_sink}, {name}: NLL difference, {row['edit']}",
                    row["delta_nll"],
                    ("" if control is None else f"random of that rank {words(control)}; ")
                    + f"attention to position 0 above {row['baseline_mass_above']:.3f} to "
                    f"{row['mass_above']:.3f}",
                    (row["low"], row["high"]),
                )
            )
        gain = paired(effects, f"{name}|Phi 1:{HEAD + 1}|", f"{name}|Omega {HEAD}|")
        answers.append(
            ss.experiments.answer(
                f"{name}: Phi 1:{HEAD + 1} minus Omega {HEAD}, as many directions kept",
                gain["value"],
                f"sign flips {gain['p']:.4f}",
                (gain["low"], gain["high"]),
            )
        )
        step = effects[f"{name}|Phi 1:{KEPT[-1]}|"].delta_nll
        said.append(
            f"{name}: the last step costs {step:+.3f} (random {words(last)}), keeping the tail in place of "
            f"the next band gains {gain['value']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}]"
        )
    held = [step.delta_nll > last.max() for name in CONVENTIONS if (step := effects[f"{name}|Phi 1:19|"])]
    word = "holds" if all(held) else "holds partly" if any(held) else "does not hold here"
    ss.figures.real_ladder(table, study.figure("ladders"), model=study.name, layer=study.below_sink)
    return ss.experiments.Finding(answers, verdict=f"{word}: {'; '.join(said)}")
