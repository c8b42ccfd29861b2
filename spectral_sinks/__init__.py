"""Spectral filtering of the residual stream: what a model keeps where its vocabulary cannot read."""

from spectral_sinks.errors import InputError, SpectralWarning
from spectral_sinks.interventions.sites import Site
from spectral_sinks.interventions.tracing import trace
from spectral_sinks.measure.attention import (
    attention_by_head,
    attention_received,
    sink_rate,
    uniform_attention,
)
from spectral_sinks.measure.effects import Effect, evaluate, evaluate_all, mean_residual
from spectral_sinks.measure.energy import energy
from spectral_sinks.measure.generation import continuation_nll, generate, generate_all
from spectral_sinks.measure.repetition import distinct, loop_onset, repeated, repetition
from spectral_sinks.measure.verdict import SinkVerdict, sink_verdict
from spectral_sinks.models.describe import describe
from spectral_sinks.models.language import LanguageModel
from spectral_sinks.models.loading import load
from spectral_sinks.models.matrices import read_spectrum
from spectral_sinks.models.source import DEFAULT
from spectral_sinks.report import figures
from spectral_sinks.report.checking import Check, uncovered, verify
from spectral_sinks.report.claims import Claims
from spectral_sinks.spectra.filters import (
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
from spectral_sinks.spectra.spectrum import Spectrum
from spectral_sinks.spectra.subspace import Subspace, intersection, principal_cosines, random_subspace
from spectral_sinks.stats import mean_interval, null_rank, sign_flip, summarise
from spectral_sinks.study import Finding, Study, answer, reproduce, without_last_band
from spectral_sinks.sweeps.cells import Cell, grid
from spectral_sinks.sweeps.cost import Cost
from spectral_sinks.sweeps.file import SweepFile
from spectral_sinks.sweeps.ladder import ladder
from spectral_sinks.sweeps.run import Done, Report, plan, sweep
from spectral_sinks.sweeps.store import Store
from spectral_sinks.sweeps.sweep import Sweep
from spectral_sinks.texts import Windows, cut, documents

__all__ = [
    "answer",
    "attention_by_head",
    "attention_received",
    "Cell",
    "Check",
    "Claims",
    "continuation_nll",
    "Cost",
    "cut",
    "DEFAULT",
    "describe",
    "distinct",
    "documents",
    "Done",
    "Effect",
    "energy",
    "evaluate",
    "evaluate_all",
    "figures",
    "Filter",
    "Finding",
    "generate",
    "generate_all",
    "grid",
    "InputError",
    "intersection",
    "keep",
    "ladder",
    "LanguageModel",
    "load",
    "loop_onset",
    "Mean",
    "mean_interval",
    "mean_residual",
    "Noise",
    "null_rank",
    "omega",
    "phi",
    "plan",
    "principal_cosines",
    "psi",
    "random_subspace",
    "read_spectrum",
    "remove",
    "repeated",
    "repetition",
    "Report",
    "reproduce",
    "rnd",
    "sign_flip",
    "sink_rate",
    "sink_verdict",
    "SinkVerdict",
    "Site",
    "SpectralWarning",
    "Spectrum",
    "Store",
    "Study",
    "Subspace",
    "summarise",
    "Swap",
    "Sweep",
    "sweep",
    "SweepFile",
    "trace",
    "uncovered",
    "uniform_attention",
    "verify",
    "Windows",
    "without_last_band",
    "Zero",
]
