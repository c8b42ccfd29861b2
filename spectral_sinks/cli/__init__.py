"""The command line of the package, which prints tables or JSON."""

import sys
from typing import Any

import spectral_sinks as ss
from spectral_sinks.cli.circuits import Circuits, run_circuits
from spectral_sinks.cli.energy import Energy, run_energy
from spectral_sinks.cli.explore import Explore, run_explore
from spectral_sinks.cli.info import Info, run_info
from spectral_sinks.cli.kv_cache import KvCache, run_kv_cache
from spectral_sinks.cli.nll import Nll, run_nll
from spectral_sinks.cli.output import quiet, say
from spectral_sinks.cli.parsing import parse
from spectral_sinks.cli.progress import alive
from spectral_sinks.cli.quantise import Quantise, run_quantise
from spectral_sinks.cli.remote import Remote, run_remote
from spectral_sinks.cli.report import Report, run_report
from spectral_sinks.cli.reproduce import Reproduce, run_reproduce
from spectral_sinks.cli.sinks import Sinks, run_sinks
from spectral_sinks.cli.spectrum import SpectrumCommand, run_spectrum
from spectral_sinks.cli.sweep import Merge, Sweep, run_merge, run_sweep
from spectral_sinks.cli.verify import Verify, run_verify
from spectral_sinks.cli.vision import Vision, run_vision

COMMANDS: dict[str, tuple[type, Any]] = {
    "info": (Info, run_info),
    "spectrum": (SpectrumCommand, run_spectrum),
    "nll": (Nll, run_nll),
    "energy": (Energy, run_energy),
    "sinks": (Sinks, run_sinks),
    "circuits": (Circuits, run_circuits),
    "quantise": (Quantise, run_quantise),
    "kv-cache": (KvCache, run_kv_cache),
    "vision": (Vision, run_vision),
    "report": (Report, run_report),
    "explore": (Explore, run_explore),
    "sweep": (Sweep, run_sweep),
    "merge": (Merge, run_merge),
    "reproduce": (Reproduce, run_reproduce),
    "remote": (Remote, run_remote),
    "verify": (Verify, run_verify),
}
"""The type of the options of each command, and what runs it."""

HALF = 300
"""Characters that are kept of the beginning and of the end of a long error message."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command `spectral-sinks`.

    The exit status is 0 on success, 1 where a check or a claim fails, 2 for bad input, and 130 after an
    interruption.
    """
    try:
        words = sys.argv[1:] if arguments is None else arguments
        if words == ["--version"]:
            say(f"spectral-sinks {ss.__version__}")
            return
        options = parse({name: kind for name, (kind, _) in COMMANDS.items()}, words, ss.__doc__)
        quiet()
        _, run = COMMANDS[words[0]]
        with alive(words[0]):
            run(options)
    except (ss.SpectralError, OSError) as error:
        message = " ".join(_sentence(error).split())
        if len(message) > 2 * HALF:  # a value that is repeated in the message may have any length
            message = f"{message[:HALF]} ... {message[-HALF:]}"
        say(f"spectral-sinks: error: {message}", sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        say("spectral-sinks: interrupted", sys.stderr)
        raise SystemExit(130) from None


def _sentence(error: Exception) -> str:
    """Return what an error says; one of the system without its number, and after the name of the file."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)
