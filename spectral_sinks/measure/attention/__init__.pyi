# Made by: python docs/generate_api.py
from .attention_interventions import AttentionCall as AttentionCall
from .attention_interventions import AttentionEdit as AttentionEdit
from .attention_interventions import CopyKey as CopyKey
from .attention_interventions import KeyBias as KeyBias
from .attention_interventions import MaskKey as MaskKey
from .attention_interventions import Prefix as Prefix
from .attention_interventions import Restrict as Restrict
from .attention_interventions import SetValue as SetValue
from .attention_interventions import SinkLogit as SinkLogit
from .attention_interventions import Streaming as Streaming
from .attention_interventions import attending as attending
from .by_position import PositionAttention as PositionAttention
from .by_position import attention_by_position as attention_by_position
from .received import attention_by_head as attention_by_head
from .received import attention_received as attention_received
from .received import sink_rate as sink_rate
from .received import uniform_attention as uniform_attention

__all__ = [
    'AttentionCall',
    'AttentionEdit',
    'CopyKey',
    'KeyBias',
    'MaskKey',
    'PositionAttention',
    'Prefix',
    'Restrict',
    'SetValue',
    'SinkLogit',
    'Streaming',
    'attending',
    'attention_by_head',
    'attention_by_position',
    'attention_received',
    'sink_rate',
    'uniform_attention',
]
