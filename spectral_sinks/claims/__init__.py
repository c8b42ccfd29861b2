"""Numbers that pages state, and where the tables have them: pages that check themselves."""

from spectral_sinks.claims.claims import Claims
from spectral_sinks.claims.verify import Check, uncovered, verify

__all__ = ["Check", "Claims", "uncovered", "verify"]
