"""Checks of claims against tables and pages, and a search for numbers that no claim covers."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from spectral_sinks.claims.claims import Claim, Claims, Stated, flat
from spectral_sinks.claims.tables import LookupFailure, MissingTable, TableCell, table, values

ROUNDING = 0.55
"""Tolerance in units of the last stated digit: half, and a little for the arithmetic of other machines."""

NUMBER = re.compile(r"(?<![\w.+-])[-+−]?\d+(?:\.\d+|(?= %))")
"""The numbers that `uncovered` looks for: decimals and percentages."""

DEFINITIONS = ("5", "95")
"""Percentages that name the dark band and the level of intervals."""


@dataclass(frozen=True)
class Check:
    """The result of one claim; `problem` is empty if the claim holds."""

    page: str
    text: str
    files: tuple[str, ...]
    command: str
    numbers: int
    problem: str = ""
    missing: str = ""
    """A table that the claim rests on and that does not exist; "" for none."""

    @property
    def holds(self) -> bool:
        return not self.problem


def verify(claims: Claims, results: str | Path, repository: str | Path | None = None) -> list[Check]:
    """Check every claim against the tables in `results`, and with `repository` also its text in its page.

    A missing table, row or column, a number that differs, and a text that does not occur in its page exactly
    once are problems of that claim, not errors.
    """
    tables: dict[str, Any] = {}
    root = None if repository is None else Path(repository)
    pages = (
        {} if repository is None else {name: _page(Path(repository), p) for name, p in claims.pages.items()}
    )
    checks: list[Check] = []
    for claim in claims.claims:
        missing = ""
        problems = list(_in_page(claim, claims.pages, pages)) if repository is not None else []
        try:
            problems += _in_table(claim, Path(results), root, tables)
        except LookupFailure as failure:
            problems.append(str(failure))
            missing = failure.file if isinstance(failure, MissingTable) else ""
        command = next((c for file in claim.files if (c := claims.command(file))), "")
        checks.append(
            Check(
                claims.pages[claim.page],
                claim.fragment,
                tuple(claim.files),
                command,
                len(claim.stated),
                "; ".join(problems),
                missing,
            )
        )
    if repository is not None:
        for stated in claims.stated:
            problem = "; ".join(_in_page(stated, claims.pages, pages))
            checks.append(Check(claims.pages[stated.page], stated.fragment, (), stated.how, 0, problem))
    return checks


def uncovered(claims: Claims, repository: str | Path) -> dict[str, list[str]]:
    """Return the decimals and percentages of each page that no claim and no `stated` covers, with some
    context.

    Fenced blocks, code and links are left out, and so are "5 %" and "95 %".
    """
    found: dict[str, list[str]] = {}
    for name, path in claims.pages.items():
        text = _page(Path(repository), path) or ""
        skipped = [hit.span() for hit in re.finditer(r"```.*?```|`[^`]*`|\]\([^)]*\)|https?://\S+", text)]
        for claim in (*claims.claims, *claims.stated):
            if claim.page == name:
                skipped += [hit.span() for hit in re.finditer(re.escape(claim.fragment), text)]
        found[path] = [
            text[max(0, hit.start() - 50) : hit.end() + 30]
            for hit in NUMBER.finditer(text)
            if not any(start <= hit.start() < stop for start, stop in skipped)
            and not (hit.group() in DEFINITIONS and text[hit.end() : hit.end() + 2] == " %")
        ]
    return found


def _page(repository: Path, path: str) -> str | None:
    """Return the text of a page with single spaces, or None if it is missing."""
    try:
        return flat((repository / path).read_text(encoding="utf-8"))
    except OSError:
        return None


def _in_page(claim: Claim | Stated, paths: dict[str, str], pages: dict[str, str | None]) -> Iterator[str]:
    text = pages[claim.page]
    if text is None:
        yield f"page {paths[claim.page]} is missing"
        return
    count = text.count(claim.fragment)
    if count == 0:
        yield f"{paths[claim.page]} no longer says so"
    elif count > 1:
        yield f"{paths[claim.page]} has this text {count} times: give more of the sentence"


def _in_table(claim: Claim, results: Path, repository: Path | None, tables: dict[str, Any]) -> Iterator[str]:
    """Yield the problems with the numbers. Raises LookupFailure if they are not found."""

    def look(cell: TableCell, columns: list[str]) -> pd.DataFrame:
        return values(cell, columns, table(cell.file or "", results, repository, tables))

    stated = claim.stated
    if not stated and claim.above is None and claim.below is None:
        yield "nothing to check: put its numbers in braces, or say above or below"
        return
    columns = claim.columns(len(stated))
    block = look(claim, columns)
    if claim.minus is not None:
        block = block - _single(claim.inherited(claim.minus), "minus", look)
    if claim.over is not None:
        block = block / _single(claim.inherited(claim.over), "over", look)
    block = block * claim.scale
    if stated:
        yield from _compared(claim, stated, [float(x) for x in block.to_numpy().flatten()])
    for other, sign, word in ((claim.above, 1, "above"), (claim.below, -1, "below")):
        if other is None:
            continue
        full = claim.inherited(other)
        against = look(full, full.columns(1)) * full.scale
        if not full.by and len(against) != 1:
            raise LookupFailure(
                f"compared with {len(against)} rows: name the columns that pair them with `by`"
            )
        aligned = against.reindex(block.index) if full.by and full.take is None else against
        if aligned.isna().any(axis=None):
            raise LookupFailure(f"rows of {full.file} to compare with are missing")
        difference = sign * (block.to_numpy()[:, 0] - aligned.to_numpy()[:, 0])
        if (wrong := ~(difference > 0)).any():
            first = block.index[wrong][0]
            name = ", ".join(f"{k} {v}" for k, v in zip(full.by, first, strict=True)) if full.by else first
            yield f"not {word} in {wrong.sum()} of {len(block)} rows, such as {name}"


def _single(cell: TableCell, word: str, look: Callable[[TableCell, list[str]], pd.DataFrame]) -> float:
    found = look(cell, cell.columns(1)).to_numpy()
    if found.size != 1:
        raise LookupFailure(f"`{word}` selects {found.size} numbers of {cell.file}")
    return float(found.item())


def _compared(claim: Claim, stated: list[str], found: list[float]) -> Iterator[str]:
    if len(stated) != len(found):
        raise LookupFailure(f"{len(stated)} numbers in braces, {len(found)} in the table")
    for written, value in zip(stated, found, strict=True):
        digits = written.replace("−", "-").replace(" ", "").replace(" ", "")
        try:
            number = float(digits)
        except ValueError:
            yield f"{{{written}}} is not a number"
            continue
        unit = 10.0 ** -len(digits.partition(".")[2])
        tolerance = ROUNDING * unit if claim.tolerance is None else claim.tolerance
        if not abs(number - value) <= tolerance:
            yield f"stated {written}, {claim.file} has {value:.6g}"
