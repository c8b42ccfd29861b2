"""Spectral filtering of the residual stream: what a model keeps where its vocabulary cannot read."""

import warnings
from typing import Any

from spectral_sinks import claims, experiments, figures, remote, spectra, stats, sweeps
from spectral_sinks.claims.claims import Claims
from spectral_sinks.claims.verify import Check, uncovered, verify
from spectral_sinks.data.images import Images, images
from spectral_sinks.data.pixels import Pixels, pixels
from spectral_sinks.data.texts import Windows, cut, documents
from spectral_sinks.errors import InputError, RemoteError, SpectralError, SpectralWarning
from spectral_sinks.experiments import Finding, Study, answer, reproduce, without_last_band
from spectral_sinks.interventions.attention_base import AttentionEdit
from spectral_sinks.interventions.attention_edits import CopyKey, MaskKey, Restrict, SetValue, Streaming
from spectral_sinks.interventions.extra_keys import KeyBias, Prefix, SinkLogit
from spectral_sinks.interventions.registers import install_registers, with_registers, without_registers
from spectral_sinks.interventions.sites import Site
from spectral_sinks.interventions.tracing import trace
from spectral_sinks.measure import attention, circuits, nll, residual, sinks, vision
from spectral_sinks.measure.attention.by_position import PositionAttention, attention_by_position
from spectral_sinks.measure.attention.received import (
    attention_by_head,
    attention_received,
    sink_rate,
    uniform_attention,
)
from spectral_sinks.measure.circuits.heads import head_use
from spectral_sinks.measure.circuits.no_op import Circuits, no_op_circuits
from spectral_sinks.measure.circuits.qk_detectors import Detectors, detectors
from spectral_sinks.measure.nll.attribution import first_order
from spectral_sinks.measure.nll.effects import Effect, evaluate, evaluate_all
from spectral_sinks.measure.nll.generation import continuation_nll, generate, generate_all
from spectral_sinks.measure.nll.repetition_metrics import distinct, loop_onset, repeated, repetition
from spectral_sinks.measure.residual.band_energy import energy
from spectral_sinks.measure.residual.logit_lens import ALONE, TOGETHER, band_lens
from spectral_sinks.measure.residual.massive import massive_activations
from spectral_sinks.measure.residual.matrix_spectrum import read_spectrum
from spectral_sinks.measure.residual.references import massive_channels, mean_keys, mean_residual, mean_values
from spectral_sinks.measure.residual.weight_energy import weight_shares
from spectral_sinks.measure.sinks.attended_tokens import (
    attended,
    attended_cost,
    attended_darkness,
    most_attended,
)
from spectral_sinks.measure.sinks.attention_bars import candidates, mark_bars, matched, received, strata
from spectral_sinks.measure.sinks.comparison import Comparison, compare
from spectral_sinks.measure.sinks.designation import Designation, designate
from spectral_sinks.measure.sinks.find import Sinks, find_sinks
from spectral_sinks.measure.sinks.sink import Sink
from spectral_sinks.measure.sinks.verdict import SinkVerdict, sink_verdict
from spectral_sinks.measure.vision.boxes import corloc, read_boxes
from spectral_sinks.measure.vision.image_effects import ImageEffect, evaluate_images
from spectral_sinks.measure.vision.image_sinks import VisionSinks, vision_sinks
from spectral_sinks.measure.vision.linear_probes import token_probes
from spectral_sinks.measure.vision.localization import Discovery, dino_seg, lost
from spectral_sinks.measure.vision.neurons import DINOV2_LARGE, register_neurons
from spectral_sinks.measure.vision.object_discovery import discover
from spectral_sinks.measure.vision.outlier_positions import outlier_places
from spectral_sinks.measure.vision.outlier_tokens import Outliers, outlier_onset, outliers
from spectral_sinks.measure.vision.register_effects import register_maps, register_repair
from spectral_sinks.measure.vision.ridge import LinearProbe
from spectral_sinks.measure.vision.trained_registers import register_ablation
from spectral_sinks.models.attention_capture import AttentionCall, attending
from spectral_sinks.models.checkpoint import DEFAULT
from spectral_sinks.models.describe import describe
from spectral_sinks.models.language import LanguageModel
from spectral_sinks.models.loading import load
from spectral_sinks.models.loading_vision import load_vision
from spectral_sinks.models.masked_lm import masked_ids, masked_positions
from spectral_sinks.models.vision import VisionModel
from spectral_sinks.remote.client import remotely
from spectral_sinks.remote.handshake import examine
from spectral_sinks.remote.server_check import preflight
from spectral_sinks.spectra.controls import DirectionSwap, NoOp, NormRestored, energy_matched, random_within
from spectral_sinks.spectra.filters import (
    At,
    Filter,
    Mean,
    Noise,
    Swap,
    Zero,
    keep,
    omega,
    phi,
    psi,
    remove,
    rnd,
)
from spectral_sinks.spectra.qk_modes import Modes
from spectral_sinks.spectra.scaling import Amplified, Copied, Scaled, amplify, carry, channels, scale
from spectral_sinks.spectra.spectrum import Spectrum
from spectral_sinks.spectra.subspace import Subspace, intersection, principal_cosines, random_subspace
from spectral_sinks.spectra.subspace_pairs import (
    farthest,
    nearest,
    outside,
    random_spectrum,
    share_deviation,
    union,
)
from spectral_sinks.stats import (
    Estimate,
    holm,
    largest_within,
    mean_interval,
    null_p,
    null_rank,
    rank_correlation,
    sequential_p,
    sign_flip,
    summarise,
    t_interval,
)
from spectral_sinks.sweeps.band_ladder import ladder
from spectral_sinks.sweeps.cells import Cell, grid
from spectral_sinks.sweeps.config import SweepFile
from spectral_sinks.sweeps.cost import Cost
from spectral_sinks.sweeps.definition import Sweep
from spectral_sinks.sweeps.effect_rows import effect_table
from spectral_sinks.sweeps.image_band_ladder import image_ladder
from spectral_sinks.sweeps.remote_jobs import collect, jobs
from spectral_sinks.sweeps.run import Done, Report, plan, sweep
from spectral_sinks.sweeps.store import Store

