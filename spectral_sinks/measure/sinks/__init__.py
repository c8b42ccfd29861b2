"""Attention sinks: find them, test whether they are dark, and edit, compare and designate them."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "attended_tokens": ["attended", "attended_cost", "attended_darkness", "most_attended"],
        "attention_bars": ["candidates", "mark_bars", "matched", "received", "strata"],
        "comparison": ["Comparison", "compare"],
        "dark_share": ["DarkShare"],
        "designation": ["Designation", "designate"],
        "find": ["Sinks", "find_sinks"],
        "sink": ["Sink"],
        "verdict": ["SinkVerdict", "sink_verdict"],
    },
)
