"""The tokens that a masked language model is scored on."""

from spectral_sinks.models.masked_lm import masked_ids, masked_positions

__all__ = ["masked_ids", "masked_positions"]
