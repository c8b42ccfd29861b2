"""Reads: which component needs the dark tail: queries, keys, values or the MLP?

Question: which component, if it alone cannot read the dark band, reproduces the effect of removing the band
from the residual stream on the NLL and on the sink?
Design: the dark band is removed from what the queries, keys, values or MLP of a layer read. All other
components and the skip connection keep it. This is done at each layer alone, at all layers above the exit
below the strongest sink, and at all layers. For keys and values it is also done at the first token alone, and
at all other tokens. All four components together are filtered above that exit. The reference is the removal
of the band at that exit.
Control: random subspaces of the same rank, removed at the same sites. There are fewer of them for single
layers away from that exit, for all layers, and for chosen tokens.
"""

from typing import Any

import pandas as pd

import spectral_sinks as ss

FEW = 5
"""Number of random subspaces for layers other than those above the reference exit or next to it."""

READS = ("queries", "keys", "values", "mlp-input")
SOME = {"first token": "first", "all but first": "all-but-first"}


def run(study: ss.experiments.Study) -> ss.experiments.Finding:
    model, u, below = study.model, study.unembedding, study.below_sink
    dark = ss.remove(u.dark())
    above = list(range(below + 1, model.layers))
    places = {f"layer {layer}": [layer] for layer in range(model.layers)}
    places |= {"above": above, "all layers": list(range(model.layers))}
    grid = {f"{kind}|{name}": [ss.Site(kind, i) for i in on] for name, on in places.items() for kind in READS}
    grid |= {f"{kind}|above, {name}": grid[f"{kind}|above"] for name in SOME for kind in READS[1:3]}
    grid["all four|above"] = [ss.Site(kind, layer) for layer in above for kind in READS]
    grid["exit|reference"] = [ss.Site("exit", below)]
    beside = {f"layer {below}", f"layer {below + 1}", "above", "reference"}
    cells = {}
    for name, sites in grid.items():
        place = name.split("|")[1]
        tokens: Any = SOME.get(place.removeprefix("above, "), "all")
        cells[f"{name}|dark"] = dict.fromkeys(sites, dark.at(tokens))
        for seed in range(study.draws if place in beside else min(FEW, study.draws)):
            cells[f"{name}|{seed}"] = dict.fromkeys(sites, ss.rnd(u.d, dark.rank, seed).at(tokens))
    effects = study.evaluate(cells, "reads")
    table = ss.sweeps.effect_table(effects, below)
    table[["site", "place", "draw"]] = [name.split("|") for name in table["name"]]
    table["sink_left"] = [sink_left(effects[name], below).mean() for name in table["name"]]
    table = table.drop(columns="name")
    study.save(table, "reads")
    ss.figures.reads(table, below, study.figure("reads"))
    return ss.experiments.Finding(answers(study, effects, table), verdict=verdict(table))


def verdict(table: pd.DataFrame) -> str:
    """State which components alone reproduce the loss of the sink, and which reproduce the cost in NLL.

    Each component is filtered above the reference exit. The loss of the sink is reproduced if it reaches 90 %
    of the loss at the reference. The cost is reproduced if it does not lie below the interval of the
    reference, and exceeds all random draws.
    """
    dark = table[table["draw"] == "dark"].set_index(["place", "site"])
    drawn = table[table["draw"] != "dark"].groupby(["place", "site"])["mean"].max()
    reference = dark.loc[("reference", "exit")]
    lost = [k for k in READS if 1 - dark.loc[("above", k), "sink_left"] >= 0.9 * (1 - reference["sink_left"])]
    costs = [k for k in READS if dark.loc[("above", k), "mean"] >= max(reference["low"], drawn[("above", k)])]
    both = set(lost) & set(costs)
    word = "holds" if both else "holds partly" if lost or costs else "does not hold here"
    return (
        f"{word}: the loss of the sink is reproduced by {', '.join(lost) or 'no reader'} alone, the NLL by "
        f"{', '.join(costs) or 'no reader'} alone"
    )


def sink_left(effect: ss.Effect, below: int) -> pd.Series:
    """Return the share of the attention to position 0 that is left, by document.

    For one site, it is measured in the first layer whose attention weights can change. For several sites, it
    is a mean over all layers above the reference exit. It is NaN if there is no such layer, or if attention
    cannot be read.
    """
    count = len(effect.sink_mass or [])
    layers = list(range(below + 1, count))
    if len(effect.sites) == 1 and effect.sites[0].kind != "exit":
        site = effect.sites[0]
        first = site.layer + (site.kind not in ("queries", "keys"))
        layers = [first] if first < count else []
    if not layers:
        return pd.Series(float("nan"), effect.table.index)
    before, after = ([f"{kind}_{layer}" for layer in layers] for kind in ("baseline_sink_mass", "sink_mass"))
    return effect.table[after].mean(axis=1) / effect.table[before].mean(axis=1)


def answers(
    study: ss.experiments.Study, effects: dict[str, ss.Effect], table: pd.DataFrame
) -> list[dict[str, Any]]:
    below = study.below_sink
    named = [f"{kind}|{place}" for place in (f"layer {below + 1}", "above", "all layers") for kind in READS]
    named += [f"{kind}|above, {some}" for kind in READS[1:3] for some in SOME]
    found = []
    for name in ["exit|reference", "all four|above", *named]:
        effect = effects[f"{name}|dark"]
        site, place = name.split("|")
        drawn = table[(table["site"] == site) & (table["place"] == place) & (table["draw"] != "dark")]
        shown = f"exit {below} (reference)" if site == "exit" else f"{site}, {place}"
        shown = shown.replace("above", f"layers above exit {below}")
        random = f"{len(drawn)} random: {drawn['mean'].min():+.4f} to {drawn['mean'].max():+.4f}"
        found.append(ss.experiments.answer(f"NLL difference, {shown}", effect.table["delta_nll"], random))
        left = sink_left(effect, below)
        if left.notna().all():
            random = f"random: {drawn['sink_left'].min():.3f} to {drawn['sink_left'].max():.3f}"
            found.append(ss.experiments.answer(f"share of the sink left, {shown}", left, random))
    return found
