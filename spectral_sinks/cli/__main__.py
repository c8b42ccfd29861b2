"""The entry point of `python -m spectral_sinks.cli`."""

from spectral_sinks.cli import main

main()
