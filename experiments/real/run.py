"""Run the experiments on real models, and write tables, figures and verdicts to a folder for each.

An experiment whose tables are there, made with the same text, draws and versions, is not run again, so a run
that was cut off goes on where it stopped. Progress and the time that is left are printed.

    python experiments/real/run.py --models smollm2 gemma3 --only conventions --out results/real --jobs 2
"""

import importlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import cache
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, get_args

import pandas as pd
import psutil
import tyro
from fetch import expected, fetch
from real_study import RealStudy, prepare

import spectral_sinks as ss

SPREAD = {"smollm2": 1, "gemma3": 1}
"""Exits that are edited beside what the onset layer and the strongest layer read, by model."""

NAMES = {"smollm2": "SmolLM2-135M-Instruct (Q4_1)", "gemma3": "Gemma 3 270M (Q4_K_M)"}

MINUTES = {
    "conventions": 40,
    "ladders": 12,
    "same_energy": 20,
    "leak": 15,
    "openings": 5,
    "secondary": 6,
    "spike": 12,
    "quantisation": 12,
    "designated": 10,
    "circuits": 10,
    "masks": 2,
    "steering": 6,
    "pruning": 40,
    "kv_cache": 40,
    "bars": 1,
    "fills": 12,
    "spectrum": 1,
    "weights": 1,
    "bos": 1,
    "components": 40,
    "lens": 30,
    "generation": 80,
    "reads": 60,
    "eu_dark": 15,
}
"""The experiments, and what each takes on one core, roughly: a guess at the time that is left. Those from
`quantisation` on are experiments of the embedded model, here under the folded convention."""

SAMPLED = (
    "conventions",
    "ladders",
    "same_energy",
    "leak",
    "pruning",
    "components",
    "lens",
    "reads",
    "eu_dark",
)
"""Experiments whose NLLs may be scored on a sample of predictions; the others measure more than effects."""

SAMPLES: dict[str, dict[str, int]] = {
    "gemma3": dict.fromkeys(("same_energy", "leak", "pruning", "components", "lens", "reads", "eu_dark"), 16)
}
"""Predictions of each window that are scored by default where all would take hours: the vocabulary of Gemma 3
is five times that of SmolLM2."""

Model = Literal["smollm2", "gemma3"]


@dataclass(frozen=True)
class Options:
    """Options of a run."""

    models: tuple[Model, ...] = get_args(Model)
    only: tuple[str, ...] = tuple(MINUTES)
    """Names of experiments."""
    out: Path = Path("results/real")
    fetched: Path = Path("models")
    """Folder of the models, which are fetched if need be."""
    documents: int = 16
    draws: int = 20
    predict: int | None = None
    """Number of predictions of each window that are scored, of the experiments conventions, ladders,
    same_energy, leak, pruning, components, lens, reads and eu_dark. The default is all, and 16 in the last
    seven on Gemma 3. The tables then have it as a column."""
    jobs: int | None = None
    """Experiments that run at the same time, one thread each; by default one for each idle core."""


def record(study: RealStudy, name: str) -> dict[str, Any]:
    """Return everything on which the results depend."""
    model = study.model
    return {
        "model": study.name,
        "source": expected(name),
        "family": model.family,
        "dtype": str(model.dtype),
        "attention": model.config._attn_implementation,
        "exits": study.exits,
        "onset": study.onset,
        "strongest_layer": study.strongest,
        "sink_mass": [round(mass, 4) for mass in study.sink_mass],
        "spectra": {key: spectrum.fingerprint[:16] for key, spectrum in study.spectra.items()},
        "bands": study.unembedding.count,
        "windows": study.windows.record,
        "draws_per_control": study.draws,
        "predict": study.predict,
        "versions": ss.sweeps.versions(),
    }


def predictions(name: str, experiment: str, options: Options) -> int | None:
    """Return how many predictions of each window an experiment scores; None is all of them."""
    return SAMPLES.get(name, {}).get(experiment) if options.predict is None else options.predict


