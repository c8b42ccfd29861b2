# Made by: python docs/generate_api.py
from .across import across as across
from .backcopy import backcopy as backcopy
from .bars import bars as bars
from .circuits import circuit_page as circuit_page
from .circuits import circuits as circuits
from .controls import controls as controls
from .controls import reads as reads
from .conventions import conventions as conventions
from .designated import designated as designated
from .designated import tuned as tuned
from .designated import variants as variants
from .eu_dark import eu_dark as eu_dark
from .fills import fills as fills
from .fills import sink_preserving as sink_preserving
from .fills import swap as swap
from .generation import generation as generation
from .kv_cache import cache_costs as cache_costs
from .lens import lens as lens
from .main import birth as birth
from .main import bos as bos
from .main import ladder as ladder
from .main import sink as sink
from .main import spectrum as spectrum
from .no_bos import no_bos as no_bos
from .no_op_attention import no_op_attention as no_op_attention
from .outliers import norm_maps as norm_maps
from .outliers import outlier_shares as outlier_shares
from .quantisation import quantisation as quantisation
from .real_ladder import real_ladder as real_ladder
from .registers import register_ablation as register_ablation
from .registers import registers as registers
from .several import several as several
from .sinks import sinks as sinks
from .vision_bands import token_spectra as token_spectra
from .vision_bands import vision_bands as vision_bands
from .vision_boxes import vision_boxes as vision_boxes
from .vision_boxes import vision_corloc as vision_corloc
from .vision_sinks import attention_maps as attention_maps
from .vision_sinks import vision_sinks as vision_sinks
from .vision_trained import vision_trained as vision_trained
from .weights import weights as weights

__all__ = [
    'across',
    'attention_maps',
    'backcopy',
    'bars',
    'birth',
    'bos',
    'cache_costs',
    'circuit_page',
    'circuits',
    'controls',
    'conventions',
    'designated',
    'eu_dark',
    'fills',
    'generation',
    'ladder',
    'lens',
    'no_bos',
    'no_op_attention',
    'norm_maps',
    'outlier_shares',
    'quantisation',
    'reads',
    'real_ladder',
    'register_ablation',
    'registers',
    'several',
    'sink',
    'sink_preserving',
    'sinks',
    'spectrum',
    'swap',
    'token_spectra',
    'tuned',
    'variants',
    'vision_bands',
    'vision_boxes',
    'vision_corloc',
    'vision_sinks',
    'vision_trained',
    'weights',
]
