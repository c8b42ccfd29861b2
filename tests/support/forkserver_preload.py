"""Imported once by the process that others are forked from: they find everything made."""

from support import small_sweeps

assert small_sweeps.sweep().units
