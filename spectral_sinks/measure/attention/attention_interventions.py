"""Attention edits, as names of the namespace `attention`."""

from spectral_sinks.interventions.attention_base import AttentionEdit
from spectral_sinks.interventions.attention_edits import CopyKey, MaskKey, Restrict, SetValue, Streaming
from spectral_sinks.interventions.extra_keys import KeyBias, Prefix, SinkLogit
from spectral_sinks.models.attention_capture import AttentionCall, attending

__all__ = [
    "AttentionCall",
    "AttentionEdit",
    "CopyKey",
    "KeyBias",
    "MaskKey",
    "Prefix",
    "Restrict",
    "SetValue",
    "SinkLogit",
    "Streaming",
    "attending",
]
