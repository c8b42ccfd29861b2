"""Fills: how much of the cost of a filter is due to residuals that are out of distribution?

Question: what does the ladder cost if the removed component is set to zero, and what if it is replaced by one
that the model could have met there: the mean of the position, the component of another document, or noise of
the same norm?
Design: bands 1 to k are kept, for every k and each fill, at the exit below the strongest sink and at a later
exit. All tokens are filtered, or all but the first if documents open with different tokens, since a swap
would then move the sink. The mean is taken over the measured documents, so each document is a small part of
its own mean.
Control: random subspaces of the rank of the last band under the same fills, and noise from as many seeds.
"""

import pandas as pd

import spectral_sinks as ss


def at(study: ss.experiments.Study, layer: int) -> tuple[pd.DataFrame, dict[str, ss.Effect]]:
    """Measure the ladder and its controls at one exit."""
    u, site = study.unembedding, ss.Site("exit", layer)
    tokens = "all" if len(study.windows.first_token_ids) == 1 else "all-but-first"
    mean = ss.Mean(ss.mean_residual(study.model, study.windows, site))
    fills = {"zero": ss.Zero(), "mean": mean, "swap": ss.Swap(), "noise": ss.Noise()}
    last = u.count - 1
    cells = {
        f"{name}|Phi|{k}": {site: ss.phi(u, 1, k).filled(fill).at(tokens)}
        for name, fill in fills.items()
        for k in range(1, u.count)
    }
    for seed in range(study.draws):
        cells[f"noise|seed {seed}|{last}"] = {site: ss.phi(u, 1, last).filled(ss.Noise(seed)).at(tokens)}
        random = ss.rnd(u.d, u.dark().rank, seed)
        for name, fill in fills.items():
            cells[f"{name}|random {seed}|{last}"] = {site: random.filled(fill).at(tokens)}
    effects = study.evaluate(cells, str(site))
    table = ss.sweeps.effect_table(effects)
    table[["fill", "filter", "kept"]] = [name.split("|") for name in table["name"]]
    return table.drop(columns="name").astype({"kept": int}).assign(layer=layer, tokens=tokens), effects


def run(study: ss.experiments.Study) -> ss.experiments.Finding:
    sink = study.below_sink
    layers = [sink, (sink + study.model.layers) // 2]
    tables, answers, beyond = [], [], {}
    n = study.unembedding.count
    for layer in layers:
        table, effects = at(study, layer)
        tables.append(table)
        delta = {name: effect.table.set_index("document")["delta_nll"] for name, effect in effects.items()}
        for fill in ("zero", "mean", "swap", "noise"):
            here = table[table["fill"] == fill]
            draws = here[here["filter"].str.startswith("random")]["mean"]
            row = here[(here["filter"] == "Phi") & (here["kept"] == n - 1)].iloc[0]
            control = f"{study.draws} random: {draws.min():+.4f} to {draws.max():+.4f}"
            control += f"; sink above {row['sink']:.3f} of {row['baseline_sink']:.3f}"
            if fill == "noise":
                seeds = here[here["filter"].str.startswith("seed")]["mean"]
                control += f"; seeds: {seeds.min():+.4f} to {seeds.max():+.4f}"
            beyond[layer, fill] = row["mean"] > draws.max()
            values = delta[f"{fill}|Phi|{n - 1}"]
            answers.append(ss.experiments.answer(f"exit {layer}: last band, fill {fill}", values, control))
        for k in (n - 1, round(0.7 * n)):
            for fill in ("mean", "swap", "noise"):
                saved = delta[f"zero|Phi|{k}"] - delta[f"{fill}|Phi|{k}"]
                low, high = ss.stats.mean_interval(saved)
                shown = "excludes 0" if low > 0 or high < 0 else "includes 0"
                name = f"exit {layer}, {k} of {n} bands kept: cost of zero above {fill}"
                answers.append(ss.experiments.answer(name, saved, shown, (low, high)))
    table = pd.concat(tables, ignore_index=True)
    study.save(table, "fills")
    ss.figures.fills(table, study.figure("fills"), n)
    return ss.experiments.Finding(answers, verdict=verdict(beyond))


def verdict(beyond: dict[tuple[int, str], bool]) -> str:
    """State under which fills the last band costs more than every random subspace."""
    word = (
        "holds" if all(beyond.values()) else "holds partly" if any(beyond.values()) else "does not hold here"
    )
    more = ", ".join(f"{fill} at exit {layer}" for (layer, fill), true in beyond.items() if true)
    return f"{word}: the last band costs more than every random subspace under {more or 'no fill'}"
