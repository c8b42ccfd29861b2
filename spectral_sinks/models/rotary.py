"""The effect of positions on keys, read from the running model, for rotary embeddings of any kind."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from spectral_sinks.errors import InputError
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
    width = next((weight.numel() for weight in norm.parameters()), size)  # without a gain in NanoChat
    return gain_of(norm, width).view(-1, size).expand(model.key_heads, size)


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
        for layer in model.attention_layers:
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
    forward pass on `size` rows, in which row c has unit vector c in place of every key. A pass on one row
    comes first: if no position changes its keys, all matrices are the identity.

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
    if not _turns(model, options):
        unit_matrix = torch.eye(size, dtype=torch.float64)
        return unit_matrix.expand(*places.shape, model.layers, size, size).clone()
    identity = torch.eye(size, dtype=torch.float64).expand(*places.shape, size, size)
    found = [identity] * model.layers

    def unit(_: Any, __: Any, output: Tensor) -> Tensor:
        rows = units.view(size, *[1] * (output.ndim - 2), size)
        return rows.repeat(*[1] * (output.ndim - 1), output.shape[-1] // size).expand_as(output).clone()

    def project(_: Any, __: Any, output: Tensor) -> Tensor:
        changed = output.clone()
        index = model.projection_index("keys")
        changed[..., index] = unit(_, __, output[..., index])
        return changed

    handles: list[Any] = []
    for layer in model.attention_layers:
        change = project if key_norm(model, layer) is None else unit
        handles.append(_source(model, layer).register_forward_hook(change))

    def look(call: AttentionCall) -> None:
        found[call.layer] = call.key[:, 0].transpose(0, 1)[places.to(call.key.device)].double().cpu()

    try:
        with torch.no_grad(), attending(model, look):
            model.module(**options)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(found, dim=-3)


@dataclass(frozen=True)
class Rotation:
    """How a layer turns keys by position: each pair of channels by an angle that grows with the position."""

    partner: Int[Tensor, "size"]
    """The other channel of each channel's pair; the channel itself if positions do not change it."""
    sign: Float[Tensor, "size"]
    """Sign with which the partner enters; 0 for a channel that positions do not change."""
    rates: Float[Tensor, "size"]
    """Radians per position."""

    def turned(
        self, keys: Float[Tensor, "batch heads keys size"], by: Int[Tensor, "*#each keys"]
    ) -> Float[Tensor, "batch heads keys size"]:
        """Return keys turned by numbers of positions; negative numbers turn them back.

        The numbers may differ between rows and heads.
        """
        # float32 as in the modules of transformers, so that turning back undoes what they did
        angles = by.to(keys.device)[..., None].float() * self.rates.to(keys.device)
        wide = keys.to(torch.promote_types(keys.dtype, torch.float32))
        across = wide[..., self.partner.to(keys.device)] * self.sign.to(wide)
        return (wide * angles.cos().to(wide) + across * angles.sin().to(wide)).to(keys.dtype)


def rotations(model: Transformer) -> list[Rotation | None]:
    """Return the rotation of the keys of each layer; None for a layer whose keys positions do not change.

    The pairs of channels are read from the matrices of `key_turns`, and the rates from the model's buffers
    `inv_freq`, since a rate that is read from a matrix in float32 is not exact enough for large positions.

    Raises InputError for a model whose positions act in another way, and for one whose rates depend on the
    length of the text.
    """
    model.require_weights("reading the rotation of keys")
    model.require_heads("reading the rotation of keys")
    rates = [
        buffer.detach().double().cpu().flatten()
        for name, buffer in model.module.named_buffers()
        if name.endswith("inv_freq")
    ]
    if rates and getattr(model, "positions_by_length", False):
        raise InputError(
            f"the rotary positions of {model.name} ({model.family}) depend on the length of the text, so a "
            "key cannot be moved to another position: leave positions as they are in the text"
        )
    once, twice = key_turns(model, [1, 2]).unbind(0)
    return [
        _rotation(model, matrix, square, torch.cat(rates) if rates else torch.zeros(0))
        for matrix, square in zip(once, twice, strict=True)
    ]


def _rotation(
    model: Transformer,
    once: Float[Tensor, "size size"],
    twice: Float[Tensor, "size size"],
    known: Float[Tensor, "rates"],
) -> Rotation | None:
    """Return the rotation whose matrices are `once` for one position and `twice` for two."""
    size = len(once)
    off = (once - once.diagonal().diag()).T.abs()  # row j: what the others give to channel j
    if not off.any():
        return None
    partner, channels = off.argmax(1), torch.arange(size)
    given = once[partner, channels]
    moved = off.amax(1) > 0
    partner = torch.where(moved, partner, channels)
    seen = torch.atan2(given.abs(), once.diagonal())
    rates = torch.zeros_like(seen)
    if len(known):
        nearest = (seen.clamp_min(1e-12).log()[:, None] - known.log()).abs().min(1)
        rates = torch.where(moved, known[nearest.indices], rates)
    rotation = Rotation(partner, given.sign() * moved, rates.float())
    scale = once.norm(dim=0).float()  # some kinds multiply keys by a constant as well
    again = rotation.turned(torch.eye(size).expand(1, 1, size, size), torch.full((size,), 2))[0, 0] * scale
    if not len(known) or not torch.allclose(again.double(), twice, atol=0.02):
        raise InputError(
            f"positions act on the keys of {model.name} ({model.family}) in another way than by rotating "
            "pairs of channels at rates in a buffer `inv_freq`, so a key cannot be moved to another "
            "position: leave positions as they are in the text"
        )
    return rotation


def biased_by_distance(model: Transformer) -> bool:
    """Whether scores are biased by the distance of query and key (ALiBi), which is counted in the cache."""
    return model.family in ("bloom", "mpt") or bool(getattr(model.config, "alibi", False))


def _turns(model: Transformer, options: dict[str, Any]) -> bool:
    """Whether keys differ between their projection, or its norm, and the dot products, in the first row."""
    turned: list[bool] = []

    def look(call: AttentionCall) -> None:
        turned.append(not torch.equal(arranged(plain[call.layer], call), call.key))

    first = {name: x[:1] if isinstance(x, Tensor) else x for name, x in options.items()}
    with torch.no_grad(), unturned_keys(model) as plain, attending(model, look):
        model.module(**first)
    return any(turned)


def _source(model: Transformer, layer: int) -> Any:
    """Return the module whose output is rotated by position."""
    path = f"{model.layout.layers}.{layer}.{model.layout.keys}"
    norm = key_norm(model, layer)
    return model.module.get_submodule(path) if norm is None else norm
