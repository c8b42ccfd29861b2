"""A designated sink: can the sink token be chosen, during or after training, and is it then dark?

Question: does the sink follow a fixed token that is put at a chosen position during training? Does a learned
logit per head, or softmax-off-by-one, replace the sink? Can a position be made the sink of a trained model?
Does the dark tail follow?
Design: after training, `ss.designate` tries edits from the lightest on, and reports which one works, its cost
in NLL, and whether the new sink is dark. For the effect of training, variants of sinklet (`train_sinklet.py`
with the same data, budget and seeds) are measured on held-out text. Each variant reads windows as in its
training. Intervals are over seeds.
Control: the same edit at random other positions, the plain variants of training, and random subspaces.

    python experiments/designated.py runs/variants/*/model --out results
"""

import json
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import tyro
from safetensors.torch import load_file
from tyro.conf import Positional

import spectral_sinks as ss

POSITION = 16
"""The position that is to become the sink, during training and after it."""

LEAST = 16
"""Number of queries that a position needs to count as another sink, since a mean over fewer is unreliable."""

COLUMNS = ["heldout_nll", "sink_rate", "mass", "to_sink_logit", "norm_ratio", "share", "others"]


def run(study: ss.experiments.Study) -> ss.experiments.Finding:
    """Designate a sink after training, for any model."""
    found = ss.designate(
        study.model, study.windows, POSITION, spectrum=study.unembedding, controls=5, draws=study.draws
    )
    study.save(found.tried, "designated")
    study.save(found.where, "designated_where")
    ss.figures.designated(found.tried, found.where, POSITION, found.old, study.figure("designated"))
    others = f"at other positions {found.nll.least:.4f} to {found.nll.most:.4f}"
    share = f"random {found.share.least:.3f} to {found.share.most:.3f}; others {found.others.value:.3f}"
    answers = [
        ss.experiments.answer(
            "interventions tried, lightest first",
            len(found.tried),
            f"the lightest that works: {found.intervention}",
        ),
        measured("NLL before", found.baseline_nll, "nats per token"),
        measured("NLL after", found.nll, others),
        measured("NLL difference", found.delta_nll, f"of {found.intervention}"),
        measured(f"attention to position {POSITION}, before", found.mass_before, "uniform 1 / tokens seen"),
        measured(f"attention to position {POSITION}, after", found.mass, found.intervention),
        measured("attention to the old sink, before", found.old_mass_before, f"position {found.old}"),
        measured("attention to the old sink, after", found.old_mass, found.intervention),
        measured("dark share of the position, before", found.share_before, share),
        measured("dark share of the position, after", found.share, share),
    ]
    word = "holds partly" if found.works else "does not hold here"
    return ss.experiments.Finding(
        answers, verdict=f"{word}: after training, {found.intervention}; the new sink is {found.verdict}"
    )


def measured(name: str, value: ss.stats.Estimate, control: str) -> dict[str, object]:
    return ss.experiments.answer(name, value.value, control, (value.low, value.high))


@dataclass(frozen=True)
class Options:
    """Options: folders of trained variants, each with a model, recipe.json and maybe sinks.safetensors."""

    models: Positional[tuple[Path, ...]]
    out: Path = Path("runs/designated")
    text: str | None = None
    """Held-out text; by default the shipped corpus."""
    documents: int = 16
    draws: int = 20


def variant(folder: Path, options: Options) -> dict[str, object]:
    """Measure one variant: strength and darkness of the sink at its intended position, other attention."""
    # the model, and windows that open as in its training
    recipe = json.loads((folder / "recipe.json").read_text())
    model = ss.load(folder)
    place = recipe["position"] if recipe["bos"] else 0
    kind = f"BOS at {place}" if place else "no BOS" if not recipe["bos"] else "BOS"
    kind += "" if recipe["softmax"] == "plain" else f", {recipe['softmax']}"
    texts = ss.documents(options.text, limit=options.documents)
    ids = [model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts]
    rows = [row[: recipe["window"] - recipe["bos"]] for row in ids]
    if recipe["bos"]:
        rows = [[*row[:place], 0, *row[place:]] for row in rows]
    windows = ss.Windows.of_ids(rows, model, list(range(len(rows))))
    # attention and residuals, with the learned sink logit where there is one
    sinks = folder / "sinks.safetensors"
    logit = ss.attention.SinkLogit(load_file(sinks)["sink_logits"]) if sinks.exists() else None
    u = ss.read_spectrum(model)
    dark, sites = u.dark(), [ss.Site("embedding"), *(ss.Site("exit", i) for i in range(model.layers - 1))]
    draws = [ss.random_subspace(model.d, dark.rank, seed) for seed in range(options.draws)]
    with ss.attending(model, logit) if logit else nullcontext():
        seen = ss.attention.attention_by_position(model, windows)
        x = ss.trace(
            model, torch.stack(list(windows.rows)), {}, sites,
            readout=lambda final, read, weights: torch.stack([read[site] for site in sites]),
        )  # fmt: skip
    alpha = seen.alpha.mean(0)  # by layer, head and position
    # the layer with the strongest sink, the strongest other position, and the residual that the layer reads
    layer = int(alpha[:, :, place].mean(1).argmax())
    other = np.delete(np.arange(alpha.shape[-1] - LEAST), place)
    strongest = np.unravel_index(alpha[:, :, other].argmax(), alpha[:, :, other].shape)
    read, rest = x[layer], torch.arange(x.shape[2]) != place
    norms = read.norm(dim=-1)
    return {
        "kind": kind,
        "seed": recipe["seed"],
        "heldout_nll": json.loads((folder.parent / "log.jsonl").read_text().splitlines()[-1])["heldout_nll"],
        "place": place,
        "layer": layer,
        "sink_rate": float((seen.alpha[..., place] > 0.3).mean()),
        "mass": float(alpha[layer, :, place].mean()),
        "uniform": ss.attention.uniform_attention(place),
        "to_sink_logit": float(np.mean(seen.to_sink_logit)),
        "strongest_other": float(alpha[:, :, other][strongest]),
        "strongest_other_position": int(other[strongest[-1]]),
        "norm_ratio": float((norms[:, place] / norms[:, rest].median(1).values).mean()),
        "convention": u.convention,
        "share": float(dark.share(read[:, place]).mean()),
        "others": float(dark.share(read[:, rest]).mean()),
        "share_most": max(float(draw.share(read[:, place]).mean()) for draw in draws),
    }


def main(options: Options) -> None:
    table = pd.DataFrame([variant(folder, options) for folder in options.models])
    table = table.sort_values(["kind", "seed"], ignore_index=True)
    over = []
    for kind, rows in table.groupby("kind"):
        for column in COLUMNS:
            low, high = ss.stats.t_interval(rows[column])
            part = {"kind": kind, "quantity": column, "mean": rows[column].mean(), "low": low, "high": high}
            over.append(part | {"least": rows[column].min(), "most": rows[column].max(), "seeds": len(rows)})
    options.out.mkdir(parents=True, exist_ok=True)
    for name, part in (("designated_variants", table), ("designated_over_seeds", pd.DataFrame(over))):
        part.to_csv(options.out / f"{name}.csv", index=False, float_format="%.6g")
    ss.figures.variants(table, options.out / "designated_variants.png")
    print(pd.DataFrame(over).round(3).to_string(index=False))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
