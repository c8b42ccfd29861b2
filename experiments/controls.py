"""Controls: does the dark band matter, or would any removal of the same rank, energy or norm do the same?

Question: which effects of removing the dark band remain under stricter controls than a random subspace of the
same rank?
Design: the dark band is removed at every exit, and at the exit below the strongest sink also from the first
token alone. There are two tests. The first ranks the effect among the draws of each control. With 20 draws
its p value cannot be below 1/21, so this test alone cannot pass Holm over two layers or more. The second
takes, for each document, the effect minus the mean of the draws, and tests it by sign flips. The p values are
adjusted over layers (Holm).
Control: random subspaces of equal rank; random subspaces of equal removed energy (matched to 1 % on these
residuals, at all tokens or at position 0); the same coefficients on other directions; a removal after which
the norm of each token is restored, compared with random subspaces that are treated alike; and a no-op that
removes the band and puts it back.
"""

from typing import Any

import pandas as pd
import torch

import spectral_sinks as ss

TOKENS = ("all", "first")


def residuals(study: ss.experiments.Study) -> dict[ss.Site, torch.Tensor]:
    """Return the residuals at every exit, `[windows, tokens, d]`, for one batch of the longest windows."""
    sites = [ss.Site("exit", layer) for layer in range(study.model.layers)]
    _, ids = next(study.windows.batches(16))
    return ss.trace(
        study.model,
        ids.to(study.model.device),
        {},
        sites,
        readout=lambda final, read, weights: {site: x.cpu() for site, x in read.items()},
    )


def cells(study: ss.experiments.Study, layer: int, x: torch.Tensor) -> dict[str, dict[ss.Site, Any]]:
    """Make the cells of one exit: the dark band and its controls, named tokens|control|draw."""
    u, site = study.unembedding, ss.Site("exit", layer)
    dark = ss.remove(u.dark())
    made: dict[str, Any] = {}
    for tokens in TOKENS if layer == study.below_sink else TOKENS[:1]:
        here = dark.at(tokens)
        made |= {f"{tokens}|dark|": here, f"{tokens}|dark, norm restored|": ss.spectra.NormRestored(here)}
        made[f"{tokens}|no-op|"] = here.filled(ss.spectra.NoOp())
        reference = x if tokens == "all" else x[:, :1]
        for seed in range(study.draws):
            random = ss.rnd(u.d, dark.rank, seed).at(tokens)
            matched = ss.spectra.energy_matched(dark.blocked, reference, seed)
            made[f"{tokens}|same rank|{seed}"] = random
            made[f"{tokens}|same energy|{seed}"] = ss.remove(matched).at(tokens)
            if layer == study.below_sink:
                made[f"{tokens}|other directions|{seed}"] = here.filled(ss.spectra.DirectionSwap(seed))
                made[f"{tokens}|same rank, norm restored|{seed}"] = ss.spectra.NormRestored(random)
    return {name: {site: edit} for name, edit in made.items()}


def compare(
    effects: dict[str, ss.Effect], layer: int, tokens: str, observed: str, control: str
) -> dict[str, object]:
    """Compare the observed effect with the draws of a control.

    Args:
        effects: the effects of the cells of one exit, by name.
        layer: the layer of the exit.
        tokens: the tokens that are filtered.
        observed: the name of the observed removal.
        control: the name of the control.

    Returns:
        The rank of the effect among the draws, p values of both tests, and the paired difference.

    """
    values = effects[f"{tokens}|{observed}|"].table.set_index("document")["delta_nll"]
    drawn = [e for name, e in effects.items() if name.startswith(f"{tokens}|{control}|")]
    table = pd.concat([e.table.set_index("document")["delta_nll"] for e in drawn], axis=1)
    null, effect = [e.delta_nll for e in drawn], float(values.mean())
    excess = values - table.mean(axis=1)
    low, high = ss.stats.mean_interval(excess)
    return {
        "layer": layer,
        "tokens": tokens,
        "observed": observed,
        "control": control,
        "effect": effect,
        "least": min(null),
        "most": max(null),
        "draws": len(null),
        "reached_by": ss.stats.null_rank(effect, null),
        "p_null": ss.stats.null_p(effect, null),
        "excess": float(excess.mean()),
        "low": low,
        "high": high,
        "p_sign_flip": ss.stats.sign_flip(excess),
        "n": len(excess),
    }


