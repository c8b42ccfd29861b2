"""Filters on a model with a large vocabulary: `evaluate_all` beside hand-written hooks, in turn.

    OMP_NUM_THREADS=1 python experiments/bench/vocabulary.py models/gemma3 --exits 8 --rounds 1

The hand-written side runs the whole model once without and once with each filter, and takes the NLL by
`cross_entropy` of its logits. It returns no KL, no agreement and no sink mass, which the other side does.
`--predict 16` also times `evaluate_all` that scores 16 predictions of each window, and says how far its NLL
lies from the exact one beside the interval that it states. The share of the unembedding in a pass by hand is
printed first.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import spectral_sinks as ss

T = TypeVar("T")


def by_hand(module: Any, layers: Any, windows: ss.Windows, cells: dict[int, ss.Filter]) -> list[float]:
    """Return the NLL without a filter, and with the filter of each exit, mean over windows."""
    ids = torch.stack(windows.rows)

    @torch.no_grad()
    def nll() -> float:
        logits: Tensor = module(ids, use_cache=False).logits
        return float(cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()))

    found = [nll()]
    for layer, edit in cells.items():

        def change(_: Any, __: Any, output: Any, edit: ss.Filter = edit) -> Any:
            return (edit(output[0]), *output[1:]) if isinstance(output, tuple) else edit(output)

        handle = layers[layer].register_forward_hook(change)
        found.append(nll())
        handle.remove()
    return found


def ours(model: ss.LanguageModel, windows: ss.Windows, cells: dict[int, ss.Filter]) -> list[float]:
    """Return the same numbers by `evaluate_all`."""
    named = {str(layer): {ss.Site("exit", layer): edit} for layer, edit in cells.items()}
    effects = list(ss.evaluate_all(model, windows, named).values())
    return [effects[0].baseline_nll, *(effect.nll for effect in effects)]


def sampled(
    model: ss.LanguageModel, windows: ss.Windows, cells: dict[int, ss.Filter], predict: int
) -> tuple[list[float], list[float]]:
    """Return the numbers of `ours` from a sample of predictions, and half the width of their intervals."""
    named = {str(layer): {ss.Site("exit", layer): edit} for layer, edit in cells.items()}
    effects = list(ss.evaluate_all(model, windows, named, predict=predict).values())
    found = [effects[0].baseline_nll, *(effect.nll for effect in effects)]
    ranges = [effects[0].sampling_interval("baseline_nll")]
    ranges += [effect.sampling_interval("nll") for effect in effects]
    return found, [(high - low) / 2 for low, high in ranges]


def share_of_unembedding(module: Any, windows: ss.Windows) -> float:
    """Return the share of a pass by hand that the unembedding and the log of the sum take."""
    ids = torch.stack(windows.rows)
    with torch.no_grad():
        start = time.process_time()
        final = module.base_model(ids, use_cache=False).last_hidden_state
        layers = time.process_time() - start
        logits = module.get_output_embeddings()(final)
        float(cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()))
        whole = time.process_time() - start
    return 1 - layers / whole


def timed(call: Callable[[], T]) -> tuple[float, T]:
    start = time.process_time()
    found = call()
    return time.process_time() - start, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--exits", type=int, nargs="+", required=True, help="exits, each a cell")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--predict", type=int, help="predictions of each window that a third side scores")
    given = parser.parse_args()
    model = ss.load(given.model)
    windows = ss.cut(ss.documents(limit=given.windows), model, length=given.length, per_document=1)
    dark = ss.remove(ss.read_spectrum(model).dark())
    cells = dict.fromkeys(given.exits, dark)
    layers = model.module.get_submodule(model.layout.layers)
    print(f"share of the unembedding: {share_of_unembedding(model.module, windows):.2f}", flush=True)
    ratios: list[float] = []
    saved: list[float] = []
    for _ in range(given.rounds):
        hand, expected = timed(lambda: by_hand(model.module, layers, windows, cells))
        own, found = timed(lambda: ours(model, windows, cells))
        ratios.append(hand / own)
        gap = max(abs(a - b) for a, b in zip(expected, found, strict=True))
        print(
            f"by hand {hand:.1f} s, evaluate_all {own:.1f} s: {ratios[-1]:.2f}; NLL within {gap:.1g}",
            flush=True,
        )
        if given.predict is not None:
            part, (some, errors) = timed(lambda: sampled(model, windows, cells, given.predict))
            saved.append(hand / part)
            off = ", ".join(f"{abs(a - b):.3f}" for a, b in zip(found, some, strict=True))
            stated = ", ".join(f"{error:.3f}" for error in errors)
            print(f"sampled {part:.1f} s: {saved[-1]:.2f}; NLL off by {off} (95 %: {stated})", flush=True)
    if saved:
        print(f"median of by hand / sampled: {statistics.median(saved):.2f}")
    print(f"median of by hand / evaluate_all: {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
