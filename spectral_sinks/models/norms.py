"""The effective gain of RMSNorm, LayerNorm and LayerScale, in whatever form it is stored."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from spectral_sinks.errors import InputError


def gain_of(norm: Any, d: int) -> Float[Tensor, "d"]:
    """Return the factor by which a norm multiplies each coordinate, in float32.

    It is `weight`, `1 + weight` (Gemma), or the factor of a LayerScale. Raises InputError for a module that
    is not a norm with a gain.
    """
    if (scale := getattr(norm, "lambda1", None)) is not None:  # LayerScale of DINOv2 and DINOv3
        return scale.detach().float().cpu()
    weight = getattr(norm, "weight", None)
    if weight is None:
        return torch.ones(d)
    probe = torch.ones(d, device=weight.device, dtype=weight.dtype)
    probe[1::2] = -1  # mean 0 and mean square 1, so both kinds of norm only apply their gain to it
    with torch.no_grad():
        acts = (norm.forward(probe[None]) - norm.forward(-probe[None]))[0].float() / 2 * probe.float()
    for gain in (weight.detach().float(), 1 + weight.detach().float()):
        if torch.allclose(acts, gain, rtol=2e-2, atol=2e-2):
            return gain.cpu()
    raise InputError(f"{type(norm).__name__} is not understood as a norm with a gain: use convention 'raw'")
