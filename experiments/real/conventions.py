"""Is the sink dark? The dark band under three conventions, at several exits, with strict controls.

Question: how much of the energy of position 0 lies in the dark band of the unembedding as it is stored (raw),
with the gain of the final norm folded in (folded), and with the mean over the vocabulary removed as well
(centred)? Does removing that band remove the sink, and is the cost that of losing so much energy anywhere?
Design: at the exits of the study, the share of position 0 and of the other tokens in each dark band is
measured. The band is removed at all tokens, at the first alone and at all but the first, and at the first it
is replaced by its mean over texts.
Control: 20 random subspaces of the same rank, at all tokens and at the first alone; 20 random subspaces that
take the same energy of position 0 as the folded band; what one convention's band has and the other's has not;
the channel with the largest activation alone, and the folded band without it.
"""

from typing import Any

import pandas as pd
import torch
from real_study import RealStudy, difference, mass_above, residuals, words

import spectral_sinks as ss

WHERE = ("all", "first", "all-but-first")
RUN = ("raw", "folded")
"""Conventions whose bands are removed; the dark band of the centred matrix is nearly the folded one."""


def shares(study: RealStudy) -> pd.DataFrame:
    """Return the dark shares of position 0 and of other tokens, by exit, document and convention."""
    model, width = study.model, study.model.d
    dark = {name: spectrum.dark() for name, spectrum in study.spectra.items()}
    rank = dark["raw"].rank
    spaces = {**dark, **{f"random {s}": ss.random_subspace(width, rank, s) for s in range(study.draws)}}
    sites = [ss.Site("embedding"), *(ss.Site("exit", layer) for layer in range(model.layers - 1))]
    rows: list[dict[str, Any]] = []
    for places, ids in study.windows.batches(16):

        def readout(final: torch.Tensor, read: dict[ss.Site, torch.Tensor], weights: Any) -> torch.Tensor:
            return torch.stack(
                [torch.stack([space.share(read[s]) for space in spaces.values()], -1) for s in sites]
            )

        # [sites, windows, tokens, spaces]
        found = ss.trace(model, ids.to(model.device), {}, sites, readout=readout).double().cpu().numpy()
        for site, values in zip(sites, found, strict=True):
            for place, value in zip(places, values, strict=True):
                first = dict(zip(spaces, value[0], strict=True))
                rest = dict(zip(spaces, value[1:].mean(0), strict=True))
                drawn = [first[name] for name in spaces if name.startswith("random")]
                rows += [
                    {
                        "layer": -1 if site.kind == "embedding" else site.layer,
                        "document": study.windows.document[place],
                        "convention": name,
                        "share": first[name],
                        "others": rest[name],
                        "random_least": min(drawn),
                        "random_most": max(drawn),
                    }
                    for name in dark
                ]
    return pd.DataFrame(rows)


def cells(study: RealStudy, layer: int) -> dict[str, dict[ss.Site, Any]]:
    """Make the cells of one exit, named tokens|edit|draw."""
    site, width = ss.Site("exit", layer), study.model.d
    x = residuals(study.model, study.windows, site)[:, 0]
    mean = ss.Mean(ss.mean_residual(study.model, study.windows, site))
    made: dict[str, Any] = {}
    dark = {name: study.spectra[name].dark() for name in RUN}
    for name, space in dark.items():
        made |= {f"{tokens}|{name} dark|": ss.remove(space, tokens=tokens) for tokens in WHERE}
        made[f"first|{name} dark, mean|"] = ss.remove(space, mean, tokens="first")
        made[f"first|{name} head|"] = ss.remove(study.spectra[name].head(space.rank / width), tokens="first")
    # which part of the band carries the sink: the largest channel, and what one band has beyond the other
    channel = int(x.abs().mean(0).argmax())
    alone = ss.spectra.channels(width, [channel])
    made["first|largest channel|"] = ss.remove(alone, tokens="first")
    made["first|folded dark without the channel|"] = ss.remove(
        ss.spectra.outside(dark["folded"], alone), tokens="first"
    )
    made["first|raw dark without folded dark|"] = ss.remove(
        ss.spectra.outside(dark["raw"], dark["folded"]), tokens="first"
    )
    for seed in range(study.draws):
        random = ss.random_subspace(width, dark["folded"].rank, seed)
        matched = ss.spectra.energy_matched(dark["folded"], x[:, None], seed)
        made[f"all|same rank|{seed}"] = ss.remove(random)
        made[f"first|same rank|{seed}"] = ss.remove(random, tokens="first")
        made[f"first|same energy|{seed}"] = ss.remove(matched, tokens="first")
    return {name: {site: edit} for name, edit in made.items()}


