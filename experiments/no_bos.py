"""No BOS: where does attention go without a BOS, and are the tokens that receive it dark?

Question: are there distributed sinks in a model that never saw BOS? On which tokens do they lie (frequency,
punctuation, position), and are they U-dark, as BOS is in the twin model?
Design: in every layer, the attention that each token receives from later tokens is divided by uniform
attention. The most attended tokens are 5 % of each layer. Candidates are the positions that half of the
queries follow, without position 0, because later positions receive attention from their neighbours only. The
measures are the dark share of the residual that the layer reads, the rank correlation of attention and dark
share given position and frequency, and the NLL without the dark band at these tokens alone.
Control: tokens of the same layer, matched in position and frequency (permutations, Holm over layers); random
subspaces of the same rank; as many matched tokens; and the twin with BOS.

The embedded model is compared with its twin `sinklet-nobos`. Any other model is measured on windows without
BOS, although it may have seen BOS in training. Further checkpoints are measured with an interval over them:

    python experiments/no_bos.py FOLDER... --name no_bos_more --out DIR
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import tyro
from scipy import stats
from tyro.conf import Positional

import spectral_sinks as ss

TWIN = "sinklet-nobos"
MASKS = 5
"""Number of draws of each control of the NLL."""


def cases(study: ss.experiments.Study) -> dict[str, ss.experiments.Study]:
    """Return the study without BOS, and for comparison the study itself if its windows open with BOS."""
    model, windows = study.model, study.windows
    rows = [row[1:] for row in windows.rows] if windows.opens_with_bos else windows.rows
    bare = ss.load(TWIN) if model.name == ss.DEFAULT else model
    name = bare.name if bare is not model else f"{model.name}, without BOS"
    found = {
        name: replace(
            study,
            model=bare,
            windows=ss.Windows.of_ids(rows, bare, windows.document),
            unembedding=ss.read_spectrum(bare),
            embedding=ss.read_spectrum(bare, "embedding"),
        )
    }
    return found | ({f"{model.name}, with BOS": study} if windows.opens_with_bos else {})


def described(inner: pd.DataFrame, model: ss.LanguageModel) -> pd.DataFrame:
    """Add the text of each candidate's token, and whether it is punctuation (without letters or digits)."""
    text = {
        i: str(i) if model.tokenizer is None else model.tokenizer.decode([i]) for i in set(inner["token"])
    }
    named = inner["token"].map(text)
    return inner.assign(text=named, punctuation=~named.map(lambda t: any(c.isalnum() for c in t)))


def by_token(inner: pd.DataFrame) -> pd.DataFrame:
    """Return how often each token is among the most attended, the most frequent first."""
    found = inner.groupby(["token", "text", "punctuation"], as_index=False).agg(
        top=("top", "sum"), pairs=("top", "size"), relative=("relative", "mean"), dark=("dark", "mean")
    )
    found = found.assign(rate=found["top"] / found["pairs"])
    return found.sort_values(["top", "token"], ascending=[False, True]).reset_index(drop=True)


def by_position(table: pd.DataFrame) -> pd.DataFrame:
    """Return the relative attention by position in the first half, mean over layers and documents."""
    return ss.stats.summarise(table[~table["late"]], ["position"], "relative")


