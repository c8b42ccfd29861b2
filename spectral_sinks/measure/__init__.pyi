# Made by: python docs/generate_api.py
from . import attention as attention
from . import circuits as circuits
from . import nll as nll
from . import residual as residual
from . import sinks as sinks
from . import vision as vision

__all__ = [
    'attention',
    'circuits',
    'nll',
    'residual',
    'sinks',
    'vision',
]