def removed(study: RealStudy, layer: int) -> pd.DataFrame:
    """Return the effect of every cell of one exit, one row per cell."""
    effects = study.evaluate(cells(study, layer))
    rows: list[dict[str, Any]] = []
    for name, effect in effects.items():
        tokens, edit, draw = name.split("|")
        rows.append(
            {"layer": layer, "tokens": tokens, "edit": edit, "draw": draw, "rank": effect.rank}
            | difference(effect)
            | mass_above(effect, layer)
            | {"removed_energy_share": float(effect.table["removed_energy_share"].mean())}
        )
    return pd.DataFrame(rows)


def run(study: RealStudy) -> ss.experiments.Finding:
    table = shares(study)
    study.save(table, "dark_shares")
    effects = pd.concat([removed(study, layer) for layer in study.exits], ignore_index=True)
    study.save(effects, "dark_removed")
    ss.figures.conventions(table, effects, study.figure("dark"), model=study.name, layer=study.below_sink)
    return ss.experiments.Finding(answers(study, table, effects), verdict=verdict(study, table, effects))


def answers(study: RealStudy, table: pd.DataFrame, effects: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the numbers at the exit below the strongest sink, then those of the other exits."""
    found: list[dict[str, Any]] = []
    for layer in sorted(study.exits, key=lambda one: one != study.below_sink):
        for name, part in table[table["layer"] == layer].groupby("convention", sort=False):
            by_document = part.set_index("document")
            found.append(
                ss.experiments.answer(
                    f"exit {layer}: share of position 0 in the {name} dark band",
                    by_document["share"],
                    f"others {part['others'].mean():.3f}; random up to {part['random_most'].max():.3f}",
                )
            )
        here = effects[effects["layer"] == layer]
        for tokens in WHERE:
            drawn = here[(here["tokens"] == tokens) & (here["edit"] == "same rank")]
            matched = here[(here["tokens"] == tokens) & (here["edit"] == "same energy")]
            for row in here[(here["tokens"] == tokens) & (here["draw"] == "")].to_dict("records"):
                said = f"next layer's attention {row['baseline_mass_next']:.3f} to {row['mass_next']:.3f}"
                if len(drawn):
                    said += f"; same rank {words(drawn['delta_nll'])}"
                if len(matched):
                    said += f"; same energy (rank {matched['rank'].min()} to {matched['rank'].max()}) "
                    said += words(matched["delta_nll"])
                found.append(
                    ss.experiments.answer(
                        f"exit {layer}: NLL difference, {row['edit']} removed, {tokens} tokens",
                        row["delta_nll"],
                        said,
                        (row["low"], row["high"]),
                    )
                )
    return found


def verdict(study: RealStudy, table: pd.DataFrame, effects: pd.DataFrame) -> str:
    """State under which conventions the share and the removal single out the dark band, at each exit."""
    said: list[str] = []
    held = some = 0
    for name in RUN:
        dark = cut = 0
        for layer in study.exits:
            part = table[(table["layer"] == layer) & (table["convention"] == name)]
            low, _ = ss.stats.mean_interval(part.groupby("document")["share"].mean())
            _, high = ss.stats.mean_interval(part.groupby("document")["others"].mean())
            dark += low > max(part["random_most"].max(), high)
            here = effects[(effects["layer"] == layer) & (effects["tokens"] == "first")]
            own = here.loc[here["edit"] == f"{name} dark", "mass_above"].iloc[0]
            cut += own < here.loc[here["edit"] == "same rank", "mass_above"].min()
        said.append(
            f"{name}: position 0 darker than others and random at {dark} of {len(study.exits)} exits, its "
            f"removal cuts the sink more than any random subspace of that rank at {cut}"
        )
        held += dark == cut == len(study.exits)
        some += dark + cut
    word = "holds" if held == len(RUN) else "holds partly" if some else "does not hold here"
    return f"{word}: {'; '.join(said)}"
