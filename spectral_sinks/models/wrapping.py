"""Wrapping of transformers models by nnsight."""

import warnings
from typing import Any

from nnsight import TransformersModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast


def wrap(module: Any, tokenizer: Any, **options: Any) -> TransformersModel:
    """Wrap a transformers model as an nnsight model; `options` are passed to nnsight."""
    # nnsight requires a tokenizer even if only ids are traced, which never use it
    placeholder = tokenizer or PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({})))
    task = "text-generation" if module.can_generate() else "fill-mask"
    if task == "fill-mask" and placeholder.mask_token is None:
        words = Tokenizer(WordLevel({"[MASK]": 0}))
        placeholder = PreTrainedTokenizerFast(tokenizer_object=words, mask_token="[MASK]")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* has a submodule named 'output'", UserWarning)  # see `part`
        return TransformersModel(module, task=task, tokenizer=placeholder, **options)
