"""Inputs and results of experiments, and a function that runs all of them."""

import importlib.util
import json
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
from tqdm import tqdm

from spectral_sinks.data.document_sources import documents as read_documents
from spectral_sinks.data.texts import Windows, cut
from spectral_sinks.errors import InputError, SpectralWarning
from spectral_sinks.files import atomic_write
from spectral_sinks.interventions.sites import Site
from spectral_sinks.interventions.tracing import Interventions
from spectral_sinks.measure.attention.received import attention_by_head
from spectral_sinks.measure.nll.effects import Effect, evaluate_all
from spectral_sinks.measure.residual.matrix_spectrum import read_spectrum
from spectral_sinks.measure.sinks.find import find_sinks
from spectral_sinks.measure.sinks.sink_rules import SinkRule
from spectral_sinks.models.attention_sdpa import TOKENS
from spectral_sinks.models.embedded import DEFAULT
from spectral_sinks.models.language import LanguageModel
from spectral_sinks.models.loading import load
from spectral_sinks.models.remote_state import To
from spectral_sinks.spectra.conventions import DARK_CONVENTION
from spectral_sinks.spectra.spectrum import Spectrum
from spectral_sinks.stats import mean_interval
from spectral_sinks.sweeps.band_ladder import ladder
from spectral_sinks.sweeps.definition import versions
from spectral_sinks.sweeps.workers import begin_worker

__all__ = ["Finding", "Study", "answer", "find_experiment", "reproduce", "without_last_band"]

BATCH = 16
"""Number of windows in a forward pass."""

FORMULAS = ("=", "+", "-", "@", "\t", "\r")
"""Characters with which a text begins that a spreadsheet takes for a formula."""

PROCESS_BYTES = 2**30
"""Memory of a process that has imported torch and transformers, generously."""

EXPERIMENTS = (
    "spectrum",
    "weights",
    "sink",
    "bos",
    "bands",
    "components",
    "lens",
    "eu_dark",
    "bars",
    "across",
    "generation",
    "swap",
    "sink_preserving",
    "fills",
    "controls",
    "reads",
    "circuits",
    "designated",
    "several",
    "no_bos",
    "masks",
    "steering",
    "writers",
    "pruning",
    "quantisation",
    "kv_cache",
)
"""Names of the experiments, in the order in which the findings build on each other; each is a file in the
experiments folder.
"""


