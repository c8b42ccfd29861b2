"""Attention sinks of images: prefix tokens at fixed positions, and patches that differ between images."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pandas as pd

from spectral_sinks.data.pixels import Pixels
from spectral_sinks.errors import InputError
from spectral_sinks.measure.attention.by_position import check_inputs
from spectral_sinks.measure.attention.received import EPSILON
from spectral_sinks.measure.circuits.heads import NO_OP
from spectral_sinks.measure.residual.massive import usual_levels
from spectral_sinks.measure.residual.matrix_spectrum import by_convention
from spectral_sinks.measure.results import Result
from spectral_sinks.measure.sinks.dark_share import as_json
from spectral_sinks.measure.sinks.rule import SHARE, Place
from spectral_sinks.measure.sinks.sink import SHOWN, Sink, counted_sinks, measure_sinks, sink_rows
from spectral_sinks.measure.vision.image_attention import ImageAttention, total_of
from spectral_sinks.measure.vision.image_passes import pass_over_images
from spectral_sinks.models.vision import VisionModel
from spectral_sinks.spectra.spectrum import Spectrum
from spectral_sinks.stats import Estimate

RULE = (
    "a token is a sink of an image if at least one head gives it more than epsilon (alpha_k over all "
    "queries). A kind of token (each token of the prefix; patches) is listed if it is a sink in half of the "
    "images. relative: the same with epsilon x 64 / T instead of epsilon, which is as many times uniform "
    "attention as epsilon is at the 64 tokens of the published setting. A sink is a no-op in a head in which "
    f"its value ratio is at most {NO_OP}. dark: as for text, compared with the patches that are not sinks"
)
"""The rule of `vision_sinks`. All of it is [ours] except alpha_k, epsilon and the value ratio."""


@dataclass(frozen=True, eq=False, repr=False)
class VisionSinks(ImageAttention, Result):
    """The sinks that `vision_sinks` found, with the attention to every token."""

    sinks: tuple[Sink, ...] = ()
    """The kinds of token that are sinks by `RULE` (`token` holds the kind), the most attended first."""
    conventions: tuple[str, ...] = ()
    """The conventions of the spectra given, the one that decides first; empty without a spectrum."""

    listed: ClassVar[tuple[str, ...]] = SHOWN

    @property
    def headline(self) -> str:
        """How many kinds of token are sinks, and in how many images of which model."""
        return f"{counted_sinks(self.sinks)} of {self.model} in {len(self.members)} images"

    @property
    def onset_layer(self) -> int | None:
        """Onset layer of the largest sink; None if there is no sink."""
        return self.sinks[0].onset_layer if self.sinks else None

    @property
    def table(self) -> pd.DataFrame:
        """The attention by image, layer, head and kind of token, as in `by_head`."""
        return self.by_head()

    def summary(self) -> pd.DataFrame:
        """Return one row per kind of token that is a sink: the fields of `Sink`, each estimate with its
        range.

        The table is empty if there is no sink.
        """
        return sink_rows(self.sinks, self.conventions)

    def record(self) -> dict[str, Any]:
        """Return everything except the tables by head and the arrays, as a dictionary that JSON can hold."""
        total = total_of(self.attention.alpha, self.members[:, None, None]).mean((1, 2))
        return {
            "model": self.model,
            "epsilon": self.epsilon,
            "tokens_per_image": self.length,
            "uniform": float(self.uniform.mean()),
            "relative_epsilon": self.relative,
            "images": len(self.members),
            "grid": list(self.grid) if self.pixels.alike else None,
            "prefix": list(self.prefix),
            "conventions": list(self.conventions),
            "sinks": [sink.record() for sink in self.sinks],
            "onset_layer": self.onset_layer,
            **as_json("total_sink_mass", Estimate.of(total)),
            "uniform_total_sink_mass": float((self.members.sum(1) * self.uniform).mean()),
            "kinds": json_rows(self.by_kind()),
            "patches": json_rows(self.patches()),
            "layers": json_rows(self.by_layer()),
            "heads": json_rows(self.heads()),
            "rule": RULE,
        }


def vision_sinks(
    model: VisionModel,
    pixels: Pixels,
    spectrum: Spectrum | Sequence[Spectrum] | None = None,
    *,
    epsilon: float = EPSILON,
    draws: int = 20,
    batch_size: int | None = None,
) -> VisionSinks:
    """Find the attention sinks of an image encoder by kind of token: those of the prefix, and patches.

    The rule is the entry `rule` of `VisionSinks.record`.

    Args:
        model: an image encoder.
        pixels: the images.
        spectrum: a spectrum of the residual stream. With it, the dark share of each sink is measured, and
            compared with that of patches that are not sinks and with random subspaces. Of several conventions
            of one matrix, the first decides.
        epsilon: attention received above which a head has a sink.
        draws: number of random subspaces.
        batch_size: images in a pass.

    Raises:
        InputError: for tokens of text, a spectrum of another width, an epsilon outside 0 to 1, and attention
            that cannot be seen.

    """
    check_inputs(model, pixels)
    if not 0 <= epsilon < 1:
        raise InputError(f"epsilon {epsilon}: attention received lies between 0 and 1")
    spectra = {} if spectrum is None else by_convention(model, spectrum)
    seen = pass_over_images(model, pixels, batch_size)
    attention, residuals = seen.attention, seen.residuals
    found = VisionSinks(model.name, epsilon, model.prefix, attention, seen.written, residuals)
    # A prefix token is one sink for all images; of patches only the sinks of each image count
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
        model, attention, residuals, high, spectra, places, others, epsilon, draws, batch_size
    )
    return replace(found, sinks=tuple(sinks), conventions=tuple(spectra))


def json_rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the rows of a table as dictionaries, with None for NaN."""
    return table.astype(object).where(table.notna(), None).to_dict("records")
