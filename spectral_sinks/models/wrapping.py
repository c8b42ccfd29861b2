"""Wrapping of transformers models by nnsight."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from nnsight import NNsight, TransformersModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from spectral_sinks.models.effective_weights import device_of, offloaded


class Offloaded(TransformersModel):
    """A model that accelerate spreads over memories, so that its first weight does not show its device."""

    @property
    def device(self) -> torch.device:
        return device_of(self._module)


class OffloadedEncoder(NNsight):
    """The same for an image encoder."""

    device = Offloaded.device


def wrap_encoder(module: Any) -> NNsight:
    """Wrap an image encoder of transformers as an nnsight model."""
    return (OffloadedEncoder if offloaded(module) else NNsight)(module)


def wrap(module: Any, tokenizer: Any, **options: Any) -> TransformersModel:
    """Wrap a transformers model as an nnsight model; `options` are passed to nnsight."""
    # nnsight requires a tokenizer even if only ids are traced, which never use it
    placeholder = tokenizer or PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({})))
    task = "text-generation" if module.can_generate() else "fill-mask"
    if task == "fill-mask" and placeholder.mask_token is None:
        words = Tokenizer(WordLevel({"[MASK]": 0}))
        placeholder = PreTrainedTokenizerFast(tokenizer_object=words, mask_token="[MASK]")
    kind = Offloaded if offloaded(module) else TransformersModel
    with warnings.catch_warnings(), placed(module):
        warnings.filterwarnings("ignore", ".* has a submodule named 'output'", UserWarning)  # see `part`
        return kind(module, task=task, tokenizer=placeholder, **options)


@contextmanager
def placed(module: Any) -> Iterator[None]:
    """Inside the block, the device map of an offloaded model names the device, which a pipeline reads."""
    if not offloaded(module):
        yield
        return
    held = module.__dict__.pop("hf_device_map", None)
    module.hf_device_map = {"": device_of(module)}
    try:
        yield
    finally:
        del module.hf_device_map
        if held is not None:
            module.hf_device_map = held
