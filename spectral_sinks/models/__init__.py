"""Loading of models, and the only package that knows the module names of transformers."""
