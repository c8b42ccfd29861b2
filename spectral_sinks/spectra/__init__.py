"""Mathematics on tensors: spectra, subspaces and filters.

It knows no model, no file format and no tracing library.
"""

# pyright: basic
# lazy_loader has no types
import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "controls": ["DirectionSwap", "NoOp", "NormRestored", "energy_matched", "random_within"],
        "fake_quantiser": ["FakeQuantiser"],
        "filters": [
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
        "qk_modes": ["Modes"],
        "rounding": ["RoundingNoise", "rounding_noise"],
        "scaling": ["Amplified", "Copied", "Scaled", "amplify", "carry", "channels", "scale"],
        "spectrum": ["Spectrum"],
        "subspace": ["Subspace", "intersection", "principal_cosines", "random_subspace"],
        "subspace_pairs": [
            "farthest",
            "nearest",
            "outside",
            "random_spectrum",
            "share_deviation",
            "union",
        ],
    },
)
