"""What all sides of the comparison do: read the inputs, wait for their turn, and write what they found.

It needs torch and numpy alone, since each side runs in an environment of its own. A line on standard input is
a turn: its number, and the exits at which the filter acts. The answer is a file in the folder of the side.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


@dataclass(frozen=True)
class Inputs:
    """What all sides are given."""

    model: Path
    """A folder with the checkpoint, as `save_pretrained` writes it."""
    ids: Tensor
    """Token ids, `[windows, tokens]`."""
    basis: Tensor
    """Orthonormal basis of the subspace that is removed, `[d, r]`."""


Run = Callable[[list[int]], Tensor]
"""From exits to the NLL of each window, `[1 + exits, windows]`: untouched, then with the filter at each."""


def remove(x: Tensor, basis: Tensor) -> Tensor:
    """Remove the subspace from the residual stream."""
    return x - (x @ basis) @ basis.T


def nll(logits: Tensor, ids: Tensor) -> Tensor:
    """Return the mean NLL of each window."""
    each = cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    return each.double().view(len(ids), -1).mean(1)


def serve(load: Callable[[Inputs], Run], *packages: str) -> None:
    """Load a side, and take its turns until standard input ends; the versions of `packages` are noted."""
    job, out = Path(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    with np.load(job / "inputs.npz") as held:
        inputs = Inputs(job / "model", torch.from_numpy(held["ids"]), torch.from_numpy(held["basis"]))
    run = load(inputs)
    answer(out / "ready.json", {"versions": {name: version(name) for name in packages}})
    for line in sys.stdin:
        turn, *exits = map(int, line.split())
        forget_peak()
        loaded, start = peak(), time.process_time()
        found = run(exits)
        seconds = time.process_time() - start
        numbers = {"nll": found.tolist(), "seconds": seconds, "loaded": loaded, "peak": peak()}
        answer(out / f"turn{turn}.json", numbers)


def answer(path: Path, content: dict[str, Any]) -> None:
    """Write a file at once, so that whoever waits for it never reads a part."""
    draft = path.with_suffix(".part")
    draft.write_text(json.dumps(content), encoding="utf-8")
    draft.replace(path)


def forget_peak() -> None:
    """Let the peak of the resident memory start from what is held now (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def peak() -> float:
    """Return the peak of the resident memory of this process since `forget_peak`, in MiB (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
