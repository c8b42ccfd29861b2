# Made by: python docs/generate_api.py
from .boxes import corloc as corloc
from .boxes import read_boxes as read_boxes
from .image_effects import ImageEffect as ImageEffect
from .image_effects import evaluate_images as evaluate_images
from .image_sinks import VisionSinks as VisionSinks
from .image_sinks import vision_sinks as vision_sinks
from .linear_probes import token_probes as token_probes
from .localization import Discovery as Discovery
from .localization import dino_seg as dino_seg
from .localization import lost as lost
from .neurons import DINOV2_LARGE as DINOV2_LARGE
from .neurons import register_neurons as register_neurons
from .object_discovery import discover as discover
from .outlier_positions import outlier_places as outlier_places
from .outlier_tokens import Outliers as Outliers
from .outlier_tokens import outlier_onset as outlier_onset
from .outlier_tokens import outliers as outliers
from .register_effects import register_maps as register_maps
from .register_effects import register_repair as register_repair
from .register_tokens import install_registers as install_registers
from .register_tokens import with_registers as with_registers
from .register_tokens import without_registers as without_registers
from .ridge import LinearProbe as LinearProbe
from .trained_registers import register_ablation as register_ablation

__all__ = [
    'DINOV2_LARGE',
    'Discovery',
    'ImageEffect',
    'LinearProbe',
    'Outliers',
    'VisionSinks',
    'corloc',
    'dino_seg',
    'discover',
    'evaluate_images',
    'install_registers',
    'lost',
    'outlier_onset',
    'outlier_places',
    'outliers',
    'read_boxes',
    'register_ablation',
    'register_maps',
    'register_neurons',
    'register_repair',
    'token_probes',
    'vision_sinks',
    'with_registers',
    'without_registers',
]
