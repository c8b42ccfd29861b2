"""The command `verify`: the numbers of the documentation are checked against the tables."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import spectral_sinks as ss
from spectral_sinks.cli.output import say, show, table

REPRODUCE = "spectral-sinks reproduce"

RERUN = ("info", "spectrum", "nll", "energy", "sinks", "circuits")
"""Commands that a file of claims may name, besides `reproduce`."""

FLAGS = frozenset(
    [
        *(
            "--layer",
            "--site",
            "--keep",
            "--remove",
            "--fill",
            "--tokens",
            "--controls",
            "--seed",
            "--epsilon",
        ),
        *("--draws", "--position", "--bands", "--matrix", "--convention", "--documents", "--length"),
        *("--bos", "--per-document", "--batch-size", "--dtype", "--revision"),
    ]
)
"""Their flags that may be named, each with a value. Others write files, send data or allow a checkpoint to
run code, and a file of claims may come from somebody else."""

MODEL = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
"""A model that may be named: that of this package, or a Hugging Face id."""


@dataclass(frozen=True)
class Verify:
    """Check every number of the documentation against the tables. The exit status is 0 only if all hold."""

    results: Path | None = None
    """Folder with the tables; by default results/ of the repository."""
    claims: Path | None = None
    """File of claims; by default the file of this package."""
    rerun: bool = False
    """Run the commands that write the tables again, in a temporary folder, and check the new tables.
    Only commands of this package run, without flags that write files or allow code. They are named before."""
    only: str | None = None
    """Name of one experiment: check only its claims, and with --rerun, run only this experiment."""
    uncovered: bool = False
    """Also list the decimals and percentages that no claim covers. They count as failures."""
    json: bool = False
    """Print one JSON object and nothing else on standard output."""


def run_verify(options: Verify) -> None:
    """Print the claims that fail. Raises SystemExit with status 1 where any does."""
    repository = clone()
    claims = ss.claims.Claims.read(options.claims or claims_file(repository))
    if options.only:
        wanted = f"{REPRODUCE} --only {options.only}"
        kept = [claim for claim in claims.claims if wanted in map(claims.command, claim.files)]
        if not kept:
            raise ss.InputError(f"no claim rests on experiment {options.only!r}")
        claims = claims.model_copy(update={"claims": kept, "stated": []})
    results = options.results or (repository and repository / "results")
    with ExitStack() as stack:
        kept_as_they_are: list[str] = []
        if options.rerun:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            kept_as_they_are = rerun(claims, folder, results, options.only)
            results = folder
        elif results is None:
            raise ss.InputError(
                "no results folder comes with an installed package: give --results or --rerun"
            )
        elif not results.is_dir():
            raise ss.InputError(f"{results} is not a folder: give the one that reproduce wrote to")
        checks = ss.claims.verify(claims, results, repository)
    loose = ss.claims.uncovered(claims, repository) if options.uncovered and repository else {}
    failed = [check for check in checks if not check.holds]
    tables = [check for check in checks if check.files]
    found = {
        "claims": len(checks),
        "hold": len(checks) - len(failed),
        "numbers_from_tables": sum(check.numbers for check in tables),
        "stated_without_table": len(checks) - len(tables),
        "pages_checked": repository is not None,
        "not_run_again": kept_as_they_are,
        "failed": [asdict(check) for check in failed],
        "uncovered": loose,
    }
    absent = Counter(check.missing for check in failed if check.missing)
    writes = {check.missing: check.command for check in failed}
    rows = [(c.page, c.text, c.problem, c.command) for c in failed if not c.missing]
    rows += [
        (page, f"...{words}...", "no claim covers this number", "") for page in loose for words in loose[page]
    ]
    title = (
        f"{found['hold']} of {len(checks)} claims hold: {found['numbers_from_tables']} numbers from tables, "
        f"{found['stated_without_table']} texts without a table"
    )
    if rows or options.json:
        show(options.json, found, table("", ("page", "text", "problem", "command"), rows))
    if not options.json:
        for file, count in sorted(absent.items()):
            rest = "1 claim rests" if count == 1 else f"{count} claims rest"
            say(f"{file} is missing, on which {rest}; it is written by: {writes[file]}")
        if absent:
            say(f"missing files: {len(absent)}; claims that rest on them: {absent.total()}")
        if kept_as_they_are:
            say(f"checked without running them again: {', '.join(kept_as_they_are)}")
        say(title)
    if failed or any(loose.values()):
        raise SystemExit(1)


def rerun(claims: ss.claims.Claims, folder: Path, results: Path | None, only: str | None) -> list[str]:
    """Write the tables of the claims into a folder, and return those that were copied.

    A table that no command of this package writes is copied from `results`. It is missing where `results` is
    None or does not have it. Standard error names all commands before the first one runs.

    Raises InputError, before anything runs, for a command with other flags than `FLAGS`.
    """
    files = dict.fromkeys(file for claim in claims.claims for file in claim.files if "/" not in file)
    commands = {file: claims.command(file) for file in files}
    programs = {file: words for file, command in commands.items() if (words := program(file, command))}
    again = [REPRODUCE + (f" --only {only}" if only else "")]
    again = again if only or any(command.startswith(REPRODUCE) for command in commands.values()) else []
    for command in [*again, *(shlex.join(["spectral-sinks", *words]) for words in programs.values())]:
        say(f"verify runs: {command}", sys.stderr)
    if only or any(command.startswith(REPRODUCE) for command in commands.values()):
        ss.reproduce(out=folder, only=only)
    kept: list[str] = []
    for file, command in commands.items():
        if command.startswith(REPRODUCE):
            continue
        if file in programs:
            with (folder / file).open("w") as output:
                run = [sys.executable, "-m", "spectral_sinks.cli", *programs[file]]
                subprocess.run(run, stdout=output, check=True)
        elif results is not None and (results / file).is_file():
            shutil.copy(results / file, folder / file)
            kept.append(file)
    return kept


def program(file: str, command: str) -> list[str]:
    """Return the arguments of the command of this package that prints a table as JSON; [] for other commands.

    Raises InputError for flags, models and redirections that a file of claims may not name.
    """
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ss.InputError(f"the command of {file} cannot be read ({error}): {command!r}") from error
    if (
        words[:1] != ["spectral-sinks"]
        or "--json" not in words
        or "*" in file
        or command.startswith(REPRODUCE)
    ):
        return []
    name, *rest = words[1:]
    left = [word for word in rest[:-2] if word != "--json"]
    models = [left.pop(0)] if left and not left[0].startswith("-") else []
    pairs = list(zip(left[::2], left[1::2], strict=False))
    if (
        name not in RERUN
        or rest[-2:] != [">", file]
        or len(left) % 2
        or any(flag not in FLAGS or value.startswith("-") for flag, value in pairs)
        or not all(MODEL.fullmatch(model) for model in models)
    ):
        raise ss.InputError(
            f"{command!r} is not run again: a file of claims may name {', '.join(RERUN)} with --json, a "
            f"model and {', '.join(sorted(FLAGS))}; run it yourself, and give the table with --results"
        )
    return words[1:-2]


def clone() -> Path | None:
    """Return the repository that this package is run from, or None if it is installed elsewhere."""
    folder = Path(ss.__file__).parent.parent
    return folder if (folder / "results" / "claims.toml").is_file() else None


def claims_file(repository: Path | None) -> Path:
    """Return the path of the claims, in results/ of a clone or else in the installed package."""
    return repository / "results" / "claims.toml" if repository else Path(ss.__file__).parent / "claims.toml"
