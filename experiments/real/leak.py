"""Why do random subspaces cost so much, where most of a residual is dark? What they let leak out of the dark.

Question: where a residual x is mostly dark, a random subspace R takes a part of its dark component P x along
directions that are hardly dark themselves, so what is read there changes. Is that what the removal of R
costs, and not the energy that is lost, nor what R takes of the rest?
Design: at the exit below the strongest sink, at all tokens and at the first alone, and in the logit lens of
the last exit, R x is removed, and each of its two parts alone: R P x, that of the dark component, and
R (x - P x), that of the rest.
Control: the dark component is made shorter, its direction kept, so that as much energy is lost as in a random
subspace on average. 20 draws of R.
"""

from typing import Any

import pandas as pd
import torch
from real_study import RealStudy, difference, mass_above, residuals, words
from same_energy import WHERE, read_lens

import spectral_sinks as ss

DRAWN = ("random", "dark part", "other part")
SHRUNK = "dark shrunk"


def edits(study: RealStudy, x: torch.Tensor) -> dict[str, ss.Filter]:
    """Make the filters for residuals `[windows, tokens, d]`, named edit|draw.

    Raises InputError where the dark band holds less energy than a random subspace on average.
    """
    dark = study.unembedding.dark()
    chance, share = dark.rank / dark.d, float(dark.share(x.double()).mean())
    if share <= chance:
        raise ss.InputError(f"the dark band has {share:.3f} of the energy, and a random one {chance:.3f}")
    made = {f"{SHRUNK}|": ss.remove(dark, ss.spectra.Scaled((1 - chance / share) ** 0.5))}
    for seed in range(study.draws):
        random = ss.random_subspace(dark.d, dark.rank, seed)
        made[f"random|{seed}"] = ss.remove(random)
        made[f"dark part|{seed}"] = ss.Filter(random, through=dark)
        made[f"other part|{seed}"] = ss.Filter(random, through=dark.complement())
    return made


def run(study: RealStudy) -> ss.experiments.Finding:
    site = ss.Site("exit", study.below_sink)
    x = residuals(study.model, study.windows, site)
    places = {tokens: edits(study, x[:, WHERE[tokens]]) for tokens in ("all", "first")}
    table = study.save(pd.concat([in_stream(study, site, places), in_lens(study)], ignore_index=True), "leak")
    compared = [compare(part, str(place)) for place, part in table.groupby("place", sort=False)]
    return ss.experiments.Finding([row for rows, _ in compared for row in rows], verdict=verdict(compared))


def in_stream(study: RealStudy, site: ss.Site, places: dict[Any, dict[str, ss.Filter]]) -> pd.DataFrame:
    """Return the effect of each filter on the model, at all tokens and at the first."""
    cells: dict[str, dict[ss.Site, Any]] = {
        f"{tokens}|{name}": {site: edit.at(tokens)}
        for tokens, made in places.items()
        for name, edit in made.items()
    }
    rows: list[dict[str, Any]] = []
    for name, effect in study.evaluate(cells).items():
        tokens, edit, draw = name.split("|")
        place = f"exit {site.layer}, {tokens} token{'s' * (tokens == 'all')}"
        rows.append(
            {"place": place, "edit": edit, "draw": draw} | difference(effect) | mass_above(effect, site.layer)
        )
    return pd.DataFrame(rows)


def in_lens(study: RealStudy) -> pd.DataFrame:
    """Return what the NLL of the lens at the last exit rises by with each filter."""
    last = study.model.layers - 1
    x, read, risen = read_lens(study, last)
    rows: list[dict[str, Any]] = []
    for name, edit in edits(study, x).items():
        kind, draw = name.split("|")
        found = risen(read - edit(read))
        low, high = ss.stats.mean_interval(found)
        rows.append(
            {"place": f"lens at exit {last}", "edit": kind, "draw": draw}
            | {"delta_nll": found.mean(), "low": low, "high": high}
        )
    return pd.DataFrame(rows)


def compare(rows: pd.DataFrame, place: str) -> tuple[list[dict[str, Any]], bool]:
    """Return the answers for one place, and whether the leak explains what random subspaces cost there."""
    drawn = {edit: rows[rows["edit"] == edit]["delta_nll"] for edit in DRAWN}
    shrunk = rows[rows["edit"] == SHRUNK].iloc[0]
    found = [
        ss.experiments.answer(
            f"NLL difference, {place}: {edit}", float(values.mean()), f"{len(values)} draws {words(values)}"
        )
        for edit, values in drawn.items()
    ]
    found.append(
        ss.experiments.answer(
            f"NLL difference, {place}: {SHRUNK}",
            float(shrunk["delta_nll"]),
            interval=(float(shrunk["low"]), float(shrunk["high"])),
        )
    )
    others, random = max(drawn["other part"].max(), shrunk["delta_nll"]), drawn["random"]
    return found, bool(others < random.min() and drawn["dark part"].mean() > random.mean() / 2)


def verdict(compared: list[tuple[list[dict[str, Any]], bool]]) -> str:
    """State at how many places the leak explains the cost.

    It does where the dark part alone costs more than half of what random subspaces cost, mean over draws, and
    the other part of every draw, and the loss of the energy alone, cost less than any random subspace.
    """
    count = sum(explained for _, explained in compared)
    word = "holds" if count == len(compared) else "holds partly" if count else "does not hold here"
    return (
        f"{word}: what leaks out of the dark band explains the cost of random subspaces at {count} of "
        f"{len(compared)} places"
    )