@dataclass(frozen=True)
class Study:
    """A model, texts and spectra for the experiments, and the folder for their results."""

    model: LanguageModel
    windows: Windows
    unembedding: Spectrum
    embedding: Spectrum
    out: Path
    draws: int = 20
    """Number of random subspaces per control."""
    silent: bool = False
    """Without progress bars, which mix up when experiments run side by side."""
    predict: int | None = None
    """Number of predictions of each window that `evaluate` and `ladder` score; all by default. Tables that
    are saved then have it as a column."""

    def evaluate(self, cells: Mapping[str, Interventions], title: str = "") -> dict[str, Effect]:
        """Run `evaluate_all` on the study's model and windows, with a progress bar."""
        with tqdm(desc=title, unit="cell", leave=False, disable=self.silent or None) as bar:
            return evaluate_all(
                self.model,
                self.windows,
                cells,
                batch_size=BATCH,
                predict=self.predict,
                progress=_tick(bar),
            )

    @cached_property
    def below_sink(self) -> int:
        """The exit below the strongest sink.

        It is the exit of the layer before the one that attends most to position 0, among all layers but the
        first. Raises InputError for a model with one layer, and if attention cannot be read.
        """
        if self.model.layers < 2:
            raise InputError(f"{self.model.name} has one layer: no exit lies below an attention layer")
        heads = attention_by_head(self.model, self.windows, batch_size=BATCH)
        return int(heads.groupby("layer")["attention"].mean().iloc[1:].idxmax()) - 1

    @cached_property
    def exits(self) -> list[int]:
        """The layers at whose exit the residual stream is filtered: all."""
        return list(range(self.model.layers))

    @cached_property
    def layers(self) -> list[int]:
        """The layers whose components are filtered one by one: all."""
        return list(range(self.model.layers))

    @cached_property
    def openings(self) -> Windows:
        """The first 64 tokens of each window, the length at which sinks are judged."""
        rows = [row[:TOKENS] for row in self.windows.rows]
        return Windows.of_ids(rows, self.model, self.windows.document)

    def unseen(self, *, length: int | None = None, times: int = 1) -> Windows:
        """Return windows of shipped documents after the study's: what is learned there is tested here.

        There is one window of each document, and `times` as many documents as the study has.
        """
        count = len(set(self.windows.document))
        texts = read_documents(limit=(1 + times) * count)[count:]
        bos = "always" if self.windows.opens_with_bos else "auto"
        return cut(texts, self.model, length=length or self.windows.length, per_document=1, bos=bos)

    @cached_property
    def sink_rule(self) -> SinkRule:
        """The rule for sinks of twice as many unseen documents, with the dark bands folded and raw."""
        windows = self.unseen(length=TOKENS, times=2)
        spectra = [read_spectrum(self.model, convention=name) for name in (DARK_CONVENTION, "raw")]
        return SinkRule.learn(self.model, find_sinks(self.model, windows, spectra, draws=0), spectra)

    def ladder(self, site: Site, **options: Any) -> pd.DataFrame:
        """Run `ladder` at a site, with a progress bar."""
        with tqdm(desc=str(site), unit="cell", leave=False, disable=self.silent or None) as bar:
            return ladder(
                self.model,
                self.windows,
                site,
                self.unembedding,
                self.embedding,
                draws=self.draws,
                batch_size=BATCH,
                predict=self.predict,
                progress=_tick(bar),
                **options,
            )

    def save(self, table: pd.DataFrame, name: str) -> pd.DataFrame:
        """Write a table as CSV, with six significant digits, and return it.

        A text that a spreadsheet would take for a formula is written after an apostrophe, since tokens come
        from the model and the documents.
        """
        if self.predict is not None:
            table = table.assign(predict=self.predict)
        with atomic_write(self.out / f"{name}.csv") as path:
            _without_formulas(table).to_csv(path, index=False, float_format="%.6g")
        return table

    def figure(self, name: str) -> Path:
        """Return the path of the figure with that name."""
        return self.out / f"{name}.png"


def _together(path: Path, manifest: dict[str, Any], names: Sequence[str]) -> list[str]:
    """Return the experiments of this run, and of an earlier one in the folder with the same manifest."""
    try:
        earlier = json.loads(path.read_text())
    except (OSError, ValueError):
        return list(names)
    same = all(earlier.get(key) == value for key, value in manifest.items())
    done = {*names, *(earlier.get("experiments", ()) if same else ())}
    return [name for name in EXPERIMENTS if name in done]


def _tick(bar: Any) -> Callable[[int], None]:
    def tick(done: int) -> None:
        bar.update(done)

    return tick


@dataclass(frozen=True)
class Finding:
    """The result of an experiment: one row per quantity, with its interval and its control."""

    answers: list[dict[str, Any]]
    name: str = ""
    seconds: float = field(default=0.0, compare=False)
    """Processor time of this process, in seconds."""
    verdict: str = ""
    """"holds", "holds partly" or "does not hold here", and a sentence; written to verdicts.csv."""


def _verdicts(path: Path, findings: Sequence[Finding], names: Sequence[str]) -> pd.DataFrame:
    """Return the verdicts of this run, and those of earlier runs for the named experiments."""
    said = {found.name: found.verdict for found in findings}
    if path.is_file():
        earlier = pd.read_csv(path)
        said = dict(zip(earlier["experiment"], earlier["verdict"], strict=True)) | said
    rows = [{"experiment": name, "verdict": said[name]} for name in names if said.get(name)]
    return pd.DataFrame(rows)


