"""The no-op of a real BERT without a head, all-MiniLM-L6-v2: is it [CLS] or [SEP]?

Question: in BERT-base over half of the attention of the middle layers goes to [SEP] (Clark et al. 2019). Does
this smaller, distilled and fine-tuned relative have such a no-op, at which token, and do its heads find it by
one or two modes whose query side is always on? Is it the token or the position? How much of that token's
energy lies in the dark band of the embedding (the model has no unembedding)?
Design: the opening of held-out Wikipedia articles, [CLS] first and [SEP] last. By layer and head: attention,
norm-weighted attention, value ratio, and the conditions of the no-op rule. Then the same windows without
[CLS], without [SEP] and without both.
Control: a random word in the place of the sink; random bases of the queries; uniform attention; random
subspaces for the dark band.

    python experiments/real/minilm.py
"""

import json
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import tyro
from fetch import expected, fetch

import spectral_sinks as ss

NAME = "minilm"
TOKENS = 64
"""Tokens in a window."""

KEPT = ("attention", "weighted", "value_ratio", "top_one", "top_two", "always_on", "rival")
"""The quantities of each head that are written."""


@dataclass(frozen=True)
class Options:
    """Options of a run."""

    model: Path | None = None
    """Folder of an encoder; by default all-MiniLM-L6-v2, fetched if need be."""
    fetched: Path = Path("models")
    out: Path = Path("results/real/minilm")
    text: Path | None = None
    """A file or folder of texts; by default the shipped corpus."""
    documents: int = 32
    draws: int = 20
    """Number of random subspaces."""


def places(windows: ss.Windows) -> dict[str, list[int]]:
    """Return where [CLS], [SEP] and a random word stand in each window."""
    generator = torch.Generator().manual_seed(0)
    lengths = windows.lengths
    drawn = [int(torch.randint(1, length - 1, (), generator=generator)) for length in lengths]
    return {"cls": [0] * len(lengths), "sep": [length - 1 for length in lengths], "random": drawn}


def by_layer(found: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Return the attention to each kind of token by layer, mean over heads, with intervals over documents."""
    rows: list[dict[str, Any]] = []
    for kind, table in found.items():
        mean = table.groupby(["layer", "document"])[list(KEPT[:3])].mean()
        for layer, part in mean.groupby("layer"):
            row: dict[str, Any] = {"size": TOKENS, "set": "all", "documents": len(part)}
            row |= {"layer": layer, "kind": kind, "uniform": 1 / TOKENS}
            for name in KEPT[:3]:
                low, high = ss.stats.mean_interval(part[name])
                row |= {name: float(part[name].mean()), f"{name}_low": low, f"{name}_high": high}
            rows.append(row)
    return pd.DataFrame(rows)


def without(windows: ss.Windows, model: ss.LanguageModel) -> pd.DataFrame:
    """Return the attention to the first and the last token, where [CLS] or [SEP] are left out."""
    rows: list[dict[str, Any]] = []
    for name, start, stop in (("both", 0, 0), ("no [SEP]", 0, -1), ("no [CLS]", 1, 0), ("neither", 1, -1)):
        cut = [row[start : len(row) + stop] for row in windows.rows]
        seen = ss.attention.attention_by_position(model, ss.Windows.of_ids(cut, model))
        for layer in range(model.layers):
            row: dict[str, Any] = {"windows": name, "layer": layer}
            alpha = seen.alpha[:, layer].mean(1)
            for place, at in (("first", 0), ("last", -1)):
                low, high = ss.stats.mean_interval(alpha[:, at])
                row |= {place: float(alpha[:, at].mean()), f"{place}_low": low, f"{place}_high": high}
            rows.append(row | {"most_elsewhere": float(alpha[:, 1:-1].mean(0).max())})
    return pd.DataFrame(rows)


def verdict(layers: pd.DataFrame, heads: pd.DataFrame) -> str:
    mean = layers.pivot(index="layer", columns="kind", values="attention")
    top = {kind: (int(mean[kind].idxmax()), float(mean[kind].max())) for kind in ("cls", "sep")}
    rule = {kind: int(heads.loc[heads["kind"] == kind, "circuit"].sum()) for kind in ("cls", "sep")}
    word = "holds" if rule["sep"] and top["sep"][1] > 0.5 else "does not hold here"
    return (
        f"{word}: at most {top['sep'][1]:.3f} of a layer's attention goes to [SEP] (layer {top['sep'][0]}), "
        f"and {top['cls'][1]:.3f} to [CLS] (layer {top['cls'][0]}); heads with a no-op circuit by the rule: "
        f"{rule['cls']} at [CLS], {rule['sep']} at [SEP], of {len(heads) // 2}"
    )


def main(options: Options) -> None:
    torch.set_num_threads(1)
    folder = options.model or fetch([NAME], options.fetched)[NAME]
    model = ss.load(folder)
    windows = ss.cut(
        ss.documents(options.text, limit=options.documents), model, length=TOKENS, per_document=1
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ss.SpectralWarning)  # the record says which matrix it is
        (spectrum,) = ss.read_spectra(model)
    options.out.mkdir(parents=True, exist_ok=True)

    def save(table: pd.DataFrame, name: str) -> pd.DataFrame:
        table.to_csv(options.out / f"{name}.csv", index=False, float_format="%.5g")
        return table

    at = places(windows)
    circuits = {kind: ss.no_op_circuits(model, windows, spectrum, at[kind]) for kind in ("cls", "sep")}
    use = {kind: found.use for kind, found in circuits.items()}
    use["random"] = ss.head_use(model, windows, at["random"])
    layers = save(by_layer(use), "layers")
    columns = ["layer", "head", *(f"{name}{end}" for name in KEPT for end in ("", "_low", "_high"))]
    columns += ["random_top_two", "modes_needed", "dormant", "circuit", "lacking"]
    heads = [found.heads[columns].assign(size=TOKENS, kind=kind) for kind, found in circuits.items()]
    heads = save(pd.concat(heads), "heads")
    save(without(windows, model), "without")
    energy = ss.energy(model, windows, spectrum)
    dark = energy[energy["band"] == spectrum.count]
    dark = dark.groupby(["site", "layer", "position_class"], as_index=False)[["share", "norm"]].mean()
    save(dark, "dark")
    sinks = ss.find_sinks(model, windows, spectrum, length=TOKENS, draws=options.draws)
    save(sinks.summary(), "sinks")
    ss.figures.no_op_attention(layers, heads, options.out / "no_op.png")
    record = {
        "model": "all-MiniLM-L6-v2" if options.model is None else model.name,
        "source": expected(NAME) if options.model is None else None,
        "fingerprint": model.fingerprint[:16],
        "spectrum": repr(spectrum),
        "chance_dark": spectrum.dark().rank / spectrum.d,
        "windows": windows.record,
        "draws_per_control": options.draws,
        "versions": ss.sweeps.versions(),
        "verdict": verdict(layers, heads),
    }
    (options.out / "minilm.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except ss.InputError as error:
        print(error, file=sys.stderr)
        sys.exit(1)
