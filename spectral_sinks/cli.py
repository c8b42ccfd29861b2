"""The command line: the library's calls, as tables for people and JSON for machines."""

import json
import math
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import datasets
import tyro
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from tyro.conf import FlagCreatePairsOff, Positional, subcommand

import spectral_sinks as ss

FillName = Literal["zero", "mean", "swap", "noise"]


@dataclass(frozen=True)
class Common:
    """What every command takes."""

    model: Positional[str] = ss.DEFAULT
    """The embedded model's name, a Hugging Face id, or a folder."""
    json: bool = False
    """Print one JSON object and nothing else on standard output."""
    revision: str | None = None
    """Branch, tag or commit of a Hugging Face id."""
    allow_pickle: bool = False
    """Load pickled weights, which can run code."""
    trust_remote_code: bool = False
    """Let a checkpoint run code of its own."""

    def load(self, **options: Any) -> ss.LanguageModel:
        return ss.load(
            self.model,
            revision=self.revision,
            allow_pickle=self.allow_pickle,
            trust_remote_code=self.trust_remote_code,
            **options,
        )


@dataclass(frozen=True)
class Running(Common):
    """What every command that runs a model takes."""

    text: str | None = None
    """A text file, .jsonl, .csv or .parquet, a hub data set id, or - for standard input; the shipped corpus
    by default."""
    separator: str | None = None
    """What separates documents in a text file or on standard input, such as "\\n\\n"; without it, it is one
    document."""
    split: str = "train"
    """Split of a hub data set."""
    column: str = "text"
    """Column of a table or data set that holds the text."""
    documents: int = 48
    """Read at most this many documents."""
    length: int | None = None
    """Tokens in a window, BOS included; 256 by default, or the context where that is shorter."""
    per_document: int | None = None
    """At most this many windows from a document; 2 by default, or all of a text that is one document."""
    bos: Literal["auto", "always", "never"] = "auto"
    """Open windows with BOS: always, never, or as the model's own tokenizer does."""
    batch_size: int = 16
    device: str | None = None
    """Where to run, such as cuda or cpu."""
    dtype: str = "auto"
    """Weights in this dtype, such as bfloat16; the checkpoint's own by default."""
    convention: Literal["raw", "folded", "centred"] = "raw"
    """Convention of the unembedding."""
    bands: int = 20
    """Number of bands."""

    def prepare(self) -> tuple[ss.LanguageModel, ss.Windows, ss.Spectrum]:
        spectrum = read_spectrum(self, "unembedding", self.convention, self.bands)
        model = self.load(device=self.device, dtype=self.dtype)
        separator = self.separator and self.separator.replace("\\n", "\n").replace("\\t", "\t")
        source: Any = self.text
        if self.text == "-":
            source = sys.stdin.read().split(separator or "\0")
        elif self.text is not None and any(c.isspace() for c in self.text):
            source = Path(self.text)
        texts = ss.documents(
            source, split=self.split, column=self.column, limit=self.documents, separator=separator
        )
        per_document = self.per_document
        if per_document is None and len(texts) > 1:
            per_document = 2
        windows = ss.cut(texts, model, length=self.length, per_document=per_document, bos=self.bos)
        if windows.record["documents"] == 1 and len(windows) > 1:
            warnings.warn(
                "the text is one document: intervals are over its windows, which are not independent",
                ss.SpectralWarning,
                stacklevel=2,
            )
            windows = windows.as_documents()
        return model, windows, spectrum


@dataclass(frozen=True)
class Info(Common):
    """Family, sizes, tied or not, BOS policy and context of a model; reads no weights."""


@dataclass(frozen=True)
class SpectrumCommand(Common):
    """Singular values of the unembedding (or another matrix) and its bands; reads only that tensor."""

    matrix: str = "unembedding"
    """unembedding, embedding, or the name of a parameter."""
    convention: Literal["raw", "folded", "centred"] = "raw"
    """raw; folded (final norm's gain multiplied in); centred (folded, minus the mean over the vocabulary)."""
    bands: int = 20
    """Number of bands."""


@dataclass(frozen=True)
class Nll(Running):
    """Negative log-likelihood and sink mass under a spectral filter, against the untouched model."""

    layer: int | None = None
    """Layer of the site; by default the one below the layer with the strongest sink."""
    site: str = "exit"
    """exit, attention, mlp, head:N, embedding, or what one component alone reads: queries, keys, values,
    mlp-input."""
    keep: str | None = None
    """Bands to keep: 1-8,20 or dark, dark:0.1, head:0.4, middle:0.4-0.9, all, none, random:13."""
    remove: str | None = None
    """Bands to remove, written the same way."""
    fill: FillName = "zero"
    """What takes the place of what is removed: zero, the position's mean, another document's, or noise."""
    tokens: str = "all"
    """all, first, all-but-first, or ids:5,13 for tokens by id."""
    controls: int = 0
    """Also remove this many random subspaces of the same rank, seeds 0, 1, ..., as the control."""
    seed: int = 0
    """Seed of random:N and of noise."""