def answer(
    quantity: str,
    values: Any,
    control: str = "",
    interval: tuple[float, float] | None = None,
) -> dict[str, Any]:
    """Return the row of a quantity, from one value per document (with its mean and 95 % interval) or a single
    number.
    """
    if isinstance(values, int | float):
        low, high = interval or (float("nan"), float("nan"))
        return {"quantity": quantity, "value": float(values), "low": low, "high": high, "control": control}
    low, high = interval or mean_interval(values)
    mean = float(pd.Series(values).mean())
    return {"quantity": quantity, "value": mean, "low": low, "high": high, "control": control}


def without_last_band(rows: pd.DataFrame, place: str, last: int) -> dict[str, Any]:
    """Return the cost of keeping all but the last band, from a ladder's table, beside random subspaces."""
    by = rows.set_index(["filter", "kept"])
    phi, control = by.loc[("Phi", last)], by.loc[("Rnd", last)]
    return answer(
        f"{place}: NLL difference without the last band",
        float(phi["mean"]),
        f"random: {control['least']:+.4f} to {control['most']:+.4f}",
        (float(phi["low"]), float(phi["high"])),
    )


def experiments_folder() -> Path:
    """Return the folder of the experiments: inside an installed package, or beside the package in a clone."""
    here = Path(__file__).parent
    shipped = here / "experiment_scripts"
    return shipped if shipped.is_dir() else here.parent / "experiments"


def find_experiment(name: str) -> Callable[[Study], Finding]:
    """Return the `run` of an experiment. Raises InputError for an unknown name and for a missing file."""
    if name not in EXPERIMENTS:
        raise InputError(f"no experiment {name!r}: choose from {', '.join(EXPERIMENTS)}")
    path = experiments_folder() / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"spectral_sinks_experiment_{name}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise InputError(f"the file of experiment {name!r} is missing: expected {path.name} in {path.parent}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.run


def _study(model: str | LanguageModel, out: Path, documents: int, silent: bool = False) -> Study:
    loaded = load(model)
    windows = cut(read_documents(limit=documents), loaded, per_document=1)
    spectra = {matrix: read_spectrum(loaded, matrix) for matrix in ("unembedding", "embedding")}
    return Study(loaded, windows, spectra["unembedding"], spectra["embedding"], out, silent=silent)


def _without_formulas(table: pd.DataFrame) -> pd.DataFrame:
    safe = table.copy(deep=False)
    for name in safe.columns:
        if not pd.api.types.is_numeric_dtype(safe[name]):
            safe[name] = safe[name].map(
                lambda value: f"'{value}" if isinstance(value, str) and value.startswith(FORMULAS) else value
            )
    return safe


def _run(study: Study, name: str) -> Finding:
    """Run one experiment and write its summary."""
    began = time.process_time()
    found = find_experiment(name)(study)
    found = replace(found, name=name, seconds=time.process_time() - began)
    summary = pd.DataFrame([{"experiment": name, **row} for row in found.answers])
    study.save(summary.assign(convention=study.unembedding.convention), f"{name}_summary")
    return found


def _in_turn(study: Study, names: Sequence[str], only: str | None) -> Iterator[Finding]:
    for name in names:
        try:
            yield _run(study, name)
        except InputError as error:
            if study.model.remote is None or only is not None:
                raise
            warnings.warn(f"experiment {name!r} is left out: {error}", SpectralWarning, stacklevel=3)


def _side_by_side(
    model: str, out: Path, documents: int, names: Sequence[str], jobs: int
) -> Iterator[Finding]:
    """Run experiments in processes, and yield each finding when its experiment ends."""
    # spawn, since a forked process inherits locks of torch's threads
    with ProcessPoolExecutor(jobs, get_context("spawn"), begin_worker, (1,)) as pool:
        waiting = [pool.submit(_run_alone, model, out, documents, name) for name in names]
        try:
            for done in as_completed(waiting):
                found, warned = done.result()
                for message, category in warned:
                    warnings.warn(message, category, stacklevel=3)
                yield found
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _run_alone(
    model: str, out: Path, documents: int, name: str
) -> tuple[Finding, list[tuple[str, type[Warning]]]]:
    """Run one experiment in a process of a pool; its warnings are for the caller's process to show."""
    with warnings.catch_warnings(record=True) as warned:
        found = _run(_study_of_process(model, out, documents, True), name)
    return found, [(str(one.message), one.category) for one in warned]


