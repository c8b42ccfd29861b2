"""Attention received by every position, and passes that show attention in whole maps or in blocks.

The attention edits are also listed here, since users look for them under this name.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "attention_interventions": [
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
        ],
        "by_position": ["PositionAttention", "attention_by_position"],
        "received": [
            "attention_by_head",
            "attention_received",
            "sink_rate",
            "uniform_attention",
        ],
    },
)
