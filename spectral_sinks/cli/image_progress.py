"""How far the passes over images are: a bar on a terminal, and otherwise what the lines of `progress` say."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor
from tqdm import tqdm

from spectral_sinks.cli.progress import note, spoken
from spectral_sinks.data.pixels import Pixels


@dataclass(frozen=True, eq=False)
class CountedPixels(Pixels):
    """Images whose passes are counted and shown."""

    stages: list[str] = field(default_factory=list[str])
    """What was measured so far; the last entry is what is measured now."""
    passes: list[int] = field(default_factory=list[int])
    """The number of images that each pass has shown."""

    def batches(self, batch_size: int = 16) -> Iterator[tuple[list[int], Tensor]]:
        stage = self.stages[-1] if self.stages else "images"
        begun = time.monotonic()
        self.passes.append(0)
        index = len(self.passes) - 1
        with tqdm(total=len(self), desc=stage, unit="image", leave=False, disable=None) as bar:
            for places, batch in super().batches(batch_size):
                yield places, batch
                done = self.passes[index] = self.passes[index] + len(places)
                left = (time.monotonic() - begun) / done * (len(self) - done)
                note(f"{stage}, {done} of {len(self)} images, about {spoken(left)} left of this pass")
                bar.update(len(places))


def counted(pixels: Pixels) -> CountedPixels:
    """Return the same images, counted."""
    own: dict[str, Any] = {each.name: getattr(pixels, each.name) for each in fields(Pixels)}
    return CountedPixels(**own)
