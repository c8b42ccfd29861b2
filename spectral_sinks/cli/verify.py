"""The command `verify`: the numbers of the documentation are checked against the tables."""

from __future__ import annotations

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
from spectral_sinks.cli.output import show, table

REPRODUCE = "spectral-sinks reproduce"


@dataclass(frozen=True)
class Verify:
    """Check every number of the documentation against the tables. The exit status is 0 only if all hold."""

    results: Path | None = None
    """Folder with the tables; by default results/ of the repository."""
    claims: Path | None = None
    """File of claims; by default the file of this package."""
    rerun: bool = False
    """Run the commands that write the tables again, in a temporary folder, and check the new tables."""
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
            print(f"{file} is missing, on which {count} claims rest; it is written by: {writes[file]}")
        if absent:
            print(f"missing files: {len(absent)}; claims that rest on them: {absent.total()}")
        if kept_as_they_are:
            print(f"checked without running them again: {', '.join(kept_as_they_are)}")
        print(title)
    if failed or any(loose.values()):
        raise SystemExit(1)


def rerun(claims: ss.claims.Claims, folder: Path, results: Path | None, only: str | None) -> list[str]:
    """Write the tables of the claims into a folder, and return those that were copied.

    A table that no command of this package writes is copied from `results`. It is missing where `results` is
    None or does not have it.
    """
    files = dict.fromkeys(file for claim in claims.claims for file in claim.files if "/" not in file)
    commands = {file: claims.command(file) for file in files}
    if only or any(command.startswith(REPRODUCE) for command in commands.values()):
        ss.reproduce(out=folder, only=only)
    kept: list[str] = []
    for file, command in commands.items():
        words = shlex.split(command)
        if command.startswith(REPRODUCE):
            continue
        if words[:1] == ["spectral-sinks"] and "--json" in words and "*" not in file:
            with (folder / file).open("w") as output:
                program = [sys.executable, "-m", "spectral_sinks.cli", *words[1 : words.index(">")]]
                subprocess.run(program, stdout=output, check=True)
        elif results is not None and (results / file).is_file():
            shutil.copy(results / file, folder / file)
            kept.append(file)
    return kept


def clone() -> Path | None:
    """Return the repository that this package is run from, or None if it is installed elsewhere."""
    folder = Path(ss.__file__).parent.parent
    return folder if (folder / "results" / "claims.toml").is_file() else None


def claims_file(repository: Path | None) -> Path:
    """Return the path of the claims, in results/ of a clone or else in the installed package."""
    return repository / "results" / "claims.toml" if repository else Path(ss.__file__).parent / "claims.toml"
