"""(h) Attention bars: are tokens to which all later tokens attend evenly darker than the rest?

Question: apart from BOS, do tokens that receive much attention with little variance have a larger dark ratio
|P_dark x| / |x|, and does the ratio correlate with the attention received (Cancedda 2024, section 7)?
Design: the candidates are the tokens of every layer from the one in which the sink is established, without
BOS and without the last eighth of the text. x is the residual that enters the layer. In each layer, the bars
are the 10 % of tokens that receive most attention from later tokens, and of these the half with the lower
variance, which makes 5 %. The rank correlation of attention with the ratio is computed by text and layer.
Control: other tokens of the same layer, matched in position and frequency, since early and frequent tokens
receive more attention whatever they hold; the correlation given both; and random subspaces of the same rank.
"""

import numpy as np
import pandas as pd

import spectral_sinks as ss

GIVEN = ("position", "usual", "count")
"""Covariates: position, mean attention that the position receives over the texts, and count of the token."""


def run(study: ss.experiments.Study) -> ss.experiments.Finding:
    # candidates, bars, and their matched tokens, for the dark band and the random subspaces
    model, dark = study.model, study.unembedding.dark()
    spaces = {"dark": dark}
    spaces |= {f"random {seed}": ss.random_subspace(dark.d, dark.rank, seed) for seed in range(study.draws)}
    table = ss.sinks.candidates(ss.sinks.received(model, study.windows, spaces), model)
    table = table.assign(
        count=table.groupby(["layer", "token"])["token"].transform("size"),
        usual=table.groupby(["layer", "position"])["attention"].transform("mean"),
    )
    marked = ss.sinks.mark_bars(table)
    bars = ss.sinks.matched(table, marked, "dark")
    excess = bars.assign(excess=bars["dark"] - bars["control"])
    null = [_excess(ss.sinks.matched(table, marked, name), name) for name in list(spaces)[1:]]

    # mean ratios by layer, and rank correlations, each with the range of the random subspaces
    classes = {"bars": (bars, "dark"), "matched": (bars, "control"), "rest": (table[~marked], "dark")}
    levels = pd.concat(
        ss.stats.summarise(rows, ["layer"], column).assign(tokens=name)
        for name, (rows, column) in classes.items()
    )
    random = table.groupby("layer")[list(spaces)[1:]].mean()
    levels = levels.merge(
        pd.DataFrame({"random_low": random.min(axis=1), "random_high": random.max(axis=1)}), on="layer"
    )
    links = pd.concat(_correlations(table, name) for name in spaces)
    own = links[links["subspace"] == "dark"]
    correlation = pd.concat(
        ss.stats.summarise(own, ["layer"], kind).assign(kind=kind) for kind in ("plain", "given both")
    )
    drawn = links[links["subspace"] != "dark"].groupby(["layer", "subspace"])[["plain", "given both"]].mean()
    spread = drawn.groupby("layer").agg(["min", "max"])
    correlation = correlation.assign(
        random_low=[spread.loc[r["layer"], (r["kind"], "min")] for _, r in correlation.iterrows()],
        random_high=[spread.loc[r["layer"], (r["kind"], "max")] for _, r in correlation.iterrows()],
    )
    # which tokens are bars, and the excess at other quantiles
    tokens = _tokens(table, marked, model)
    steps = pd.DataFrame([_step(table, most) for most in (0.02, 0.05, 0.1, 0.2)])
    for rows, name in (
        (levels, ""),
        (correlation, "_correlation"),
        (tokens, "_tokens"),
        (steps, "_quantiles"),
    ):
        study.save(rows, f"bars{name}")
    ss.figures.bars(levels, correlation, tokens.head(15), study.figure("bars"))

    by = own.groupby("document")[["plain", "given both"]].mean()
    over = drawn.groupby("subspace").mean()
    ten = tokens.head(10)
    chance = float(np.sqrt(dark.rank / dark.d))
    return ss.experiments.Finding(
        [
            ss.experiments.answer(
                "dark ratio of bars",
                bars.groupby("document")["dark"].mean(),
                f"matched {bars.groupby('document')['control'].mean().mean():.4f}, "
                f"rest {table[~marked].groupby('document')['dark'].mean().mean():.4f}, chance {chance:.4f}",
            ),
            ss.experiments.answer(
                "dark ratio of bars above tokens matched in position and frequency",
                excess.groupby("document")["excess"].mean(),
                f"{study.draws} random: {min(null):+.4f} to {max(null):+.4f}",
            ),
            ss.experiments.answer(
                "bars among (token, layer) pairs",
                float(marked.mean()),
                f"{int(marked.sum())} of {len(table)}, by quantile; with a match {len(bars)}; "
                f"layers {table['layer'].min()} to {table['layer'].max()}",
            ),
            ss.experiments.answer(
                "median position of bars",
                float(table[marked]["position"].median()),
                f"all candidates {table['position'].median():.0f}",
            ),
            *(
                ss.experiments.answer(
                    f"rank correlation of attention received with dark ratio, {label}",
                    by[kind],
                    f"{study.draws} random: {over[kind].min():+.3f} to {over[kind].max():+.3f}",
                )
                for kind, label in (("plain", "plain"), ("given both", "given position and frequency"))
            ),
            ss.experiments.answer(
                f"share of bars on ten tokens ({', '.join(ten['text'].map(repr))})",
                float(ten["bars"].sum() / tokens["bars"].sum()),
                f"their share of all candidates {ten['pairs'].sum() / tokens['pairs'].sum():.3f}",
            ),
        ]
    )


def _excess(bars: pd.DataFrame, column: str) -> float:
    """Return by how much bars exceed their matched tokens, mean over documents."""
    return float((bars[column] - bars["control"]).groupby(bars["document"]).mean().mean())


def _step(table: pd.DataFrame, most: float) -> dict[str, object]:
    """Return the excess of bars that are marked at another quantile of attention."""
    found = ss.sinks.matched(table, ss.sinks.mark_bars(table, most), "dark")
    by = (found["dark"] - found["control"]).groupby(found["document"]).mean()
    low, high = ss.stats.mean_interval(by)
    return {"most": most, "bars": len(found), "excess": float(by.mean()), "low": low, "high": high}


def _correlations(table: pd.DataFrame, column: str) -> pd.DataFrame:
    """Return the rank correlation of attention received with a ratio, by document and layer."""
    rows: list[dict[str, object]] = []
    for (document, layer), part in table.groupby(["document", "layer"]):
        pair = part["attention"], part[column]
        given = [part[name] for name in GIVEN]
        row: dict[str, object] = {"document": document, "layer": layer, "subspace": column}
        row |= {
            "plain": ss.stats.rank_correlation(*pair),
            "given both": ss.stats.rank_correlation(*pair, given),
        }
        rows.append(row)
    return pd.DataFrame(rows)


def _tokens(table: pd.DataFrame, marked: pd.Series, model: ss.LanguageModel) -> pd.DataFrame:
    """Return how often each token is a bar, the most frequent bar first."""
    found = table.assign(bar=marked).groupby("token")["bar"].agg(["sum", "size"]).reset_index()
    found = found.rename(columns={"sum": "bars", "size": "pairs"}).sort_values(
        ["bars", "token"], ascending=[False, True]
    )
    ids = found["token"].tolist()
    text = [str(i) if model.tokenizer is None else model.tokenizer.decode([i]) for i in ids]
    return found.assign(text=text, rate=found["bars"] / found["pairs"]).reset_index(drop=True)
