"""Means over documents for use in edits (residuals, values, keys), and candidates for massive channels."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from spectral_sinks.data.pixels import Pixels
from spectral_sinks.data.texts import Windows
from spectral_sinks.errors import InputError
from spectral_sinks.interventions.sites import Site
from spectral_sinks.interventions.tracing import deepest, trace
from spectral_sinks.measure.memory import batches
from spectral_sinks.models.attention_capture import AttentionCall, attending
from spectral_sinks.models.base import Transformer
from spectral_sinks.models.language import LanguageModel
from spectral_sinks.models.masked_lm import masked_ids
from spectral_sinks.remote.client import remotely


def mean_residual(
    model: Transformer, windows: Windows | Pixels, site: Site, batch_size: int | None = None
) -> Float[Tensor, "tokens d"]:
    """Return the mean residual at a site by position, over windows or images.

    It is the reference for the fill `Mean`. An encoder reads masked windows, as when its NLL is measured. For
    one mean over all patches of all images, average the last rows: `reference[len(model.prefix):] =
    reference[len(model.prefix):].mean(0)`.
    """
    return mean_residuals(model, windows, [site], batch_size)[site]


def mean_residuals(
    model: Transformer, windows: Windows | Pixels, sites: Sequence[Site], batch_size: int | None = None
) -> dict[Site, Tensor]:
    """Return `mean_residual` at several sites from one pass, `[tokens, d]` each, float64."""
    if isinstance(windows, Pixels):
        windows.require_one_shape()
    total = {site: torch.zeros(windows.length, model.d, dtype=torch.float64) for site in sites}
    count = torch.zeros(windows.length, 1, dtype=torch.float64)
    for _, ids in batches(model, windows, batch_size):
        ids = ids.to(model.device)
        sums = trace(
            model,
            masked_ids(model, ids) if isinstance(model, LanguageModel) and model.masks else ids,
            {},
            dict.fromkeys(sites, lambda x: x.double().sum(0).cpu()),
            readout=lambda final, read, weights: read,
            last=deepest(sites),
        )
        tokens = len(next(iter(sums.values()))) if sums else 0
        for site, part in sums.items():
            total[site][:tokens] += part
        count[:tokens] += len(ids)
    return {site: part / count for site, part in total.items()}


def mean_values(
    model: LanguageModel, windows: Windows, position: int | None = 0, *, batch_size: int | None = None
) -> Float[Tensor, "layers key_heads size"]:
    """Return the mean over windows of a position's values, or of all tokens' (None), by layer and key head.

    If the windows are those of one document, the result is that document's own value, for a swap.
    """
    return _means(model, windows, position, "value", batch_size)


def mean_keys(
    model: LanguageModel, windows: Windows, position: int = 0, *, batch_size: int | None = None
) -> Float[Tensor, "layers key_heads size"]:
    """Return the mean over windows of a position's keys, by layer and key head.

    The keys are those that enter the softmax, rotated to that position.
    """
    return _means(model, windows, position, "key", batch_size)


@remotely
def _means(
    model: LanguageModel, windows: Windows, position: int | None, which: str, batch_size: int | None
) -> Float[Tensor, "layers key_heads size"]:
    model.require_attention(f"the mean {which} of each layer")
    shortest = min(len(row) for row in windows.rows)
    if position is not None and not 0 <= position < shortest:
        raise InputError(f"position {position}: the windows have {shortest} tokens, 0 to {shortest - 1}")
    total: dict[int, Tensor] = {}
    count = 0

    def look(call: AttentionCall) -> None:
        part: Tensor = getattr(call, which).detach().double()
        part = part if position is None else part[:, :, position : position + 1]
        total[call.layer] = total.get(call.layer, 0) + part.sum((0, 2)).cpu()

    with attending(model, look):
        for _, ids in batches(model, windows, batch_size):
            trace(model, ids.to(model.device), {}, readout=lambda *_: None)
            count += ids.numel() if position is None else len(ids)
    shapes = sorted({tuple(part.shape) for part in total.values()})
    if len(shapes) > 1:
        raise InputError(
            f"the layers of {model.name} have {which}s of different shapes, {shapes[0]} and {shapes[-1]}, "
            "which do not fit into one tensor"
        )
    return torch.stack([total[layer] for layer in range(model.layers)]) / count


def massive_channels(
    model: LanguageModel, windows: Windows, site: Site, position: int = 0, count: int = 2
) -> list[int]:
    """Return the channels that are largest at one position of a site, by absolute mean over windows.

    They are candidates that `channels` can fix or zero. Whether they are massive is a separate question. (Sun
    et al. 2024)

    Args:
        model: a language model.
        windows: the text.
        site: the site.
        position: the position.
        count: number of channels.

    Raises:
        InputError: for a number of channels that the model does not have, and for a position beyond the
            windows.

    """
    if not 1 <= count <= model.d:
        raise InputError(f"{count} channels of {model.d}: give at least 1")
    mean = mean_residual(model, windows, site)
    if not 0 <= position < len(mean):
        raise InputError(f"position {position}: the windows have {len(mean)} tokens")
    return mean[position].abs().topk(count).indices.tolist()
