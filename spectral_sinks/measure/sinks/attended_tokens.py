"""Test whether the most attended tokens of each layer are dark, and whether the dark tail at them matters.

This is for sinks that are spread out: tokens that receive much attention from later ones, at any position.
They are compared with tokens of the same layer that are similar in position and frequency.
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
from spectral_sinks.spectra.subspace import Subspace, random_subspace, random_subspaces
from spectral_sinks.stats import holm, mean_interval, rank_correlation, sequential_p, sign_flip

TOP = 0.05
"""The share of a layer's tokens that count as its most attended ones [ours]."""

MASKS = 5
"""Draws of each control of the NLL. They are averaged, and compared by document."""

GIVEN = ("position", "usual", "count")
"""The variables that the partial rank correlation of attention and darkness controls for."""


def attended(
    model: LanguageModel,
    windows: Windows,
    spectrum: Spectrum,
    *,
    draws: int = 20,
    batch_size: int | None = None,
) -> pd.DataFrame:
    """Return one row for each token in each layer: the columns of `received`, relative to chance.

    `relative` is the attention from later tokens divided by what they would give under uniform attention.
    `late` marks positions that fewer than half of the queries follow. `dark`, `random 0`, ... are the shares
    of energy, in the residual that the layer reads, in the dark tail and in random subspaces of its rank.

    Args:
        model: a language model.
        windows: the text.
        spectrum: the spectrum whose dark tail is tested.
        draws: number of random subspaces.
        batch_size: windows in a pass.

    Raises:
        InputError: as `received` does.

    """
    dark = spectrum.dark()
    spaces: dict[str, Subspace] = {"dark": dark}
    drawn = random_subspaces(dark.d, dark.rank, draws)
    spaces |= {f"random {seed}": space for seed, space in enumerate(drawn)}
    table = received(model, windows, spaces, batch_size=batch_size)
    # Attention that each position would receive under uniform attention
    length = table.groupby("window")["position"].transform("max").to_numpy() + 1
    sums = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, length.max() + 1))])
    k = table["position"].to_numpy()
    with np.errstate(invalid="ignore"):
        # Under uniform attention query i gives 1 / (i + 1); the mean is over the queries strictly after k
        later = (sums[length] - sums[k + 1]) / (length - 1 - k)
    uniform = later if model.causal else 1 / length
    table[list(spaces)] **= 2
    return table.assign(relative=table["attention"] / uniform, late=k >= length / 2)


def most_attended(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of `attended` to compare: tokens after the first that half of the queries follow.

    The column `top` marks the 5 % of a layer's tokens with the highest `relative`. The other new columns
    serve for matching: `count` is the number of times that the token occurs in the layer, `usual` is the mean
    of `relative` at the position, and `stratum` groups tokens of similar position and frequency (see
    `strata`).
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
    """Return the labels `top` of one layer, permuted within each stratum."""
    stratum, top = part["stratum"].to_numpy(), part["top"].to_numpy()
    order = np.lexsort((np.random.default_rng(seed).random(len(part)), stratum))
    dealt = np.empty_like(top)
    dealt[order] = top[np.argsort(stratum, kind="stable")]
    return dealt


def attended_darkness(inner: pd.DataFrame) -> tuple[pd.DataFrame, pd.Series]:
    """Compare the dark share of the most attended tokens with that of their matches, by layer.

    Args:
        inner: the table of `most_attended`.

    Returns:
        A table with one row per layer, and the excess by document, mean over layers. The columns are
        `relative`; `top` and `matched` (dark shares); their difference `excess`, with `low` and `high` over
        documents; `random_low` and `random_high`, the range of the excess in random subspaces; the one-sided
        `p` of permutations within strata, their number `permutations`, and `p_holm` over layers; `rho`, the
        rank correlation of attention with the dark share given position and frequency, with its interval
        `rho_low` to `rho_high` and its range in random subspaces, `rho_random_low` to `rho_random_high`.

    """
    names = [name for name in inner.columns if name == "dark" or name.startswith("random ")]
    rows: list[dict[str, object]] = []
    excess: list[pd.Series] = []
    for layer, part in inner.groupby("layer"):
        # Match each top token with the mean of the other tokens in its stratum
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
    """Return a one-sided p value for the dark share of the most attended, and the number of permutations."""
    dark = part["dark"].to_numpy()
    observed = float(dark[part["top"]].mean())
    return sequential_p(observed, lambda seed: float(dark[shuffled(part, seed)].mean()))


def _linked(part: pd.DataFrame, names: list[str]) -> dict[str, float]:
    """Return the partial rank correlation of attention with dark share, mean over documents.

    It controls for position and frequency (`GIVEN`).
    """
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
    """Measure the cost in NLL of removing the dark tail at the most attended tokens of each layer.

    Costs are in nats per token. The edit acts on the residual that the layer reads. The costs are `most
    attended`; `matched`, for as many tokens, permuted within strata; and `random`, for random subspaces at
    the same tokens. Both controls are means over the draws.

    Args:
        model: a language model.
        windows: the text.
        spectrum: the spectrum whose dark tail is removed.
        inner: the table of `most_attended`.
        draws: draws of each control.

    Returns:
        One row per layer: each cost and the differences `above_matched` and `above_random`, which are paired
        by document, with `_low` and `_high`; and the p values of sign flips `p_matched` and `p_random`, also
        with Holm's correction over layers (`_holm`).

    """
    return costs(removal(model, windows, spectrum.dark(), inner, range(draws)))


def removal(
    model: LanguageModel, windows: Windows, dark: Subspace, inner: pd.DataFrame, draws: Sequence[int]
) -> pd.DataFrame:
    """Return the change of NLL without the dark tail at the most attended tokens, and for the controls.

    There is one row per layer, kind, draw and document.
    """
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
    for places, ids in windows.batches(16):  # a mask is for one batch
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
    """Return the three costs by layer, and the paired differences of the first from each control."""
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
