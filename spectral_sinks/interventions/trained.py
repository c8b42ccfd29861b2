"""An image encoder without the registers that it was trained with."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from spectral_sinks.errors import InputError
from spectral_sinks.interventions.registers import fingerprinted_anew
from spectral_sinks.models.vision import VisionModel


def require_registers(model: VisionModel) -> None:
    """Raise InputError for a model without trained registers."""
    if not model.registers:
        tokens = ", ".join((*model.prefix, "patches"))
        raise InputError(f"{model.name} has no trained registers: its tokens are {tokens}")


@contextmanager
def without_registers(model: VisionModel) -> Iterator[VisionModel]:
    """Inside the block, the model has no trained registers: they are taken out from the embedding on.

    Raises InputError for a model without any.
    """
    require_registers(model)
    part = model.tower.embeddings
    tokens, count = part.register_tokens, model.config.num_register_tokens
    part.register_tokens = nn.Parameter(tokens.detach()[:, :0], requires_grad=False)
    model.config.num_register_tokens = 0
    try:
        with fingerprinted_anew(model):
            yield model
    finally:
        part.register_tokens, model.config.num_register_tokens = tokens, count
