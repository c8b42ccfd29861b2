"""A tiny image encoder with registers, and pictures whose file names would break a page that reads markup."""

import functools
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import transformers
from PIL import Image

import spectral_sinks as ss
from spectral_sinks.pages import token_readings
from spectral_sinks.pages.image_explorer import ImageExplorer
from support import tiny_encoders

FAMILY = "dinov2 registers classifier"

EPSILON = 0.1
"""What counts as a sink of the tiny encoder, whose heads give no token 0.3."""

NAMES = (
    "<img src=x onerror=document.body.dataset.hacked=1>.png",
    "<script>document.body.dataset.hacked=1<!--.png",
    '\u202egnp."&quot;{{7*7}}.png',
)
"""Names of the files."""


@functools.cache
def model() -> ss.VisionModel:
    size = {"height": tiny_encoders.SIDE, "width": tiny_encoders.SIDE}
    processor = transformers.ViTImageProcessorPil(size=size, image_mean=[0.5] * 3, image_std=[0.2] * 3)
    return ss.load_vision(tiny_encoders.plain(FAMILY), processor=processor)


def pictures(folder: Path) -> list[Path]:
    """Write pictures of several shapes: a gradient with a white corner, and noise."""
    made: list[Path] = []
    for place, name in enumerate(NAMES):
        rng = np.random.default_rng(place)
        values = rng.integers(0, 60, (24 + 8 * place, 40, 3)) + np.linspace(0, 150, 40)[None, :, None]
        values[:6, :6] = 255
        made.append(folder / name)
        Image.fromarray(values.astype(np.uint8)).save(made[-1])
    return made


def pixels(folder: Path, shape: Literal["square", "own"] = "own") -> ss.Pixels:
    """Return the pictures as the encoder reads them, each in its own shape."""
    return ss.pixels(pictures(folder), model(), size=tiny_encoders.SIDE, shape=shape)


def explored(pixels: ss.Pixels) -> ImageExplorer:
    """Return the explorer of pictures, whose sinks are what some head gives more than `EPSILON`."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(token_readings, "EPSILON", EPSILON)
        return ss.explore(model(), pixels, spectrum(), exits=[0, 1])


def spectrum() -> ss.Spectrum:
    return ss.read_spectrum(model(), "embedding", bands=4)
