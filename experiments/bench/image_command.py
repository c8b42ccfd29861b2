"""Processor time of the command `vision`, beside one plain forward pass of the same images.

`python experiments/bench/image_command.py MODEL IMAGES --size 518 --limit 24 --out FILE` runs both in one
process, the plain pass before and after the command, and writes the ratio of processor times. The command
counts whole: it loads the checkpoint, decodes and prepares the images, measures, and makes its tables. The
plain pass is the forward pass alone, of the same pixels in batches of the same size. The target is a ratio of
4. On four photographs at 518 pixels with DINOv2-small and one thread it was 2.28; with more images, loading
the checkpoint counts less.
"""

import argparse
import contextlib
import io
import json
import runpy
import sys
import time
from pathlib import Path

import torch

import spectral_sinks as ss


def plain_pass(pixels: ss.Pixels, batch_size: int) -> float:
    """Return the processor time of one forward pass of all images."""
    batches = list(pixels.batches(batch_size))
    begun = time.process_time()
    with torch.no_grad():
        for _, batch in batches:
            pixels.model.module(**pixels.model.inputs(batch.to(pixels.model.device)))
    return time.process_time() - begun


def command(words: list[str]) -> tuple[float, dict[str, object]]:
    """Return the processor time of one run of the command, and what it printed as JSON."""
    printed, before = io.StringIO(), sys.argv
    sys.argv = ["spectral-sinks", "vision", *words, "--json"]
    begun = time.process_time()
    try:
        with contextlib.redirect_stdout(printed):
            runpy.run_module("spectral_sinks", run_name="__main__")
    finally:
        sys.argv = before
    return time.process_time() - begun, json.loads(printed.getvalue())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("images")
    parser.add_argument("--size", type=int, default=518)
    parser.add_argument("--limit", type=int, default=24)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2, choices=(1, 2), help="plain passes: 1 saves time")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    model = ss.load_vision(given.model)
    images = ss.images(given.images, limit=given.limit)
    pixels = ss.pixels(images, model, size=given.size, shape="own")
    batch = given.batch_size
    options = ["--size", given.size, "--limit", given.limit, "--batch-size", batch]
    seconds = [plain_pass(pixels, batch)]
    whole, record = command([given.model, given.images, *map(str, options)])
    if given.rounds > 1:
        seconds.append(plain_pass(pixels, batch))
    plain = sum(seconds) / len(seconds)
    row = {
        "name": "vision command / plain pass",
        "model": model.name,
        "images": len(images),
        "size": given.size,
        "tokens": sum(pixels.lengths),
        "passes": record["passes"],
        "plain_seconds": [round(each, 2) for each in seconds],
        "command_seconds": round(whole, 2),
        "ratio_cpu": round(whole / plain, 3),
        "target": 4.0,
        "reached": whole <= 4 * plain,
    }
    print(json.dumps(row))
    if given.out is not None:
        given.out.write_text(json.dumps(row) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
