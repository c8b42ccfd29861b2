"""Figures drawn from tables alone: each function takes the rows of an experiment and writes one PNG."""

# pyright: basic
# lazy_loader has no types
import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "across": ["across"],
        "backcopy": ["backcopy"],
        "bars": ["bars"],
        "circuits": ["circuit_page", "circuits"],
        "controls": ["controls", "reads"],
        "conventions": ["conventions"],
        "designated": ["designated", "tuned", "variants"],
        "eu_dark": ["eu_dark"],
        "fills": ["fills", "sink_preserving", "swap"],
        "generation": ["generation"],
        "kv_cache": ["cache_costs"],
        "lens": ["lens"],
        "main": ["birth", "bos", "ladder", "sink", "spectrum"],
        "no_bos": ["no_bos"],
        "no_op_attention": ["no_op_attention"],
        "outliers": ["norm_maps", "outlier_shares"],
        "quantisation": ["quantisation"],
        "real_ladder": ["real_ladder"],
        "registers": ["register_ablation", "registers"],
        "several": ["several"],
        "sinks": ["sinks"],
        "vision_bands": ["token_spectra", "vision_bands"],
        "vision_boxes": ["vision_boxes", "vision_corloc"],
        "vision_sinks": ["attention_maps", "vision_sinks"],
        "vision_trained": ["vision_trained"],
        "weights": ["weights"],
    },
)
