"""Is it the dark band, or the energy in it? Controls of the same energy for single components and the lens.

Question: does the removal of the dark band from what a component writes, or from what the logit lens reads,
cost more than the loss of as much energy in random directions? A random subspace of the band's rank, the
control of `components.py` and `lens.py`, takes less energy where the band holds more than chance.
Design: of the MLPs and attention components in the layers of the study, the one whose output costs most
without its dark band is taken. The band is removed from its output at all tokens, at the first alone and at
all but the first. The lens reads the exit at half of the depth and the last one without the dark band, with
the scale that the final norm has for the whole residual.
Control: 20 random subspaces of the same rank, and 20 that take the same share of the energy of the same
tokens, at the same place.
"""

from collections.abc import Callable
from typing import Any

import pandas as pd
import torch
from real_study import RealStudy, difference, mass_above, residuals, words

import spectral_sinks as ss

WHERE: dict[Any, slice] = {"all": slice(None), "first": slice(1), "all-but-first": slice(1, None)}
CONTROLS = ("same rank", "same energy")


def run(study: RealStudy) -> ss.experiments.Finding:
    chosen = study.save(components(study), "same_energy_components")
    costliest = chosen.loc[chosen["delta_nll"].idxmax()]
    written = study.save(
        output(study, ss.Site(costliest["site"], int(costliest["layer"]))), "same_energy_output"
    )
    last = study.model.layers - 1
    read = study.save(
        pd.concat([lens(study, layer) for layer in (last // 2, last)], ignore_index=True), "same_energy_lens"
    )
    compared = [compare(part, f"output of {costliest['site']} {costliest['layer']}, {tokens} tokens")
                for tokens, part in written.groupby("tokens", sort=False)]  # fmt: skip
    compared += [compare(part, f"lens at exit {layer}") for layer, part in read.groupby("layer", sort=False)]
    return ss.experiments.Finding([row for row, _ in compared], verdict=verdict(compared))


def components(study: RealStudy) -> pd.DataFrame:
    """Return the cost of each component's dark band, at all tokens."""
    sites = [ss.Site(kind, layer) for kind in ("mlp", "attention") for layer in study.layers]
    dark = ss.remove(study.unembedding.dark())
    effects = study.evaluate({str(site): {site: dark} for site in sites})
    return pd.DataFrame(
        {"site": site.kind, "layer": site.layer} | difference(effects[str(site)]) for site in sites
    )


def output(study: RealStudy, site: ss.Site) -> pd.DataFrame:
    """Return the effect of removing the dark band, and of each control, from the output of a component."""
    dark, x = study.unembedding.dark(), residuals(study.model, study.windows, site)
    cells: dict[str, dict[ss.Site, Any]] = {}
    for tokens, part in WHERE.items():
        cells[f"{tokens}|dark|"] = {site: ss.remove(dark, tokens=tokens)}
        for seed in range(study.draws):
            random = ss.random_subspace(dark.d, dark.rank, seed)
            matched = ss.spectra.energy_matched(dark, x[:, part], seed)
            cells[f"{tokens}|same rank|{seed}"] = {site: ss.remove(random, tokens=tokens)}
            cells[f"{tokens}|same energy|{seed}"] = {site: ss.remove(matched, tokens=tokens)}
    rows: list[dict[str, Any]] = []
    for name, effect in study.evaluate(cells).items():
        tokens, edit, draw = name.split("|")
        rows.append(
            {"site": site.kind, "layer": site.layer, "tokens": tokens, "edit": edit, "draw": draw}
            | {"rank": effect.rank}
            | difference(effect)
            | mass_above(effect, site.layer)
            | {"removed_energy_share": float(effect.table["removed_energy_share"].mean())}
        )
    return pd.DataFrame(rows)


def read_lens(
    study: RealStudy, layer: int
) -> tuple[torch.Tensor, torch.Tensor, Callable[[torch.Tensor], pd.Series]]:
    """Return the residuals at an exit, those that the lens reads, and what its NLL rises by without a part.

    The first are `[windows, tokens, d]`, and the second have only the tokens whose prediction is scored. The
    function takes what is left out of the second, of the same shape, and returns a value for each document.
    Raises InputError for a model whose final norm centres the residual, which would mix what is left out with
    the rest.
    """
    model = study.model
    if model.centres_residual:
        raise ss.InputError(f"the final norm of {model.name} is a LayerNorm: this lens is for RMSNorm")
    x = residuals(study.model, study.windows, ss.Site("exit", layer))
    ids, sample = torch.stack(list(study.windows.rows)), ss.nll.Sample.of(study.predict)
    rows, width = torch.arange(len(ids)), ids.shape[1] - 1
    places = torch.arange(width).expand(len(ids), -1)
    if sample is not None:
        places = sample.drawn_each(rows.tolist(), width)
    read, targets = x[rows[:, None], places], ids[rows[:, None], places + 1]
    with torch.no_grad():
        final = model.module.get_submodule(model.layout.final_norm)(read)
    gained = model.final_gain * read
    scale = (final * gained).sum(-1, keepdim=True) / gained.square().sum(-1, keepdim=True)

    def nll(final: torch.Tensor) -> pd.Series:
        logits = model.unembed(final).flatten(0, 1)
        losses = torch.nn.functional.cross_entropy(logits, targets.flatten(), reduction="none")
        by_window = losses.detach().view_as(targets).double().mean(1).numpy()
        return pd.Series(by_window, study.windows.document).groupby(level=0).mean()

    whole = nll(final)
    return x, read, lambda removed: nll(final - scale * model.final_gain * removed) - whole


def lens(study: RealStudy, layer: int) -> pd.DataFrame:
    """Return what the NLL of the lens at an exit rises by without the dark band, and without each control."""
    dark = study.unembedding.dark()
    x, read, risen_without = read_lens(study, layer)
    spaces = {"dark|": dark}
    for seed in range(study.draws):
        spaces[f"same rank|{seed}"] = ss.random_subspace(dark.d, dark.rank, seed)
        spaces[f"same energy|{seed}"] = ss.spectra.energy_matched(dark, x, seed)
    found: list[dict[str, Any]] = []
    for name, space in spaces.items():
        edit, draw = name.split("|")
        risen = risen_without(space.project(read))
        low, high = ss.stats.mean_interval(risen)
        found.append(
            {"layer": layer, "edit": edit, "draw": draw, "rank": space.rank}
            | {"delta_nll": risen.mean(), "low": low, "high": high}
            | {"removed_energy_share": float(space.share(x.double()).mean())}
        )
    return pd.DataFrame(found)


def compare(rows: pd.DataFrame, place: str) -> tuple[dict[str, Any], bool]:
    """Return the answer for one place, and whether the band costs more than every draw of its energy."""
    dark = rows[rows["edit"] == "dark"].iloc[0]
    said = [f"{dark['removed_energy_share']:.3f} of the energy"]
    drawn = {kind: rows[rows["edit"] == kind] for kind in CONTROLS}
    for kind, part in drawn.items():
        least, most = part["rank"].min(), part["rank"].max()
        ranks = f"rank {least}" if least == most else f"rank {least} to {most}"
        said.append(f"{len(part)} of the {kind} ({ranks}) {words(part['delta_nll'])}")
    cost, interval = float(dark["delta_nll"]), (float(dark["low"]), float(dark["high"]))
    found = ss.experiments.answer(
        f"NLL difference without the dark band, {place}", cost, "; ".join(said), interval
    )
    return found, cost > drawn["same energy"]["delta_nll"].max()


def verdict(compared: list[tuple[dict[str, Any], bool]]) -> str:
    beyond = [row["quantity"].split(", ", 1)[1] for row, more in compared if more]
    word = "holds" if len(beyond) == len(compared) else "holds partly" if beyond else "does not hold here"
    return (
        f"{word}: the dark band costs more than any random subspace of the same energy at {len(beyond)} of "
        f"{len(compared)} places ({'; '.join(beyond) or 'none'})"
    )
