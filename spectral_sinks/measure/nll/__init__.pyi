# Made by: python docs/generate_api.py
from .attribution import first_order as first_order
from .bos_policy import BosComparison as BosComparison
from .bos_policy import compare_bos as compare_bos
from .cache_comparison import CacheCosts as CacheCosts
from .cache_comparison import cache_costs as cache_costs
from .cache_comparison import cache_settings as cache_settings
from .cache_comparison import compare_caches as compare_caches
from .cached_texts import CachedNLL as CachedNLL
from .cached_texts import KVCache as KVCache
from .cached_texts import cached_nll as cached_nll
from .cached_texts import held_bytes as held_bytes
from .cached_texts import join_documents as join_documents
from .effects import Effect as Effect
from .effects import evaluate as evaluate
from .effects import evaluate_all as evaluate_all
from .generation import continuation_nll as continuation_nll
from .generation import generate as generate
from .generation import generate_all as generate_all
from .masked_tokens import masked_ids as masked_ids
from .masked_tokens import masked_positions as masked_positions
from .repetition_metrics import distinct as distinct
from .repetition_metrics import loop_onset as loop_onset
from .repetition_metrics import repeated as repeated
from .repetition_metrics import repetition as repetition
from .scoring import Sample as Sample
from .screening import screen as screen

__all__ = [
    'BosComparison',
    'CacheCosts',
    'CachedNLL',
    'Effect',
    'KVCache',
    'Sample',
    'cache_costs',
    'cache_settings',
    'cached_nll',
    'compare_bos',
    'compare_caches',
    'continuation_nll',
    'distinct',
    'evaluate',
    'evaluate_all',
    'first_order',
    'generate',
    'generate_all',
    'held_bytes',
    'join_documents',
    'loop_onset',
    'masked_ids',
    'masked_positions',
    'repeated',
    'repetition',
    'screen',
]
