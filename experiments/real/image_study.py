"""What the experiments on real image encoders share: pictures, and one pass over them that measures all.

Each picture is passed through the encoder once for each size. In every layer the pass looks at [CLS], at the
patch that draws most there, and at a random patch as the control. The patch is chosen by every second query,
and what it draws is measured with the other queries, so that the choice of a maximum does not raise it.
What was measured is kept in a file for every few pictures, so a run that was cut off goes on.
"""

import hashlib
import sys
import tarfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

import spectral_sinks as ss

KINDS = ("cls", "patch", "random")
"""The tokens that are looked at: [CLS], the patch that draws most in the layer, and a random patch."""

QUANTITIES = ("attention", "weighted", "value_ratio", "queries")
"""By kind: attention received; share of the norm-weighted attention; norm of what the value writes over the
mean of all tokens; and share of the queries that put at least half of their attention there. The token's own
query is left out, except from what all tokens move, of which the norm-weighted attention is a share."""

LIMITS = (0.2, 0.35, 0.5)
"""Value ratios up to which a token counts as writing nothing: the published one, and two that are looser."""

CHUNK = 5
"""Pictures in a file of the measurement."""


@dataclass(frozen=True)
class Pictures:
    """Pictures, and the name of the set that each belongs to."""

    images: ss.Images
    sets: tuple[str, ...]

    def first(self, count: int) -> ss.Images:
        """Return the first pictures."""
        return ss.images([self.images[place] for place in range(min(count, len(self.images)))])


def read_pictures(sources: Sequence[Path], limit: int) -> Pictures:
    """Read the pictures of folders and tar files, in this order, up to a number.

    A tar file is read in turn through its folders, so that a part of it has as many pictures of each class.

    Raises InputError for a source that is neither, and for one without a picture.
    """
    found: list[Any] = []
    sets: list[str] = []
    for source in sources:
        if source.is_dir():
            held: list[Any] = list(ss.images(source))
        elif source.is_file() and tarfile.is_tarfile(source):
            held = in_tar(source, limit - len(found))
        else:
            raise ss.InputError(f"{source} is neither a folder of images nor a tar file of them")
        found += held
        sets += [source.name.split(".")[0]] * len(held)
    if not found:
        raise ss.InputError(f"no images in {', '.join(map(str, sources)) or 'what was given'}")
    return Pictures(ss.images(found[:limit]), tuple(sets[:limit]))


def in_tar(source: Path, limit: int) -> list[Image.Image]:
    """Return the first pictures of a tar file, one of each folder in turn.

    Raises InputError for what is no tar file.
    """
    if not (source.is_file() and tarfile.is_tarfile(source)):
        raise ss.InputError(f"{source} is no tar file")
    with tarfile.open(source) as archive:
        folders: dict[str, list[str]] = {}
        for name in sorted(archive.getnames()):
            if Path(name).suffix.lower() in Image.registered_extensions():
                folders.setdefault(str(Path(name).parent), []).append(name)
        turns = [name for turn in zip_longest(*folders.values()) for name in turn if name is not None]
        found: list[Image.Image] = []
        for name in turns[: max(limit, 0)]:
            held = archive.extractfile(name)
            if held is not None:
                found.append(Image.open(BytesIO(held.read())).convert("RGB"))
        return found


