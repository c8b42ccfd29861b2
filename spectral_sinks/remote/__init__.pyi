# Made by: python docs/generate_api.py
from .client import remotely as remotely
from .handshake import examine as examine
from .server_check import preflight as preflight

__all__ = [
    'examine',
    'preflight',
    'remotely',
]
