"""Numbers out of one trace: NLL, energy by band, attention."""
