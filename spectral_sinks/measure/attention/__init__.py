"""Attention received by every position, and the passes that show it, whole or block by block.

The edits of attention stand here too, since people look for them under this word.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "attention_edits": [
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
