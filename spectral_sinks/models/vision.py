"""Image encoders: their modules, patch grid, prefix tokens and classifier head."""

import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import Conv2d

from spectral_sinks.errors import InputError
from spectral_sinks.models.base import Transformer
from spectral_sinks.models.configuration import VISION_FAMILIES
from spectral_sinks.models.effective_weights import (
    effective_kernel,
    effective_weight,
    innermost,
    is_linear,
    outermost,
)
from spectral_sinks.models.layout import has
from spectral_sinks.models.layout_vision import HEADS
from spectral_sinks.models.traits import check_sums

ADDED = "_test_time_registers"
"""Attribute of the embeddings of an encoder with test-time registers: their number and their neurons."""


@dataclass(frozen=True, eq=False)
class VisionModel(Transformer):
    """A transformers image encoder, with or without a classifier head, wrapped by nnsight.

    Make one with `load_vision`. The tokens of an image are its `prefix`, followed by the patches row by row.
    """

    processor: Any = None
    """The image processor that the checkpoint ships; None without one (pixels can still be measured)."""

    @cached_property
    def tower(self) -> Any:
        """The encoder without its head."""
        return self.module.get_submodule(self.layout.embedding.rpartition(".")[0])

    @cached_property
    def config(self) -> Any:
        """The configuration of the encoder."""
        return self.tower.config

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        size = self.config.patch_size
        return size if isinstance(size, int) else size[0]

    @property
    def image_size(self) -> int | None:
        """Side in pixels of the images for which the encoder was made; None if the configuration does not
        say.
        """
        size = getattr(self.config, "image_size", None)
        return size if isinstance(size, int) or size is None else size[0]

    @property
    def prefix(self) -> tuple[str, ...]:
        """Names of the tokens before the patches: "cls", then "distillation" (DeiT) or "reg1", "reg2", ...

        Test-time registers come last: "test1", "test2", ...
        """
        part = self.tower.embeddings
        added = tuple(f"test{index + 1}" for index in range(getattr(part, ADDED, {}).get("registers", 0)))
        if not hasattr(part, "cls_token") and not hasattr(part, "class_embedding"):
            return added
        registers = getattr(self.config, "num_register_tokens", 0) or 0
        distilled = ("distillation",) if hasattr(part, "distillation_token") else ()
        return ("cls", *distilled, *(f"reg{index + 1}" for index in range(registers)), *added)

    @property
    def registers(self) -> tuple[int, ...]:
        """Positions of the trained register tokens."""
        return tuple(place for place, name in enumerate(self.prefix) if name.startswith("reg"))

    @property
    def added(self) -> tuple[int, ...]:
        """Positions of the test-time registers."""
        return tuple(place for place, name in enumerate(self.prefix) if name.startswith("test"))

    @property
    def cls(self) -> int | None:
        """Position of the [CLS] token; None without one (SigLIP)."""
        return 0 if "cls" in self.prefix else None

    @property
    def settings(self) -> str:
        """What is computed with the weights, as JSON: the configuration and the test-time registers."""
        added = getattr(self.tower.embeddings, ADDED, None)
        return super().settings + (json.dumps(added, sort_keys=True) if added else "")

    def at(self, *kinds: str) -> frozenset[int]:
        """Return a set of token kinds, as `Filter.tokens` takes it for images of any size.

        The kinds are "patches", a name in `prefix`, "registers", or "prefix" for all tokens before the
        patches. Raises InputError for any other.
        """
        groups = {"patches": {len(self.prefix)}, "prefix": {*range(len(self.prefix))}}
        groups |= {"registers": {*self.registers}} | {name: {i} for i, name in enumerate(self.prefix)}
        if unknown := [kind for kind in kinds if not groups.get(kind)]:
            raise InputError(
                f"{self.name} has no tokens {', '.join(map(repr, unknown))}: choose from "
                f"{', '.join(name for name, members in groups.items() if members)}"
            )
        return frozenset().union(*(groups[kind] for kind in kinds))

    def grid(self, pixels: Float[Tensor, "batch channels height width"]) -> tuple[int, int]:
        """Return the number of rows and columns of patches. Raises InputError for images without a whole
        patch.
        """
        rows, columns = (side // self.patch_size for side in pixels.shape[-2:])
        if not rows or not columns:
            raise InputError(
                f"images of {pixels.shape[-2]} x {pixels.shape[-1]} pixels: {self.name} has patches of "
                f"{self.patch_size} x {self.patch_size}"
            )
        return rows, columns

    def kinds(self, pixels: Float[Tensor, "batch channels height width"]) -> Int[Tensor, "batch tokens"]:
        """Return the kind of each token as a number: its index in `prefix`, or `len(prefix)` for a patch."""
        rows, columns = self.grid(pixels)
        row = [*range(len(self.prefix)), *[len(self.prefix)] * (rows * columns)]
        return torch.tensor(row).expand(len(pixels), -1)

    def inputs(self, batch: Float[Tensor, "batch channels height width"]) -> dict[str, Any]:
        """Return the arguments of the forward pass; positions are interpolated for images of another size."""
        self.grid(batch)
        given: dict[str, Any] = {"pixel_values": batch.to(self.dtype)}
        fixed = not self.family.startswith("dino")  # DINO models interpolate, or rotate keys, themselves
        if fixed and tuple(batch.shape[-2:]) != (self.image_size, self.image_size):
            given["interpolate_pos_encoding"] = True
        return given

    def final(self) -> Any:
        """Inside a trace, return the residual stream `[batch, tokens, d]` after the final norm.

        CLIP applies its norm to the pooled token alone. For CLIP, the exit of the last layer is returned,
        which is what is read from it.
        """
        if self.family == "clip_vision_model":
            return self.layer(self.layers - 1).output
        return super().final()

    @property
    def reading(self) -> tuple[str, ...]:
        """Names of the head's layers that read the residual stream; empty without a head."""
        return tuple(name for name in HEADS if has(self.module, name) and self._linear(name))

    def _linear(self, name: str) -> bool:
        return is_linear(self.module.get_submodule(name))

    @property
    def head_weights(self) -> list[Float[Tensor, "classes columns"]]:
        """The matrices of the head's layers that read the residual stream."""
        return [effective_weight(self.module.get_submodule(name), self.dtype) for name in self.reading]

    @property
    def classes(self) -> int:
        """Number of classes of the head; 0 without one."""
        return self.module.get_submodule(self.reading[0]).out_features if self.reading else 0

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes."""
        names = self.module.config.id2label
        return tuple(names[index] for index in range(self.classes))

    @property
    def unembedding_weight(self) -> Float[Tensor, "rows d"]:
        """The matrix with which the classifier reads the residual stream: one row for each class and token
        that it reads.

        The head of DINOv2 reads [CLS] and the mean of the patches, and the two heads of DeiT read two tokens;
        the blocks of rows are stacked. Raises InputError without a head.
        """
        if not self.reading:
            raise InputError(
                f"{self.name} has no classifier head, so nothing names what is read of its residual stream: "
                "name a matrix, such as "
                f"read_spectrum(model, '{self.layout.layers}.0.{self.layout.values}.weight')"
            )
        return torch.cat([part for weight in self.head_weights for part in weight.split(self.d, dim=1)])

    @property
    def embedding_weight(self) -> Float[Tensor, "inputs d"]:
        """The matrix with which the patch embedding writes: one row for each value of a patch."""
        return effective_kernel(self.patch_embedding, self.dtype).T

    @property
    def patch_embedding(self) -> Any:
        """The convolution that writes the patches into the residual stream."""
        return next(outermost(self.tower.embeddings, lambda part: isinstance(innermost(part), Conv2d)))

    @property
    def tied(self) -> bool:
        return False

    def logits(self) -> Any:
        """Inside a trace, return the output of the head, `[batch, classes]`. Raises InputError without a
        head.
        """
        if not self.reading:
            raise InputError(f"{self.name} has no classifier head")
        return self.nn.output.logits

    def check(self) -> None:
        """Run one image and check that the layers add up and that the number of tokens is as expected.

        Raises InputError otherwise.
        """
        # an encoder of a known family interpolates positions, so that a few patches are enough
        side = 4 * self.patch_size if self.tested else self.image_size or 2 * self.patch_size
        pixels = torch.zeros(1, self.config.num_channels, side, side, device=self.device)
        options = self.inputs(pixels)
        seen: list[int] = []

        def count(_: Any, given: Any, output: Any) -> None:
            seen.append((output[0] if isinstance(output, tuple) else output).shape[-2])

        last = self.module.get_submodule(f"{self.layout.layers}.{self.layers - 1}")
        handle = last.register_forward_hook(count)
        try:
            check_sums(self, lambda: self.module(**options))
        finally:
            handle.remove()
        if seen != [tokens := self.kinds(pixels).shape[1]]:
            raise InputError(
                f"{self.name} ({self.family}) makes {seen[0]} tokens of an image of {side} x {side}, and "
                f"{tokens} were expected: {', '.join(self.prefix) or 'no prefix'} and the patches"
            )

    @property
    def rotates_keys(self) -> bool:
        """Whether keys are rotated by position (DINOv3), or this is not known."""
        return self.family == "dinov3_vit" or not self.tested

    @property
    def tested(self) -> bool:
        return self.family in VISION_FAMILIES

    def __repr__(self) -> str:
        return (
            f"VisionModel({self.name}, {self.family}, {self.layers} layers, d {self.d}, {self.heads} heads, "
            f"patches of {self.patch_size}, {', '.join(self.prefix) or 'no prefix'}, "
            f"{self.classes or 'no'} classes, {self.dtype})"
        )
