"""The energy and the bands of the residual stream, and the means that ablations put in."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "band_energy": ["energy"],
        "logit_lens": ["ALONE", "TOGETHER", "band_lens"],
        "massive": ["massive_activations"],
        "matrix_spectrum": ["read_spectra", "read_spectrum"],
        "references": ["massive_channels", "mean_keys", "mean_residual", "mean_values"],
        "weight_energy": ["weight_shares"],
    },
)
