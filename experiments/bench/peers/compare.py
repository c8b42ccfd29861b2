"""The same filters by this package and by other means, in turn, each side in an environment of its own.

`make bench-peers` makes the environments and runs

    python experiments/bench/peers/compare.py --models sinklet smollm2 gemma3 --out results

Every side removes the dark band of one model at each of some exits, on the same windows, and returns the NLL
of every window. A round lets all sides run one after the other, on one thread, in an order that is reversed
from round to round. The run stops where an NLL lies more than 1e-4 nats from that of this package.

`bench_peers.json` has one row for each model and side: `seconds` of processor time by round, their `median`,
the `ratio` to this package (median over rounds, and its `lowest` and `highest`), `peak_mib` of the resident
memory of the process and what it held before (`loaded_mib`), and `difference`, the largest one in nats.
Models that are not named keep their rows.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import spectral_sinks as ss

HERE = Path(__file__).parent
OURS = "ours"
PEERS = ("hooks", "nnsight_trace", "transformer_lens_bridge")
"""Scripts beside this one; each has its requirements in a file of the same name."""

TOLERANCE = 1e-4
"""How far the NLL of a window may lie from that of this package, in nats."""

PATIENCE = 1800.0
"""Seconds after which a side that gives no answer is given up."""


@dataclass(frozen=True)
class Case:
    """A model and the size of its comparison, which takes some minutes of one core."""

    source: str
    windows: int
    length: int
    exits: int


CASES = {
    "sinklet": Case(ss.DEFAULT, 16, 128, 6),
    "smollm2": Case("models/smollm2", 4, 64, 4),
    "gemma3": Case("models/gemma3", 2, 64, 3),
}


class Side:
    """A side that runs in a process of its own, and waits between its turns."""

    def __init__(self, name: str, python: Path, job: Path) -> None:
        script = HERE / f"{name}.py"
        if not python.is_file():
            raise ss.InputError(f"{python} is missing: run make bench-peers, which makes the environments")
        self.name, self.out = name, job / name
        self.out.mkdir()
        self.log = (self.out / "log").open("w")
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [python, script, job, self.out],
            stdin=subprocess.PIPE,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            env=environment,
            text=True,
        )
        self.versions: dict[str, str] = {}

    def __enter__(self) -> "Side":
        try:
            self.versions = self._answer("ready.json")["versions"]
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()
        self.log.close()

    def turn(self, number: int, exits: list[int]) -> dict[str, Any]:
        """Let the side run, and return its answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{number} {' '.join(map(str, exits))}\n")
        self.process.stdin.flush()
        return self._answer(f"turn{number}.json")

    def _answer(self, file: str) -> dict[str, Any]:
        path, start = self.out / file, time.monotonic()
        while not path.exists():
            if self.process.poll() is not None:
                said = (self.out / "log").read_text(errors="replace").strip()
                raise ss.InputError(f"the side {self.name} ended without an answer:\n{said[-2000:]}")
            if time.monotonic() - start > PATIENCE:
                raise ss.InputError(f"the side {self.name} gave no answer for {PATIENCE:.0f} s")
            time.sleep(0.05)
        return json.loads(path.read_text(encoding="utf-8"))


def write_job(case: Case, job: Path) -> list[int]:
    """Write the checkpoint, the windows and the basis for all sides, and return the exits."""
    model = ss.load(case.source, dtype="float32")
    windows = ss.cut(ss.documents(limit=case.windows), model, length=case.length, per_document=1)
    dark = ss.read_spectrum(model).dark()
    model.module.save_pretrained(job / "model")
    model.tokenizer.save_pretrained(job / "model")
    ids = np.stack([row.numpy() for row in windows.rows])
    np.savez(job / "inputs.npz", ids=ids, basis=dark.basis.float().numpy())
    return np.linspace(0, model.layers - 1, case.exits).round().astype(int).tolist()


