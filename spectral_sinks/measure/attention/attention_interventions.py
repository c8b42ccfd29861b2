"""The edits of attention, under the word that people look for."""

from spectral_sinks.interventions.attention_base import AttentionEdit as AttentionEdit
from spectral_sinks.interventions.attention_edits import CopyKey as CopyKey
from spectral_sinks.interventions.attention_edits import MaskKey as MaskKey
from spectral_sinks.interventions.attention_edits import Restrict as Restrict
from spectral_sinks.interventions.attention_edits import SetValue as SetValue
from spectral_sinks.interventions.attention_edits import Streaming as Streaming
from spectral_sinks.interventions.extra_keys import KeyBias as KeyBias
from spectral_sinks.interventions.extra_keys import Prefix as Prefix
from spectral_sinks.interventions.extra_keys import SinkLogit as SinkLogit
from spectral_sinks.models.attention_capture import AttentionCall as AttentionCall
from spectral_sinks.models.attention_capture import attending as attending
