"""What a head does with its attention sink, and how it finds the sink: QK detectors and no-op circuits."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "heads": ["head_use"],
        "no_op": ["Circuits", "no_op_circuits"],
        "qk_detectors": ["Detectors", "detectors"],
    },
)
