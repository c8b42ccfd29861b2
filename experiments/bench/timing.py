"""Timing of two sides that run in turn: ratios of wall and processor time, peak memory, and their rows."""

import gc
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from cases import Case
from rich.console import Console
from rich.table import Table

Row = dict[str, Any]


@dataclass
class Clock:
    """Wall and processor seconds of each side, by round."""

    wall: dict[str, list[float]]
    cpu: dict[str, list[float]]
    found: dict[str, Any]
    """The last result of each side."""

    def row(
        self,
        name: str,
        case: Case,
        a: str,
        b: str,
        target: float | None = None,
        at_least: bool = False,
        **more: Any,
    ) -> Row:
        """Return the row of the ratio of side `a` to side `b`, median over the rounds.

        Args:
            name: the name of the ratio.
            case: the case that was timed.
            a: the side in the numerator.
            b: the side in the denominator.
            target: the ratio that is to be reached.
            at_least: whether the target is a lower bound, not an upper bound.
            **more: further columns.

        """
        made = row(name, case.name, _median(self.wall[a], self.wall[b]), target, at_least)
        if case.model.device.type != "cuda":
            made["ratio_cpu"] = round(_median(self.cpu[a], self.cpu[b]), 3)
        seconds = {side: round(statistics.median(self.wall[side]), 5) for side in (a, b)}
        return made | {"seconds": seconds, "rounds": len(self.wall[a])} | more


def _median(a: list[float], b: list[float]) -> float:
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def row(
    name: str,
    model: str,
    ratio: float | None,
    target: float | None = None,
    at_least: bool = False,
    **more: Any,
) -> Row:
    reached = None
    if target is not None and ratio is not None:
        reached = ratio >= target if at_least else ratio <= target
    made: Row = {"name": name, "model": model, "ratio": None if ratio is None else round(ratio, 3)}
    made |= {"target": target, "reached": reached, "threads": torch.get_num_threads()}
    return made | more


def in_turn(rounds: int, **calls: Callable[[int], Any]) -> Clock:
    """Time calls one after the other, in an order that is reversed from round to round.

    Round -1 is a warm-up and is not timed.
    """
    clock = Clock({side: [] for side in calls}, {side: [] for side in calls}, {})
    for turn in range(-1, rounds):
        for side in list(calls)[:: 1 if turn % 2 else -1]:
            gc.collect()
            _wait()
            wall, cpu = time.perf_counter(), time.process_time()
            clock.found[side] = calls[side](turn)
            _wait()
            if turn >= 0:
                clock.wall[side].append(time.perf_counter() - wall)
                clock.cpu[side].append(time.process_time() - cpu)
    return clock


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextmanager
def peak() -> Iterator[list[float]]:
    """Watch the resident memory while the block runs; the yielded list holds its maximum in MiB."""
    process, found, done = psutil.Process(), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            found[0] = max(found[0], process.memory_info().rss / 2**20)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()


def show(rows: list[Row]) -> None:
    table = Table("what", "model", "ratio", "cpu", "target", "", "note", title="bench")
    for made in rows:
        mark = {True: "reached", False: "missed", None: ""}[made["reached"]]
        numbers = [made.get(key) for key in ("ratio", "ratio_cpu", "target")]
        table.add_row(
            made["name"], made["model"], *("" if x is None else f"{x:g}" for x in numbers), mark, made["note"]
        )
    Console().print(table)
