"""The two small models that the package carries."""

from pathlib import Path

DEFAULT = "sinklet"
"""A causal language model whose attention sink is BOS."""

TWIN = "sinklet-nobos"
"""The negative control: the same data, steps and seed, without BOS."""

FOLDER = Path(__file__).parent
"""Each model lies in the folder of its name."""
