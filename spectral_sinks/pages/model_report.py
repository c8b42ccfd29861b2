"""The report of a model: every measurement that its page shows, as tables."""

import platform
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from spectral_sinks.data.document_sources import documents
from spectral_sinks.data.pixels import Pixels
from spectral_sinks.data.texts import Windows, cut
from spectral_sinks.errors import InputError, SpectralWarning, without_secrets
from spectral_sinks.interventions.sites import Site
from spectral_sinks.interventions.tracing import Interventions, trace
from spectral_sinks.measure.attention.by_position import Inputs
from spectral_sinks.measure.circuits.no_op import RULE as CIRCUIT_RULE
from spectral_sinks.measure.circuits.no_op import Circuits, no_op_circuits
from spectral_sinks.measure.nll.bos_policy import compare_bos
from spectral_sinks.measure.nll.effects import evaluate_all
from spectral_sinks.measure.residual.band_energy import energy
from spectral_sinks.measure.residual.matrix_spectrum import by_convention, read_spectra
from spectral_sinks.measure.sinks.find import Sinks, find_sinks
from spectral_sinks.measure.sinks.verdict import RULE, SinkVerdict, sink_verdict
from spectral_sinks.models.attention_sdpa import TOKENS
from spectral_sinks.models.base import Transformer
from spectral_sinks.models.describe import describe
from spectral_sinks.models.embedded import DEFAULT
from spectral_sinks.models.language import LanguageModel
from spectral_sinks.models.loading import load
from spectral_sinks.pages.html import Page
from spectral_sinks.pages.report_page import report_page
from spectral_sinks.pages.token_text import shown_tokens
from spectral_sinks.spectra.conventions import DARK_CONVENTION, Convention
from spectral_sinks.spectra.filters import remove
from spectral_sinks.spectra.spectrum import Spectrum
from spectral_sinks.stats import Estimate

DOCUMENTS, LENGTH = 16, 128
"""Articles of the shipped corpus, and tokens of each, that are read where no text is given."""

LIBRARIES = ("spectral-sinks", "torch", "transformers", "nnsight", "numpy")
"""Packages whose versions a page states."""


@dataclass(frozen=True, eq=False)
class ModelReport:
    """The tables behind the page of a model, and the page."""

    model: str
    record: dict[str, Any]
    """Everything that is not a table: the card, the verdict in words, versions, hashes and the command."""
    tables: dict[str, pd.DataFrame]
    """Tables by name; a part that could not be measured has none."""
    maps: Any = field(default=None, repr=False)
    """Attention of the first window by layer and head, `[layers, heads, queries, keys]`; None without it."""
    absent: dict[str, str] = field(default_factory=dict)
    """Parts that were not measured, and the reason for each."""

    @cached_property
    def page(self) -> Page:
        """The page. Raises InputError where Plotly is not installed."""
        return Page(report_page(self.record, self.tables, self.maps, self.absent))

    def save(self, path: str | Path) -> Path:
        """Write the page to a file and return its path.

        Raises InputError for a name that does not end in .html, for a folder that does not exist, and where
        Plotly is not installed.
        """
        return self.page.save(path)

    def _repr_html_(self) -> str:
        return self.page._repr_html_()


