# Made by: python docs/generate_api.py
from .heads import head_use as head_use
from .no_op import Circuits as Circuits
from .no_op import no_op_circuits as no_op_circuits
from .qk_detectors import Detectors as Detectors
from .qk_detectors import detectors as detectors

__all__ = [
    'Circuits',
    'Detectors',
    'detectors',
    'head_use',
    'no_op_circuits',
]