__all__ = [
    "attention",
    "circuits",
    "claims",
    "experiments",
    "nll",
    "remote",
    "residual",
    "sinks",
    "spectra",
    "SpectralError",
    "stats",
    "sweeps",
    "vision",
    "ALONE",
    "Amplified",
    "amplify",
    "answer",
    "At",
    "attended",
    "attended_cost",
    "attended_darkness",
    "attending",
    "attention_by_head",
    "attention_by_position",
    "attention_received",
    "AttentionCall",
    "band_lens",
    "candidates",
    "carry",
    "Cell",
    "channels",
    "Check",
    "Circuits",
    "Claims",
    "collect",
    "compare",
    "Comparison",
    "continuation_nll",
    "Copied",
    "CopyKey",
    "corloc",
    "Cost",
    "cut",
    "DEFAULT",
    "describe",
    "designate",
    "Designation",
    "Detectors",
    "detectors",
    "dino_seg",
    "DINOV2_LARGE",
    "DirectionSwap",
    "discover",
    "Discovery",
    "distinct",
    "documents",
    "Done",
    "Effect",
    "effect_table",
    "energy",
    "energy_matched",
    "evaluate",
    "evaluate_all",
    "evaluate_images",
    "examine",
    "farthest",
    "figures",
    "Filter",
    "find_sinks",
    "Finding",
    "first_order",
    "generate",
    "generate_all",
    "grid",
    "head_use",
    "holm",
    "image_ladder",
    "ImageEffect",
    "Images",
    "images",
    "InputError",
    "intersection",
    "jobs",
    "keep",
    "KeyBias",
    "ladder",
    "LanguageModel",
    "largest_within",
    "LinearProbe",
    "load",
    "load_vision",
    "loop_onset",
    "lost",
    "mark_bars",
    "masked_ids",
    "masked_positions",
    "MaskKey",
    "massive_activations",
    "massive_channels",
    "matched",
    "Mean",
    "mean_interval",
    "mean_keys",
    "mean_residual",
    "mean_values",
    "Estimate",
    "Modes",
    "AttentionEdit",
    "nearest",
    "most_attended",
    "no_op_circuits",
    "Noise",
    "NoOp",
    "NormRestored",
    "null_p",
    "null_rank",
    "omega",
    "outlier_onset",
    "outlier_places",
    "Outliers",
    "outliers",
    "outside",
    "phi",
    "Pixels",
    "pixels",
    "plan",
    "PositionAttention",
    "Prefix",
    "preflight",
    "principal_cosines",
    "psi",
    "random_spectrum",
    "random_subspace",
    "random_within",
    "rank_correlation",
    "read_boxes",
    "read_spectrum",
    "received",
    "register_ablation",
    "register_maps",
    "register_neurons",
    "register_repair",
    "RemoteError",
    "remotely",
    "remove",
    "repeated",
    "repetition",
    "Report",
    "reproduce",
    "Restrict",
    "rnd",
    "scale",
    "Scaled",
    "sequential_p",
    "SetValue",
    "share_deviation",
    "sign_flip",
    "Sink",
    "sink_rate",
    "sink_verdict",
    "SinkLogit",
    "Sinks",
    "SinkVerdict",
    "Site",
    "SpectralWarning",
    "Spectrum",
    "Store",
    "strata",
    "Streaming",
    "Study",
    "Subspace",
    "summarise",
    "Swap",
    "Sweep",
    "sweep",
    "SweepFile",
    "t_interval",
    "install_registers",
    "TOGETHER",
    "token_probes",
    "trace",
    "uncovered",
    "uniform_attention",
    "union",
    "verify",
    "vision_sinks",
    "VisionModel",
    "VisionSinks",
    "weight_shares",
    "Windows",
    "with_registers",
    "without_last_band",
    "without_registers",
    "Zero",
]

_RENAMED = {
    "Measured": "stats.Estimate",
    "Move": "attention.AttentionEdit",
    "test_time_registers": "vision.install_registers",
}
"""Public names of the version before, which keep working for one version."""


def __getattr__(name: str) -> Any:
    if name not in _RENAMED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(f"ss.{name} is now ss.{_RENAMED[name]}", DeprecationWarning, stacklevel=2)
    room, _, new = _RENAMED[name].partition(".")
    return getattr(globals()[room], new)
