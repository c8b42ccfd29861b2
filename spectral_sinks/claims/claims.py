"""Claims that check themselves: the numbers that pages state, and where tables hold them.

The format is described at the top of results/claims.toml.
"""

import re
import tomllib
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from spectral_sinks.claims.tables import TableCell, below, globbed
from spectral_sinks.errors import InputError


class Claim(TableCell):
    """A fragment of a page with numbers in braces that are checked, or a comparison that holds in a table."""

    page: str
    text: str
    tolerance: float | None = Field(default=None, gt=0)
    """In the units of the page; by default 0.55 of a unit of the last stated digit."""
    above: TableCell | None = None
    """A number that every selected number exceeds."""
    below: TableCell | None = None
    """A number that exceeds every selected number."""

    @property
    def stated(self) -> list[str]:
        """The numbers in braces, as written."""
        return re.findall(r"\{([^{}]*)\}", self.text)

    @property
    def fragment(self) -> str:
        """The text as the page has it, without braces and with single spaces."""
        return flat(self.text.replace("{", "").replace("}", ""))

    @property
    def files(self) -> list[str]:
        """The tables that the claim needs."""
        cells = [c for c in (self, self.over, self.minus, self.above, self.below) if c is not None]
        return list(dict.fromkeys(c.file for c in cells if c.file))


class Stated(BaseModel):
    """A fragment with numbers that are in no table; only its presence in the page is checked."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    page: str
    text: str
    how: str = Field(min_length=1)
    """The source of the numbers."""

    @property
    def fragment(self) -> str:
        return flat(self.text)


class Claims(BaseModel):
    """A file of claims; `Claims.read(path)` makes one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    pages: dict[str, str] = {}
    """The path of each page in the repository, by its short name."""
    commands: dict[str, str] = {}
    """The command that writes a table, by file name with `*`; the first match counts."""
    claims: list[Claim] = Field(min_length=1)
    stated: list[Stated] = []

    @model_validator(mode="before")
    @classmethod
    def _blocks(cls, data: Any) -> Any:
        """Pass the keys of a [[table]] block to its claims, unless they have their own."""
        if isinstance(data, dict) and "table" in data:
            data = dict(data)
            claims = list(data.pop("claims", []))
            for block in data.pop("table"):
                shared = {key: value for key, value in block.items() if key != "claims"}
                claims += [shared | claim for claim in block.get("claims", [])]
            data["claims"] = claims
        return data

    @model_validator(mode="after")
    def _known_pages(self) -> "Claims":
        for path in self.pages.values():
            below(path)
        for claim in (*self.claims, *self.stated):
            if claim.page not in self.pages:
                raise ValueError(f"page {claim.page!r} is not among {', '.join(self.pages)}")
        return self

    @classmethod
    def read(cls, path: str | Path) -> "Claims":
        """Read a file of claims. Raises InputError if it is missing, is not TOML, or breaks the format."""
        try:
            return cls.model_validate(tomllib.loads(Path(path).read_text(encoding="utf-8")))
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise InputError(f"{path} is not TOML: {error}") from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            given: Any = first["input"]
            given = given.get("text", "") if isinstance(given, dict) else given
            raise InputError(f"{path}: {where}: {first['msg']} (given: {str(given)[:80]!r})") from error

    def command(self, file: str) -> str:
        """Return the command that writes a table, or "" if none is known."""
        return next((c for name, c in self.commands.items() if globbed(name).fullmatch(file)), "")


def flat(text: str) -> str:
    """Replace all white space by single spaces, so that the lines of a page may break anywhere."""
    return " ".join(text.split())
