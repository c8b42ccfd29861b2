"""Claims that check themselves: which numbers pages state, and where they are in tables.

The format is described at the top of results/claims.toml.
"""

import re
import tomllib
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from spectral_sinks.claims.tables import Cell, globbed
from spectral_sinks.errors import InputError


class Claim(Cell):
    """A fragment of a page whose numbers in braces are checked, or an order that holds in a table."""

    page: str
    text: str
    tolerance: float | None = Field(default=None, gt=0)
    """In the units of the page; 0.55 of the last stated digit by default."""
    above: Cell | None = None
    """Every selected number exceeds this one's."""
    below: Cell | None = None

    @property
    def stated(self) -> list[str]:
        """The numbers in braces, as written."""
        return re.findall(r"\{([^{}]*)\}", self.text)

    @property
    def fragment(self) -> str:
        """The text as the page has it, white space made even."""
        return flat(self.text.replace("{", "").replace("}", ""))

    @property
    def files(self) -> list[str]:
        """Tables that it needs."""
        cells = [c for c in (self, self.over, self.minus, self.above, self.below) if c is not None]
        return list(dict.fromkeys(c.file for c in cells if c.file))


class Stated(BaseModel):
    """A fragment with numbers that no table has; only its presence is checked."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    page: str
    text: str
    how: str = Field(min_length=1)
    """Where they come from."""

    @property
    def fragment(self) -> str:
        return flat(self.text)


class Claims(BaseModel):
    """A file of claims; `Claims.read(path)` makes one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    pages: dict[str, str] = {}
    """Short names of pages: paths in the repository."""
    commands: dict[str, str] = {}
    """Which command writes a table, by file name with `*`; the first that fits."""
    claims: list[Claim] = Field(min_length=1)
    stated: list[Stated] = []

    @model_validator(mode="before")
    @classmethod
    def _blocks(cls, data: Any) -> Any:
        """A [[table]] block gives its claims what they do not say themselves."""
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
        for claim in (*self.claims, *self.stated):
            if claim.page not in self.pages:
                raise ValueError(f"page {claim.page!r} is not among {', '.join(self.pages)}")
        return self

    @classmethod
    def read(cls, path: str | Path) -> "Claims":
        """Raises InputError for a file that is missing, no TOML, or says what is not understood."""
        try:
            return cls.model_validate(tomllib.loads(Path(path).read_text(encoding="utf-8")))
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{path} is no TOML: {error}") from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            given = first["input"]
            given = given.get("text", "") if isinstance(given, dict) else given
            raise InputError(f"{path}: {where}: {first['msg']} (given: {str(given)[:80]!r})") from error

    def command(self, file: str) -> str:
        """The command that writes a table."""
        return next((c for name, c in self.commands.items() if globbed(name).fullmatch(file)), "")


def flat(text: str) -> str:
    """White space made even, so that the lines of a page may break anywhere."""
    return " ".join(text.split())
