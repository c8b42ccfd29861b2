"""Spectral filtering of the residual stream: what a model keeps where its vocabulary cannot read."""

# pyright: basic
# lazy_loader has no types; type checkers read __init__.pyi, which docs/generate_api.py writes
import warnings

import lazy_loader

__version__ = "0.2.0"

_find, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=["claims", "experiments", "figures", "remote", "spectra", "stats", "sweeps"],
    submod_attrs={
        "measure": ["attention", "circuits", "nll", "residual", "sinks", "vision"],
        "data.images": ["Images", "images"],
        "data.pixels": ["Pixels", "pixels"],
        "data.document_sources": ["documents"],
        "data.texts": ["Windows", "cut"],
        "errors": ["InputError", "RemoteError", "SpectralError", "SpectralWarning"],
        "experiments": ["reproduce"],
        "interventions.sites": ["Site"],
        "interventions.tracing": ["trace"],
        "measure.attention.received": ["attention_by_head"],
        "measure.circuits.heads": ["head_use"],
        "measure.circuits.no_op": ["no_op_circuits"],
        "measure.nll.effects": ["Effect", "evaluate", "evaluate_all"],
        "measure.nll.generation": ["generate"],
        "measure.residual.band_energy": ["energy"],
        "measure.residual.matrix_spectrum": ["read_spectra", "read_spectrum"],
        "measure.residual.references": ["mean_residual"],
        "measure.sinks.clean_directions": ["clean"],
        "measure.sinks.comparison": ["compare"],
        "measure.sinks.designation": ["designate"],
        "measure.sinks.find": ["find_sinks"],
        "measure.sinks.sink_rules": ["SinkRule", "sink_mask"],
        "measure.sinks.spike_neurons": ["spike_writers"],
        "measure.sinks.verdict": ["sink_verdict"],
        "measure.vision.image_effects": ["evaluate_images"],
        "measure.vision.image_sinks": ["vision_sinks"],
        "measure.vision.outlier_tokens": ["outliers"],
        "models.attention_capture": ["attending"],
        "models.describe": ["describe"],
        "models.embedded": ["DEFAULT"],
        "models.language": ["LanguageModel"],
        "models.loading": ["load"],
        "models.loading_vision": ["load_vision"],
        "models.vision": ["VisionModel"],
        "pages.model_report": ["report"],
        "pages.text_explorer": ["explore"],
        "remote.client": ["remotely"],
        "spectra.filters": [
            "At",
            "Filter",
            "Mean",
            "Noise",
            "Swap",
            "Zero",
            "keep",
            "omega",
            "phi",
            "psi",
            "remove",
            "rnd",
        ],
        "spectra.spectrum": ["Spectrum"],
        "spectra.subspace": ["Subspace", "random_subspace"],
        "sweeps.cells": ["grid"],
        "sweeps.definition": ["Sweep"],
        "sweeps.run": ["sweep"],
    },
)

_MOVED = {
    "spectra": "Amplified amplify carry channels Copied DirectionSwap energy_matched farthest intersection "
    "Modes nearest NoOp NormRestored outside principal_cosines random_spectrum random_within "
    "scale Scaled share_deviation union",
    "attention": "attention_by_position attention_received AttentionCall CopyKey KeyBias MaskKey "
    "PositionAttention Prefix Restrict SetValue sink_rate SinkLogit Streaming uniform_attention",
    "residual": "ALONE band_lens massive_activations massive_channels mean_keys mean_values TOGETHER "
    "weight_shares",
    "nll": "continuation_nll distinct first_order generate_all loop_onset masked_ids masked_positions "
    "repeated repetition",
    "sinks": "attended attended_cost attended_darkness candidates Comparison Designation mark_bars "
    "matched most_attended received Sink Sinks SinkVerdict strata",
    "circuits": "Circuits Detectors detectors",
    "vision": "corloc dino_seg DINOV2_LARGE discover Discovery ImageEffect LinearProbe lost outlier_onset "
    "outlier_places Outliers read_boxes register_ablation register_maps register_neurons "
    "register_repair token_probes VisionSinks with_registers without_registers",
    "sweeps": "Cell collect Cost Done effect_table image_ladder jobs ladder plan Report Store SweepFile",
    "remote": "examine preflight",
    "stats": "holm largest_within mean_interval null_p null_rank rank_correlation sequential_p sign_flip "
    "summarise t_interval",
    "claims": "Check Claims uncovered verify",
    "experiments": "answer Finding Study without_last_band",
}
_OLD = {name: f"{space}.{name}" for space, names in _MOVED.items() for name in names.split()} | {
    "Measured": "stats.Estimate",
    "Move": "attention.AttentionEdit",
    "test_time_registers": "vision.install_registers",
}
"""Names that version 0.1 had at the top, and where they are now. Version 0.3 drops them."""


def __getattr__(name: str):
    if name in _OLD:
        warnings.warn(f"ss.{name} is now ss.{_OLD[name]}", DeprecationWarning, stacklevel=2)
        space, _, new = _OLD[name].partition(".")
        return getattr(_find(space), new)
    try:
        return _find(name)
    except AttributeError:
        if name in __all__:
            raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
