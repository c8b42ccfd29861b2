"""How much of a batch one pass takes: what is free decides first, and running out of memory halves it."""

import gc
import re
from collections.abc import Callable, Iterator
from typing import TypeVar

import psutil
import torch
from torch import Tensor

from spectral_sinks.data.pixels import Pixels
from spectral_sinks.data.texts import Windows
from spectral_sinks.errors import InputError
from spectral_sinks.models.base import Transformer

T = TypeVar("T")

TOKENS = {"cpu": 4096, "cuda": 2**17}
"""Tokens in a pass beyond which it gains nothing: on a CPU larger activations only leave the cache."""

BATCH = 16
"""Windows in a batch unless the caller says otherwise, and in a group within which a swap pairs them."""

SHARE = 0.5
"""Of the free memory, what a pass may be planned to take."""


class Memory:
    """The rows (windows) of one pass through a model, found by halving when they prove too many."""

    def __init__(self, model: Transformer, tokens: int) -> None:
        self.device = model.device
        each = row_bytes(model, tokens)
        most = TOKENS.get(self.device.type, TOKENS["cpu"]) // tokens
        self.rows = max(1, min(most, int(SHARE * free(self.device) / each)))

    def parts(self, total: int, size: int, run: Callable[[int, int], T]) -> list[T]:
        """Return the results of `run(start, stop)` on parts of `total` things of `size` rows each.

        A part that does not fit is halved, and so are all later ones; a single thing is tried again with
        `rows` less than its size, on which `run` may take its rows apart. Raises InputError where that fails.
        """
        found: list[T] = []
        start = 0
        while start < total:
            stop = min(total, start + max(1, self.rows // size))
            try:
                found.append(run(start, stop))
                start = stop
                continue
            except Exception as error:  # allocators raise types of their own, and nnsight wraps them
                if not out_of_memory(error):
                    raise
                if stop - start == 1 and (size == 1 or self.rows < size):
                    raise InputError(
                        f"one window does not fit into the memory of {self.device}: give shorter windows"
                    ) from error
            self.rows = max(1, (stop - start) * size // 2)
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        return found


def batch_size_for(model: Transformer, length: int, batch_size: int | None = None) -> int:
    """Return the number of windows of `length` tokens in a batch: `batch_size`, or what fits into memory.

    The default is at most `BATCH`.

    Raises InputError for a batch size below 1.
    """
    if batch_size is None:
        return max(1, min(BATCH, int(SHARE * free(model.device) / row_bytes(model, length))))
    if batch_size < 1:
        raise InputError(f"batch_size {batch_size}: expected at least 1, or None to find it by memory")
    return batch_size


def batches(
    model: Transformer, inputs: Windows | Pixels, batch_size: int | None
) -> Iterator[tuple[list[int], Tensor]]:
    """Yield batches of windows or images with their indices, as many in each as `batch_size_for` says."""
    return inputs.batches(batch_size_for(model, inputs.length, batch_size))


def swap_groups(inputs: Windows | Pixels) -> Iterator[tuple[list[int], Tensor]]:
    """Yield the groups within which a swap pairs windows or images, each of which takes the one before it.

    They depend on the windows alone, and not on the batch size or on memory, so that results do not either.
    """
    return inputs.batches(BATCH)


def free(device: torch.device) -> int:
    """Bytes that can still be allocated on a device."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return psutil.virtual_memory().available


def row_bytes(model: Transformer, tokens: int) -> int:
    """Bytes that one window takes in a pass: residuals, the widest layer, kept attention maps."""
    wide = getattr(model.config, "intermediate_size", None) or 4 * model.d
    width = 8 * model.d + 3 * wide
    if model.config._attn_implementation == "eager" or model.own_attention is not None:
        width += 3 * model.heads * tokens
    return tokens * width * max(4, model.dtype.itemsize)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error, or what it was raised from, is an allocator's."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, RuntimeError) and re.search(
        r"out of memory|not enough memory|can't allocate memory|ALLOC_FAILED|bad_alloc", str(error)
    ):
        return True
    cause = error.__cause__
    return cause is not None and out_of_memory(cause)