def run(study: ss.experiments.Study) -> ss.experiments.Finding:
    tables, tests = [], []
    for site, x in residuals(study).items():
        effects = study.evaluate(cells(study, site.layer, x), str(site))
        table = ss.sweeps.effect_table(effects).assign(layer=site.layer)
        table[["tokens", "control", "draw"]] = [name.split("|") for name in table["name"]]
        tables.append(table.drop(columns="name"))
        pairs, which = [("dark", "same rank"), ("dark", "same energy")], TOKENS[:1]
        if site.layer == study.below_sink:
            pairs += [("dark", "other directions"), ("dark, norm restored", "same rank, norm restored")]
            which = TOKENS
        tests += [compare(effects, site.layer, tokens, *pair) for tokens in which for pair in pairs]
    table, test = pd.concat(tables, ignore_index=True), pd.DataFrame(tests)
    family = test.groupby(["tokens", "observed", "control"])
    for column in ("p_null", "p_sign_flip"):
        test[f"{column}_holm"] = family[column].transform(ss.stats.holm)
    study.save(table, "controls")
    study.save(test, "controls_tests")
    ss.figures.controls(table, test, study.below_sink, study.figure("controls"))
    return ss.experiments.Finding(answers(study, table, test), verdict=verdict(test))


def verdict(test: pd.DataFrame) -> str:
    """State whether removing the dark band costs more than its controls at every exit.

    The test is by sign flips, adjusted by Holm.
    """
    said, shares = [], []
    for control in ("same rank", "same energy"):
        rows = test[(test["tokens"] == "all") & (test["control"] == control)]
        more = (rows["p_sign_flip_holm"] <= 0.05) & (rows["excess"] > 0)
        shares.append(more.mean())
        said.append(f"than {control} at {int(more.sum())} of {len(rows)} exits")
    word = "holds" if min(shares) == 1 else "holds partly" if max(shares) > 0 else "does not hold here"
    return f"{word}: the dark band costs more {', '.join(said)} (Holm, 5 %)"


def answers(study: ss.experiments.Study, table: pd.DataFrame, test: pd.DataFrame) -> list[dict[str, Any]]:
    layer, found = study.below_sink, []
    here = table[table["layer"] == layer]
    for row in test[test["layer"] == layer].to_dict("records"):
        drawn = here[(here["tokens"] == row["tokens"]) & (here["control"] == row["control"])]
        found.append(
            ss.experiments.answer(
                f"exit {layer}, {row['tokens']}: {row['observed']} minus the mean of {row['control']} (nats)",
                row["excess"],
                f"{row['effect']:+.4f} against {row['least']:+.4f} to {row['most']:+.4f}; reached by "
                f"{row['reached_by']} of {row['draws']}, p {row['p_null']:.3f}; energy removed "
                f"{drawn['removed_energy_share'].mean():.3f}; sign flips {row['p_sign_flip']:.4f}",
                (row["low"], row["high"]),
            )
        )
    for tokens in TOKENS:
        single = here[here["tokens"] == tokens].set_index("control")
        for control in ("dark, norm restored", "no-op"):
            row = single.loc[control]
            shown = f"dark: {single.loc['dark', 'mean']:+.4f}; sink above {row['sink']:.3f}"
            shown += f" of {row['baseline_sink']:.3f}"
            name = f"exit {layer}, {tokens}: NLL difference, {control}"
            found.append(ss.experiments.answer(name, float(row["mean"]), shown, (row["low"], row["high"])))
    for control in ("same rank", "same energy"):
        rows = test[(test["tokens"] == "all") & (test["control"] == control)]
        passed = rows["p_sign_flip_holm"] <= 0.05
        more, less = (int((passed & (sign * rows["excess"] > 0)).sum()) for sign in (1, -1))
        found.append(
            ss.experiments.answer(
                f"exits of {len(rows)} where dark costs more than {control} (Holm, 5 %)",
                more,
                f"less at {less}; beyond all draws at {int((rows['reached_by'] == 0).sum())}; smallest p of "
                f"that null after Holm {rows['p_null_holm'].min():.3f}",
            )
        )
    return found
