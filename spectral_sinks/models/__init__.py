"""The only room that knows module names of transformers."""