def check(name: str, found: list[list[float]], ours: list[list[float]]) -> float:
    """Return the largest difference of two sides' NLL. Raises InputError for one above the tolerance."""
    difference = float(np.abs(np.array(found) - np.array(ours)).max())
    if not difference <= TOLERANCE:
        raise ss.InputError(
            f"the NLL of the side {name} lies {difference:.2g} nats from that of this package, more than "
            f"{TOLERANCE:g}: the times of different numbers are not compared"
        )
    return difference


def compare(
    model: str, case: Case, environments: Path, rounds: int, peers: tuple[str, ...] = PEERS
) -> list[dict[str, Any]]:
    """Run all sides on one model, and return a row for each. Raises InputError where a side fails."""
    with ExitStack() as stack:
        job = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-peers-")))
        exits = write_job(case, job)
        pythons = {OURS: Path(sys.executable)} | {
            name: environments / name / "bin" / "python" for name in peers
        }
        sides = [stack.enter_context(Side(name, python, job)) for name, python in pythons.items()]
        answers: dict[str, list[dict[str, Any]]] = {side.name: [] for side in sides}
        differences = dict.fromkeys(answers, 0.0)
        for turn in range(rounds + 1):  # the first warms up: one filter, and no time is taken
            found = {
                side.name: side.turn(turn, exits if turn else exits[:1])
                for side in (sides if turn % 2 else sides[::-1])
            }
            for name, answer in found.items():
                difference = check(name, answer["nll"], found[OURS]["nll"])
                differences[name] = max(differences[name], difference)
                if turn:
                    answers[name].append(answer)
            spent = ", ".join(f"{name} {answer['seconds']:.2f} s" for name, answer in found.items())
            print(f"{model}, {f'round {turn}' if turn else 'warm-up'}: {spent}", flush=True)
    size = {"windows": case.windows, "tokens": case.length, "exits": exits}
    return [
        {"model": model, "side": side.name, **size, "versions": side.versions}
        | measured(answers[side.name], answers[OURS])
        | {"difference": differences[side.name]}
        for side in sides
    ]


def measured(answers: list[dict[str, Any]], ours: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the numbers of a side: its times, their ratios to those of this package, and its memory."""
    seconds = [answer["seconds"] for answer in answers]
    ratios = [a["seconds"] / b["seconds"] for a, b in zip(answers, ours, strict=True)]
    return {
        "seconds": [round(each, 3) for each in seconds],
        "median": round(statistics.median(seconds), 3),
        "ratio": round(statistics.median(ratios), 3),
        "lowest": round(min(ratios), 3),
        "highest": round(max(ratios), 3),
        "peak_mib": round(max(answer["peak"] for answer in answers)),
        "loaded_mib": round(min(answer["loaded"] for answer in answers)),
    }


def show(rows: list[dict[str, Any]]) -> None:
    table = Table("model", "side", "seconds", "/ ours", "peak, MiB", "difference, nats")
    for row in rows:
        ratio = f"{row['ratio']:.2f} [{row['lowest']:.2f}, {row['highest']:.2f}]"
        peak = f"{row['peak_mib']} (loaded: {row['loaded_mib']})"
        table.add_row(
            row["model"], row["side"], f"{row['median']:.2f}", ratio, peak, f"{row['difference']:.1g}"
        )
    Console().print(table)


def merged(path: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of a file, those of the same models replaced, in the order of the models."""
    old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    again = {row["model"] for row in rows}
    order = {name: index for index, name in enumerate(CASES)}
    return sorted(
        [row for row in old if row["model"] not in again] + rows, key=lambda row: order[row["model"]]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=CASES, default=["sinklet"])
    parser.add_argument(
        "--environments", type=Path, default=Path(".venv-peers"), help="a folder for each peer"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="folder for bench_peers.json")
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name in given.models:
        rows += compare(name, CASES[name], given.environments, given.rounds)
    show(rows)
    if given.out is not None:
        given.out.mkdir(parents=True, exist_ok=True)
        path = given.out / "bench_peers.json"
        path.write_text(json.dumps(merged(path, rows), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except ss.InputError as error:
        print(error, file=sys.stderr)
        sys.exit(1)