def report(
    model: Transformer | str | Path = DEFAULT,
    windows: Windows | None = None,
    spectrum: Spectrum | Sequence[Spectrum] | None = None,
    *,
    convention: Convention | None = None,
    draws: int = 20,
    batch_size: int | None = None,
    card: dict[str, Any] | None = None,
    command: str = "",
) -> ModelReport:
    """Measure a model, and return a report that becomes one page for a browser.

    The page says in one sentence whether the model has a sink and whether it is dark. It shows the spectrum,
    the energy of each band by layer, the sinks, the attention of every head to the first token, and what the
    removal of each band does. A part that cannot be measured for this model or text is named with the reason.

    Args:
        model: a language model, or what `load` takes.
        windows: the text; by default 128 tokens of each of 16 articles of the shipped corpus.
        spectrum: the spectrum whose dark tail is tested, or several, as from `read_spectra`, of which the
            first decides; by default those of the unembedding as stored and folded.
        convention: the convention that decides where `spectrum` is not given; folded by default.
        draws: number of random subspaces that the dark band is compared with.
        batch_size: windows in a pass.
        card: properties of the checkpoint, as from `describe`; by default they are read where `model` is a
            name or a folder.
        command: the command that the page states.

    Raises:
        InputError: for a model that cannot be loaded, a spectrum of another width, and an image encoder.

    """
    if isinstance(model, str | Path):
        if card is None:
            card = describe(model)
        model = load(model)
    if not isinstance(model, LanguageModel):
        raise InputError(
            f"{model.name} reads images, and a report is of a language model: ss.explore(model, images) "
            "makes a page about its tokens"
        )
    if windows is None:
        length = min(LENGTH, model.context or LENGTH)
        windows = cut(documents(limit=DOCUMENTS), model, length=length, per_document=1)
    if spectrum is None:
        spectrum = read_spectra(model, convention=convention)
    spectra = list(by_convention(model, spectrum).values())
    parts = _Parts({}, {})
    tables = {"spectrum": spectrum_table(spectra)}

    bos = parts.take("NLL with and without BOS", lambda: compare_bos(model, windows))
    verdict = parts.take(
        "the verdict on the sink",
        lambda: sink_verdict(model, windows, spectra, draws=draws, batch_size=batch_size),
    )
    shares = parts.take(
        "the energy of the bands", lambda: energy(model, windows, spectra, batch_size=batch_size)
    )
    sinks = parts.take(
        "the sinks",
        lambda: find_sinks(
            model,
            windows,
            spectra,
            length=min(TOKENS, windows.length),
            draws=draws,
            batch_size=batch_size,
        ),
    )
    circuits = parts.take(
        "the circuits of the heads",
        lambda: no_op_circuits(model, windows, spectra[0], batch_size=batch_size),
    )
    site = Site("exit", 0) if verdict is None else verdict.site
    bands = parts.take(
        "what the removal of each band does",
        lambda: removed_bands(model, windows, spectra[0], site, verdict, batch_size),
    )
    maps = parts.take("the attention of each head", lambda: first_maps(model, windows))
    if shares is not None:
        tables["energy"] = energy_table(shares)
    if sinks is not None:
        tables["sinks"] = sinks.summary()
        tables["heads"] = head_table(sinks, circuits)
        tables["norms"] = sinks.norms()
    if circuits is not None:
        tables["profiles"] = profile_table(circuits)
    if bands is not None:
        tables["bands"] = bands
    if verdict is not None:
        tables["verdict"] = verdict.summary()
    record = {
        "model": model.name,
        "card": card_of(model, windows, card, bos),
        "verdict": None if verdict is None else verdict_words(verdict),
        "site": str(site),
        "draws": draws,
        "convention": spectra[0].convention,
        "conventions": [each.convention for each in spectra],
        "dark_rank": spectra[0].dark().rank,
        "d": spectra[0].d,
        "bands": spectra[0].count,
        "rules": {"verdict": RULE, "circuits": CIRCUIT_RULE},
        "tokens": first_tokens(model, windows),
        "attention_layers": list(model.attention_layers),
        "provenance": provenance(model, windows, spectra, command),
        "warnings": parts.said,
    }
    return ModelReport(model.name, record, tables, maps, parts.absent)


