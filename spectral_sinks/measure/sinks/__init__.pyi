# Made by: python docs/generate_api.py
from .attended_tokens import attended as attended
from .attended_tokens import attended_cost as attended_cost
from .attended_tokens import attended_darkness as attended_darkness
from .attended_tokens import most_attended as most_attended
from .attention_bars import candidates as candidates
from .attention_bars import mark_bars as mark_bars
from .attention_bars import matched as matched
from .attention_bars import received as received
from .attention_bars import strata as strata
from .clean_directions import CleanDirection as CleanDirection
from .clean_directions import clean as clean
from .comparison import Comparison as Comparison
from .comparison import compare as compare
from .dark_share import DarkShare as DarkShare
from .designation import Designation as Designation
from .designation import designate as designate
from .find import Sinks as Sinks
from .find import find_sinks as find_sinks
from .head_pruning import HeadRemoval as HeadRemoval
from .head_pruning import head_removal as head_removal
from .quantisation import QuantisationReport as QuantisationReport
from .quantisation import quantisation_report as quantisation_report
from .sink import Sink as Sink
from .sink_rules import MaskAgreement as MaskAgreement
from .sink_rules import SinkRule as SinkRule
from .sink_rules import mask_agreement as mask_agreement
from .sink_rules import sink_mask as sink_mask
from .spike_neurons import SpikeWriters as SpikeWriters
from .spike_neurons import spike_writers as spike_writers
from .verdict import SinkVerdict as SinkVerdict
from .verdict import sink_verdict as sink_verdict

__all__ = [
    'CleanDirection',
    'Comparison',
    'DarkShare',
    'Designation',
    'HeadRemoval',
    'MaskAgreement',
    'QuantisationReport',
    'Sink',
    'SinkRule',
    'SinkVerdict',
    'Sinks',
    'SpikeWriters',
    'attended',
    'attended_cost',
    'attended_darkness',
    'candidates',
    'clean',
    'compare',
    'designate',
    'find_sinks',
    'head_removal',
    'mark_bars',
    'mask_agreement',
    'matched',
    'most_attended',
    'quantisation_report',
    'received',
    'sink_mask',
    'sink_verdict',
    'spike_writers',
    'strata',
]
