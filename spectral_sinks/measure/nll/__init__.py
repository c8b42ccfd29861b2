"""What an intervention costs, in nats per token.

Also what it does to generated text.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "attribution": ["first_order"],
        "bos_policy": ["BosComparison", "compare_bos"],
        "cache_comparison": ["CacheCosts", "cache_costs", "cache_settings", "compare_caches"],
        "cached_texts": ["CachedNLL", "KVCache", "cached_nll", "held_bytes", "join_documents"],
        "effects": ["Effect", "evaluate", "evaluate_all"],
        "generation": ["continuation_nll", "generate", "generate_all"],
        "scoring": ["Sample"],
        "screening": ["screen"],
        "repetition_metrics": ["distinct", "loop_onset", "repeated", "repetition"],
        "masked_tokens": ["masked_ids", "masked_positions"],
    },
)
