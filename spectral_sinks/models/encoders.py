"""Encoders: how one is recognised by the names of its classes and its model type."""

from collections.abc import Iterable
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from spectral_sinks.errors import InputError

HEADS = ("ForMaskedLM", "ForPreTraining")
GENERATORS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


def is_encoder(architectures: Iterable[str], model_type: str | None, decoder: bool | None) -> bool:
    """Whether a model with these class names is an encoder, which predicts masked tokens or has no head.

    A configuration with `is_decoder` set (`decoder`) is none. Without class names, the model type decides.
    Raises InputError for an encoder with a head of another kind, such as a classifier.
    """
    names = list(architectures)
    encoder = model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if decoder or not (names or encoder):
        return False
    if any(name.endswith(HEADS) for name in names) or not names:
        return True
    if encoder and not any(name.endswith(GENERATORS) for name in names):
        if is_bare(names):
            return True
        raise InputError(
            f"{names[0]} ({model_type}) has a head that is not over the vocabulary: expected a masked "
            "language model, such as BertForMaskedLM, a causal one, or an encoder alone, such as BertModel"
        )
    return False


def is_bare(architectures: Iterable[str]) -> bool:
    """Whether the class names are those of an encoder without a head, such as BertModel."""
    names = list(architectures)
    alone = any(name.endswith("Model") and not name.endswith("PreTrainedModel") for name in names)
    return alone and not any(name.endswith((*HEADS, *GENERATORS)) for name in names)


def encodes(module: Any) -> bool:
    """Whether a transformers model is an encoder; raises InputError as `is_encoder` does."""
    config = module.config.get_text_config()
    names = [kind.__name__ for kind in type(module).__mro__]
    return is_encoder(names, config.model_type, getattr(config, "is_decoder", False))
