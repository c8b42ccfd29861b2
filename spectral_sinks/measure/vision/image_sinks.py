"""Attention sinks of images: the prefix at its fixed positions, and patches that move with the image."""

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from spectral_sinks.data.pixels import Pixels
from spectral_sinks.errors import InputError
from spectral_sinks.measure.attention.by_position import check_inputs
from spectral_sinks.measure.attention.capture import observe as look_at
from spectral_sinks.measure.attention.received import EPSILON
from spectral_sinks.measure.circuits.heads import NO_OP, written_norms
from spectral_sinks.measure.residual.massive import observe, usual_levels
from spectral_sinks.measure.sinks.rule import SHARE, Place
from spectral_sinks.measure.sinks.sink import Sink, as_json, measure_sinks
from spectral_sinks.measure.vision.image_attention import ImageAttention, total_of
from spectral_sinks.models.attention_capture import AttentionCall
from spectral_sinks.models.vision import VisionModel
from spectral_sinks.spectra.spectrum import Spectrum
from spectral_sinks.stats import Estimate

RULE = (
    "a token is a sink of an image if at least one head gives it more than epsilon (alpha_k over all "
    "queries); listed are the kinds of token (each of the prefix; patches) that are sinks in half of the "
    "images. relative: the same with epsilon x 64 / T in the place of epsilon, as many times uniform "
    "attention as epsilon is at the 64 tokens of the published setting. A sink is a no-op in a head where "
    f"its value ratio is at most {NO_OP}. dark: as for text, against the patches that are no sinks"
)
"""The rule of `vision_sinks`; all of it [ours] but alpha_k, epsilon and the value ratio."""


@dataclass(frozen=True, eq=False)
class VisionSinks(ImageAttention):
    """What `vision_sinks` found."""

    sinks: tuple[Sink, ...] = ()
    """Kinds that are sinks by `RULE`, `token` says which; largest attention first."""
    dark_known: bool = False
    """Whether a spectrum was given."""

    @property
    def onset_layer(self) -> int | None:
        """Onset of the largest sink."""
        return self.sinks[0].onset_layer if self.sinks else None

    def record(self) -> dict[str, Any]:
        """Everything but the tables by head and the arrays, as JSON holds it."""
        sinks = [sink.record() for sink in self.sinks]
        if not self.dark_known:
            sinks = [{k: v for k, v in sink.items() if "dark" not in k} for sink in sinks]
        total = total_of(self.attention.alpha, self.members[:, None, None]).mean((1, 2))
        return {
            "model": self.model,
            "epsilon": self.epsilon,
            "tokens_per_image": self.tokens,
            "uniform": 1 / self.tokens,
            "relative_epsilon": self.relative,
            "images": len(self.members),
            "grid": list(self.grid),
            "prefix": list(self.prefix),
            "sinks": sinks,
            "onset_layer": self.onset_layer,
            **as_json("total_sink_mass", Estimate.of(total)),
            "uniform_total_sink_mass": float(self.members.sum(1).mean() / self.tokens),
            "kinds": as_rows(self.by_kind()),
            "patches": as_rows(self.patches()),
            "layers": as_rows(self.by_layer()),
            "rule": RULE,
        }


def vision_sinks(
    model: VisionModel,
    pixels: Pixels,
    spectrum: Spectrum | None = None,
    *,
    epsilon: float = EPSILON,
    draws: int = 20,
    batch_size: int = 16,
) -> VisionSinks:
    """The sinks of an image encoder by kind of token, by the rule in `vision_sinks.RULE`.

    With a spectrum of the residual stream, the share of each sink's residual in its dark band is measured
    beside that of patches that are no sinks and of `draws` random subspaces. Raises InputError for tokens of
    text, a spectrum of another width, an epsilon outside 0 to 1, and attention that cannot be seen.
    """
    check_inputs(model, pixels)
    if not 0 <= epsilon < 1:
        raise InputError(f"epsilon {epsilon}: attention received lies between 0 and 1")
    if spectrum is not None and spectrum.d != model.d:
        raise InputError(f"a spectrum of width {spectrum.d} for {model.name} of width {model.d}")
    writes = [written_norms(model, layer) for layer in range(model.layers)]
    attention, residuals = observe(model, pixels, batch_size)
    written = np.zeros(attention.alpha.shape, dtype=np.float32)

    def look(call: AttentionCall, places: list[int]) -> None:
        value = call.value.repeat_interleave(call.groups, dim=1).double()
        written[places, call.layer] = (value @ writes[call.layer].to(value.device)).norm(dim=-1).cpu()

    look_at(model, pixels, [look], batch_size=batch_size)
    found = VisionSinks(model.name, epsilon, model.prefix, pixels.grid, attention, written, residuals)
    places: list[Place] = []
    for token, kind in enumerate((*model.prefix, "patch")):
        member = found.kinds[kind] & found.members
        if member.any(1).mean() >= SHARE:
            where = token if kind != "patch" else None
            every = found.kinds[kind] if where is not None else member
            places.append(Place(where, token, Counter({token: int(every.any(1).sum())}), every))
    others = found.kinds["patch"] & ~found.members
    high = residuals.high(usual_levels(model, attention, residuals, batch_size))
    sinks = measure_sinks(
        model, attention, residuals, high, spectrum, places, others, epsilon, draws, batch_size
    )
    return replace(found, sinks=tuple(sinks), dark_known=spectrum is not None)


def as_rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows, with None for NaN."""
    return table.astype(object).where(table.notna(), None).to_dict("records")
