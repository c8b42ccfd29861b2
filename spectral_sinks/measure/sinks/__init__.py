"""Attention sinks: find them, test whether they are dark, and edit, compare and designate them."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "attended_tokens": ["attended", "attended_cost", "attended_darkness", "most_attended"],
        "attention_bars": ["candidates", "mark_bars", "matched", "received", "strata"],
        "clean_directions": ["CleanDirection", "clean"],
        "comparison": ["Comparison", "compare"],
        "dark_share": ["DarkShare"],
        "designation": ["Designation", "designate"],
        "find": ["Sinks", "find_sinks"],
        "head_pruning": ["HeadRemoval", "head_removal"],
        "quantisation": ["QuantisationReport", "quantisation_report"],
        "sink": ["Sink"],
        "sink_rules": ["MaskAgreement", "SinkRule", "mask_agreement", "sink_mask"],
        "spike_neurons": ["SpikeWriters", "spike_writers"],
        "verdict": ["SinkVerdict", "sink_verdict"],
    },
)
