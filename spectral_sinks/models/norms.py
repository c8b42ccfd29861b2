"""The effective gain of RMSNorm, LayerNorm and LayerScale, in whatever form it is stored."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from spectral_sinks.errors import InputError
from spectral_sinks.models.effective_weights import device_of, dtype_of, loaded


def gain_of(norm: Any, d: int) -> Float[Tensor, "d"]:
    """Return the factor by which a norm multiplies each coordinate, in float32.

    It is `weight`, `1 + weight` (Gemma), or the factor of a LayerScale; of an adapted norm, that of the
    adapter. Raises InputError for a module that is not a norm with a gain.
    """
    with loaded(norm):
        if (scale := getattr(norm, "lambda1", None)) is not None:  # LayerScale of DINOv2 and DINOv3
            return scale.detach().float().cpu()
        stored = [weight.detach().float() for weight in norm.parameters() if weight.numel() == d]
    acts = _actions(norm, d)
    gains = [gain for weight in stored for gain in (weight, 1 + weight)] or [torch.ones_like(acts)]
    gain = min(gains, key=lambda gain: float((acts - gain).abs().max()))
    if not torch.allclose(acts, gain, rtol=2e-2, atol=2e-2):
        raise InputError(
            f"{type(norm).__name__} is not understood as a norm with a gain: use convention 'raw'"
        )
    return gain.cpu()


def centres(norm: Any, d: int) -> bool:
    """Whether a norm subtracts the mean over the coordinates, as LayerNorm does, so that constants give 0."""
    same = torch.ones(1, d, device=device_of(norm), dtype=dtype_of(norm, torch.float32))
    with torch.no_grad():
        constant = (norm.forward(same) - norm.forward(-same)).float() / 2
    return bool(constant.norm() < 0.1 * _actions(norm, d).norm())


@torch.no_grad()
def _actions(norm: Any, d: int) -> Float[Tensor, "d"]:
    """Return what a norm multiplies 1 and -1 in turn by."""
    device, dtype = device_of(norm), dtype_of(norm, torch.float32)
    probe = torch.ones(d, device=device, dtype=dtype)
    probe[1::2] = -1  # mean 0 and mean square 1, so both kinds of norm only apply their gain to it
    apart = norm.forward(probe[None]) - norm.forward(-probe[None])
    return apart[0].float() / 2 * probe.float()
