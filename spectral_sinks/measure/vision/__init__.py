"""Image encoders: outlier tokens, attention sinks, registers and interventions.

Also object discovery, which outlier tokens disturb.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    "spectral_sinks",
    submod_attrs={
        "interventions.registers": ["install_registers", "with_registers", "without_registers"],
        "measure.vision.boxes": ["corloc", "read_boxes"],
        "measure.vision.image_effects": ["ImageEffect", "evaluate_images"],
        "measure.vision.image_sinks": ["VisionSinks", "vision_sinks"],
        "measure.vision.linear_probes": ["token_probes"],
        "measure.vision.localization": ["Discovery", "dino_seg", "lost"],
        "measure.vision.neurons": ["DINOV2_LARGE", "register_neurons"],
        "measure.vision.object_discovery": ["discover"],
        "measure.vision.outlier_positions": ["outlier_places"],
        "measure.vision.outlier_tokens": ["Outliers", "outlier_onset", "outliers"],
        "measure.vision.register_effects": ["register_maps", "register_repair"],
        "measure.vision.ridge": ["LinearProbe"],
        "measure.vision.trained_registers": ["register_ablation"],
    },
)