@dataclass
class _Parts:
    """The parts of a report that cannot be measured, and the caveats of those that can."""

    absent: dict[str, str]
    warned: dict[str, None]

    def take(self, name: str, measure: Callable[[], Any]) -> Any:
        """Return a part; None, with the reason kept, for one that this model or text does not have."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", SpectralWarning)
            try:
                return measure()
            except InputError as error:
                self.absent[name] = without_secrets(" ".join(str(error).split()))
                return None
            finally:
                for each in caught:
                    if issubclass(each.category, SpectralWarning):
                        self.warned[without_secrets(str(each.message))] = None
                    else:
                        warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)

    @property
    def said(self) -> list[str]:
        return list(self.warned)


def spectrum_table(spectra: list[Spectrum]) -> pd.DataFrame:
    """Return one row per direction and convention: its band, its singular value and that over the largest."""
    rows = [
        {
            "convention": each.convention,
            "direction": direction + 1,
            "band": 1 + int(np.searchsorted(each.edges[1:], direction, side="right")),
            "singular_value": float(value),
            "relative": float(value / each.values[0]),
        }
        for each in spectra
        for direction, value in enumerate(each.values)
    ]
    return pd.DataFrame(rows)


def energy_table(shares: pd.DataFrame) -> pd.DataFrame:
    """Return the mean share of each band by convention, layer and class of token, over documents."""
    keys = ["convention", "position_class", "layer", "band"]
    return shares.groupby(keys, sort=False, as_index=False)[["share", "norm"]].mean()


def head_table(sinks: Sinks, circuits: Circuits | None) -> pd.DataFrame:
    """Return one row per layer and head: the attention that it pays the first token, and its circuit."""
    rows: list[dict[str, Any]] = []
    for (layer, head), part in sinks.by_head().groupby(["layer", "head"]):
        attention = Estimate.of(part["first"])
        if np.isfinite(attention.value):
            rows.append({"layer": layer, "head": head, **attention.columns("received")})
    table = pd.DataFrame(rows)
    if circuits is None or table.empty:
        return table
    names = ["use", "attention", "value_ratio", "top_two", "random_top_two", "always_on", "rival"]
    names += ["key_dark", "reading_dark", "value_dark", "circuit", "lacking"]
    return table.merge(circuits.heads[["layer", "head", *names]], on=["layer", "head"], how="left")


def profile_table(circuits: Circuits) -> pd.DataFrame:
    """Return the shares of the bands in what each head reads and writes at the sink, mean over documents."""
    keys = ["layer", "head"]
    bands = [str(band) for band in range(1, circuits.spectrum.count + 1)]
    rows: list[pd.DataFrame] = []
    for what, shares in (("value", circuits.value_shares), ("reading", circuits.read_shares)):
        mean = shares.groupby(keys)[bands].mean().reset_index()
        rows.append(mean.melt(keys, bands, "band", "share").assign(what=what))
    layers, heads, count = circuits.key_shares.shape
    index = pd.MultiIndex.from_product([range(layers), range(heads), bands], names=[*keys, "band"])
    key = pd.DataFrame({"share": circuits.key_shares.double().flatten().numpy()}, index).reset_index()
    key = key.dropna()  # layers without attention
    table = pd.concat([key.assign(what="key direction"), *rows], ignore_index=True)
    return table.assign(band=table["band"].astype(int), chance=1 / count)[
        ["layer", "head", "what", "band", "share", "chance"]
    ]


def removed_bands(
    model: LanguageModel,
    windows: Windows,
    spectrum: Spectrum,
    site: Site,
    verdict: SinkVerdict | None,
    batch_size: int | None,
) -> pd.DataFrame:
    """Remove one band at a time at a site, and return the change of the NLL and of the sink, a row per band.

    The range of random subspaces is that of the verdict, which removes them at the same site.
    """
    cells: dict[str, Interventions] = {
        str(band): {site: remove(spectrum.band(band))} for band in range(1, spectrum.count + 1)
    }
    effects = evaluate_all(model, windows, cells, batch_size=batch_size)
    layer = site.layer + 1 if site.kind == "exit" else 0
    rows: list[dict[str, Any]] = []
    for band, effect in effects.items():
        row = {
            "band": int(band),
            "directions": effect.rank,
            **Estimate.of(effect.table["delta_nll"]).columns("delta_nll"),
            "removed_energy_share": float(effect.table["removed_energy_share"].mean()),
        }
        if f"sink_mass_{layer}" in effect.table:
            row |= Estimate.of(effect.table[f"sink_mass_{layer}"]).columns("sink")
            row["untouched_sink"] = float(effect.table[f"baseline_sink_mass_{layer}"].mean())
        if verdict is not None:
            row |= {"random_least": verdict.delta.least, "random_most": verdict.delta.most}
            if "sink" in row:
                kept = (1 - verdict.cut.most, 1 - verdict.cut.least)
                row |= {
                    f"random_sink_{end}": row["untouched_sink"] * share
                    for end, share in zip(("least", "most"), kept, strict=True)
                }
        rows.append(row)
    return pd.DataFrame(rows)


def first_maps(model: LanguageModel, windows: Windows) -> Any:
    """Return the attention of every head on the first tokens of the first window."""
    row = windows.rows[0][:TOKENS]

    def readout(final: Tensor, read: dict[Site, Tensor], weights: list[Tensor]) -> Tensor:
        return torch.stack([each[0].float().cpu() for each in weights])

    return trace(model, row[None].to(model.device), {}, readout=readout, attention=True).numpy()


def first_tokens(model: LanguageModel, windows: Windows) -> list[str]:
    """Return the first tokens of the first window as labels."""
    return [token.label for token in shown_tokens(windows.rows[0][:TOKENS].tolist(), model.tokenizer)]


def verdict_words(verdict: SinkVerdict) -> dict[str, Any]:
    """Return the verdict as one sentence, what each other convention says, and the layers it speaks of."""
    return {
        "sentence": sentence(verdict),
        "others": [sentence(other) for other in verdict.alternatives],
        "verdict": verdict.verdict,
        "convention": verdict.convention,
        "layer": verdict.layer,
        "onset": verdict.onset,
        "disagreement": verdict.disagreement,
    }


def sentence(verdict: SinkVerdict) -> str:
    """Return a verdict as one sentence with its intervals and its convention."""
    token = "BOS, its first token," if verdict.opens_with_bos else "its first token"
    if verdict.verdict == "no sink":
        return (
            f"{verdict.model} has no attention sink at its first position: no head gives it more than 30 % "
            f"of the attention (the strongest gives {percent(verdict.head)})."
        )
    most = f"{100 * verdict.share.most:.1f} %"
    chance = f"at most {most} in any of {verdict.draws} random subspaces of that size"
    share = f"{percent(verdict.share)} of its energy"
    cut_most = f"at most {100 * verdict.cut.most:.0f} %"
    if verdict.verdict == "dark":
        return (
            f"{verdict.model} has a dark attention sink: {token} keeps {share} in the directions that the "
            f"vocabulary reads least ({chance}), and without these directions layer {verdict.layer} loses "
            f"{percent(verdict.cut)} of its attention to it, where random subspaces take {cut_most} "
            f"({verdict.convention} convention)."
        )
    return (
        f"{verdict.model} has an attention sink that is not dark: layer {verdict.layer} gives {token} "
        f"{percent(verdict.mass)} of its attention, and of the three conditions for a dark sink it fails "
        f"these: {verdict.reason} ({verdict.convention} convention)."
    )


def percent(value: Estimate) -> str:
    """Return a share with its interval."""
    if np.isnan([value.low, value.high]).any():
        return f"{100 * value.value:.1f} %"
    return f"{100 * value.value:.1f} % [{100 * value.low:.1f}, {100 * value.high:.1f}]"


def card_of(
    model: LanguageModel, windows: Windows, described: dict[str, Any] | None, bos: Any
) -> list[tuple[str, str]]:
    """Return the properties of a model as rows of a name and a value."""
    found = described or {}
    token = None if model.bos is None else model.tokenizer.convert_ids_to_tokens(model.bos)
    opening = f"windows open with {token}" if windows.opens_with_bos else "windows do not open with BOS"
    rows = [
        ("Model", model.name),
        ("Family", model.family),
        ("Reads", "left to right (causal)" if model.causal else "both directions (encoder)"),
        ("Layers", str(model.layers)),
        ("Heads in a layer", str(model.heads)),
        ("Width of the residual stream", str(model.d)),
        ("Vocabulary", str(model.vocabulary)),
        ("Context", "not stated" if model.context is None else f"{model.context} tokens"),
        ("Embedding and unembedding", "the same matrix" if model.tied else "two matrices"),
        ("Numbers", str(model.dtype).removeprefix("torch.")),
        ("Quantisation", str(found.get("quantization") or "none stated")),
        ("First token", opening),
    ]
    if bos is not None:
        rows.append(
            ("NLL with and without BOS", f"{bos.with_bos:.3f} and {bos.without_bos:.3f} nats per token")
        )
    return rows


def provenance(
    model: Transformer, inputs: Inputs, spectra: list[Spectrum], command: str
) -> list[tuple[str, str]]:
    """Return what is needed to repeat the measurement, as rows of a name and a value."""
    rows = [
        ("Command", without_secrets(command) or "called from Python"),
        *(_of_images(inputs) if isinstance(inputs, Pixels) else _of_text(inputs)),
        *((f"Hash of the {s.convention} {s.matrix}", s.fingerprint[:16] or "none") for s in spectra),
        ("Made", datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")),
        ("Python", platform.python_version()),
    ]
    return rows + [(name, _version(name)) for name in LIBRARIES]


def _of_text(windows: Windows) -> list[tuple[str, str]]:
    record = windows.record
    return [
        ("Text", f"{record['documents']} documents, {len(windows)} windows, {record['tokens']} tokens"),
        ("Tokens in a window", f"up to {windows.length}"),
        ("Hash of the token ids", record["data_hash"]),
        ("Default convention", DARK_CONVENTION),
    ]


def _of_images(pixels: Pixels) -> list[tuple[str, str]]:
    record, side = pixels.record, pixels.model.patch_size
    grids = sorted(set(pixels.grids))
    sizes = [
        f"{columns * side} x {rows * side} pixels ({columns} x {rows} patches)" for rows, columns in grids
    ]
    return [
        ("Images", f"{len(pixels)} of {' or '.join(sizes)}"),
        ("Tokens before the patches", ", ".join(pixels.model.prefix) or "none"),
        ("Prepared by", record["processor"] or "the caller, as tensors"),
        ("Hash of the images", record["data_hash"]),
    ]


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # sources that are on the path but not installed
        return "not installed"
