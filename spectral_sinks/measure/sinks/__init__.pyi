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
from .comparison import Comparison as Comparison
from .comparison import compare as compare
from .dark_share import DarkShare as DarkShare
from .designation import Designation as Designation
from .designation import designate as designate
from .find import Sinks as Sinks
from .find import find_sinks as find_sinks
from .sink import Sink as Sink
from .verdict import SinkVerdict as SinkVerdict
from .verdict import sink_verdict as sink_verdict

__all__ = [
    'Comparison',
    'DarkShare',
    'Designation',
    'Sink',
    'SinkVerdict',
    'Sinks',
    'attended',
    'attended_cost',
    'attended_darkness',
    'candidates',
    'compare',
    'designate',
    'find_sinks',
    'mark_bars',
    'matched',
    'most_attended',
    'received',
    'sink_verdict',
    'strata',
]
