"""Register tokens, put into an image encoder or taken out of it."""

from spectral_sinks.interventions.registers import install_registers, with_registers, without_registers

__all__ = ["install_registers", "with_registers", "without_registers"]
