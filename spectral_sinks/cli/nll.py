"""The command `nll`: the effect of a spectral filter on the NLL."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Literal

from rich.console import Group
from rich.text import Text

import spectral_sinks as ss
from spectral_sinks.cli.options import Running, bos_record, bos_row, ran, why
from spectral_sinks.cli.output import plain, show, table
from spectral_sinks.cli.parsing import Count, Draws, Seed
from spectral_sinks.cli.progress import note

FillName = Literal["zero", "mean", "swap", "noise"]

DRAWS = 20
"""Number of random subspaces that the dark share of position 0 is compared with."""


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
    controls: Draws = 0
    """Number of random subspaces of the same rank (seeds 0, 1, ...) that are removed as controls."""
    seed: Seed = 0
    """Seed of random:N, of the fill noise, of --predict and of --screen."""
    predict: Count | None = None
    """Number of tokens, drawn from each window, whose prediction is scored; by default all are.
    It saves time where the vocabulary is large. The output then says which interval this costs."""
    screen: Count | None = None
    """Number of tokens, drawn from each window, on which the controls are screened. Those whose interval
    holds the filter's NLL difference are then measured on all tokens, as the filter is. The output marks the
    others."""


def run_nll(options: Nll) -> None:
    if options.keep is not None and options.remove is not None:
        raise ss.InputError("give --keep or --remove, not both")
    asked = (options.layer is not None, options.controls, options.fill != "zero", options.tokens != "all")
    spec = options.remove if options.keep is None else options.keep
    if spec is None and any(asked):
        raise ss.InputError(
            "--layer, --fill, --tokens and --controls have no effect without a filter: "
            "give --keep or --remove as well"
        )
    if options.screen is not None and not options.controls:
        raise ss.InputError("--screen is for the controls: give --controls 20 as well")
    if options.screen is not None and options.predict is not None:
        raise ss.InputError("give --predict or --screen, not both")
    tokens = parse_tokens(options.tokens)
    site = ss.Site.parse(options.site)
    if spec is not None and not spec.strip():
        raise ss.InputError(
            f"{'--remove' if options.keep is None else '--keep'} {spec!r} names no bands: give such as "
            "1-8,20, dark, all or none"
        )
    model, windows, spectra = options.prepare(beside=bool(spec), head="the NLL")
    spectrum = spectra[0]
    # not for --help
    from spectral_sinks.measure.memory import batch_size_for, swap_groups
    from spectral_sinks.measure.nll.scoring import Sample
    from spectral_sinks.measure.sinks.dark_share import disagreement_on, record_of
    from spectral_sinks.spectra.subspace import random_subspaces

    sample = None if options.predict is None else Sample(options.predict, options.seed)
    size = batch_size_for(model, windows.length, options.batch_size)
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
        make = ss.remove if options.keep is None else ss.keep
        fill = make_fill(options, model, windows, site)
        chosen = make(subspace, fill, tokens)
        cells = {chosen.name: {site: chosen}}
        for seed, drawn in enumerate(random_subspaces(model.d, chosen.rank, options.controls)):
            cells[f"control {seed}"] = {site: ss.remove(drawn, fill, tokens)}
    from tqdm import tqdm  # not for --help

    batches = len(list(swap_groups(windows) if options.fill == "swap" else windows.batches(size)))
    hidden = True if options.json else None  # None hides the bar unless the output is a terminal
    passed, total = 0, (len(cells) + (options.controls if options.screen else 0)) * batches
    most = "at most " if options.screen else ""
    with tqdm(total=total, desc="nll", unit="pass", leave=False, disable=hidden) as bar:

        def tick(done: int) -> None:
            nonlocal passed
            passed += done
            bar.update(done)
            note(f"{passed} of {most}{total} passes")

        if options.screen is None:
            effects = ss.evaluate_all(model, windows, cells, batch_size=size, predict=sample, progress=tick)
        else:
            name, *drawn = cells
            effects = ss.evaluate_all(model, windows, {name: cells[name]}, batch_size=size, progress=tick)
            effects |= ss.nll.screen(
                model,
                windows,
                {control: cells[control] for control in drawn},
                predict=Sample(options.screen, options.seed),
                threshold=effects[name].delta_nll,
                batch_size=size,
                progress=tick,
            )
    effect, *controls = effects.values()
    shares = dark_shares(model, windows, site, spectra, size) if chosen else {}
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
        "conventions": [each.convention for each in spectra],
        "rank": chosen.rank if chosen else 0,
        "removed_energy_share": float(effect.table["removed_energy_share"].mean()),
        "sink_mass": effect.sink_mass,
        "baseline_sink_mass": effect.baseline_sink_mass,
        **record_of(shares),
        **bos_record(model, windows),
        **ran(model),
        "controls": [
            {
                "seed": seed,
                "delta_nll": control.delta_nll,
                "exact": control.predict is None,
                "removed_energy_share": float(control.table["removed_energy_share"].mean()),
                "sink_mass": control.sink_mass,
            }
            for seed, control in enumerate(controls)
        ],
    }
    if sample is not None:
        found["predict"] = sample.count
        for name in ("nll", "baseline_nll", "delta_nll", "kl"):
            found[f"{name}_sampling_interval"] = list(effect.sampling_interval(name))
    if not model.causal:
        found["masking"] = windows.record["masking"]
        found["reads_through"] = model.reads_through
    elsewhere = {"controls", "remote", "bos_comparison", "conventions", *record_of(shares)}
    rows = [(str(k), plain(v)) for k, v in found.items() if k not in elsewhere]
    rows += [(f"dark share of position 0, {name}", described(share)) for name, share in shares.items()]
    rows += bos_row(found)
    token = "token" if model.causal else "masked token"
    if model.remote is not None:
        rows.append(("server", model.remote.host))
    if controls:
        reached = ss.stats.null_rank(effect.delta_nll, [c.delta_nll for c in controls])
        screened = [options.screen is not None and c.predict is not None for c in controls]
        marked = ["~" * mark + plain(c.delta_nll) for mark, c in zip(screened, controls, strict=True)]
        rows.append(("delta_nll of random controls", " ".join(marked)))
        rows.append(("controls that reach the filter's", f"{reached} of {len(controls)}"))
        if options.screen is not None:
            exact = f"{len(controls) - sum(screened)} of {len(controls)}"
            if any(screened):
                exact += (
                    f"; the others (~) were screened on {options.screen} tokens of each window, and no "
                    "interval of theirs holds the filter's (95 % for all together)"
                )
            rows.append(("controls measured on all tokens", exact))
    made = table(f"NLL (nats per {token}) of {model.name}", ("", ""), rows)
    said = disagreement_on(shares)
    notes = [Text(f"At {site}, position 0 is {said} {why(shares)}.")] if said else []
    show(options.json, found, Group(made, *notes))


def dark_shares(
    model: ss.LanguageModel, windows: ss.Windows, site: ss.Site, spectra: list[ss.Spectrum], batch_size: int
) -> dict[str, ss.sinks.DarkShare]:
    """Return the share of position 0 in the dark band at the site of the filter, by convention."""
    # not for --help
    from spectral_sinks.measure.sinks.dark_share import carrier_shares
    from spectral_sinks.spectra.subspace import random_subspaces

    darks = {spectrum.convention: spectrum.dark() for spectrum in spectra}
    randoms = random_subspaces(model.d, spectra[0].dark().rank, DRAWS)
    return carrier_shares(model, windows, site, darks, randoms, batch_size)


def described(share: ss.sinks.DarkShare) -> str:
    """Format the dark share of position 0, beside random subspaces and the other tokens."""
    own = share.share
    return (
        f"{plain(own.value)} [{plain(own.low)}, {plain(own.high)}]; random {plain(own.least)} to "
        f"{plain(own.most)}; other tokens {plain(share.others.value)}"
    )


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
