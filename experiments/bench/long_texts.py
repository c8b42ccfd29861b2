"""Peak memory and processor time of `find_sinks` on long windows, beside a plain forward pass of the same.

    OMP_NUM_THREADS=1 python experiments/bench/long_texts.py models/smollm2 --tokens 2048 8192

Each side runs in a process of its own. The plain pass computes no logits. Peaks are those of the whole
process, with the model, during the pass; times are those of the passes alone. Linux only.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch

import spectral_sinks as ss


def forget_peak() -> None:
    """Let the peak of the resident memory start from what is held now: loading may have held more."""
    Path("/proc/self/clear_refs").write_text("5")


def peak() -> float:
    """Return the peak of the resident memory of this process since `forget_peak`, in MiB (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def measure(name: str, tokens: int, side: str) -> dict[str, float]:
    """Load a model, run one side on one window of random tokens, and return its peaks and its seconds."""
    torch.manual_seed(0)
    model = ss.load(name)
    ids = torch.randint(model.vocabulary, (1, tokens))
    windows = ss.Windows.of_ids(ids, model)
    spectra = ss.read_spectra(model)
    forget_peak()
    loaded, start = peak(), time.process_time()
    if side == "plain":
        with torch.no_grad():
            model.module.base_model(ids, use_cache=False)
    else:
        ss.find_sinks(model, windows, spectra, length=tokens)
    return {"loaded": loaded, "peak": peak(), "seconds": time.process_time() - start}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 2048, 8192])
    parser.add_argument("--side", choices=["plain", "sinks"], help="run one side and print it as JSON")
    given = parser.parse_args()
    if given.side:
        print(json.dumps(measure(given.model, given.tokens[0], given.side)))
        return
    for tokens in given.tokens:
        found = {}
        for side in ("plain", "sinks"):
            command = [sys.executable, __file__, given.model, "--tokens", str(tokens), "--side", side]
            ran = subprocess.run(command, capture_output=True, text=True, check=True)
            found[side] = json.loads(ran.stdout.splitlines()[-1])
        plain, sinks = found["plain"], found["sinks"]
        print(
            f"T {tokens}: peak {sinks['peak']:.0f} MiB / {plain['peak']:.0f} MiB = "
            f"{sinks['peak'] / plain['peak']:.2f} (after loading {plain['loaded']:.0f}), time "
            f"{sinks['seconds']:.1f} s / {plain['seconds']:.1f} s = "
            f"{sinks['seconds'] / plain['seconds']:.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
