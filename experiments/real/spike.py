"""Which neurons write the spike? The MLP that adds most to what the layer with the strongest sink reads.

Question: is the residual that carries the sink written by a few neurons of one MLP, and does the sink go when
they are silent?
Design: the layer is the one, below that with the strongest sink, whose MLP adds most along the residual of
position 0 that the sink is read from. A neuron's contribution is its activation times its output weights,
with the gain and scale of the norm that follows the MLP in some families, along the direction of what the MLP
writes at position 0; contributions add up to the norm of that. The neurons with the largest ones are silenced
at all tokens: 1, 3, 10 and 30 of them.
Control: as many neurons that write most at other tokens, and 20 sets of as many random neurons.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pandas as pd
import torch
from real_study import RealStudy, words

import spectral_sinks as ss

COUNTS = (1, 3, 10, 30)


def down_projection(study: RealStudy, layer: int) -> torch.nn.Linear:
    """Return the module that writes the MLP's neurons to the residual stream."""
    module = study.model.module.get_submodule(f"{study.model.layout.layers}.{layer}.mlp.down_proj")
    assert isinstance(module, torch.nn.Linear)
    return module


def spike_layer(study: RealStudy) -> tuple[int, pd.DataFrame]:
    """Return the layer whose MLP writes the carrier of the sink, and what all MLPs write at position 0.

    `along_carrier` is what an MLP adds along the mean residual of position 0 that the layer with the
    strongest sink reads.
    """
    sites = [ss.Site("mlp", layer) for layer in range(study.model.layers)]
    carrier = ss.Site("exit", study.below_sink)

    def readout(final: torch.Tensor, read: dict[ss.Site, torch.Tensor], weights: Any) -> tuple[Any, ...]:
        norms = torch.stack([read[site].norm(dim=-1) for site in sites], 1)
        return norms, torch.stack([read[site][:, 0] for site in sites], 1), read[carrier][:, 0]

    parts = [
        ss.trace(study.model, ids.to(study.model.device), {}, [*sites, carrier], readout=readout)
        for _, ids in study.windows.batches(16)
    ]
    norms, first, read = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
    direction = torch.nn.functional.normalize(read.mean(0), dim=0)
    table = pd.DataFrame(
        {
            "layer": range(study.model.layers),
            "written_first": norms[..., 0].mean(0),
            "written_others": norms[..., 1:].mean((0, 2)),
            "along_carrier": first.mean(0) @ direction,
        }
    )
    return int(table["along_carrier"].iloc[: study.below_sink + 1].idxmax()), table


