"""Norms as they act: the gain of RMSNorm, LayerNorm and LayerScale, whatever form it is stored in."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from spectral_sinks.errors import InputError


def gain_of(norm: Any, d: int) -> Float[Tensor, "d"]:
    """What a norm multiplies each coordinate by, float32: `weight`, `1 + weight` (Gemma), a layer scale.

    Raises InputError for a module that is no norm with a gain.
    """
    if (scale := getattr(norm, "lambda1", None)) is not None:  # LayerScale of DINOv2 and DINOv3
        return scale.detach().float().cpu()
    weight = getattr(norm, "weight", None)
    if weight is None:
        return torch.ones(d)
    probe = torch.ones(d, device=weight.device, dtype=weight.dtype)
    probe[1::2] = -1  # mean 0 and mean square 1: both kinds of norm multiply it by their gain alone
    with torch.no_grad():
        acts = (norm.forward(probe[None]) - norm.forward(-probe[None]))[0].float() / 2 * probe.float()
    for gain in (weight.detach().float(), 1 + weight.detach().float()):
        if torch.allclose(acts, gain, rtol=2e-2, atol=2e-2):
            return gain.cpu()
    raise InputError(f"{type(norm).__name__} is not understood as a norm with a gain: use convention 'raw'")
