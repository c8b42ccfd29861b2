"""Attention sinks: find them, test whether they are dark, and edit, compare and designate them."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    "spectral_sinks",
    submod_attrs={
        "measure.sinks.attended_tokens": ["attended", "attended_cost", "attended_darkness", "most_attended"],
        "measure.sinks.attention_bars": ["candidates", "mark_bars", "matched", "received", "strata"],
        "measure.sinks.comparison": ["Comparison", "compare"],
        "measure.sinks.designation": ["Designation", "designate"],
        "measure.sinks.find": ["Sinks", "find_sinks"],
        "measure.sinks.sink": ["Sink"],
        "measure.sinks.verdict": ["SinkVerdict", "sink_verdict"],
    },
)