@cache
def prepared(name: str, options: Options) -> RealStudy:
    """Return the study of a model; a process that runs several experiments on it loads it once."""
    model = ss.load(fetch([name], options.fetched)[name])
    study = prepare(model, NAMES[name], options.out / name, options.documents, SPREAD[name])
    return replace(study, draws=options.draws)


def unfinished(name: str, options: Options) -> list[str]:
    """Return the experiments on a model whose tables are not there, or are made of other things."""
    manifest = record(prepared(name, options), name)
    return [
        experiment
        for experiment in options.only
        if not stored(
            options.out / name, manifest | {"predict": predictions(name, experiment, options)}, experiment
        )
    ]


def run_one(name: str, experiment: str, options: Options) -> tuple[str, str, float]:
    """Run one experiment on one model; return what it took in seconds of processor time."""
    began = time.process_time()
    study = replace(prepared(name, options), predict=predictions(name, experiment, options))
    finding = find(experiment)(study)
    study.save(
        pd.DataFrame([{"experiment": experiment, **row} for row in finding.answers]), f"{experiment}_summary"
    )
    seconds = time.process_time() - began
    done = {"verdict": finding.verdict, "processor_seconds": round(seconds)}
    (study.out / f"{experiment}.json").write_text(json.dumps(record(study, name) | done, indent=1) + "\n")
    return name, experiment, seconds


def find(experiment: str) -> Callable[[Any], ss.experiments.Finding]:
    """Return the `run` of an experiment in this folder, or of one of the embedded model."""
    if (Path(__file__).parent / f"{experiment}.py").is_file():
        return importlib.import_module(experiment).run
    return ss.experiments.find_experiment(experiment)


def stored(out: Path, manifest: dict[str, Any], experiment: str) -> bool:
    """Whether the tables of an experiment are there, made of the same things."""
    try:
        earlier = json.loads((out / f"{experiment}.json").read_text())
    except (OSError, ValueError):
        return False
    return all(earlier.get(key) == value for key, value in json.loads(json.dumps(manifest)).items())


def main(options: Options) -> None:
    if options.predict is not None and (other := [name for name in options.only if name not in SAMPLED]):
        raise ss.InputError(
            f"--predict does not apply to the experiment {other[0]}: give --only {' '.join(SAMPLED)}"
        )
    asked = len(options.models) * len(options.only)
    cores = sum(busy < 50 for busy in psutil.cpu_percent(1.0, percpu=True))
    jobs = min(options.jobs or max(1, cores), asked)
    fetch(options.models, options.fetched)
    # spawn, since a forked process inherits locks of torch's threads
    with ProcessPoolExecutor(jobs, get_context("spawn"), ss.sweeps.begin_worker, (1,)) as pool:
        try:
            run_all(pool, options, asked, jobs)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def run_all(pool: Executor, options: Options, asked: int, jobs: int) -> None:
    """Run the experiments whose tables are not there, and print progress."""
    missing = dict(zip(options.models, pool.map(unfinished, options.models, repeat(options)), strict=True))
    todo = [(name, one) for one in options.only for name in options.models if one in missing[name]]
    left = sum(MINUTES.get(experiment, 10) for _, experiment in todo)
    others = f"; the others: about {left / jobs:.0f} minutes" if todo else ""
    say(f"{asked - len(todo)} of {asked} experiments are there{others}")
    began = time.monotonic()
    waiting = [pool.submit(run_one, name, experiment, options) for name, experiment in todo]
    for count, done in enumerate(as_completed(waiting), start=1):
        name, experiment, seconds = done.result()
        left -= MINUTES.get(experiment, 10)
        say(
            f"{name} {experiment}: {seconds / 60:.1f} minutes of processor time; {count} of {len(todo)} "
            f"after {(time.monotonic() - began) / 60:.0f} minutes, about {left / jobs:.0f} left"
        )


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def experiments_of(arguments: Sequence[str] | None = None) -> Options:
    """Read the options of the command line."""
    return tyro.cli(Options, description=__doc__, args=arguments)


if __name__ == "__main__":
    try:
        main(experiments_of())
    except ss.InputError as error:
        say(str(error))
        sys.exit(1)
    except KeyboardInterrupt:
        say("stopped: the same command goes on where it stopped")
        sys.exit(130)
