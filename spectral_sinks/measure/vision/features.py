"""The output of an image encoder: tokens, logits, and the features that represent an image."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from spectral_sinks.data.pixels import Pixels
from spectral_sinks.errors import InputError
from spectral_sinks.interventions.sites import Site
from spectral_sinks.interventions.tracing import Interventions, Resume, trace
from spectral_sinks.models.vision import VisionModel

NEIGHBOURS = 5
"""Number of nearest images for which the share that stays is reported."""


@dataclass(frozen=True, eq=False)
class EncoderOutput:
    """Output of an image encoder for a batch of images, in float64 on the CPU."""

    tokens: Float[Tensor, "batch tokens d"]
    """After the final norm. CLIP applies it to [CLS] alone, so its patches are the exit of the last layer."""
    logits: Float[Tensor, "batch classes"] | None


def run_encoder(
    model: VisionModel,
    batch: Tensor,
    edits: Interventions,
    reads: Sequence[Site] = (),
    resume: Resume | None = None,
) -> tuple[EncoderOutput, dict[Site, Tensor]]:
    """Run one pass; return the output of the model, and the residuals at the sites `reads`.

    Args:
        model: an image encoder.
        batch: the pixels.
        edits: the edit at each site.
        reads: the sites whose residuals are returned.
        resume: the residual from which the pass begins.

    """

    def readout(final: Tensor, read: dict[Site, Tensor], _: list[Tensor]) -> tuple[Any, ...]:
        return final, model.logits() if model.classes else None, read

    final, logits, read = trace(model, batch, edits, reads, readout=readout, resume=resume)
    if model.family == "clip_vision_model":
        with torch.no_grad():
            normed = model.module.get_submodule(model.layout.final_norm).forward(final[:, :1])
        final = torch.cat([normed, final[:, 1:]], dim=1)
    return EncoderOutput(final.cpu().double(), None if logits is None else logits.cpu().double()), read


def token_kinds(model: VisionModel) -> Mapping[str, list[int] | slice]:
    """Return the positions of the tokens of each kind: "cls", "distillation", "registers" and "patches"."""
    kinds: dict[str, Any] = {
        name: [place] for place, name in enumerate(model.prefix) if place not in model.registers
    }
    kinds |= {"registers": list(model.registers)} if model.registers else {}
    return kinds | {"patches": slice(len(model.prefix), None)}


def features(model: VisionModel, output: EncoderOutput) -> dict[str, Tensor]:
    """Return the vectors that represent an image, `[batch, d]`: [CLS] if there is one, and the mean patch."""
    vectors = {} if model.cls is None else {"cls": output.tokens[:, model.cls]}
    return vectors | {"patches": output.tokens[:, len(model.prefix) :].mean(1)}


def token_changes(
    new: Float[Tensor, "*batch tokens d"], old: Float[Tensor, "*batch tokens d"]
) -> tuple[Float[Tensor, "*batch tokens"], Float[Tensor, "*batch tokens"]]:
    """Cosine of each token to its untouched value, and the error relative to the norm of that value."""
    cosine = torch.nn.functional.cosine_similarity(new, old, dim=-1)
    return cosine, (new - old).norm(dim=-1) / old.norm(dim=-1)


def same_top_class(
    new: Float[Tensor, "batch classes"], old: Float[Tensor, "batch classes"]
) -> Float[Tensor, "batch"]:
    """Test whether the untouched top class still has the largest logit; a tie counts as agreement."""
    kept = new.gather(1, old.argmax(-1, keepdim=True))[:, 0]
    return (kept >= new.amax(-1)).double()


def classes_of(model: VisionModel, pixels: Pixels, labels: Tensor | None) -> Tensor | None:
    """Return labels as classes of the head, matched by name if they have names; None if these differ."""
    names = getattr(pixels.images, "label_names", None)
    if labels is None or not model.classes or not names:
        return classes_in_range(model, labels)
    if not set(names) <= set(model.labels):
        return None
    return torch.tensor([model.labels.index(names[int(label)]) for label in labels])


def classes_in_range(model: VisionModel, labels: Tensor | None) -> Tensor | None:
    """Return labels that are numbers of the head's classes. Raises InputError for other numbers."""
    if labels is None or not model.classes:
        return None
    if int(labels.min()) < 0 or int(labels.max()) >= model.classes:
        raise InputError(
            f"labels {int(labels.min())} to {int(labels.max())}: the head of {model.name} has classes 0 to "
            f"{model.classes - 1}"
        )
    return labels


def neighbours(
    gallery: Float[Tensor, "n d"], vectors: Float[Tensor, "n d"]
) -> tuple[Float[Tensor, "n"], Float[Tensor, "n"]]:
    """Test whether each vector keeps the nearest neighbours of its own row in the gallery, by cosine.

    The own row is left out. The first result is 1 where the nearest row is the same, the second the share of
    the five nearest rows that stay.
    """
    count = min(NEIGHBOURS, len(gallery) - 1)
    itself = torch.eye(len(gallery), dtype=torch.bool)
    before, after = (
        (normalize(x, dim=-1) @ normalize(gallery, dim=-1).T).masked_fill(itself, -2).topk(count).indices
        for x in (gallery, vectors)
    )
    kept = (before[:, :, None] == after[:, None]).any(-1).double().mean(1)
    return (before[:, 0] == after[:, 0]).double(), kept
