"""Preparation of images as the input of an image encoder, with a record of every choice."""

import hashlib
import math
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from spectral_sinks.errors import InputError, SpectralWarning
from spectral_sinks.models.vision import VisionModel

if TYPE_CHECKING:
    from PIL import Image

    from spectral_sinks.data.images import Images

KEPT = 2**30
"""Bytes of pixels that are kept for the next pass; images beyond that are processed again in each pass."""

Shape = Literal["square", "own"]
"""Whether a picture is resized to a square or keeps its shape."""


@dataclass(frozen=True, eq=False)
class Pixels:
    """Images as a model reads them; each is a document of its own."""

    images: Any
    """A sequence of upright RGB pictures, or a tensor `[images, channels, height, width]` of model inputs."""
    model: VisionModel
    options: dict[str, Any]
    """Options passed to the processor in addition to its own settings."""
    record: dict[str, Any] = field(default_factory=dict[str, Any])
    """How the inputs were made: processor, size, grid, number and hash of the images, and names of labels."""
    own_grids: tuple[tuple[int, int], ...] | None = None
    """Rows and columns of patches of each image that keeps its shape; None if all have one shape."""
    _kept: dict[int, Tensor] = field(default_factory=dict[int, Tensor], repr=False)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, place: int) -> Float[Tensor, "channels height width"]:
        """Return the model input of one image."""
        if place not in self._kept:
            made = self._made(place)
            if made.nbytes * (len(self._kept) + 1) > KEPT:
                return made
            self._kept[place] = made
        return self._kept[place]

    def _made(self, place: int) -> Tensor:
        image = self.images[place]
        if isinstance(image, Tensor):
            return image
        options = self.options
        if self.own_grids is not None:
            height, width = (sides * self.model.patch_size for sides in self.own_grids[place])
            options = options | {"size": {"height": height, "width": width}}
        made = self.model.processor(images=image, return_tensors="pt", **options)["pixel_values"]
        return made[0]

    def picture(self, place: int) -> "Image.Image":
        """Return what the model sees of an image, at its own proportions.

        That is the picture itself where the whole of it is resized. Otherwise, it is made from the model's
        input: the part that is cut out, or the values of a tensor from the smallest to the largest.
        """
        from PIL import Image  # a server may lack it

        crops = self.options.get("do_center_crop", getattr(self.model.processor, "do_center_crop", False))
        if not isinstance(self.images[place], Tensor) and not crops:
            return self.images[place]
        values = np.moveaxis(self[place].float().cpu().numpy()[:3], 0, -1)
        processor = self.model.processor
        if not isinstance(self.images[place], Tensor) and getattr(processor, "do_normalize", False):
            values = values * np.asarray(processor.image_std) + np.asarray(processor.image_mean)
        else:
            values = (values - values.min()) / max(float(np.ptp(values)), 1e-12)
        return Image.fromarray((values.clip(0, 1) * 255).round().astype(np.uint8).squeeze())

    @property
    def document(self) -> range:
        """The document of each image: its own index."""
        return range(len(self))

    @property
    def labels(self) -> Int[Tensor, "images"] | None:
        """Class index of each image; None for unlabelled images."""
        labels = getattr(self.images, "labels", None)
        return None if labels is None else torch.as_tensor(labels)

    @property
    def grid(self) -> tuple[int, int]:
        """Number of rows and columns of patches. Raises InputError if they differ between images."""
        self.require_one_shape()
        return self.grids[0]

    @property
    def alike(self) -> bool:
        """Whether all images have the same rows and columns of patches."""
        return len(set(self.grids)) == 1

    def require_one_shape(self) -> None:
        """Raise InputError for images of several shapes."""
        if not self.alike:
            raise InputError(
                f"the images have {len(set(self.grids))} shapes, and this compares patches at the same "
                "position of images: prepare them by pixels(..., shape='square')"
            )

    @property
    def grids(self) -> Sequence[tuple[int, int]]:
        """Number of rows and columns of patches of each image."""
        return self.own_grids or [self.model.grid(self[0][None])] * len(self)

    @property
    def length(self) -> int:
        """Number of tokens per image, prefix and patches; of the largest image if they differ."""
        return max(self.lengths)

    @property
    def lengths(self) -> list[int]:
        """Number of tokens of each image."""
        return [len(self.model.prefix) + rows * columns for rows, columns in self.grids]

    def batches(self, batch_size: int = 16) -> Iterator[tuple[list[int], Tensor]]:
        """Yield indices of images with their model inputs, `[batch, channels, height, width]`.

        Images are in their order, and all of a batch have one shape.
        """
        grids = self.grids
        for _, run in groupby(range(len(self)), key=lambda place: grids[place]):
            same = list(run)
            for start in range(0, len(same), batch_size):
                places = same[start : start + batch_size]
                made = [self[place] for place in places]
                if len({each.shape for each in made}) > 1:
                    raise InputError(
                        f"the image processor of {self.model.name} makes images of several sizes, "
                        f"{_sides(made[0])} and others: give pixels(..., size=)"
                    )
                yield places, torch.stack(made)

    def tokens(self, batch: Float[Tensor, "batch channels height width"]) -> Int[Tensor, "batch tokens"]:
        """Return the kind of each token: its index in the model's prefix, or `len(prefix)` for a patch."""
        return self.model.kinds(batch)


