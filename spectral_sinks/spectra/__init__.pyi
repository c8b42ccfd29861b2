# Made by: python docs/generate_api.py
from .controls import DirectionSwap as DirectionSwap
from .controls import NoOp as NoOp
from .controls import NormRestored as NormRestored
from .controls import energy_matched as energy_matched
from .controls import random_within as random_within
from .fake_quantiser import FakeQuantiser as FakeQuantiser
from .filters import At as At
from .filters import Filter as Filter
from .filters import Mean as Mean
from .filters import Noise as Noise
from .filters import Swap as Swap
from .filters import Zero as Zero
from .filters import keep as keep
from .filters import omega as omega
from .filters import phi as phi
from .filters import psi as psi
from .filters import remove as remove
from .filters import rnd as rnd
from .qk_modes import Modes as Modes
from .rounding import RoundingNoise as RoundingNoise
from .rounding import rounding_noise as rounding_noise
from .scaling import Amplified as Amplified
from .scaling import Copied as Copied
from .scaling import Scaled as Scaled
from .scaling import amplify as amplify
from .scaling import carry as carry
from .scaling import channels as channels
from .scaling import scale as scale
from .spectrum import Spectrum as Spectrum
from .subspace import Subspace as Subspace
from .subspace import intersection as intersection
from .subspace import principal_cosines as principal_cosines
from .subspace import random_subspace as random_subspace
from .subspace_pairs import farthest as farthest
from .subspace_pairs import nearest as nearest
from .subspace_pairs import outside as outside
from .subspace_pairs import random_spectrum as random_spectrum
from .subspace_pairs import share_deviation as share_deviation
from .subspace_pairs import union as union

__all__ = [
    'Amplified',
    'At',
    'Copied',
    'DirectionSwap',
    'FakeQuantiser',
    'Filter',
    'Mean',
    'Modes',
    'NoOp',
    'Noise',
    'NormRestored',
    'RoundingNoise',
    'Scaled',
    'Spectrum',
    'Subspace',
    'Swap',
    'Zero',
    'amplify',
    'carry',
    'channels',
    'energy_matched',
    'farthest',
    'intersection',
    'keep',
    'nearest',
    'omega',
    'outside',
    'phi',
    'principal_cosines',
    'psi',
    'random_spectrum',
    'random_subspace',
    'random_within',
    'remove',
    'rnd',
    'rounding_noise',
    'scale',
    'share_deviation',
    'union',
]