def sinks_of(name: str, study: ss.experiments.Study) -> dict[str, object]:
    """Return the answer that states how many sinks `find_sinks` finds, and which."""
    tokens = min(64, *(len(row) for row in study.windows.rows))
    found = ss.find_sinks(study.model, study.windows, study.unembedding, length=tokens, draws=study.draws)
    texts = [
        f"{s.token!r} in {s.documents} documents, dark share {s.dark_share.value:.3f}, others "
        f"{s.other_dark_share.value:.3f}, alpha in layer {s.layer} {s.attention_mass.value:.3f}"
        for s in found.sinks
    ]
    rate, most = found.attention.rate(), float(np.nanmax(found.attention.alpha.mean(0)[..., : tokens // 2]))
    return ss.experiments.answer(
        f"{name}: sinks by the rule of find_sinks, T = {tokens}",
        len(found.sinks),
        f"largest mean alpha of a head {most:.3f}; Sink^0.3 at position 0 {rate[:, 0].mean():.3f}, at others "
        f"{rate[:, 1 : tokens // 2].mean():.4f}" + "".join(f"; {text}" for text in texts[:5]),
    )


def measure(study: ss.experiments.Study) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the table of all tokens, and the described candidates."""
    table = ss.sinks.attended(study.model, study.windows, study.unembedding, draws=study.draws)
    return table, described(ss.sinks.most_attended(table), study.model)


def run(study: ss.experiments.Study) -> ss.experiments.Finding:
    # where attention goes in each case, and how dark its targets are
    layers, places, tokens, inners, darker, found = [], [], [], [], [], []
    measured = cases(study)
    for name, case in measured.items():
        table, inner = measure(case)
        layer, excess = ss.sinks.attended_darkness(inner)
        darker.append(excess)
        first = ss.stats.summarise(table[table["position"] == 0], ["layer"], "dark")
        layer["first"], layer["first_low"], layer["first_high"] = first["mean"], first["low"], first["high"]
        layers.append(layer.assign(model=name))
        places.append(by_position(table).assign(model=name))
        tokens.append(by_token(inner).assign(model=name))
        found += [sinks_of(name, case), *answers(name, table, inner, layer, excess)]
        inners.append(inner)
    if len(darker) == 2:
        pair = (darker[1] - darker[0]).dropna()
        quantity = "excess of dark share with BOS minus without, paired by document"
        found.append(ss.experiments.answer(quantity, pair, f"sign flips {ss.stats.sign_flip(pair):.4f}"))
    # the NLL without the dark band at the most attended tokens of the model without BOS
    bare = next(iter(measured.values()))
    draws = min(MASKS, bare.draws)
    cost = ss.sinks.attended_cost(bare.model, bare.windows, bare.unembedding, inners[0], draws=draws)
    for column, control in (
        ("above_matched", "as many matched tokens"),
        ("above_random", "random subspaces"),
    ):
        worst = cost.loc[cost[column].idxmax()]
        found.append(
            ss.experiments.answer(
                f"NLL without the dark band at the most attended, above {control}, largest of the layers",
                float(worst[column]),
                f"layer {worst['layer']:.0f}: {worst['most attended']:+.4f} against "
                f"{worst[column.removeprefix('above_')]:+.4f}, sign flips and Holm "
                f"{worst['p_' + column.removeprefix('above_') + '_holm']:.4f}",
                (float(worst[f"{column}_low"]), float(worst[f"{column}_high"])),
            )
        )
    layer, place, token = (pd.concat(part, ignore_index=True) for part in (layers, places, tokens))
    study.save(place, "no_bos_positions")
    for rows, suffix in ((layer, ""), (token, "_tokens"), (cost, "_nll")):
        study.save(rows.assign(convention=study.unembedding.convention), f"no_bos{suffix}")
    ss.figures.no_bos(layer, place, token, cost, study.figure("no_bos"))
    return ss.experiments.Finding(found, verdict=verdict(int(found[0]["value"]), layers[0], cost))


def answers(
    name: str, table: pd.DataFrame, inner: pd.DataFrame, layer: pd.DataFrame, excess: pd.Series
) -> list[dict[str, object]]:
    """Return the answers about the targets of attention: position 0, and the most attended tokens.

    Args:
        name: the name of the case.
        table: all tokens.
        inner: the described candidates.
        layer: the darkness of the most attended tokens by layer.
        excess: the excess of their dark share over matched tokens, by document.

    """
    top, ten = inner[inner["top"]], by_token(inner).head(10)
    first = table[table["position"] == 0].groupby("document")["relative"].mean()
    links = {
        column: [
            ss.stats.rank_correlation(part["relative"], part[column])
            for _, part in inner.groupby(["document", "layer"])
        ]
        for column in ("count", "position")
    }
    owners = [document for (document, _), _ in inner.groupby(["document", "layer"])]
    link = {key: pd.Series(values).groupby(owners).mean() for key, values in links.items()}
    darker = (layer["p_holm"] <= 0.05) & (layer["low"] > 0)
    beyond = darker & (layer["low"] > layer["random_high"])
    return [
        ss.experiments.answer(f"{name}: attention to position 0 over uniform", first),
        ss.experiments.answer(
            f"{name}: attention to the most attended 5 % over uniform",
            top.groupby("document")["relative"].mean(),
            f"all candidates {inner['relative'].mean():.2f}; above 2: {(inner['relative'] > 2).mean():.4f}",
        ),
        ss.experiments.answer(
            f"{name}: share of punctuation among the most attended",
            top.groupby("document")["punctuation"].mean(),
            f"all candidates {inner['punctuation'].mean():.3f}",
        ),
        ss.experiments.answer(
            f"{name}: share of the most attended on ten tokens ({', '.join(ten['text'].map(repr))})",
            float(ten["top"].sum() / len(top)),
            f"their share of all candidates {ten['pairs'].sum() / len(inner):.3f}",
        ),
        ss.experiments.answer(
            f"{name}: median position of the most attended",
            float(top["position"].median()),
            f"all candidates {inner['position'].median():.0f}",
        ),
        ss.experiments.answer(
            f"{name}: rank correlation of attention with the count of the token", link["count"]
        ),
        ss.experiments.answer(f"{name}: rank correlation of attention with position", link["position"]),
        ss.experiments.answer(
            f"{name}: dark share of the most attended above their matches, mean over layers",
            excess,
            f"most attended {layer['top'].mean():.3f}, matched {layer['matched'].mean():.3f}, "
            f"position 0 {layer['first'].mean():.3f}",
        ),
        ss.experiments.answer(
            f"{name}: layers where the most attended are darker than their matches (Holm, 5 %)",
            int(darker.sum()),
            f"of {len(layer)}; and beyond random subspaces {int(beyond.sum())}; "
            f"smallest adjusted p {layer['p_holm'].min():.4f}",
        ),
    ]


def verdict(listed: int, layer: pd.DataFrame, cost: pd.DataFrame) -> str:
    """State whether the most attended tokens are darker than controls, and what their dark band is worth.

    The controls are matched tokens and random subspaces.
    """
    darker = (layer["p_holm"] <= 0.05) & (layer["low"] > 0) & (layer["low"] > layer["random_high"])
    dearer = (cost["p_matched_holm"] <= 0.05) & (cost["above_matched_low"] > 0)
    word = "holds" if darker.all() else "holds partly" if darker.any() else "does not hold here"
    return (
        f"{word}: {layer['model'].iloc[0]} has {listed or 'no'} sink(s) by the rule of find_sinks; its most "
        "attended 5 % are darker than matched tokens, and that by more than in any random subspace, in "
        f"{int(darker.sum())} of {len(layer)} layers; removing the dark band there costs more than at as "
        f"many matched tokens in {int(dearer.sum())} of {len(cost)}"
    )


@dataclass(frozen=True)
class Options:
    """Options: checkpoints of one kind, such as those of several seeds."""

    models: Positional[tuple[str, ...]]
    """Names or folders of models."""
    out: Path = Path("runs/no_bos")
    name: str = "no_bos_more"
    documents: int = 16
    draws: int = 20


def main(options: Options) -> None:
    options.out.mkdir(parents=True, exist_ok=True)
    texts, rows = ss.documents(limit=options.documents), []
    for name in options.models:
        model = ss.load(name)
        spectra = [ss.read_spectrum(model, matrix) for matrix in ("unembedding", "embedding")]
        windows = ss.cut(texts, model, per_document=1, bos="never")
        table, inner = measure(
            ss.experiments.Study(model, windows, spectra[0], spectra[1], options.out, options.draws)
        )
        layer, excess = ss.sinks.attended_darkness(inner)
        label = Path(name).parent.name if Path(name).is_dir() else name
        top = inner[inner["top"]]
        rows.append(
            {
                "model": label,
                "first": table[table["position"] == 0]["relative"].mean(),
                "relative": top["relative"].mean(),
                "punctuation": top["punctuation"].mean(),
                "excess": excess.mean(),
                "rho": layer["rho"].mean(),
                "darker_layers": int(((layer["p_holm"] <= 0.05) & (layer["low"] > 0)).sum()),
                "layers": len(layer),
            }
        )
        print(rows[-1])
    found = pd.DataFrame(rows).set_index("model").astype(float)
    if len(found) > 1:
        mean, half = found.mean(), stats.t.ppf(0.975, len(found) - 1) * found.sem()  # over checkpoints
        found.loc["mean"], found.loc["low"], found.loc["high"] = mean, mean - half, mean + half
    found.to_csv(options.out / f"{options.name}.csv", float_format="%.6g")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
