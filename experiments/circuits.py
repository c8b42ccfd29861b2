"""The no-op circuit behind the sink: which heads have one, and does it use the dark band?

Question: do the heads that attend to BOS write next to nothing from it, and do they attend to it through one
or two modes of their scores whose query side is always on? Does what these modes read, and what the value of
the sink writes, lie in the dark band?
Design: `ss.no_op_circuits` is applied to every head, with position 0 as the sink; its documentation states
the rule. Each head has its attention and value ratio, the share of the sink's margin in the two leading
modes, and three dark shares: of the direction that the key side reads, of what it reads at the sink, and of
what the value of the sink writes.
Control: random bases for the modes, and chance for the bands. For the embedded model, the control is also its
twin trained without BOS, which should have no such head.
"""

import pandas as pd

import spectral_sinks as ss

TWIN = "sinklet-nobos"


def run(study: ss.experiments.Study) -> ss.experiments.Finding:
    # the heads of the model, and the quantities of those with a circuit
    found = ss.no_op_circuits(study.model, study.windows, study.unembedding)
    convention = study.unembedding.convention
    tables = [found.heads.assign(model=study.model.name, convention=convention)]
    heads = found.heads.set_index(["layer", "head"])
    chance = study.unembedding.dark().rank / study.unembedding.d
    answers = [
        ss.experiments.answer(f"heads of {len(heads)} with a no-op circuit at position 0", len(found.found)),
        ss.experiments.answer(
            "heads that are dormant by the published sink event", int((heads["dormant"] > 0.5).sum())
        ),
    ]
    for layer, head in found.found:
        row = heads.loc[(layer, head)]
        for column, name, control in (
            ("attention", "attention on the sink", f"norm-weighted {row['weighted']:.3f}"),
            ("value_ratio", "value ratio", "no-op at most 0.2"),
            (
                "top_two",
                "share of the margin in two modes",
                f"random bases at most {row['random_top_two']:.3f}",
            ),
        ):
            interval = (row[f"{column}_low"], row[f"{column}_high"])
            answers.append(
                ss.experiments.answer(f"head {layer}.{head}: {name}", row[column], control, interval)
            )
        for column, name in (
            ("key_dark", "the direction that the key side reads"),
            ("reading_dark", "what it reads at the sink"),
            ("value_dark", "what the sink's value writes"),
        ):
            answers.append(
                ss.experiments.answer(
                    f"head {layer}.{head}: dark share of {name}", row[column], f"chance {chance:.3f}"
                )
            )
    # the twin without BOS is the negative control of the embedded model
    said = f"{len(found.found)} heads of {len(heads)}"
    if study.model.name == ss.DEFAULT:
        twin = ss.load(TWIN)
        texts = ss.documents(limit=len(set(study.windows.document)))
        windows = ss.cut(texts, twin, length=study.windows.length, per_document=1)
        other = ss.no_op_circuits(twin, windows, ss.read_spectrum(twin))
        tables.append(other.heads.assign(model=TWIN))
        most = f"largest attention on position 0: {other.heads['attention'].max():.3f}"
        answers.append(
            ss.experiments.answer(
                f"heads of {TWIN} with a no-op circuit at position 0", len(other.found), most
            )
        )
        said += f", {len(other.found)} of its twin without BOS"
    table = pd.concat(tables, ignore_index=True).drop(columns="ranks")
    study.save(table, "circuits")
    ss.figures.circuits(found.heads, study.figure("circuits"))
    if found.found:
        layer, head = max(found.found, key=lambda pair: heads.loc[pair, "attention"])
        study.save(found.sides(layer, head), "circuits_sides")
        study.save(found.profile(layer, head), "circuits_profile")
        ss.figures.circuit_page(
            f"{study.model.name}, head {layer}.{head}",
            heads.loc[(layer, head)],
            found.sides(layer, head),
            found.profile(layer, head),
            0,
            study.figure("circuits_head"),
        )
    dark = sum(bool(heads.loc[pair, "reading_dark"] > 0.5) for pair in found.found)
    word = (
        "does not hold here" if not found.found else "holds" if dark == len(found.found) else "holds partly"
    )
    verdict = f"{word}: a no-op circuit in {said}; {dark} read the sink mostly in the dark band"
    return ss.experiments.Finding(answers, verdict=verdict)
