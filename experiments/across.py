"""Across models: is there a sink, where does it begin, is its carrier dark, and what does its tail cost?

Question: which models and checkpoints have an attention sink at position 0, and is it dark (Cancedda 2024,
section 5)? That a sink is dark is measured, never assumed.
Design: `ss.sink_verdict` measures one row per model, and its documentation states the rule. The row holds the
strength of the sink (Sink^0.3 and mass at T = 64), its onset layer, the dark share of the residual that its
strongest layer reads, and the loss of sink and of NLL without the dark band. The model of the study is
measured on its windows, and on the same windows without BOS. Models given on the command line are judged
under the conventions raw and folded.
Control: random subspaces of the rank of the dark band, for the share, the cut and the NLL. The share is also
compared with that of the other tokens.

    python experiments/across.py sinklet gpt2 FOLDER runs/sinklet/step-001000.pt --out DIR

Models are names, folders, hub ids, or checkpoints of `train_sinklet.py`, which show the birth of the sink
over training steps.
"""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
import tyro
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from tyro.conf import Positional

import spectral_sinks as ss


def run(study: ss.experiments.Study) -> ss.experiments.Finding:
    model, windows = study.model, study.windows
    cases = {model.name: windows}
    if windows.opens_with_bos:
        cases[f"{model.name}, without BOS"] = ss.Windows.of_ids(
            [row[1:] for row in windows.rows], model, windows.document
        )
    found = [
        ss.sink_verdict(model, cut, study.unembedding, name=name, draws=study.draws)
        for name, cut in cases.items()
    ]
    return finish(found, study)


def finish(found: list[ss.sinks.SinkVerdict], study: ss.experiments.Study) -> ss.experiments.Finding:
    """Write the table and its figure, and return four answers per model with the verdict."""
    table = study.save(pd.DataFrame([verdict.record() for verdict in found]), "across")
    ss.figures.across(table, study.figure("across"))
    answers = []
    for v in found:
        answers += [
            ss.experiments.answer(
                f"{v.model}: Sink^0.3 at T = 64", v.rate.value, v.verdict, (v.rate.low, v.rate.high)
            ),
            ss.experiments.answer(
                f"{v.model}: dark share of the carrier ({v.site})",
                v.share.value,
                f"random: {v.share.least:.3f} to {v.share.most:.3f}, other tokens {v.others.value:.3f}",
                (v.share.low, v.share.high),
            ),
            ss.experiments.answer(
                f"{v.model}: sink of layer {v.layer} cut by removing the dark band",
                v.cut.value,
                f"random: {v.cut.least:.3f} to {v.cut.most:.3f}",
                (v.cut.low, v.cut.high),
            ),
            ss.experiments.answer(
                f"{v.model}: NLL difference without the dark band",
                v.delta.value,
                f"random: {v.delta.least:+.4f} to {v.delta.most:+.4f}",
                (v.delta.low, v.delta.high),
            ),
        ]
    words = {"dark": "holds", "not dark": "does not hold here", "no sink": "no sink to judge"}
    verdict = ". ".join(f"{v.model}: {words[v.verdict]} ({described(v)}: {v.reason})" for v in found)
    return ss.experiments.Finding(answers, verdict=verdict)


def described(verdict: ss.sinks.SinkVerdict) -> str:
    """Return a verdict with the convention under which it holds; whether there is a sink needs none."""
    word = verdict.verdict
    return word if word == "no sink" else f"{word} under {verdict.convention}"


@dataclass(frozen=True)
class Options:
    """Options of the comparison: the models, and the text."""

    models: Positional[tuple[str, ...]]
    """Names, folders, hub ids, or step-N.pt checkpoints of a training run (whose folder has model/)."""
    out: Path = Path("runs/across")
    name: str = "across"
    """Name of the table and the figure."""
    text: str | None = None
    """Text to measure on; by default the shipped corpus. The tokenizer of each model splits it."""
    documents: int = 16
    draws: int = 20


def open_model(name: str) -> tuple[ss.LanguageModel, str]:
    """Load a model, or a training checkpoint with the configuration of its run; return its label too."""
    path = Path(name)
    if path.suffix != ".pt":
        return ss.load(name), path.name
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path.parent / "model"))
    model.load_state_dict(torch.load(path, weights_only=True)["model"])
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path.parent / "tokenizer")
    model.set_attn_implementation("sdpa_opening")  # the implementation that `load` chooses
    label = f"{path.parent.name}, step {int(path.stem.split('-')[1])}"
    return ss.load(model, tokenizer=tokenizer), label


def main(options: Options) -> None:
    options.out.mkdir(parents=True, exist_ok=True)
    texts = ss.documents(options.text, limit=options.documents)
    rows = []
    for name in options.models:
        model, label = open_model(name)
        windows = ss.cut(texts, model, per_document=1)
        found = ss.sink_verdict(
            model, windows, ss.read_spectra(model, convention="raw"), name=label, draws=options.draws
        )
        rows.append(found.record() | {"data_hash": windows.record["data_hash"]})
        print(f"{label}: {found.disagreement or described(found)} ({found.reason})")
        table = pd.DataFrame(rows)
        table.to_csv(options.out / f"{options.name}.csv", index=False, float_format="%.6g")
        ss.figures.across(table, options.out / f"{options.name}.png")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
