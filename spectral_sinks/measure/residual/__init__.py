"""The energy and the bands of the residual stream, and the means that ablations put in."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    "spectral_sinks",
    submod_attrs={
        "measure.residual.band_energy": ["energy"],
        "measure.residual.logit_lens": ["ALONE", "TOGETHER", "band_lens"],
        "measure.residual.massive": ["massive_activations"],
        "measure.residual.matrix_spectrum": ["read_spectrum"],
        "measure.residual.references": ["massive_channels", "mean_keys", "mean_residual", "mean_values"],
        "measure.residual.weight_energy": ["weight_shares"],
    },
)
