"""The most attended tokens of each layer: are they dark, and does the dark band at them matter?

For sinks that are spread out: tokens that receive much attention from later ones, wherever they stand, beside
tokens of the same layer that are alike in position and frequency.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from spectral_sinks.data.texts import Windows
from spectral_sinks.interventions.sites import Site
from spectral_sinks.measure.nll.effects import evaluate_all
from spectral_sinks.measure.sinks.attention_bars import received, strata
from spectral_sinks.models.language import LanguageModel
from spectral_sinks.spectra.filters import remove
from spectral_sinks.spectra.spectrum import Spectrum
from spectral_sinks.spectra.subspace import Subspace, random_subspace
from spectral_sinks.stats import holm, mean_interval, rank_correlation, sequential_p, sign_flip

TOP = 0.05
"""Share of the tokens of a layer that are its most attended ones [ours]."""

MASKS = 5
"""Draws of each control of the NLL: they are averaged, and compared by document."""

GIVEN = ("position", "usual", "count")
"""What the rank correlation of attention and darkness is taken given."""


def attended(
    model: LanguageModel, windows: Windows, spectrum: Spectrum, *, draws: int = 20, batch_size: int = 8
) -> pd.DataFrame:
    """Every token of every layer, one row each: what `received` says, over chance.

    `relative` is the attention from later tokens over what they would give if they attended evenly; `late`
    marks positions that fewer than half of the queries follow; `dark`, `random 0`, ... are shares of the
    energy of what the layer reads in the dark band and in random subspaces of its rank. Raises InputError as
    `received` does.
    """
    dark = spectrum.dark()
    spaces: dict[str, Subspace] = {"dark": dark}
    spaces |= {f"random {seed}": random_subspace(dark.d, dark.rank, seed) for seed in range(draws)}
    table = received(model, windows, spaces, batch_size=batch_size)
    length = table.groupby("window")["position"].transform("max").to_numpy() + 1
    sums = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, length.max() + 1))])
    k = table["position"].to_numpy()
    with np.errstate(invalid="ignore"):
        later = (sums[length] - sums[k + 1]) / (length - 1 - k)  # queries strictly after k
    uniform = later if model.causal else 1 / length
    table[list(spaces)] **= 2
    return table.assign(relative=table["attention"] / uniform, late=k >= length / 2)


def most_attended(table: pd.DataFrame) -> pd.DataFrame:
    """Of `attended`, the tokens after the first that half of the queries follow, and which are `top`.

    `top` are the 5 % of a layer with the highest `relative`. Beside it what each is matched by: its `count`
    in the layer, the `usual` attention at its position, and the `stratum` that both make.
    """
    inner = table[(table["position"] > 0) & ~table["late"]].reset_index(drop=True)
    by = inner.groupby("layer")["relative"]
    return inner.assign(
        top=inner["relative"] > by.transform("quantile", 1 - TOP),
        count=inner.groupby(["layer", "token"])["token"].transform("size"),
        usual=inner.groupby(["layer", "position"])["relative"].transform("mean"),
        stratum=strata(inner),
    )


def shuffled(part: pd.DataFrame, seed: int) -> NDArray[np.bool_]:
    """The labels `top` dealt anew within each stratum of a layer."""
    stratum, top = part["stratum"].to_numpy(), part["top"].to_numpy()
    order = np.lexsort((np.random.default_rng(seed).random(len(part)), stratum))
    dealt = np.empty_like(top)
    dealt[order] = top[np.argsort(stratum, kind="stable")]
    return dealt


def attended_darkness(inner: pd.DataFrame) -> tuple[pd.DataFrame, pd.Series]:
    """Dark share of the most attended against their matches, by layer; and the excess by document.

    Of `most_attended`. Columns: `relative`, `top`, `matched`, their difference `excess` with `low` and `high`
    over documents, and `random_low`, `random_high`, the range of the same in random subspaces; `p` of
    permutations within strata (one-sided) and `p_holm` over layers; `rho`, the rank correlation of attention
    with the dark share given position and frequency, with interval, and its range in random subspaces. The
    excess by document is the mean over layers.
    """
    names = [name for name in inner.columns if name == "dark" or name.startswith("random ")]
    rows: list[dict[str, object]] = []
    excess: list[pd.Series] = []
    for layer, part in inner.groupby("layer"):
        others = part[~part["top"]].groupby("stratum")[names].mean()
        top = part[part["top"] & part["stratum"].isin(others.index)]
        control = others.loc[top["stratum"]].set_index(top.index)
        means = pd.concat([top[names] - control, top[["document"]]], axis=1).groupby("document").mean()
        excess.append(means["dark"])
        low, high = mean_interval(means["dark"])
        p, draws = _permuted(part)
        row: dict[str, object] = {
            "layer": layer,
            "relative": top["relative"].mean(),
            "top": top["dark"].mean(),
        }
        row |= {"matched": control["dark"].mean(), "excess": means["dark"].mean(), "low": low, "high": high}
        row |= {"random_low": means[names[1:]].mean().min(), "random_high": means[names[1:]].mean().max()}
        rows.append(row | {"p": p, "permutations": draws} | _linked(part, names))
    found = pd.DataFrame(rows)
    return found.assign(p_holm=holm(found["p"].tolist())), pd.concat(excess, axis=1).mean(axis=1)


def _permuted(part: pd.DataFrame) -> tuple[float, int]:
    """One-sided p value of the most attended of a layer being this dark, and the permutations drawn."""
    dark = part["dark"].to_numpy()
    observed = float(dark[part["top"]].mean())
    return sequential_p(observed, lambda seed: float(dark[shuffled(part, seed)].mean()))


def _linked(part: pd.DataFrame, names: list[str]) -> dict[str, float]:
    """Rank correlation of attention with dark share given position and frequency; mean over documents."""
    links = {
        name: [
            rank_correlation(of["relative"], of[name], [of[column] for column in GIVEN])
            for _, of in part.groupby("document")
        ]
        for name in names
    }
    drawn = [float(np.mean(links[name])) for name in names[1:]]
    low, high = mean_interval(links["dark"])
    row = {"rho": float(np.mean(links["dark"])), "rho_low": low, "rho_high": high}
    return row | {"rho_random_low": min(drawn), "rho_random_high": max(drawn)}


def attended_cost(
    model: LanguageModel, windows: Windows, spectrum: Spectrum, inner: pd.DataFrame, *, draws: int = MASKS
) -> pd.DataFrame:
    """What removing the dark band at the most attended tokens of each layer costs, nats per token, by layer.

    Of `most_attended`, at what the layer reads. `most attended`, `matched` (as many tokens dealt anew within
    strata) and `random` (random subspaces at the same tokens), each the mean of `draws`; `above_matched` and
    `above_random` paired by document, with `_low`, `_high`, and p of sign flips, with Holm over layers.
    """
    return costs(removal(model, windows, spectrum.dark(), inner, range(draws)))


def removal(
    model: LanguageModel, windows: Windows, dark: Subspace, inner: pd.DataFrame, draws: Sequence[int]
) -> pd.DataFrame:
    """NLL without the dark band at the most attended tokens of a layer, and the controls, by document."""
    cells: dict[str, tuple[Site, Subspace, torch.Tensor]] = {}

    def mask(part: pd.DataFrame, chosen: NDArray[np.bool_]) -> torch.Tensor:
        found = torch.zeros(len(windows.rows), windows.length, dtype=torch.bool)
        found[part["window"].to_numpy()[chosen], part["position"].to_numpy()[chosen]] = True
        return found

    for layer, part in inner.groupby("layer"):
        site = Site("exit", int(layer) - 1) if layer else Site("embedding")
        top = mask(part, part["top"].to_numpy())
        cells[f"{layer}|most attended|0"] = site, dark, top
        for seed in draws:
            cells[f"{layer}|matched|{seed}"] = site, dark, mask(part, shuffled(part, seed))
            cells[f"{layer}|random|{seed}"] = site, random_subspace(dark.d, dark.rank, seed), top
    rows: list[pd.DataFrame] = []
    for places, ids in windows.batches(16):  # a mask says which tokens of one batch
        here = Windows.of_ids(list(ids), model, [windows.document[place] for place in places])
        edits = {
            name: {site: remove(space, tokens=tokens[places, : ids.shape[1]])}
            for name, (site, space, tokens) in cells.items()
        }
        for name, effect in evaluate_all(model, here, edits).items():
            layer, kind, draw = name.split("|")
            found = effect.table[["document", "delta_nll"]]
            rows.append(found.assign(layer=int(layer), kind=kind, draw=int(draw)))
    return pd.concat(rows).groupby(["layer", "kind", "draw", "document"], as_index=False)["delta_nll"].mean()


def costs(effects: pd.DataFrame) -> pd.DataFrame:
    """By layer: the three costs, and the most attended above each control, paired by document."""
    by = effects.groupby(["layer", "kind", "document"])["delta_nll"].mean().unstack("kind")
    rows: list[dict[str, object]] = []
    for layer, part in by.groupby("layer"):
        row: dict[str, object] = {"layer": layer}
        for kind in part.columns:
            low, high = mean_interval(part[kind])
            row |= {kind: part[kind].mean(), f"{kind}_low": low, f"{kind}_high": high}
        for control in ("matched", "random"):
            excess = part["most attended"] - part[control]
            low, high = mean_interval(excess)
            row |= {f"above_{control}": excess.mean()}
            row |= {f"above_{control}_low": low, f"above_{control}_high": high}
            row |= {f"p_{control}": sign_flip(excess)}
        rows.append(row)
    found = pd.DataFrame(rows)
    return found.assign(**{f"p_{c}_holm": holm(found[f"p_{c}"].tolist()) for c in ("matched", "random")})
