"""Images become what an image encoder reads; every choice made on the way is recorded."""

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
"""Bytes of pixels that are kept for the next pass; beyond, images are processed anew in each."""


@dataclass(frozen=True, eq=False)
class Pixels:
    """Images as a model reads them, all of one size; each is a document of its own."""

    images: Any
    """A sequence of upright RGB pictures, or a tensor `[images, channels, height, width]` of what is read."""
    model: VisionModel
    options: dict[str, Any]
    """What the processor is told beside its settings."""
    record: dict[str, Any] = field(default_factory=dict[str, Any])
    """How they were made: processor, size, grid, count, hash of the images, labels' names."""
    _kept: dict[int, Tensor] = field(default_factory=dict[int, Tensor], repr=False)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, place: int) -> Float[Tensor, "channels height width"]:
        """One image as it is read."""
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
        """Each image is a document."""
        return range(len(self))

    @property
    def labels(self) -> Int[Tensor, "images"] | None:
        """Class of each image, where they have one."""
        labels = getattr(self.images, "labels", None)
        return None if labels is None else torch.as_tensor(labels)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.model.grid(self[0][None])

    @property
    def length(self) -> int:
        """Tokens of an image: prefix and patches."""
        rows, columns = self.grid
        return len(self.model.prefix) + rows * columns

    @property
    def lengths(self) -> list[int]:
        """Tokens of each image: of all the same."""
        return [self.length] * len(self)

    def batches(self, batch_size: int = 16) -> Iterator[tuple[list[int], Tensor]]:
        """Places of images, and what the model reads of them `[batch, channels, height, width]`."""
        for start in range(0, len(self), batch_size):
            places = list(range(start, min(start + batch_size, len(self))))
            yield places, torch.stack([self[place] for place in places])

    def tokens(self, batch: Float[Tensor, "batch channels height width"]) -> Int[Tensor, "batch tokens"]:
        """The kind of each token: its place in the model's prefix, `len(prefix)` for a patch."""
        return self.model.kinds(batch)


def pixels(
    images: "Images | Sequence[Any] | Tensor",
    model: VisionModel,
    *,
    size: int | None = None,
) -> Pixels:
    """What a model reads of images: its processor's work, or with `size` a plain resize to that square.

    `images` is what `ss.images` gives, a sequence of PIL images, or a tensor `[images, channels, height,
    width]` that is ready to be read.
    Raises InputError for no images, pictures without a processor, a size that holds no whole patch, tensors
    of another number of channels, and NaN or Inf.
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
    """That of tensors over their numbers; pictures bring their own, or are hashed decoded."""
    known = getattr(images, "record", {}).get("data_hash")
    if known:
        return known
    digest = hashlib.sha256()
    for image in images:
        if isinstance(image, Tensor):
            digest.update(image.contiguous().cpu().numpy().data)
        else:
            digest.update(image.convert("RGB").tobytes())
    return digest.hexdigest()
