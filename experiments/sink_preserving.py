"""Sink-preserving filters: how much of the middle of the spectrum can be removed if the tail is kept?

Question: how much of the residual stream can be deleted at a given cost if the dark tail, or the first token,
is spared (Cancedda 2024, section 4: Omega)?
Design: directions are deleted upwards from the dark end, at one exit and at all exits at once. There are
three kinds of equal rank: with the last band kept (Omega), without it (Phi), and at all tokens but the first
(Phi). The largest share that can be deleted within +0.01, +0.05 and +0.1 nats is determined anew in each
bootstrap sample of documents. A schedule over layers is chosen greedily on every other document. Each step
deletes 1 % more at the exit where this costs least, with all chosen exits filtered at once and the tail kept.
The schedule is measured on the other documents, and so is one depth for all exits.
The saving of a kept tail is computed per document. It is the cost at equal rank with the tail dropped, with
the first token spared, or with random directions kept (mean of the draws), minus the cost with the tail kept.
Control: the same rank is deleted with random directions kept instead of the tail. For the schedule, random
subspaces of its ranks are removed.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

import spectral_sinks as ss

SHARES = (0.01, 0.02, 0.03, 0.04, 0.06, 0.1, 0.15, 0.2, 0.3, 0.5, 0.9)
RANDOM = (0.1, 0.3)
BUDGETS = (0.01, 0.05, 0.1)
KINDS: dict[str, tuple[bool, Any]] = {
    "tail kept": (True, "all"),
    "tail dropped": (False, "all"),
    "tail dropped, first token spared": (False, "all-but-first"),
}


def ranks(u: ss.Spectrum, shares: tuple[float, ...]) -> list[int]:
    """Return numbers of directions for shares, at least 1 and at most the number above the tail."""
    return sorted({min(max(1, round(share * u.d)), u.d - u.dark().rank) for share in shares})


def deleting(u: ss.Spectrum, kind: str, rank: int) -> ss.Filter:
    """Return the filter that deletes the darkest directions, or those just above the tail if it is kept."""
    tail, tokens = KINDS[kind]
    end = u.d - u.dark().rank if tail else u.d
    return ss.remove(u.directions(end - rank, end, f"{rank} up from {end}"), tokens=tokens)


def random_kept(u: ss.Spectrum, rank: int, seed: int) -> ss.Filter:
    """Return the filter that deletes `rank` directions and keeps random ones instead of the tail.

    The directions come from the tail and the `rank` directions above it. As many are kept as the tail has.
    """
    low = u.directions(u.d - u.dark().rank - rank, u.d, "low end")
    return ss.remove(ss.spectra.random_within(low, rank, seed))


def measure(study: ss.experiments.Study, layers: list[int], random: list[int]) -> tuple[pd.DataFrame, ...]:
    """Measure the cost of deleting directions at some exits at once.

    Returns three tables: the cost of each filter; the largest share within each budget, by kind; and the
    saving of a kept tail at the ranks `random`, at which random directions were kept too.
    """
    u, sites = study.unembedding, [ss.Site("exit", layer) for layer in layers]
    steps = ranks(u, SHARES)
    cells = {f"{kind}|{k}": dict.fromkeys(sites, deleting(u, kind, k)) for kind in KINDS for k in steps}
    for k in random:
        for seed in range(study.draws):
            cells[f"random {seed} kept|{k}"] = dict.fromkeys(sites, random_kept(u, k, seed))
    where = "all exits" if len(layers) > 1 else f"exit {layers[0]}"
    effects = study.evaluate(cells, where)
    table = ss.sweeps.effect_table(effects, layers[0])
    table[["kind", "deleted"]] = [name.split("|") for name in table["name"]]
    table = table.astype({"deleted": int}).assign(where=where)
    table["share"] = table["rank"] / (u.d * len(layers))
    # the largest share within each budget
    within: list[dict[str, object]] = []
    for kind in KINDS:
        costs = np.stack([effects[f"{kind}|{k}"].table["delta_nll"] for k in steps], axis=1)
        for budget in BUDGETS:
            value, low, high = ss.stats.largest_within(costs, [k / u.d for k in steps], budget)
            within.append(
                {"where": where, "kind": kind, "budget": budget, "mean": value, "low": low, "high": high}
            )
    # the saving of a kept tail over each alternative
    saved: list[dict[str, object]] = []
    for k in random:
        costs = {name: e.table.set_index("document")["delta_nll"] for name, e in effects.items()}
        draws = pd.concat([costs[f"random {seed} kept|{k}"] for seed in range(study.draws)], axis=1)
        others = {kind: costs[f"{kind}|{k}"] for kind in list(KINDS)[1:]} | {
            "random kept": draws.mean(axis=1)
        }
        for kind, cost in others.items():
            values = cost - costs[f"{next(iter(KINDS))}|{k}"]
            low, high = ss.stats.mean_interval(values)
            row = {
                "where": where,
                "deleted": k,
                "against": kind,
                "mean": values.mean(),
                "low": low,
                "high": high,
            }
            saved.append(row | {"p_sign_flip": ss.stats.sign_flip(values), "n": len(values)})
    return table.drop(columns="name"), pd.DataFrame(within), pd.DataFrame(saved)


def halves(study: ss.experiments.Study) -> tuple[ss.experiments.Study, ss.experiments.Study]:
    """Split the documents in two halves, every other one. Raises InputError for a single document."""
    windows = study.windows
    order = {document: place for place, document in enumerate(dict.fromkeys(windows.document))}
    if len(order) < 2:
        raise ss.InputError(
            "a schedule is chosen on some documents and measured on others: give at least two documents"
        )
    found = []
    for part in (0, 1):
        mine = [i for i, document in enumerate(windows.document) if order[document] % 2 == part]
        rows, owners = [windows.rows[i] for i in mine], [windows.document[i] for i in mine]
        found.append(replace(study, windows=ss.Windows.of_ids(rows, study.model, owners)))
    return found[0], found[1]


def schedule(u: ss.Spectrum, depths: dict[int, int]) -> dict[ss.Site, ss.Filter]:
    """Return Omega at each exit at which directions are deleted."""
    return {ss.Site("exit", layer): deleting(u, "tail kept", k) for layer, k in depths.items() if k}


def greedy(study: ss.experiments.Study) -> list[tuple[dict[int, int], float]]:
    """Return schedules of growing size up to the largest budget, with their costs on these documents."""
    u = study.unembedding
    step, most = max(1, round(0.01 * u.d)), u.d - u.dark().rank
    path, depths = [], dict.fromkeys(range(study.model.layers), 0)
    while True:
        trials = {str(i): depths | {i: depth + step} for i, depth in depths.items() if depth + step <= most}
        effects = study.evaluate({name: schedule(u, trial) for name, trial in trials.items()}, "greedy")
        best = min(effects, key=lambda name: effects[name].delta_nll, default=None)
        if best is None or effects[best].delta_nll > max(BUDGETS):
            return path
        depths = trials[best]
        path.append((depths, effects[best].delta_nll))


def schedules(study: ss.experiments.Study) -> pd.DataFrame:
    """Choose the greedy schedule and the best single depth for each budget, and measure them.

    They are chosen on one half of the documents and measured on the other.
    """
    chosen, other = halves(study)
    u, layers = study.unembedding, range(study.model.layers)
    uniform = {str(k): dict.fromkeys(layers, k) for k in ranks(u, SHARES)}
    found = chosen.evaluate({name: schedule(u, depths) for name, depths in uniform.items()}, "one depth")
    level = [(uniform[name], effect.delta_nll) for name, effect in found.items()]
    picked: dict[str, tuple[dict[int, int], float]] = {}
    for kind, path in (("greedy", greedy(chosen)), ("one depth", level)):
        for budget in BUDGETS:
            fits = [step for step in path if step[1] <= budget]
            nothing = (dict.fromkeys(layers, 0), 0.0)
            picked[f"{kind}|{budget}"] = max(fits, key=lambda step: sum(step[0].values()), default=nothing)
    # measured on the other half, with random subspaces of the ranks of the greedy schedule
    cells = {name: schedule(u, depths) for name, (depths, _) in picked.items()}
    for name in [name for name in cells if name.startswith("greedy")]:
        for seed in range(study.draws):
            cells[f"random {seed}|{name.split('|')[1]}"] = {
                site: ss.rnd(u.d, edit.rank, seed * len(layers) + site.layer)
                for site, edit in cells[name].items()
            }
    table = ss.sweeps.effect_table(other.evaluate(cells, "held out"), 0)
    table[["kind", "budget"]] = [name.split("|") for name in table["name"]]
    removed = [sum(edit.rank for edit in cells[name].values()) for name in table["name"]]
    table["share"] = np.array(removed) / (u.d * len(layers))
    nan = float("nan")
    table["chosen_at"] = [picked[name][1] if name in picked else nan for name in table["name"]]
    for layer in layers:
        table[f"deleted_{layer}"] = [picked[n][0][layer] if n in picked else nan for n in table["name"]]
    return table.drop(columns="name")


def run(study: ss.experiments.Study) -> ss.experiments.Finding:
    layers = list(range(study.model.layers))
    places = [[layer] for layer in layers] + ([layers] if len(layers) > 1 else [])
    random = ranks(study.unembedding, RANDOM)
    made = [measure(study, place, random if len(place) > 1 else random[:1]) for place in places]
    table, within, saved = (pd.concat(part, ignore_index=True) for part in zip(*made, strict=True))
    plans = schedules(study)
    study.save(table, "sink_preserving")
    study.save(within, "sink_preserving_within")
    study.save(saved, "sink_preserving_saved")
    study.save(plans, "sink_preserving_schedules")
    ss.figures.sink_preserving(table, within, plans, study.figure("sink_preserving"))
    found = answers(study, table, within, plans)
    for row in saved.to_dict("records"):
        share = f"{row['deleted']} of {study.unembedding.d} deleted"
        shown = "excludes 0" if row["low"] > 0 or row["high"] < 0 else "includes 0"
        name = f"{row['where']}: saved by keeping the tail (nats), {share}, against {row['against']}"
        found.append(ss.experiments.answer(name, row["mean"], shown, (row["low"], row["high"])))
    return ss.experiments.Finding(found, verdict=verdict(saved))


def verdict(saved: pd.DataFrame) -> str:
    """State whether keeping the tail is cheaper at equal rank than each alternative, at each set of exits."""
    said, sure = [], []
    for kind, rows in saved.groupby("against", sort=False):
        sure.append(float((rows["low"] > 0).mean()))
        least, most = rows["mean"].min(), rows["mean"].max()
        said.append(
            f"than {kind} at {int((rows['low'] > 0).sum())} of {len(rows)} ({least:+.3f} to {most:+.3f} nats)"
        )
    holds = "holds" if min(sure) == 1 else "holds partly" if max(sure) > 0 else "does not hold here"
    return f"{holds}: at equal rank, keeping the tail is cheaper {', '.join(said)}"


def answers(
    study: ss.experiments.Study, table: pd.DataFrame, within: pd.DataFrame, plans: pd.DataFrame
) -> list[dict[str, Any]]:
    kept_kind, dropped_kind, spared_kind = KINDS
    found = []
    for (where, budget), rows in within.groupby(["where", "budget"], sort=False):
        kept, dropped, spared = (
            rows.set_index("kind").loc[kind] for kind in (kept_kind, dropped_kind, spared_kind)
        )
        found.append(
            ss.experiments.answer(
                f"{where}: share deleted within +{budget:g} nats, {kept_kind}",
                float(kept["mean"]),
                f"{dropped_kind}: {dropped['mean']:.3f} [{dropped['low']:.3f}, {dropped['high']:.3f}]; "
                f"first token spared: {spared['mean']:.3f} [{spared['low']:.3f}, {spared['high']:.3f}]",
                (kept["low"], kept["high"]),
            )
        )
    random = table[table["kind"].str.startswith("random")]
    for (where, deleted), draws in random.groupby(["where", "deleted"], sort=False):
        here = table[(table["where"] == where) & (table["deleted"] == deleted)]
        kept = here[here["kind"] == kept_kind].iloc[0]
        found.append(
            ss.experiments.answer(
                f"{where}: NLL difference, {deleted} of {study.unembedding.d} deleted, {kept_kind}",
                float(kept["mean"]),
                f"random kept instead: {draws['mean'].min():+.4f} to {draws['mean'].max():+.4f}",
                (kept["low"], kept["high"]),
            )
        )
    for row in plans[~plans["kind"].str.startswith("random")].to_dict("records"):
        control = f"share deleted {row['share']:.3f}; {row['chosen_at']:+.4f} where it was chosen"
        draws = plans[plans["kind"].str.startswith("random") & (plans["budget"] == row["budget"])]["mean"]
        if row["kind"] == "greedy":
            control += f"; random of these ranks: {draws.min():+.4f} to {draws.max():+.4f}"
        name = f"schedule, {row['kind']}, budget +{row['budget']}: NLL difference, held-out documents"
        found.append(ss.experiments.answer(name, float(row["mean"]), control, (row["low"], row["high"])))
    return found
