"""Pure mathematics on tensors: spectra, subspaces, filters. Knows no model."""
