"""The effect of positions on keys, read from the running model, for rotary embeddings of any kind."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from spectral_sinks.models.attention_capture import AttentionCall, attending
from spectral_sinks.models.base import Transformer
from spectral_sinks.models.norms import gain_of


def key_norm(model: Transformer, layer: int) -> Any | None:
    """Return the norm that keys pass before the rotation (Qwen3, Gemma 3, OLMo 2), or None."""
    attention = f"{model.layout.layers}.{layer}.{model.layout.attention}"
    return getattr(model.module.get_submodule(attention), "k_norm", None)


def key_gain(model: Transformer, layer: int) -> Float[Tensor, "key_heads size"]:
    """Return the gain of the norm of the keys, by head; ones if there is no such norm."""
    norm, size = key_norm(model, layer), model.head_size
    if norm is None:
        return torch.ones(model.key_heads, size)
    return gain_of(norm, norm.weight.numel()).view(-1, size).expand(model.key_heads, size)


@contextmanager
def unturned_keys(model: Transformer) -> Iterator[dict[int, Tensor]]:
    """Inside the block, collect the last pass's keys by layer as they are before the rotation by position.

    They are the outputs of the projection, or of the norm after it. `arranged` brings them into the order of
    an `AttentionCall`.
    """
    found: dict[int, Tensor] = {}
    handles: list[Any] = []

    def keeper(layer: int) -> Any:
        index = slice(None) if key_norm(model, layer) is not None else model.projection_index("keys")

        def keep(_: Any, __: Any, output: Tensor) -> None:
            found[layer] = output[..., index].detach()

        return keep

    try:
        for layer in range(model.layers):
            handles.append(_source(model, layer).register_forward_hook(keeper(layer)))
        yield found
    finally:
        for handle in handles:
            handle.remove()


def arranged(unturned: Tensor, call: AttentionCall) -> Float[Tensor, "batch key_heads keys size"]:
    """Return keys from before the rotation in the order of the keys of a call: heads before tokens."""
    key = call.key
    if unturned.ndim == 3:
        return unturned.view(*unturned.shape[:2], -1, key.shape[-1]).transpose(1, 2)
    either = [x for x in (unturned, unturned.transpose(1, 2)) if x.shape == key.shape]
    # a rotation keeps norms up to one common factor, which tells tokens from heads
    norms = key.norm(dim=-1)
    return min(either, key=lambda x: float((norms / x.norm(dim=-1).clamp_min(1e-30)).std()))


def key_turns(
    model: Transformer, place: int | Sequence[int], pixels: Tensor | None = None
) -> Float[Tensor, "*places layers size size"]:
    """Return the matrices that positions apply to keys, between their projection (or its norm) and the dot
    products.

    With the matrix R of a layer, a key `k` enters the dot products as `k @ R`. R is a rotation for rotary
    embeddings, also for partial or scaled ones, and the identity without them. All matrices are read from one
    forward pass on `size` rows, in which row c has unit vector c in place of every key.

    `place` is one position, or several. For an image encoder, `pixels` is the image `[channels, height,
    width]` of the pass; its size determines the positions of the patches.
    """
    size = model.head_size
    places = torch.as_tensor(place)
    units = torch.eye(size, device=model.device, dtype=model.dtype)
    if pixels is None:
        ids = torch.zeros(size, max(int(places.max()) + 1, 2), dtype=torch.long, device=model.device)
        options = {**model.inputs(ids), "use_cache": False}
    else:
        options = model.inputs(pixels.to(model.device).expand(size, *pixels.shape))
    found: list[Tensor] = []  # by layer, each [*places, size, size]

    def unit(_: Any, __: Any, output: Tensor) -> Tensor:
        rows = units.view(size, *[1] * (output.ndim - 2), size)
        return rows.repeat(*[1] * (output.ndim - 1), output.shape[-1] // size).expand_as(output).clone()

    def project(_: Any, __: Any, output: Tensor) -> Tensor:
        changed = output.clone()
        index = model.projection_index("keys")
        changed[..., index] = unit(_, __, output[..., index])
        return changed

    handles: list[Any] = []
    for layer in range(model.layers):
        change = project if key_norm(model, layer) is None else unit
        handles.append(_source(model, layer).register_forward_hook(change))

    def look(call: AttentionCall) -> None:
        found.append(call.key[:, 0].transpose(0, 1)[places.to(call.key.device)].double().cpu())

    try:
        with torch.no_grad(), attending(model, look):
            model.module(**options)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(found, dim=-3)


def _source(model: Transformer, layer: int) -> Any:
    """Return the module whose output is rotated by position."""
    path = f"{model.layout.layers}.{layer}.{model.layout.keys}"
    norm = key_norm(model, layer)
    return model.module.get_submodule(path) if norm is None else norm
