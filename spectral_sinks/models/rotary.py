"""What a model's positions do to keys, read from the running model: rotary embeddings of any kind."""

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
    """The norm that keys pass before they are turned (Qwen3, Gemma 3, OLMo 2); None without one."""
    attention = f"{model.layout.layers}.{layer}.{model.layout.attention}"
    return getattr(model.module.get_submodule(attention), "k_norm", None)


def key_gain(model: Transformer, layer: int) -> Float[Tensor, "key_heads size"]:
    """The gain of the norm that keys pass, by head; ones where they pass none."""
    norm, size = key_norm(model, layer), model.head_size
    if norm is None:
        return torch.ones(model.key_heads, size)
    return gain_of(norm, norm.weight.numel()).view(-1, size).expand(model.key_heads, size)


@contextmanager
def unturned_keys(model: Transformer) -> Iterator[dict[int, Tensor]]:
    """Inside the block, the last pass's keys by layer as they were before positions turned them.

    They are the outputs of the projection, or of the norm after it; `arranged` puts them in order.
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
    """Keys before their turn in the order of the call's: heads before tokens."""
    key = call.key
    if unturned.ndim == 3:
        return unturned.view(*unturned.shape[:2], -1, key.shape[-1]).transpose(1, 2)
    either = [x for x in (unturned, unturned.transpose(1, 2)) if x.shape == key.shape]
    norms = key.norm(dim=-1)  # a turn keeps them up to one factor, which tells tokens from heads
    return min(either, key=lambda x: float((norms / x.norm(dim=-1).clamp_min(1e-30)).std()))


def key_turns(
    model: Transformer, place: int | Sequence[int], pixels: Tensor | None = None
) -> Float[Tensor, "*places layers size size"]:
    """What becomes of keys at a position, or at several, between their projection (or its norm) and products.

    With matrix R of a layer, a key `k` enters the products as `k @ R`: a rotation for rotary embeddings,
    partial or scaled too, the identity without them. Read from one pass on `size` rows, in which row c puts
    unit vector c in the place of every key; of an image encoder on the image `pixels`
    `[channels, height, width]`, whose size says where its patches are.
    """
    size = model.head_size
    places = torch.as_tensor(place)
    units = torch.eye(size, device=model.device, dtype=model.dtype)
    if pixels is None:
        ids = torch.zeros(size, max(int(places.max()) + 1, 2), dtype=torch.long, device=model.device)
        options = {**model.inputs(ids), "use_cache": False}
    else:
        options = model.inputs(pixels.to(model.device).expand(size, *pixels.shape))
    found: list[Tensor] = []

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
    """The module whose output positions turn."""
    path = f"{model.layout.layers}.{layer}.{model.layout.keys}"
    norm = key_norm(model, layer)
    return model.module.get_submodule(path) if norm is None else norm
