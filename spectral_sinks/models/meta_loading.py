"""Models that stay on a server: configuration and tokenizer are read, weights are not."""

from collections.abc import Mapping
from typing import Any

import torch
from nnsight import TransformersModel
from nnsight.modeling import huggingface
from nnsight.modeling.mixins.meta import MetaDevice
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from spectral_sinks.errors import InputError, brief
from spectral_sinks.models.checkpoint import Source
from spectral_sinks.models.layout import Layout, find_layout
from spectral_sinks.models.pickling import wrap


def load_on_meta(
    source: Source,
    tokenizer: Any,
    attention: str,
    dtype: torch.dtype | str,
    parts: Mapping[str, str] | None,
    revision: str | None,
    trust_remote_code: bool,
    masked: bool = False,
) -> tuple[TransformersModel, Layout]:
    """Return the nnsight model of a checkpoint without memory for any weight, and its layout.

    Args:
        source: the checkpoint.
        tokenizer: its tokenizer, or None.
        attention: transformers' `attn_implementation`; "auto" is eager attention, which returns its maps and
            which every server has.
        dtype: the dtype of the model; "auto" is the one of the configuration.
        parts: names of modules, for a model whose layout is not found.
        revision: the revision that the server is asked for.
        trust_remote_code: whether the checkpoint may run code of its own.
        masked: whether it is a masked language model.

    Raises:
        InputError: for a configuration from which no model can be built.

    """
    try:
        config = AutoConfig.from_pretrained(
            source.location,
            **source.options,
            trust_remote_code=trust_remote_code,
        )
        with MetaDevice():
            module = (AutoModelForMaskedLM if masked else AutoModelForCausalLM).from_config(
                config,
                attn_implementation="eager" if attention == "auto" else attention,
                trust_remote_code=trust_remote_code,
                **({} if dtype == "auto" else {"dtype": dtype}),
            )
    except (ValueError, KeyError, OSError) as error:
        kind = "masked" if masked else "causal"
        raise InputError(
            f"{source.name} cannot be built as a {kind} language model: {brief(error)}"
        ) from error
    nn = wrap(module.eval(), tokenizer, device="meta")
    nn.repo_id, nn.revision = source.location, revision  # by which the server identifies the model
    if source.folder is not None:  # a server on this machine can read the folder too
        huggingface._ID_CACHE[nn.repo_id] = nn.repo_id
    if trust_remote_code:
        nn.kwargs["trust_remote_code"] = True
    return nn, find_layout(module, parts)
