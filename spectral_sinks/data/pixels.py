"""Preparation of images as the input of an image encoder, with a record of every choice."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from spectral_sinks.errors import InputError
from spectral_sinks.models.vision import VisionModel

if TYPE_CHECKING:
    from spectral_sinks.data.images import Images

KEPT = 2**30
"""Bytes of pixels that are kept for the next pass; images beyond that are processed again in each pass."""


@dataclass(frozen=True, eq=False)
class Pixels:
    """Images as a model reads them, all of one size; each is a document of its own."""

    images: Any
    """A sequence of upright RGB pictures, or a tensor `[images, channels, height, width]` of model inputs."""
    model: VisionModel
    options: dict[str, Any]
    """Options passed to the processor in addition to its own settings."""
    record: dict[str, Any] = field(default_factory=dict[str, Any])
    """How the inputs were made: processor, size, grid, number and hash of the images, and names of labels."""
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
        made = self.model.processor(images=image, return_tensors="pt", **self.options)["pixel_values"]
        return made[0]

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
        """Number of rows and columns of patches."""
        return self.model.grid(self[0][None])

    @property
    def length(self) -> int:
        """Number of tokens per image, prefix and patches."""
        rows, columns = self.grid
        return len(self.model.prefix) + rows * columns

    @property
    def lengths(self) -> list[int]:
        """Number of tokens of each image, which is the same for all."""
        return [self.length] * len(self)

    def batches(self, batch_size: int = 16) -> Iterator[tuple[list[int], Tensor]]:
        """Yield indices of images with their model inputs, `[batch, channels, height, width]`."""
        for start in range(0, len(self), batch_size):
            places = list(range(start, min(start + batch_size, len(self))))
            yield places, torch.stack([self[place] for place in places])

    def tokens(self, batch: Float[Tensor, "batch channels height width"]) -> Int[Tensor, "batch tokens"]:
        """Return the kind of each token: its index in the model's prefix, or `len(prefix)` for a patch."""
        return self.model.kinds(batch)


def pixels(
    images: "Images | Sequence[Any] | Tensor",
    model: VisionModel,
    *,
    size: int | None = None,
) -> Pixels:
    """Prepare images for a model, by its processor or, with `size`, by a plain resize to a square.

    `images` is the result of `ss.images`, a sequence of PIL images, or a tensor `[images, channels, height,
    width]` of model inputs, which is used unchanged.

    Raises InputError for no images, for pictures and a model without a processor, for a size without a whole
    patch, for tensors with another number of channels, for a tensor with a `size`, and for NaN or Inf.
    """
    if len(images) == 0:
        raise InputError("no images: give at least one")
    options: dict[str, Any] = {}
    if isinstance(images, Tensor):
        if images.ndim != 4 or images.shape[1] != model.config.num_channels:
            raise InputError(
                f"pixels of shape {tuple(images.shape)}: {model.name} reads "
                f"[images, {model.config.num_channels}, height, width]"
            )
        if size is not None:
            raise InputError("a tensor is read as it is: resize it first, or give pictures")
        if not torch.isfinite(images).all():
            raise InputError("the pixels hold NaN or Inf")
    elif model.processor is None:
        raise InputError(
            f"{model.name} came without an image processor: load_vision(model, processor=...), or give a "
            "tensor of what is to be read"
        )
    elif size is not None:
        options = {"size": {"height": size, "width": size}, "do_resize": True, "do_center_crop": False}
    found = Pixels(images, model, options)
    rows, columns = found.grid
    length = len(model.prefix) + rows * columns
    found.record.update(getattr(images, "record", {}))
    found.record.update(
        model=model.name,
        images=len(found),
        height=found[0].shape[-2],
        width=found[0].shape[-1],
        rows=rows,
        columns=columns,
        tokens=length,
        prefix=list(model.prefix),
        processor=None if isinstance(images, Tensor) else type(model.processor).__name__,
        resized=size,
        data_hash=_hash(images),
    )
    return found


def _hash(images: Any) -> str:
    """Return the recorded hash of the images, else a hash of the tensors' values or the decoded pictures."""
    known = getattr(images, "record", {}).get("data_hash")
    if known:
        return known
    digest = hashlib.sha256()
    for image in images:
        if isinstance(image, Tensor):
            digest.update(repr(tuple(image.shape)).encode())
            digest.update(image.contiguous().cpu().numpy().data)
        else:
            digest.update(repr(image.size).encode() + image.convert("RGB").tobytes())
    return digest.hexdigest()
