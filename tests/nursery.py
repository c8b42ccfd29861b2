"""Imported once by the process that others are forked from: they find everything made."""

import sweeping

assert sweeping.sweep().units
