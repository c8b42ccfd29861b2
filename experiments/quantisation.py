"""What quantisation breaks, and whether sink tokens and massive channels are to blame.

Question: how much of the damage of rounding the residual stream to int8 or int4 goes when the sink tokens, or
the massive channels, keep their exact values; where does the error lie; and how far do the bands of the
unembedding turn when its weights are rounded?
Design: `ss.sinks.quantisation_report`, whose documentation states what is rounded. The rule that marks sink
tokens and channels is learned on other documents. Windows have 64 tokens. The bands are those of the folded
and the raw spectrum.
Control: as many random tokens of each window, and as many random channels of each site, five draws of each.
"""

from collections.abc import Sequence
from typing import Any

import pandas as pd

import spectral_sinks as ss

DRAWS = 5
"""Draws of each control at most, since each takes a pass for every kind of quantisation."""

CONTROLS = {"sink tokens": "random tokens", "massive channels": "random channels", "both": "random tokens"}


def run(study: ss.experiments.Study, alone: Sequence[ss.Site] | None = None) -> ss.experiments.Finding:
    """Run the experiment; `alone` are the sites that are quantised one at a time, by default all."""
    model, spectra = study.model, ss.read_spectra(study.model)
    every = [ss.Site("embedding"), *(ss.Site("exit", layer) for layer in range(model.layers))]
    report = ss.sinks.quantisation_report(
        model,
        study.openings,
        study.sink_rule,
        spectra,
        draws=min(study.draws, DRAWS),
        alone=every if alone is None else alone,
    )
    summary = study.save(report.summary(), "quantisation")
    sites = study.save(report.by_site(), "quantisation_sites")
    angles = study.save(report.angles, "quantisation_angles")
    ss.figures.quantisation(summary, sites, angles, study.figure("quantisation"))
    return finding(report, summary, sites, angles)


def finding(
    report: ss.sinks.QuantisationReport, summary: pd.DataFrame, sites: pd.DataFrame, angles: pd.DataFrame
) -> ss.experiments.Finding:
    answers: list[dict[str, Any]] = [ss.experiments.answer("share of sink tokens", report.sink_tokens)]
    names = ("what", "bits", "per", "spared")
    by = {tuple(row[name] for name in names): row for row in summary.to_dict("records")}
    for (what, bits, per, spared), row in by.items():
        if spared.startswith("random"):
            continue
        said, control = "", CONTROLS.get(spared)
        if other := by.get((what, bits, per, control)):
            said = f"{control} {other['delta_nll_least']:+.4f} to {other['delta_nll_most']:+.4f}"
        answers.append(
            ss.experiments.answer(
                f"{what}, int{bits} per {per}, {spared} spared: NLL difference",
                float(row["delta_nll"]),
                said,
                (row["delta_nll_low"], row["delta_nll_high"]),
            )
        )
    for (bits, per), part in sites.groupby(["bits", "per"], sort=False):
        worst = part.loc[part["error_others"].idxmax()]
        answers.append(
            ss.experiments.answer(
                f"int{bits} per {per}: largest error of other tokens, over sites",
                float(worst["error_others"]),
                f"at {worst['site']}; sinks there {worst['error_sinks']:.4g}",
            )
        )
    plain = angles[(angles["spared"] == "nothing") & (angles["band"] == "dark")]
    first = angles[(angles["spared"] == "nothing") & (angles["band"] == "first")]
    for row, other in zip(plain.to_dict("records"), first.to_dict("records"), strict=True):
        answers.append(
            ss.experiments.answer(
                f"unembedding, int{row['bits']} per {row['per']}: share of the dark band "
                f"({row['convention']}) turned out of itself",
                float(row["rotated"]),
                f"first band {other['rotated']:.4g}; largest angle {row['largest_angle']:.1f} degrees, "
                f"first band {other['largest_angle']:.1f}",
            )
        )
    return ss.experiments.Finding(answers, verdict=verdict(by))


def verdict(by: dict[tuple[Any, ...], Any]) -> str:
    """Judge by int8 with one step per tensor, where a large token decides the step of all others."""
    kinds = {key[3]: row for key, row in by.items() if key[:3] == ("activations", 8, "tensor")}
    cost, spared, drawn = (kinds[kind] for kind in ("nothing", "sink tokens", "random tokens"))
    saved = 1 - spared["delta_nll"] / cost["delta_nll"]
    beyond = spared["delta_nll"] < drawn["delta_nll_least"]
    word = "holds" if saved > 0.5 and beyond else "holds partly" if beyond else "does not hold here"
    said = (
        f"{word}: int8 with one step per tensor costs {cost['delta_nll']:+.3f} nats, "
        f"{spared['delta_nll']:+.3f} with the sink tokens exact (random tokens "
        f"{drawn['delta_nll_least']:+.3f} to {drawn['delta_nll_most']:+.3f})"
    )
    if "massive channels" in kinds:
        said += f", {kinds['massive channels']['delta_nll']:+.3f} with the massive channels exact"
    return said
