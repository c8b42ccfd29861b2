"""What the commands do: the library's calls, shown."""

import warnings
from typing import Any

from tqdm import tqdm

import spectral_sinks as ss
from spectral_sinks.cli.options import Energy, Info, Nll, Reproduce, SpectrumCommand, read_spectrum, remote_of
from spectral_sinks.cli.output import plain, show, table


def run_info(options: Info) -> None:
    found = ss.describe(options.model, revision=options.revision, trust_remote_code=options.trust_remote_code)
    show(options.json, found, table("", ("", ""), [(k, str(v)) for k, v in found.items()]))


def run_spectrum(options: SpectrumCommand) -> None:
    spectrum = read_spectrum(options, options.matrix, options.convention, options.bands)
    energy = spectrum.values.square()
    bands = [
        {
            "band": j,
            "directions": stop - start,
            "first": start,
            "largest": float(spectrum.values[start]),
            "smallest": float(spectrum.values[stop - 1]),
            "energy_share": float(energy[start:stop].sum() / energy.sum()),
        }
        for j, (start, stop) in enumerate(zip(spectrum.edges, spectrum.edges[1:], strict=False), start=1)
    ]
    found = {
        "model": options.model,
        "matrix": spectrum.matrix,
        "convention": spectrum.convention,
        "tied": spectrum.tied,
        "reads_through": spectrum.reads_through,
        "d_model": spectrum.d,
        "singular_values": spectrum.values.tolist(),
        "bands": bands,
    }
    rows = [
        (
            str(b["band"]),
            str(b["directions"]),
            f"{b['largest']:.4g}",
            f"{b['smallest']:.4g}",
            f"{b['energy_share']:.4f}",
        )
        for b in bands
    ]
    columns = ("band", "directions", "largest singular value", "smallest", "share of the matrix's energy")
    show(options.json, found, table(repr(spectrum), columns, rows))


def run_nll(options: Nll) -> None:
    if options.keep and options.remove:
        raise ss.InputError("give --keep or --remove, not both")
    asked = (options.layer is not None, options.controls, options.fill != "zero", options.tokens != "all")
    if not (options.keep or options.remove) and any(asked):
        raise ss.InputError(
            "--layer, --fill, --tokens and --controls belong to a filter: give --keep or --remove"
        )
    tokens = parse_tokens(options.tokens)
    site = ss.Site.parse(options.site)
    model, windows, spectrum = options.prepare()
    spec = options.keep or options.remove
    layer = options.layer
    if spec and layer is None and site.kind != "embedding":
        layer = layer_of_strongest_sink(model, windows, options.batch_size)
    site = ss.Site.parse(options.site, layer or 0)
    site.check(model)
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
    batches = len(list(windows.batches(options.batch_size)))
    hidden = True if options.json else None  # None: where nobody watches
    with tqdm(total=len(cells) * batches, desc="nll", unit="pass", leave=False, disable=hidden) as bar:

        def tick(done: int) -> None:
            bar.update(done)

        effects = ss.evaluate_all(model, windows, cells, batch_size=options.batch_size, progress=tick)
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
    rows = [(str(k), plain(v)) for k, v in found.items() if k not in ("controls", "remote")]
    token = "token" if model.causal else "masked token"
    if model.remote is not None:
        rows.append(("ran at", model.remote.host))
    if controls:
        reached = ss.null_rank(effect.delta_nll, [c.delta_nll for c in controls])
        rows.append(("random controls: difference", plain([c.delta_nll for c in controls])))
        rows.append(("controls that reach the filter's", f"{reached} of {len(controls)}"))
    show(options.json, found, table(f"NLL (nats per {token}) of {model.name}", ("", ""), rows))


def ran(model: ss.LanguageModel) -> dict[str, Any]:
    """Where the model is, if it is elsewhere."""
    return {} if model.remote is None else {"remote": model.remote.record()}


def layer_of_strongest_sink(model: ss.LanguageModel, windows: ss.Windows, batch_size: int) -> int:
    """The layer whose exit is read by the layer with the strongest sink."""
    mass = ss.evaluate(model, windows, {}, batch_size=batch_size).sink_mass
    if mass is None or len(mass) < 2:
        raise ss.InputError("the layer with the strongest sink cannot be found here: name one with --layer")
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


def run_energy(options: Energy) -> None:
    model, windows, spectrum = options.prepare()
    shares = ss.energy(model, windows, spectrum, batch_size=options.batch_size)
    mean = shares.groupby(["site", "layer", "position_class", "band"], sort=False, as_index=False)[
        ["share", "norm"]
    ].mean()
    found = {
        "model": model.name,
        "convention": spectrum.convention,
        "documents": windows.record["documents"],
        "first_token_ids": windows.first_token_ids,
        "rows": mean.to_dict("records"),
        **ran(model),
    }
    rows: list[tuple[str, ...]] = []
    for (site, layer, kind), part in mean.groupby(["site", "layer", "position_class"], sort=False):
        by_band = part["share"].to_numpy()
        cells = (by_band[0], by_band[1:-1].sum(), by_band[-1])
        label = "embedding" if site == "embedding" else f"exit {layer}"
        rows.append((label, str(kind), f"{part['norm'].mean():.4g}", *(f"{c:.4f}" for c in cells)))
    columns = ("place", "tokens", "median norm", "band 1", "between", f"band {spectrum.count} (dark)")
    show(options.json, found, table(f"Energy share by band, {model.name}", columns, rows))


def run_reproduce(options: Reproduce) -> None:
    findings = ss.reproduce(
        model=options.model,
        out=options.out,
        only=options.only,
        documents=options.documents,
        remote=remote_of(options.remote),
    )
    rows = [
        {"experiment": f.name, **answer, "seconds": round(f.seconds, 1)}
        for f in findings
        for answer in f.answers
    ]
    lines = [
        (r["experiment"], r["quantity"], plain(r["value"]), plain([r["low"], r["high"]]), r["control"])
        for r in rows
    ]
    columns = ("experiment", "quantity", "value", "95 % interval", "control")
    verdicts = {f.name: f.verdict for f in findings if f.verdict}
    found = {"out": str(options.out), "rows": rows, "verdicts": verdicts}
    show(options.json, found, table("Findings", columns, lines))
    if verdicts and not options.json:
        show(False, {}, table("", ("experiment", "verdict"), verdicts.items()))
