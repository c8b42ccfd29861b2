"""The no-op circuit behind the sink: which heads have one, and does it use the dark band?

Question: do the heads that attend to BOS write next to nothing from it, and do they attend to it through one
or two modes of their scores whose query side is always on? Does what these modes read, and what the value of
the sink writes, lie in the dark band?
Design: `ss.no_op_circuits` is applied to every head, with position 0 as the sink; its documentation states
the rule. Each head has its attention and value ratio, the share of the sink's margin in the two leading
modes, and three dark shares: of the direction that the key side reads, of what it reads at the sink, and of
what the value of the sink writes.
Control: random bases for the modes, and chance for the bands. A random direction reads at the sink, on
average, the energy of the sink's residual by band, which is therefore the control of what the key side reads
there. For the embedded model, the control is also its twin trained without BOS, which should have no such
head.
"""

from pathlib import Path

import pandas as pd

import spectral_sinks as ss

TWIN = "sinklet-nobos"

LISTED = 12
"""Number of heads up to which each is answered for by itself, and above which their medians are given."""

QUANTITIES = {
    "attention": "attention on the sink",
    "value_ratio": "value ratio",
    "top_two": "share of the margin in two modes",
    "key_dark": "dark share of the direction that the key side reads",
    "reading_dark": "dark share of what it reads at the sink",
    "value_dark": "dark share of what the sink's value writes",
}


def control(column: str, head: pd.Series, chance: float) -> str:
    """Return what a quantity of a head is compared with."""
    controls = {
        "reading_dark": f"a random direction {head['sink_dark']:.3f} on average",
        "attention": f"norm-weighted {head['weighted']:.3f}",
        "value_ratio": "no-op at most 0.2",
        "top_two": f"random bases at most {head['random_top_two']:.3f}",
    }
    return controls.get(column, f"chance {chance:.3f}")


def run(study: ss.experiments.Study) -> ss.experiments.Finding:
    # the heads of the model, and the quantities of those with a circuit
    found = ss.no_op_circuits(study.model, study.windows, study.unembedding)
    convention = study.unembedding.convention
    name = Path(study.model.name).name
    sink_dark = found.sink_shares.groupby("layer")[str(study.unembedding.count)].mean()
    table = found.heads.assign(sink_dark=found.heads["layer"].map(sink_dark))
    tables = [table.assign(model=name, convention=convention)]
    heads = table.set_index(["layer", "head"])
    chance = study.unembedding.dark().rank / study.unembedding.d
    answers = [
        ss.experiments.answer(f"heads of {len(heads)} with a no-op circuit at position 0", len(found.found)),
        ss.experiments.answer(
            "heads that are dormant by the published sink event", int((heads["dormant"] > 0.5).sum())
        ),
    ]
    if len(found.found) <= LISTED:
        for layer, head in found.found:
            row = heads.loc[(layer, head)]
            for column, quantity in QUANTITIES.items():
                low, high = row.get(f"{column}_low"), row.get(f"{column}_high")
                answers.append(
                    ss.experiments.answer(
                        f"head {layer}.{head}: {quantity}",
                        row[column],
                        control(column, row, chance),
                        None if low is None else (low, high),
                    )
                )
    else:
        circuits, others = heads[heads["circuit"]], heads[~heads["circuit"]]
        for column, quantity in QUANTITIES.items():
            control_of = circuits["sink_dark"]
            random = f"; a random direction {control_of.min():.3f} to {control_of.max():.3f} on average"
            answers.append(
                ss.experiments.answer(
                    f"median of {len(circuits)} heads with a no-op circuit: {quantity}",
                    circuits[column].median(),
                    f"{circuits[column].min():.3f} to {circuits[column].max():.3f} in these heads; median of "
                    f"the other heads {others[column].median():.3f}"
                    + (random if column == "reading_dark" else ""),
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
            f"{name}, head {layer}.{head}",
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
    if found.found:
        random = heads.loc[found.found, "sink_dark"]
        verdict += f", where a random direction reads {random.min():.2f} to {random.max():.2f} of it"
    return ss.experiments.Finding(answers, verdict=verdict)
