"""What a head does with its attention sink, and how it finds the sink: QK detectors and no-op circuits."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    "spectral_sinks",
    submod_attrs={
        "measure.circuits.heads": ["head_use"],
        "measure.circuits.no_op": ["Circuits", "no_op_circuits"],
        "measure.circuits.qk_detectors": ["Detectors", "detectors"],
    },
)
