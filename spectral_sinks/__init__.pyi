# Made by: python docs/generate_api.py
from . import claims as claims
from . import experiments as experiments
from . import figures as figures
from . import remote as remote
from . import spectra as spectra
from . import stats as stats
from . import sweeps as sweeps
from .data.document_sources import documents as documents
from .data.images import Images as Images
from .data.images import images as images
from .data.pixels import Pixels as Pixels
from .data.pixels import pixels as pixels
from .data.texts import Windows as Windows
from .data.texts import cut as cut
from .errors import InputError as InputError
from .errors import RemoteError as RemoteError
from .errors import SpectralError as SpectralError
from .errors import SpectralWarning as SpectralWarning
from .experiments import reproduce as reproduce
from .interventions.sites import Site as Site
from .interventions.tracing import trace as trace
from .measure import attention as attention
from .measure import circuits as circuits
from .measure import nll as nll
from .measure import residual as residual
from .measure import sinks as sinks
from .measure import vision as vision
from .measure.attention.received import attention_by_head as attention_by_head
from .measure.circuits.heads import head_use as head_use
from .measure.circuits.no_op import no_op_circuits as no_op_circuits
from .measure.nll.effects import Effect as Effect
from .measure.nll.effects import evaluate as evaluate
from .measure.nll.effects import evaluate_all as evaluate_all
from .measure.nll.generation import generate as generate
from .measure.residual.band_energy import energy as energy
from .measure.residual.matrix_spectrum import read_spectra as read_spectra
from .measure.residual.matrix_spectrum import read_spectrum as read_spectrum
from .measure.residual.references import mean_residual as mean_residual
from .measure.sinks.clean_directions import clean as clean
from .measure.sinks.comparison import compare as compare
from .measure.sinks.designation import designate as designate
from .measure.sinks.find import find_sinks as find_sinks
from .measure.sinks.sink_rules import SinkRule as SinkRule
from .measure.sinks.sink_rules import sink_mask as sink_mask
from .measure.sinks.spike_neurons import spike_writers as spike_writers
from .measure.sinks.verdict import sink_verdict as sink_verdict
from .measure.vision.image_effects import evaluate_images as evaluate_images
from .measure.vision.image_sinks import vision_sinks as vision_sinks
from .measure.vision.outlier_tokens import outliers as outliers
from .models.attention_capture import attending as attending
from .models.describe import describe as describe
from .models.embedded import DEFAULT as DEFAULT
from .models.language import LanguageModel as LanguageModel
from .models.loading import load as load
from .models.loading_vision import load_vision as load_vision
from .models.vision import VisionModel as VisionModel
from .pages.model_report import report as report
from .pages.text_explorer import explore as explore
from .remote.client import remotely as remotely
from .spectra.filters import At as At
from .spectra.filters import Filter as Filter
from .spectra.filters import Mean as Mean
from .spectra.filters import Noise as Noise
from .spectra.filters import Swap as Swap
from .spectra.filters import Zero as Zero
from .spectra.filters import keep as keep
from .spectra.filters import omega as omega
from .spectra.filters import phi as phi
from .spectra.filters import psi as psi
from .spectra.filters import remove as remove
from .spectra.filters import rnd as rnd
from .spectra.spectrum import Spectrum as Spectrum
from .spectra.subspace import Subspace as Subspace
from .spectra.subspace import random_subspace as random_subspace
from .sweeps.cells import grid as grid
from .sweeps.definition import Sweep as Sweep
from .sweeps.run import sweep as sweep

__version__: str

__all__ = [
    'At',
    'DEFAULT',
    'Effect',
    'Filter',
    'Images',
    'InputError',
    'LanguageModel',
    'Mean',
    'Noise',
    'Pixels',
    'RemoteError',
    'SinkRule',
    'Site',
    'SpectralError',
    'SpectralWarning',
    'Spectrum',
    'Subspace',
    'Swap',
    'Sweep',
    'VisionModel',
    'Windows',
    'Zero',
    'attending',
    'attention',
    'attention_by_head',
    'circuits',
    'claims',
    'clean',
    'compare',
    'cut',
    'describe',
    'designate',
    'documents',
    'energy',
    'evaluate',
    'evaluate_all',
    'evaluate_images',
    'experiments',
    'explore',
    'figures',
    'find_sinks',
    'generate',
    'grid',
    'head_use',
    'images',
    'keep',
    'load',
    'load_vision',
    'mean_residual',
    'nll',
    'no_op_circuits',
    'omega',
    'outliers',
    'phi',
    'pixels',
    'psi',
    'random_subspace',
    'read_spectra',
    'read_spectrum',
    'remote',
    'remotely',
    'remove',
    'report',
    'reproduce',
    'residual',
    'rnd',
    'sink_mask',
    'sink_verdict',
    'sinks',
    'spectra',
    'spike_writers',
    'stats',
    'sweep',
    'sweeps',
    'trace',
    'vision',
    'vision_sinks',
]
