# Made by: python docs/generate_api.py
from .band_energy import energy as energy
from .logit_lens import ALONE as ALONE
from .logit_lens import TOGETHER as TOGETHER
from .logit_lens import band_lens as band_lens
from .massive import massive_activations as massive_activations
from .matrix_spectrum import read_spectra as read_spectra
from .matrix_spectrum import read_spectrum as read_spectrum
from .references import massive_channels as massive_channels
from .references import mean_keys as mean_keys
from .references import mean_residual as mean_residual
from .references import mean_values as mean_values
from .weight_energy import weight_shares as weight_shares

__all__ = [
    'ALONE',
    'TOGETHER',
    'band_lens',
    'energy',
    'massive_activations',
    'massive_channels',
    'mean_keys',
    'mean_residual',
    'mean_values',
    'read_spectra',
    'read_spectrum',
    'weight_shares',
]
