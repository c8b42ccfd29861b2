"""Attention received by every position, and passes that show attention in whole maps or in blocks.

The attention edits are also listed here, since users look for them under this name.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    "spectral_sinks",
    submod_attrs={
        "interventions.attention_base": ["AttentionEdit"],
        "interventions.attention_edits": ["CopyKey", "MaskKey", "Restrict", "SetValue", "Streaming"],
        "interventions.extra_keys": ["KeyBias", "Prefix", "SinkLogit"],
        "measure.attention.by_position": ["PositionAttention", "attention_by_position"],
        "measure.attention.received": [
            "attention_by_head",
            "attention_received",
            "sink_rate",
            "uniform_attention",
        ],
        "models.attention_capture": ["AttentionCall", "attending"],
    },
)
