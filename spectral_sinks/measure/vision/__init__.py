"""Image encoders: outlier tokens, attention sinks, registers and interventions.

Also object discovery, which outlier tokens disturb.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "boxes": ["corloc", "read_boxes"],
        "image_effects": ["ImageEffect", "evaluate_images"],
        "image_sinks": ["VisionSinks", "vision_sinks"],
        "linear_probes": ["token_probes"],
        "localization": ["Discovery", "dino_seg", "lost"],
        "neurons": ["DINOV2_LARGE", "register_neurons"],
        "object_discovery": ["discover"],
        "outlier_positions": ["outlier_places"],
        "outlier_tokens": ["Outliers", "outlier_onset", "outliers"],
        "register_effects": ["register_maps", "register_repair"],
        "register_tokens": ["install_registers", "with_registers", "without_registers"],
        "ridge": ["LinearProbe"],
        "trained_registers": ["register_ablation"],
    },
)
