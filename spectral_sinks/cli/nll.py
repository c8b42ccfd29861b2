"""The command `nll`: the effect of a spectral filter on the NLL."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Literal

from tqdm import tqdm

import spectral_sinks as ss
from spectral_sinks.cli.options import Running, bos_record, bos_row, ran
from spectral_sinks.cli.output import plain, show, table

FillName = Literal["zero", "mean", "swap", "noise"]


@dataclass(frozen=True)
class Nll(Running):
    """Measure NLL and sink mass under a spectral filter, and compare them with the untouched model."""

    layer: int | None = None
    """Layer of the site. By default it is the layer below the one with the strongest sink."""
    site: str = "exit"
    """Site of the filter: exit, attention, mlp, head:N or embedding.
    The sites queries, keys, values and mlp-input edit only what this component reads."""
    keep: str | None = None
    """Bands to keep, such as 1-8,20, dark, dark:0.1, head:0.4, middle:0.4-0.9, all, none or random:13."""
    remove: str | None = None
    """Bands to remove, in the same notation."""
    fill: FillName = "zero"
    """Replacement of the removed part: zero, its mean at the position, that of another document, or noise."""
    tokens: str = "all"
    """Tokens that are filtered: all, first, all-but-first, or ids:5,13 for tokens by id."""
    controls: int = 0
    """Number of random subspaces of the same rank (seeds 0, 1, ...) that are removed as controls."""
    seed: int = 0
    """Seed of random:N and of the fill noise."""


def run_nll(options: Nll) -> None:
    if options.keep and options.remove:
        raise ss.InputError("give --keep or --remove, not both")
    asked = (options.layer is not None, options.controls, options.fill != "zero", options.tokens != "all")
    if not (options.keep or options.remove) and any(asked):
        raise ss.InputError(
            "--layer, --fill, --tokens and --controls have no effect without a filter: "
            "give --keep or --remove as well"
        )
    tokens = parse_tokens(options.tokens)
    site = ss.Site.parse(options.site)
    model, windows, spectrum = options.prepare()
    from spectral_sinks.measure.memory import batch_size_for  # not for --help

    size = batch_size_for(model, windows.length, options.batch_size)
    spec = options.keep or options.remove
    # without --layer, the filter acts below the layer with the strongest sink
    layer = options.layer
    if spec and layer is None and site.kind != "embedding":
        layer = layer_of_strongest_sink(model, windows, size)
    site = ss.Site.parse(options.site, layer or 0)
    site.check(model)
    # the filter and its random controls, each as one cell
    chosen: ss.Filter | None = None
    cells: dict[str, dict[ss.Site, Any]] = {"no-op": {}}
    if spec:
        subspace = spectrum.subspace(spec, options.seed)
        make = ss.keep if options.keep else ss.remove
        fill = make_fill(options, model, windows, site)
        chosen = make(subspace, fill, tokens)
        cells = {chosen.name: {site: chosen}}
        for seed in range(options.controls):
            control = ss.remove(ss.random_subspace(model.d, chosen.rank, seed), fill, tokens)
            cells[f"control {seed}"] = {site: control}
    batches = len(list(windows.batches(size)))
    hidden = True if options.json else None  # None hides the bar unless the output is a terminal
    with tqdm(total=len(cells) * batches, desc="nll", unit="pass", leave=False, disable=hidden) as bar:

        def tick(done: int) -> None:
            bar.update(done)

        effects = ss.evaluate_all(model, windows, cells, batch_size=size, progress=tick)
    effect, *controls = effects.values()
    low, high = effect.delta_nll_interval
    if len(effect.table) < 2:
        warnings.warn("one window has no interval: give a longer text", ss.SpectralWarning, stacklevel=2)
    if effect.sink_mass is None:
        reason = "attention cannot be read" if not model.reads_attention else "a window has under 64 tokens"
        warnings.warn(f"no sink mass: {reason}", ss.SpectralWarning, stacklevel=2)
    found = {
        "model": model.name,
        "nll": effect.nll,
        "baseline_nll": effect.baseline_nll,
        "delta_nll": effect.delta_nll,
        "delta_nll_interval": [low, high],
        "kl": float(effect.table["kl"].mean()),
        "top1_agreement": float(effect.table["top1_agreement"].mean()),
        "documents": windows.record["documents"],
        "interval_over": "documents" if windows.record["documents"] == len(effect.table) else "windows",
        "tokens": int(effect.table["tokens"].sum()),
        "first_token_ids": windows.first_token_ids,
        "opens_with_bos": windows.opens_with_bos,
        "data_hash": windows.record["data_hash"],
        "layer": site.layer if chosen else None,
        "site": options.site if chosen else None,
        "filter": chosen.name if chosen else "none",
        "fill": options.fill,
        "filtered_tokens": options.tokens,
        "convention": spectrum.convention,
        "rank": chosen.rank if chosen else 0,
        "removed_energy_share": float(effect.table["removed_energy_share"].mean()),
        "sink_mass": effect.sink_mass,
        "baseline_sink_mass": effect.baseline_sink_mass,
        **bos_record(model, windows),
        **ran(model),
        "controls": [
            {
                "seed": seed,
                "delta_nll": control.delta_nll,
                "removed_energy_share": float(control.table["removed_energy_share"].mean()),
                "sink_mass": control.sink_mass,
            }
            for seed, control in enumerate(controls)
        ],
    }
    if not model.causal:
        found["masking"] = windows.record["masking"]
        found["reads_through"] = model.reads_through
    rows = [(str(k), plain(v)) for k, v in found.items() if k not in ("controls", "remote", "bos_comparison")]
    rows += bos_row(found)
    token = "token" if model.causal else "masked token"
    if model.remote is not None:
        rows.append(("server", model.remote.host))
    if controls:
        reached = ss.stats.null_rank(effect.delta_nll, [c.delta_nll for c in controls])
        rows.append(("delta_nll of random controls", plain([c.delta_nll for c in controls])))
        rows.append(("controls that reach the filter's", f"{reached} of {len(controls)}"))
    show(options.json, found, table(f"NLL (nats per {token}) of {model.name}", ("", ""), rows))


def layer_of_strongest_sink(model: ss.LanguageModel, windows: ss.Windows, batch_size: int) -> int:
    """Return the layer below the one with the strongest sink."""
    mass = ss.evaluate(model, windows, {}, batch_size=batch_size).sink_mass
    if mass is None or len(mass) < 2:
        raise ss.InputError(
            "the layer with the strongest sink cannot be found for this model and text: name one with --layer"
        )
    return max(range(1, len(mass)), key=lambda layer: mass[layer]) - 1


def parse_tokens(text: str) -> Any:
    if text.startswith("ids:"):
        try:
            return frozenset(int(part) for part in text[4:].split(","))
        except ValueError as error:
            raise ss.InputError(f"tokens {text!r}: expected ids:5,13") from error
    if text not in ("all", "first", "all-but-first"):
        raise ss.InputError(f"tokens {text!r}: choose from all, first, all-but-first, ids:5,13")
    return text


def make_fill(options: Nll, model: ss.LanguageModel, windows: ss.Windows, site: ss.Site) -> Any:
    if options.fill == "mean":
        return ss.Mean(ss.mean_residual(model, windows, site, options.batch_size))
    return {"zero": ss.Zero(), "swap": ss.Swap(), "noise": ss.Noise(options.seed)}[options.fill]
