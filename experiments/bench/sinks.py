"""The passes of `find_sinks` beside a plain forward pass over the same windows, in turn.

    OMP_NUM_THREADS=1 python experiments/bench/sinks.py models/smollm2 --documents 48 --rounds 3

The plain pass computes no logits. Both sides read the same batches.
"""

import argparse
import statistics
import time

import torch

import spectral_sinks as ss

TOKENS = 64
"""Tokens that `find_sinks` reads of each window."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--documents", type=int, default=48)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    model = ss.load(given.model)
    texts = ss.documents(limit=given.documents)
    windows = ss.cut(texts, model, length=TOKENS, per_document=2)
    spectra = ss.read_spectra(model)
    ratios: list[float] = []
    for _ in range(given.rounds):
        start = time.process_time()
        with torch.no_grad():
            for _, ids in windows.batches(given.batch):
                model.module.base_model(ids, use_cache=False)
        plain = time.process_time() - start
        ss.find_sinks(model, windows, spectra, length=TOKENS, batch_size=given.batch)
        sinks = time.process_time() - start - plain
        ratios.append(sinks / plain)
        print(f"find_sinks {sinks:.1f} s, plain pass {plain:.1f} s: {ratios[-1]:.2f}", flush=True)
    print(f"median of find_sinks / plain pass: {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