def pixels(
    images: "Images | Sequence[Any] | Tensor",
    model: VisionModel,
    *,
    size: int | None = None,
    shape: Shape = "square",
) -> Pixels:
    """Prepare images for a model, by its processor or, with `size`, by a plain resize of the whole picture.

    Args:
        images: the result of `ss.images`, pictures as `ss.images` takes them, or a tensor `[images, channels,
            height, width]` of model inputs, which is used unchanged.
        model: an image encoder.
        size: the side of a square in pixels. It is rounded to whole patches, with a warning.
        shape: "square" resizes every picture to the square. With "own" a picture keeps its shape: its sides
            are rounded to whole patches, which together are about as many as those of the square. Its default
            `size` is that for which the model was made.

    Raises:
        InputError: for no images, for pictures and a model without a processor, for a size without a whole
            patch, for tensors with another number of channels, for a tensor with a `size` or an own `shape`,
            for NaN or Inf, and for pictures that `ss.images` cannot read.

    """
    if len(images) == 0:
        raise InputError("no images: give at least one")
    if shape not in get_args(Shape):
        raise InputError(f"shape {shape!r}: choose from {', '.join(get_args(Shape))}")
    options: dict[str, Any] = {}
    grids: tuple[tuple[int, int], ...] | None = None
    sizes: tuple[tuple[int, int], ...] = ()
    if isinstance(images, Tensor):
        if images.ndim != 4 or images.shape[1] != model.config.num_channels:
            raise InputError(
                f"pixels of shape {tuple(images.shape)}: {model.name} reads "
                f"[images, {model.config.num_channels}, height, width]"
            )
        if size is not None or shape == "own":
            raise InputError("a tensor is read as it is: resize it first, or give pictures")
        if not torch.isfinite(images).all():
            raise InputError("the pixels hold NaN or Inf")
    elif model.processor is None:
        raise InputError(
            f"{model.name} came without an image processor: load_vision(model, processor=...), or give a "
            "tensor of what is to be read"
        )
    else:
        from spectral_sinks.data import images as reading  # with libraries that a server may lack

        if not isinstance(images, reading.Images):
            images = reading.images(images, broken="refuse")
        sizes = images.sizes
        if shape == "own":
            size = size or model.image_size
            if size is None:
                raise InputError(f"{model.name} does not say what size of image it was made for: give size")
        if size is not None:
            size = _whole_patches(size, model)
            options = {"size": {"height": size, "width": size}, "do_resize": True, "do_center_crop": False}
        if shape == "own" and size is not None:
            side = size // model.patch_size
            grids = tuple(own_grid(width / height, side) for width, height in sizes)
    found = Pixels(images, model, options, {}, grids)
    height, width = found[0].shape[-2:]
    model.grid(found[0][None])  # refuses an image that is smaller than a patch
    if height % model.patch_size or width % model.patch_size:
        warnings.warn(
            f"images of {width} x {height} pixels are no multiple of the patch of {model.name}, "
            f"{model.patch_size}: the last {width % model.patch_size} columns and "
            f"{height % model.patch_size} rows of pixels are not read",
            SpectralWarning,
            stacklevel=2,
        )
    alike = found.alike
    rows, columns = found.grids[0] if alike else (None, None)
    found.record.update(getattr(images, "record", {}))
    found.record.update(
        model=model.name,
        images=len(found),
        height=height if alike else None,
        width=width if alike else None,
        rows=rows,
        columns=columns,
        tokens=found.length,
        prefix=list(model.prefix),
        processor=None if isinstance(images, Tensor) else type(model.processor).__name__,
        resized=size,
        shape=shape,
        data_hash=_hash(images),
    )
    if grids is not None:
        counted = Counter(f"{columns} x {rows}" for rows, columns in grids)
        found.record["grids"] = dict(counted.most_common())
        changes = [
            columns * height / (rows * width)
            for (rows, columns), (width, height) in zip(grids, sizes, strict=True)
        ]
        found.record["stretched"] = max(max(change, 1 / change) for change in changes) - 1
    return found


def own_grid(aspect: float, side: int) -> tuple[int, int]:
    """Return the rows and columns of patches for a picture of an aspect ratio (width over height).

    They are about as many as those of a square of `side` patches, and at most that many in the narrowest
    pictures, which have one row or column.
    """
    rows, columns = (round(side * math.sqrt(ratio)) for ratio in (1 / aspect, aspect))
    return min(max(rows, 1), side * side), min(max(columns, 1), side * side)


def _whole_patches(size: int, model: VisionModel) -> int:
    """Return a size rounded to whole patches, with a warning where it changes."""
    rounded = max(1, round(size / model.patch_size)) * model.patch_size
    if size < model.patch_size:
        raise InputError(
            f"images of {size} x {size} pixels: {model.name} has patches of {model.patch_size} x "
            f"{model.patch_size}"
        )
    if rounded != size:
        warnings.warn(
            f"size {size} is no multiple of the patch of {model.name}, {model.patch_size}: images are "
            f"resized to {rounded}",
            SpectralWarning,
            stacklevel=3,
        )
    return rounded


def _sides(image: Tensor) -> str:
    return f"{image.shape[-1]} x {image.shape[-2]}"


def _hash(images: "Images | Tensor") -> str:
    """Return the recorded hash of the images, or a hash of the values of tensors."""
    if known := getattr(images, "record", {}).get("data_hash"):
        return known
    digest = hashlib.sha256()
    for image in images:
        assert isinstance(image, Tensor), "pictures have a record"
        digest.update(repr(tuple(image.shape)).encode())
        digest.update(image.contiguous().cpu().numpy().data)
    return digest.hexdigest()
