"""Figures drawn from tables alone: each function takes the rows of an experiment and writes one PNG."""

from spectral_sinks.figures.across import across
from spectral_sinks.figures.backcopy import backcopy
from spectral_sinks.figures.bars import bars
from spectral_sinks.figures.circuits import circuit_page, circuits
from spectral_sinks.figures.controls import controls, reads
from spectral_sinks.figures.designated import designated, tuned, variants
from spectral_sinks.figures.eu_dark import eu_dark
from spectral_sinks.figures.fills import fills, sink_preserving, swap
from spectral_sinks.figures.generation import generation
from spectral_sinks.figures.lens import lens
from spectral_sinks.figures.main import birth, bos, ladder, sink, spectrum
from spectral_sinks.figures.no_bos import no_bos
from spectral_sinks.figures.outliers import norm_maps, outlier_shares
from spectral_sinks.figures.registers import register_ablation, registers
from spectral_sinks.figures.several import several
from spectral_sinks.figures.sinks import sinks
from spectral_sinks.figures.vision_bands import token_spectra, vision_bands
from spectral_sinks.figures.vision_boxes import vision_boxes, vision_corloc
from spectral_sinks.figures.vision_sinks import attention_maps, vision_sinks
from spectral_sinks.figures.vision_trained import vision_trained
from spectral_sinks.figures.weights import weights

__all__ = [
    "across",
    "attention_maps",
    "backcopy",
    "bars",
    "birth",
    "bos",
    "circuit_page",
    "circuits",
    "controls",
    "designated",
    "eu_dark",
    "fills",
    "generation",
    "ladder",
    "lens",
    "no_bos",
    "norm_maps",
    "outlier_shares",
    "reads",
    "register_ablation",
    "registers",
    "several",
    "sink",
    "sink_preserving",
    "sinks",
    "spectrum",
    "swap",
    "token_spectra",
    "tuned",
    "variants",
    "vision_bands",
    "vision_boxes",
    "vision_corloc",
    "vision_sinks",
    "vision_trained",
    "weights",
]
