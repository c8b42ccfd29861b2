"""`python -m spectral_sinks` is the command `spectral-sinks`."""

from spectral_sinks.cli import main

main()
