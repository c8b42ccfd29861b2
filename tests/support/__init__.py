"""Helpers of the tests: small models, planted answers, and reference computations made another way."""
