"""The command line of the package, which prints tables or JSON."""

import sys
from typing import Annotated, Any

import tyro
from tyro.conf import FlagCreatePairsOff, subcommand

import spectral_sinks as ss
from spectral_sinks.cli.circuits import Circuits, run_circuits
from spectral_sinks.cli.energy import Energy, run_energy
from spectral_sinks.cli.info import Info, run_info
from spectral_sinks.cli.nll import Nll, run_nll
from spectral_sinks.cli.output import quiet, say
from spectral_sinks.cli.remote import Remote, run_remote
from spectral_sinks.cli.reproduce import Reproduce, run_reproduce
from spectral_sinks.cli.sinks import Sinks, run_sinks
from spectral_sinks.cli.spectrum import SpectrumCommand, run_spectrum
from spectral_sinks.cli.sweep import Merge, Sweep, run_merge, run_sweep
from spectral_sinks.cli.verify import Verify, run_verify
from spectral_sinks.cli.vision import Vision, run_vision

Command = (
    Annotated[Info, subcommand("info")]
    | Annotated[SpectrumCommand, subcommand("spectrum")]
    | Annotated[Nll, subcommand("nll")]
    | Annotated[Energy, subcommand("energy")]
    | Annotated[Sinks, subcommand("sinks")]
    | Annotated[Circuits, subcommand("circuits")]
    | Annotated[Vision, subcommand("vision")]
    | Annotated[Sweep, subcommand("sweep")]
    | Annotated[Merge, subcommand("merge")]
    | Annotated[Reproduce, subcommand("reproduce")]
    | Annotated[Remote, subcommand("remote")]
    | Annotated[Verify, subcommand("verify")]
)


RUN: dict[type, Any] = {
    Info: run_info,
    SpectrumCommand: run_spectrum,
    Nll: run_nll,
    Energy: run_energy,
    Sinks: run_sinks,
    Circuits: run_circuits,
    Vision: run_vision,
    Sweep: run_sweep,
    Merge: run_merge,
    Reproduce: run_reproduce,
    Remote: run_remote,
    Verify: run_verify,
}


def main(arguments: list[str] | None = None) -> None:
    """Run the command `spectral-sinks`.

    The exit status is 0 on success, 1 where a check or a claim fails, 2 for bad input, and 130 after an
    interruption.
    """
    options: Any = tyro.cli(  # pyright: ignore[reportCallIssue]
        Command,  # pyright: ignore[reportArgumentType]
        prog="spectral-sinks",
        description=ss.__doc__,
        args=arguments,
        config=(FlagCreatePairsOff,),
    )
    quiet()
    try:
        RUN[type(options)](options)
    except (ss.SpectralError, OSError) as error:
        message = " ".join(str(error).split())
        say(f"spectral-sinks: error: {message}", sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        say("spectral-sinks: interrupted", sys.stderr)
        raise SystemExit(130) from None
