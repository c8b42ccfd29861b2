"""Mathematics on tensors: spectra, subspaces and filters.

It knows no model, no file format and no tracing library.
"""

# pyright: basic
# lazy_loader has no types
import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    "spectral_sinks",
    submod_attrs={
        "spectra.controls": ["DirectionSwap", "NoOp", "NormRestored", "energy_matched", "random_within"],
        "spectra.filters": [
            "At",
            "Filter",
            "Mean",
            "Noise",
            "Swap",
            "Zero",
            "keep",
            "omega",
            "phi",
            "psi",
            "remove",
            "rnd",
        ],
        "spectra.qk_modes": ["Modes"],
        "spectra.scaling": ["Amplified", "Copied", "Scaled", "amplify", "carry", "channels", "scale"],
        "spectra.spectrum": ["Spectrum"],
        "spectra.subspace": ["Subspace", "intersection", "principal_cosines", "random_subspace"],
        "spectra.subspace_pairs": [
            "farthest",
            "nearest",
            "outside",
            "random_spectrum",
            "share_deviation",
            "union",
        ],
    },
)
