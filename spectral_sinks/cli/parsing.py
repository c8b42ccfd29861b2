"""The words of a command line as options: numbers with their ranges, and one sentence for what is wrong."""

from __future__ import annotations

import io
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import dataclass, fields
from itertools import chain
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import tyro
from tyro.conf import FlagCreatePairsOff, subcommand
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from spectral_sinks.errors import InputError

KINDS = {int: ("INT", "a whole number"), float: ("NUMBER", "a number")}
"""Types of numbers, with what help and errors call them."""

PROGRAM = "spectral-sinks"

SENTENCES = {
    r"Error parsing (\S+): (.*)": r"\1: \2",
    r"(?i)unrecognized options: (.*)": r"the command does not take \1",
    r"Missing value for argument '(.*?)'.*": r"\1 needs a value",
    r"Missing from \S+ \w+: (\S+) +(.*?)\.?( \(required\))?": r"\1 is missing (\2)",
    r"(?i)invalid choice (.*) for argument '(.*?)'. Expected one of \((.*?),?\)": r"\2 \1: choose from \3",
}
"""What tyro says, as a pattern, and what is said instead."""

BORDER = "╭╮╰╯│| \n"
RULE = re.compile("[─-]+")
"""What tyro draws around the parts of an error, the first of which is below its title, and between them."""

REGISTRY = ConstructorRegistry()
"""How the options that are numbers, or that may be left out, are read."""


@dataclass(frozen=True)
class Between:
    """The range of a number among the options, as an annotation of its field: both ends are allowed."""

    least: float
    most: float | None = None

    def __str__(self) -> str:
        return f"at least {self.least}" if self.most is None else f"{self.least} to {self.most}"


Count = Annotated[int, Between(1)]
"""A number of things of which there has to be one."""

Natural = Annotated[int, Between(0)]
"""A number of things of which there may be none."""

Draws = Annotated[int, Between(0, 10_000)]
"""A number of random subspaces, at most `MOST_DRAWS`, whose module imports torch, unlike --help."""

Seed = Annotated[int, Between(0, 2**32 - 1)]
"""A seed, as generators of random numbers take it."""


@REGISTRY.primitive_rule
def _read_number(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Read a number; without this rule, an error names Python types."""
    members = [get_args(part)[0] if get_origin(part) is Annotated else part for part in _members(info.type)]
    given = [part for part in members if part is not NoneType]
    if len(given) != 1 or given[0] not in KINDS:
        return None
    kind, optional = given[0], NoneType in members
    metavar, described = KINDS[kind]

    def read(words: list[str]) -> Any:
        if optional and words[0] == "None":
            return None
        try:
            return kind(words[0])
        except ValueError:
            raise ValueError(f"{words[0]!r} is not {described}") from None

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, kind) or (optional and value is None),
        str_from_instance=lambda value: [str(value)],
    )


def parse(commands: Mapping[str, type], arguments: Sequence[str], description: str | None) -> Any:
    """Return the options of a command line. Help is printed, and ends the program with status 0.

    Args:
        commands: the type of the options of each command, by the name of the command.
        arguments: the words of the command line.
        description: what help says about the program.

    Raises:
        InputError: for words that cannot be read, and for a number outside its range.

    """
    command = next(iter(arguments), None)
    if command is None or not (command in commands or command in ("-h", "--help") or "--tyro" in command):
        said = "no command is given" if command is None else f"there is no command {command!r}"
        raise InputError(f"{said}: choose from {', '.join(commands)}, and see {PROGRAM} --help")
    # one command is read alone, which is faster than all of them
    if command in commands:
        kind, words, program, about = commands[command], arguments[1:], f"{PROGRAM} {command}", None
    else:
        named = tuple(Annotated[kind, subcommand(name)] for name, kind in commands.items())
        kind, words, program, about = Union[named], arguments, PROGRAM, description  # noqa: UP007

    def read() -> Any:
        return tyro.cli(  # pyright: ignore[reportCallIssue]
            kind,  # pyright: ignore[reportArgumentType]
            prog=program,
            description=about,
            args=words,
            config=(FlagCreatePairsOff,),
            registry=REGISTRY,
        )

    try:
        with redirect_stderr(io.StringIO()):
            options = read()
    except SystemExit as stopped:
        if stopped.code != 2:
            raise
        # once more on a line that is long enough, since tyro breaks words to fit its box
        with _columns(100_000), redirect_stderr(io.StringIO()) as box, suppress(SystemExit):
            read()
        raise InputError(f"{_sentence(box.getvalue())}: see {program} --help") from None
    check_ranges(options)
    return options


@contextmanager
def _columns(count: int) -> Iterator[None]:
    """Let the terminal appear that wide inside the block."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(count)
    try:
        yield
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before


def _sentence(box: str) -> str:
    """Return what a box of tyro says, as a sentence, with the option that may have been meant."""
    lines = [line for each in box.splitlines()[1:] if (line := each.strip(BORDER))]
    parts = [[]] if not RULE.fullmatch(lines[0]) else []
    for line in lines:
        if RULE.fullmatch(line):
            parts.append([])
        else:
            parts[-1].append(line)
    said = " ".join(parts[0]).rstrip(".")
    for pattern, words in SENTENCES.items():
        if match := re.fullmatch(pattern, said):
            said = match.expand(words)
            break
    meant = re.search(r"Perhaps you meant: (--[\w-]+)", " ".join(chain.from_iterable(parts[1:])))
    if meant and meant[1] not in said:
        said += f" (perhaps {meant[1]} is meant)"
    return said


def check_ranges(options: Any) -> None:
    """Raise InputError for a number outside the range with which its field is annotated."""
    hints = get_type_hints(type(options), include_extras=True)
    for field in fields(options):
        value = getattr(options, field.name)
        for wanted in _ranges(hints[field.name]):
            most = float("inf") if wanted.most is None else wanted.most
            if value is not None and not wanted.least <= value <= most:
                flag = field.name.replace("_", "-")
                raise InputError(f"--{flag} {value}: give {wanted}")


def _members(kind: Any) -> tuple[Any, ...]:
    """Return the types of a union, or the type itself."""
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def _ranges(hint: Any) -> list[Between]:
    """Return the ranges in an annotation, also in one of the types of a union."""
    found = [each for part in _members(hint) for each in getattr(part, "__metadata__", ())]
    return [each for each in found if isinstance(each, Between)]


def spelled(command: str, options: Any) -> str:
    """Return the command line that gives these options."""
    words = [PROGRAM, command]
    for field in fields(options):
        value = getattr(options, field.name)
        if field.name == "model":
            words[2:2] = [str(value)]
        elif isinstance(value, tuple):  # what stands behind the model
            words[3:3] = map(str, value)
        elif value != field.default:
            flag = f"--{field.name.replace('_', '-')}"
            words += [flag] if value is True else [flag, str(value)]
    return shlex.join(words)