_study_of_process = cache(_study)
"""A process that runs several experiments loads the model once."""


def idle_jobs(model: LanguageModel) -> int:
    """Return the number of experiments that can run at the same time: by idle cores and free memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # measured over a second, since a load average still counts what has just ended
    idle = min(cores, sum(busy < 50 for busy in psutil.cpu_percent(1.0, percpu=True)))
    weights = sum(p.numel() * p.element_size() for p in model.module.parameters())
    # a process holds torch and transformers, the weights, and about as much again in activations and bases
    held = psutil.virtual_memory().available // (PROCESS_BYTES + 3 * weights)
    return max(1, min(idle, held))


def reproduce(
    model: str | LanguageModel = DEFAULT,
    out: str | Path = "results",
    only: str | None = None,
    documents: int = 16,
    remote: To = False,
    jobs: int | None = None,
    progress: Callable[[Finding], None] | None = None,
) -> list[Finding]:
    """Run the experiments on a model, and write their tables and figures to a folder.

    Experiments run side by side, each in a process of its own that computes with one thread. Each writes
    NAME_summary.csv, and manifest.json describes the whole run. For a model on a server, experiments that
    cannot run there are left out, with a warning.

    Args:
        model: a language model, or the name, hub id or folder of one.
        out: the results folder.
        only: the name of one experiment; by default all are run.
        documents: the number of documents, from the first of the shipped corpus.
        remote: where the model's measurements run, as for `load`.
        jobs: the number of experiments that run at the same time. By default it is the number of idle cores,
            or fewer if the memory does not hold so many copies of the model. A model that is loaded already
            or is on a server, and a single experiment, run in this process.
        progress: called with each finding as soon as its experiment has ended.

    Returns:
        The finding of each experiment that ran, in the order of `EXPERIMENTS`.

    Raises:
        InputError: for an unknown experiment or fewer than one job.
        OSError: if `out` cannot be written.

    """
    # find every experiment before anything is computed
    names = EXPERIMENTS if only is None else (only,)
    for name in names:
        find_experiment(name)
    if jobs is not None and jobs < 1:
        raise InputError(f"{jobs} jobs: expected at least one")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    loaded = load(model, remote=remote)
    study = _study(loaded, out, documents)
    if only is None and isinstance(model, str) and loaded.remote is None:
        jobs = jobs or idle_jobs(loaded)
        runs = _side_by_side(model, out, documents, names, jobs)
    else:
        runs = _in_turn(study, names, only)
    findings: list[Finding] = []
    for found in runs:
        findings.append(found)
        if progress is not None:
            progress(found)
    findings.sort(key=lambda found: names.index(found.name))
    # the manifest: everything on which the results depend
    manifest = {
        "model": loaded.name,
        "family": loaded.family,
        "unembedding_hash": study.unembedding.fingerprint[:16],
        "embedding_hash": study.embedding.fingerprint[:16],
        "convention": study.unembedding.convention,
        "bands": study.unembedding.count,
        "windows": study.windows.record,
        "dtype": str(loaded.dtype),
        "attention": loaded.config._attn_implementation,
        "versions": versions(),
        "draws_per_control": study.draws,
    }
    done = [found.name for found in findings]
    manifest |= {"experiments": _together(out / "manifest.json", manifest, done)}
    if loaded.remote is not None:
        manifest["remote"] = loaded.remote.record()
    with atomic_write(out / "manifest.json") as path:
        path.write_text(json.dumps(manifest, indent=1) + "\n")
    if len(verdicts := _verdicts(out / "verdicts.csv", findings, manifest["experiments"])):
        study.save(verdicts, "verdicts")
    return findings
