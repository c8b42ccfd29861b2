# Made by: python docs/generate_api.py
from .claims import Claims as Claims
from .verify import Check as Check
from .verify import uncovered as uncovered
from .verify import verify as verify

__all__ = [
    'Check',
    'Claims',
    'uncovered',
    'verify',
]
