"""Spectral filtering of the residual stream: what a model keeps where its vocabulary cannot read."""

from spectral_sinks.errors import InputError, RemoteError, SpectralWarning
from spectral_sinks.interventions.probing import examine
from spectral_sinks.interventions.sites import Site
from spectral_sinks.interventions.tracing import trace
from spectral_sinks.measure.attention import (
    attention_by_head,
    attention_received,
    sink_rate,
    uniform_attention,
)
from spectral_sinks.measure.bars import candidates, mark_bars, matched, received
from spectral_sinks.measure.effects import Effect, evaluate, evaluate_all, mean_residual
from spectral_sinks.measure.energy import energy
from spectral_sinks.measure.generation import continuation_nll, generate, generate_all
from spectral_sinks.measure.lens import ALONE, TOGETHER, band_lens
from spectral_sinks.measure.preflight import preflight
from spectral_sinks.measure.repetition import distinct, loop_onset, repeated, repetition
from spectral_sinks.measure.screen import first_order
from spectral_sinks.measure.spectra import read_spectrum
from spectral_sinks.measure.verdict import SinkVerdict, sink_verdict
from spectral_sinks.measure.weights import weight_shares
from spectral_sinks.models.describe import describe
from spectral_sinks.models.language import LanguageModel
from spectral_sinks.models.loading import load
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
from spectral_sinks.spectra.pairs import (
    farthest,
    nearest,
    outside,
    random_spectrum,
    share_deviation,
    union,
)
from spectral_sinks.spectra.spectrum import Spectrum
from spectral_sinks.spectra.subspace import Subspace, intersection, principal_cosines, random_subspace
from spectral_sinks.stats import (
    mean_interval,
    null_rank,
    rank_correlation,
    sequential_p,
    sign_flip,
    summarise,
)
from spectral_sinks.study import Finding, Study, answer, reproduce, without_last_band
from spectral_sinks.sweeps.cells import Cell, grid
from spectral_sinks.sweeps.cost import Cost
from spectral_sinks.sweeps.file import SweepFile
from spectral_sinks.sweeps.jobs import collect, jobs
from spectral_sinks.sweeps.ladder import ladder
from spectral_sinks.sweeps.run import Done, Report, plan, sweep
from spectral_sinks.sweeps.store import Store
from spectral_sinks.sweeps.sweep import Sweep
from spectral_sinks.texts import Windows, cut, documents

__all__ = [
    "ALONE",
    "answer",
    "attention_by_head",
    "attention_received",
    "band_lens",
    "candidates",
    "Cell",
    "Check",
    "Claims",
    "collect",
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
    "examine",
    "farthest",
    "figures",
    "Filter",
    "Finding",
    "first_order",
    "generate",
    "generate_all",
    "grid",
    "InputError",
    "intersection",
    "jobs",
    "keep",
    "ladder",
    "LanguageModel",
    "load",
    "mark_bars",
    "matched",
    "loop_onset",
    "Mean",
    "mean_interval",
    "mean_residual",
    "nearest",
    "Noise",
    "null_rank",
    "omega",
    "outside",
    "phi",
    "plan",
    "preflight",
    "principal_cosines",
    "psi",
    "random_spectrum",
    "random_subspace",
    "rank_correlation",
    "read_spectrum",
    "received",
    "RemoteError",
    "remove",
    "repeated",
    "repetition",
    "Report",
    "reproduce",
    "rnd",
    "sequential_p",
    "share_deviation",
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
    "sweep",
    "Sweep",
    "SweepFile",
    "TOGETHER",
    "trace",
    "uncovered",
    "uniform_attention",
    "union",
    "weight_shares",
    "verify",
    "Windows",
    "without_last_band",
    "Zero",
]
