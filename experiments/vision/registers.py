"""Vision registers: do trained registers matter, or are zeros out of distribution?

Question: what does an encoder with register tokens lose if these are removed, zeroed, fixed to their mean
over images, replaced by noise, or swapped between images (Darcet et al. 2024; Sun et al. 2024, on ViTs)?
Design: `ss.vision.register_ablation` edits the registers at the exits of all layers. It measures the effect
on the features of [CLS] and patches, on the most likely class, and on accuracy. Intervals are over images.
Control: noise with the mean and standard deviation of the registers, and shuffling the registers within an
image, which must change nothing.

    python experiments/vision/registers.py --model runs/vit/random4-0/model --images FOLDER --out results
    python experiments/vision/registers.py --model facebook/dinov2-with-registers-base-imagenet1k-1-layer \
        --images FOLDER --out runs/registers
"""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import tyro

import spectral_sinks as ss


@dataclass(frozen=True)
class Options:
    """Options: the model, and the images."""

    model: str
    """Folder or hub id of an encoder with registers."""
    images: Path
    """Folder of images, or a .txt list of files."""
    out: Path
    """Folder for the table and the figure."""
    names: Path | None = None
    """File that lists the names of the images inside the folder, such as the held-out images."""
    size: int | None = None
    limit: int | None = None
    batch: int = 50


def main(options: Options) -> pd.DataFrame:
    model = ss.load_vision(options.model)
    listed = None if options.names is None else options.names.read_text().split()
    files = options.images if listed is None else [options.images / name for name in listed]
    labels = None if listed is None else [Path(name).parent.name for name in listed]
    images = ss.images(files, limit=options.limit, labels=labels)
    table = ss.vision.register_ablation(
        model, ss.pixels(images, model, size=options.size), batch_size=options.batch
    )
    options.out.mkdir(parents=True, exist_ok=True)
    table.to_csv(options.out / "vision_registers.csv", index=False, float_format="%.5g")
    ss.figures.register_ablation(table, options.out / "vision_registers.png")
    print(table.to_string())
    return table


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