@dataclass(frozen=True)
class Energy(Running):
    """Share of each band in the residuals of BOS and of other tokens, by layer."""


@dataclass(frozen=True)
class Reproduce:
    """Run the experiments, write their tables and figures, print a summary."""

    only: str | None = None
    """One experiment by name; all of them by default."""
    out: Path = Path("results")
    """Folder for tables and figures."""
    model: str = ss.DEFAULT
    """The embedded model's name, a Hugging Face id, or a folder."""
    documents: int = 16
    """Documents of the shipped corpus to measure on, one window each."""
    json: bool = False
    """Print the summary as one JSON object and nothing else on standard output."""


Command = (
    Annotated[Info, subcommand("info")]
    | Annotated[SpectrumCommand, subcommand("spectrum")]
    | Annotated[Nll, subcommand("nll")]
    | Annotated[Energy, subcommand("energy")]
    | Annotated[Reproduce, subcommand("reproduce")]
)


def read_spectrum(options: Common, matrix: str, convention: Any, bands: int) -> ss.Spectrum:
    model = options.load() if options.allow_pickle else options.model  # single tensors need safetensors
    return ss.read_spectrum(model, matrix, convention=convention, bands=bands, revision=options.revision)


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
    if len(effect.rows) < 2:
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
        "kl": float(effect.rows["kl"].mean()),
        "top1_agreement": float(effect.rows["top1_agreement"].mean()),
        "documents": windows.record["documents"],
        "interval_over": "documents" if windows.record["documents"] == len(effect.rows) else "windows",
        "tokens": int(effect.rows["tokens"].sum()),
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
        "removed_energy_share": float(effect.rows["removed_energy_share"].mean()),
        "sink_mass": effect.sink_mass,
        "baseline_sink_mass": effect.baseline_sink_mass,
        "controls": [
            {
                "seed": seed,
                "delta_nll": control.delta_nll,
                "removed_energy_share": float(control.rows["removed_energy_share"].mean()),
                "sink_mass": control.sink_mass,
            }
            for seed, control in enumerate(controls)
        ],
    }
    rows = [(str(k), plain(v)) for k, v in found.items() if k != "controls"]
    if controls:
        reached = ss.null_rank(effect.delta_nll, [c.delta_nll for c in controls])
        rows.append(("random controls: difference", plain([c.delta_nll for c in controls])))
        rows.append(("controls that reach the filter's", f"{reached} of {len(controls)}"))
    show(options.json, found, table(f"NLL (nats per token) of {model.name}", ("", ""), rows))


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
        model=options.model, out=options.out, only=options.only, documents=options.documents
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
    show(options.json, {"out": str(options.out), "rows": rows}, table("Findings", columns, lines))


def plain(value: Any) -> str:
    """A value as a person reads it."""
    if isinstance(value, list | tuple):
        return " ".join(plain(part) for part in value)
    if isinstance(value, float):
        return "-" if math.isnan(value) else f"{value:.4f}"
    return "-" if value is None else str(value)


def table(title: str, columns: tuple[str, ...], rows: Any) -> Table:
    made = Table(*columns, title=title or None, show_header=any(columns), title_justify="left")
    for row in rows:
        made.add_row(*row)
    return made


def show(as_json: bool, found: dict[str, Any], shown: Table) -> None:
    if as_json:
        print(json.dumps(without_nan(found)))
    else:
        Console().print(shown)


def without_nan(value: Any) -> Any:
    """JSON has no NaN: null instead."""
    if isinstance(value, dict):
        return {k: without_nan(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


RUN: dict[type, Any] = {
    Info: run_info,
    SpectrumCommand: run_spectrum,
    Nll: run_nll,
    Energy: run_energy,
    Reproduce: run_reproduce,
}


def quiet() -> None:
    """Warnings in one line on standard error; no chatter from libraries."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)

    def line(message: Any, category: Any, *rest: Any, **more: Any) -> None:
        print(f"spectral-sinks: warning: {message}", file=sys.stderr)

    warnings.showwarning = line


def main(arguments: list[str] | None = None) -> None:
    """Entry point of `spectral-sinks`: exit status 0, 2 for bad input, 130 when interrupted."""
    options: Any = tyro.cli(  # pyright: ignore[reportCallIssue]
        Command,  # pyright: ignore[reportArgumentType]
        prog="spectral-sinks",
        description=ss.__doc__,
        args=arguments,
        config=(FlagCreatePairsOff,),
    )
    quiet()
    try:
        RUN[type(options)](options)
    except (ss.InputError, OSError) as error:
        message = " ".join(str(error).split())
        print(f"spectral-sinks: error: {message}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("spectral-sinks: interrupted", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
