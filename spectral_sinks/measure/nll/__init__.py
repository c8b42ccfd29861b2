"""What an intervention costs, in nats per token.

Also what it does to generated text.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    "spectral_sinks",
    submod_attrs={
        "measure.nll.attribution": ["first_order"],
        "measure.nll.effects": ["Effect", "evaluate", "evaluate_all"],
        "measure.nll.generation": ["continuation_nll", "generate", "generate_all"],
        "measure.nll.repetition_metrics": ["distinct", "loop_onset", "repeated", "repetition"],
        "models.masked_lm": ["masked_ids", "masked_positions"],
    },
)
