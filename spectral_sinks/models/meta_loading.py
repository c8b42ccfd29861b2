"""A model that stays at a server: its configuration and tokenizer are read, its weights are not."""

from collections.abc import Mapping
from typing import Any

import torch
from nnsight import TransformersModel
from nnsight.modeling import huggingface
from nnsight.modeling.mixins.meta import MetaDevice
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from spectral_sinks.errors import InputError
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
    """The nnsight model of a checkpoint without memory for a single weight, and where its parts are.

    `attention` "auto" is eager, the implementation that returns its maps and that every server has. Raises
    InputError for a configuration that cannot be read.
    """
    try:
        config = AutoConfig.from_pretrained(
            source.location,
            revision=source.revision,
            local_files_only=source.offline or source.folder is not None,
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
        raise InputError(f"{source.name} cannot be built as a {kind} language model: {error}") from error
    nn = wrap(module.eval(), tokenizer, device="meta")
    nn.repo_id, nn.revision = source.location, revision  # what the server knows it by
    if source.folder is not None:  # which a server on this machine sees too
        huggingface._ID_CACHE[nn.repo_id] = nn.repo_id
    if trust_remote_code:
        nn.kwargs["trust_remote_code"] = True
    return nn, find_layout(module, parts)