@contextmanager
def watched(module: torch.nn.Module, into: list[torch.Tensor]) -> Iterator[None]:
    """Record what goes into a module."""

    def hook(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        into.append(inputs[0].detach().cpu())

    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def silenced(module: torch.nn.Module, neurons: Sequence[int]) -> Iterator[None]:
    """Set some inputs of a module to zero, at all tokens."""
    chosen = list(neurons)

    def hook(_: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        changed = inputs[0].clone()
        changed[..., chosen] = 0
        return (changed, *inputs[1:])

    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def contributions(study: RealStudy, layer: int) -> pd.DataFrame:
    """Return the contribution of each neuron along what the MLP writes at position 0, and at other tokens."""
    module, site = down_projection(study, layer), ss.Site("mlp", layer)
    seen: list[torch.Tensor] = []
    with watched(module, seen):
        added = [
            ss.trace(
                study.model, ids.to(study.model.device), {}, [site],
                readout=lambda final, read, weights: read[site].cpu(),
            )
            for _, ids in study.windows.batches(16)
        ]  # fmt: skip
    activation = torch.cat(seen)  # [windows, tokens, neurons]
    weight = module.weight.detach().float().cpu()  # [d, neurons]
    added = torch.cat(added)
    # what the norm after the MLP, if there is one, multiplies each channel by
    scale = added / (activation @ weight.T)
    written = added[:, 0].mean(0)
    along = ((written / written.norm()) * scale) @ weight  # [windows, tokens, neurons]
    return pd.DataFrame(
        {
            "neuron": range(activation.shape[-1]),
            "activation": activation[:, 0].mean(0),
            "contribution": (activation * along)[:, 0].mean(0),
            "contribution_others": (activation * along)[:, 1:].mean((0, 1)),
            "size_others": (activation[:, 1:].abs() * weight.norm(dim=0)).mean((0, 1)),
        }
    ).sort_values("contribution", ascending=False, ignore_index=True)


def measured(study: RealStudy, layer: int, neurons: Sequence[int]) -> dict[str, Any]:
    """Return NLL by document, the sink above and the norm at position 0 with some neurons silent."""
    site, model = ss.Site("exit", layer), study.model
    nll: list[torch.Tensor] = []
    mass: list[torch.Tensor] = []
    norms: list[torch.Tensor] = []
    for _, ids in study.windows.batches(16):

        def readout(
            final: torch.Tensor,
            read: dict[ss.Site, torch.Tensor],
            weights: list[torch.Tensor],
            ids: torch.Tensor = ids,
        ) -> tuple[torch.Tensor, ...]:
            logits = model.unembed(final[:, :-1]).transpose(1, 2)
            loss = torch.nn.functional.cross_entropy(logits, ids[:, 1:], reduction="none")
            above = torch.stack(weights[layer + 1 :], 1)  # [windows, layers, heads]
            return loss.double().mean(1), above.mean((1, 2)), read[site].norm(dim=-1)

        with silenced(down_projection(study, layer), neurons):
            parts = ss.trace(
                model, ids, {}, [site], readout=readout, attention=lambda maps: maps[..., 0].mean(-1)
            )
        for into, part in zip((nll, mass, norms), parts, strict=True):
            into.append(part)
    norm = torch.cat(norms)
    return {
        "documents": torch.cat(nll).numpy(),
        "mass_above": float(torch.cat(mass).mean()),
        "norm_ratio": float((norm[:, 0] / norm[:, 1:].median(1).values).mean()),
    }


def run(study: RealStudy) -> ss.experiments.Finding:
    layer, written = spike_layer(study)
    study.save(written, "spike_layers")
    neurons = contributions(study, layer)
    study.save(neurons.head(100), "spike_neurons")
    before = measured(study, layer, [])
    base = before.pop("documents")
    rng = np.random.default_rng(0)
    busiest = neurons.sort_values("size_others", ascending=False)["neuron"]
    rows: list[dict[str, Any]] = []
    for count in COUNTS:
        sets = {("largest at position 0", ""): neurons["neuron"].head(count).tolist()}
        sets["largest at other tokens", ""] = busiest.head(count).tolist()
        for draw in range(study.draws):
            sets["random", str(draw)] = rng.choice(len(neurons), count, replace=False).tolist()
        for (kind, draw), chosen in sets.items():
            found = measured(study, layer, chosen)
            delta = found.pop("documents") - base
            low, high = ss.stats.mean_interval(delta)
            rows.append(
                {
                    "count": count,
                    "kind": kind,
                    "draw": draw,
                    "delta_nll": delta.mean(),
                    "low": low,
                    "high": high,
                }
                | found
            )
    table = pd.DataFrame(rows)
    study.save(table, "spike_silenced")
    return ss.experiments.Finding(
        answers(study, layer, neurons, table, before), verdict=verdict(layer, neurons, table, before)
    )


def answers(
    study: RealStudy, layer: int, neurons: pd.DataFrame, table: pd.DataFrame, before: dict[str, float]
) -> list[dict[str, Any]]:
    total = neurons["contribution"].sum()
    found = [
        ss.experiments.answer(
            f"layer {layer} of {study.model.layers}: norm that its MLP writes at position 0", float(total)
        )
    ]
    for count in COUNTS:
        share = float(neurons["contribution"].head(count).sum() / total)
        found.append(
            ss.experiments.answer(
                f"share of it from the {count} largest of {len(neurons)} neurons",
                share,
                f"chance {count / len(neurons):.4f}",
            )
        )
        here = table[table["count"] == count]
        drawn = here[here["kind"] == "random"]
        for kind in ("largest at position 0", "largest at other tokens"):
            row = here[here["kind"] == kind].iloc[0]
            found.append(
                ss.experiments.answer(
                    f"NLL difference, {count} neurons silent ({kind})",
                    float(row["delta_nll"]),
                    f"random {words(drawn['delta_nll'])}; attention to position 0 above "
                    f"{before['mass_above']:.3f} to {row['mass_above']:.3f}, random at least "
                    f"{drawn['mass_above'].min():.3f}; norm ratio {before['norm_ratio']:.1f} to "
                    f"{row['norm_ratio']:.1f}",
                    (row["low"], row["high"]),
                )
            )
    return found


def verdict(layer: int, neurons: pd.DataFrame, table: pd.DataFrame, before: dict[str, float]) -> str:
    share = neurons["contribution"].head(3).sum() / neurons["contribution"].sum()
    three = table[table["count"] == 3]
    own = three[three["kind"] == "largest at position 0"].iloc[0]
    least = three.loc[three["kind"] == "random", "mass_above"].min()
    word = "holds" if share > 0.5 and own["mass_above"] < least else "does not hold here"
    return (
        f"{word}: three neurons of layer {layer} write {share:.0%} of the spike; without them the attention "
        f"to position 0 in the layers above is {own['mass_above']:.3f} where it was "
        f"{before['mass_above']:.3f} (random at least {least:.3f}), at {own['delta_nll']:+.3f} nats"
    )