class Pass:
    """The measurement of one layer after the other, for one batch of pictures."""

    def __init__(self, model: ss.VisionModel, kept_keys: bool) -> None:
        if model.cls is None:
            raise ss.InputError(f"{model.name} has no [CLS] token, with which its patches are compared")
        self.model, self.cls, self.kept_keys = model, model.cls, kept_keys
        self.writes = [small(written(model, layer)) for layer in range(model.layers)]
        self.random: Tensor = torch.zeros(0)
        self.found: dict[int, dict[str, Tensor]] = {}

    def __call__(self, call: ss.attention.AttentionCall) -> None:
        batch, heads, tokens, _ = call.query.shape
        start = len(self.model.prefix)
        # attention received, from queries of even and of odd number
        halves = torch.zeros(2, batch, heads, tokens, dtype=torch.float64)
        strong = torch.zeros(2, batch, heads, tokens, dtype=torch.float64)
        own = torch.zeros(batch, heads, tokens, dtype=torch.float64)
        for rows in call.blocks():
            weights, first = call.weights(rows), rows.start or 0
            for half in (0, 1):
                part = weights[:, :, (half - first) % 2 :: 2]
                halves[half] += part.sum(2).double()
                strong[half] += (part >= 0.5).sum(2).double()
            index = torch.arange(weights.shape[2])
            own[:, :, first : first + len(index)] = weights[:, :, index, first + index].double()
        counts = torch.tensor([(tokens + 1) // 2, tokens // 2]).double()
        chosen = start + halves[0][:, :, start:].mean(1).argmax(-1)
        value = call.value.double()
        norms = (value @ self.writes[call.layer]).norm(dim=-1)
        ratio = norms / norms.mean(-1, keepdim=True)
        whole, held_out = halves.sum(0), halves[1]
        every = torch.arange(batch)
        values = torch.zeros(len(KINDS), batch, heads, len(QUANTITIES), dtype=torch.float64)
        query = call.query.double() * call.scaling
        key = call.key.double()
        found: dict[str, Tensor] = {"chosen": chosen}
        asked, keys = query.sum(2), key.mean(2)
        second = query.mT @ query
        key_second = key.mT @ key / tokens
        for place, kind in enumerate(KINDS):
            at = {"cls": torch.full((batch,), self.cls), "patch": chosen, "random": self.random}[kind]
            # without the token's own query, as in `ss.head_use`; the chosen patch by the other half alone
            half = kind != "cls"
            seen, many = (held_out, counts[1]) if half else (whole, counts.sum())
            hits = strong[1] if half else strong.sum(0)
            counted = (at % 2 == 1) | torch.full((batch,), not half)
            mine = own[every, :, at] * counted[:, None]
            number = (many - counted.double())[:, None]
            values[place, ..., 0] = (seen[every, :, at] - mine) / number
            values[place, ..., 1] = (seen[every, :, at] - mine) * norms[every, :, at] / (seen * norms).sum(-1)
            values[place, ..., 2] = ratio[every, :, at]
            values[place, ..., 3] = (
                hits[every, :, at] - (own[every, :, at] >= 0.5).double() * counted[:, None]
            ) / number
            # the margin of the token: the mean query, without its own, on its key minus the mean of others
            apart, sink = query[every, :, at], key[every, :, at]
            mean = (keys * tokens - sink) / (tokens - 1)
            found[f"{kind} query"] = (asked - apart) / (tokens - 1)
            found[f"{kind} gap"] = sink - mean
            found[f"{kind} own query"] = apart
            cross = keys[..., :, None] * mean[..., None, :]
            shifted = key_second - cross - cross.mT + mean[..., :, None] * mean[..., None, :]
            found[f"{kind} keys"] = shifted
        found["values"] = values.movedim(0, 1)
        found["queries"] = second.float()
        alpha = whole / tokens
        found["nothing"] = torch.stack([(alpha * (ratio <= limit)).sum(-1) for limit in LIMITS], -1)
        found["nothing tokens"] = torch.stack([(ratio <= limit).double().mean(-1) for limit in LIMITS], -1)
        if self.kept_keys:
            found["all keys"] = key.half()
        self.found[call.layer] = found

    def run(self, pixels: Tensor, random: Tensor) -> dict[str, NDArray[Any]]:
        """Return what was measured on a batch, by name: `[pictures, layers, ...]`."""
        self.random = random
        self.found.clear()
        with ss.attention.attending(self.model, self):
            norms = norms_of(self.model, pixels)
        layers = [self.found[layer] for layer in range(self.model.layers)]
        joined = {name: torch.stack([layer[name] for layer in layers], 1).numpy() for name in layers[0]}
        for kind in KINDS:  # by picture only their sum is used
            joined[f"{kind} keys"] = joined[f"{kind} keys"].sum(0, keepdims=True)
        return joined | {"norms": norms}


def norms_of(model: ss.VisionModel, pixels: Tensor) -> NDArray[np.float64]:
    """Return the norm of every token at the embedding and every exit, `[pictures, exits, tokens]`."""
    sites = [ss.Site("embedding"), *(ss.Site("exit", layer) for layer in range(model.layers))]

    def readout(final: Tensor, read: dict[ss.Site, Tensor], weights: Any) -> Tensor:
        return torch.stack([read[site].double().norm(dim=-1) for site in sites], 1)

    return ss.trace(model, pixels, {}, sites, readout=readout).numpy()


def written(model: ss.VisionModel, layer: int) -> Tensor:
    """Return the matrix that writes each head's values, with the layer's scale, `[heads, size, d]`."""
    rows = torch.stack([model.head_write(layer, head) for head in range(model.heads)]).detach()
    if model.layout.attention_write == model.layout.attention:
        return rows.double()
    scale: Any = model.module.get_submodule(f"{model.layout.layers}.{layer}.{model.layout.attention_write}")
    with torch.no_grad():
        return scale.forward(rows).double()


def small(rows: Tensor) -> Tensor:
    """Return square matrices by which a vector gets the norm that it has by `rows`."""
    return torch.linalg.qr(rows.mT).R.mT


def measure(
    model: ss.VisionModel,
    pictures: Pictures,
    size: int,
    work: Path,
    kept_keys: int = 24,
    count: int | None = None,
) -> dict[str, NDArray[Any]]:
    """Measure every picture once at a size, and return all results; what is in `work` is not made again.

    Args:
        model: an image encoder with [CLS].
        pictures: the pictures.
        size: side of the square to which they are resized.
        work: folder for the files of the measurement.
        kept_keys: for how many of the first pictures the keys of all tokens are kept.
        count: how many of the first pictures are measured; by default all.

    """
    pixels = ss.pixels(pictures.images, model, size=size)
    known = hashlib.sha256(
        f"{pixels.record['data_hash']} {model.fingerprint} {kept_keys}".encode()
    ).hexdigest()
    folder = work / f"{size}-{known[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    start, patches = len(model.prefix), pixels.length - len(model.prefix)
    drawn = start + torch.randint(patches, (len(pixels),), generator=torch.Generator().manual_seed(0))
    passes = {keys: Pass(model, keys) for keys in (True, False)}
    files: list[Path] = []
    began, made = time.monotonic(), 0
    total = min(count or len(pixels), len(pixels))
    for first in range(0, total, CHUNK):
        places = list(range(first, min(first + CHUNK, total)))
        file = folder / f"{first:05d}.npz"
        files.append(file)
        if file.exists():
            continue
        step = max(1, 1024 // pixels.length)
        parts = [
            passes[first < kept_keys].run(
                torch.stack([pixels[place] for place in places[at : at + step]]),
                drawn[places[at : at + step]],
            )
            for at in range(0, len(places), step)
        ]
        partial = file.with_suffix(".part.npz")
        whole: dict[str, Any] = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        np.savez(partial, **whole)
        partial.rename(file)
        made += len(places)
        each = (time.monotonic() - began) / made
        print(
            f"{size} pixels: {places[-1] + 1} of {total} pictures, {each:.1f} s each, about "
            f"{each * (total - places[-1] - 1) / 60:.0f} minutes left",
            file=sys.stderr,
            flush=True,
        )
    held = [dict(np.load(file)) for file in files]
    return {name: np.concatenate([part[name] for part in held if name in part]) for name in held[0]}
