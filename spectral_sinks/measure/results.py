"""What every result can do: show itself, as text and in a notebook, by a sentence and a small table."""

from abc import ABC, abstractmethod
from html import escape
from typing import Any, ClassVar

import numpy as np
import pandas as pd

ROWS = 8
"""Rows of a summary that a result shows of itself."""


class Result(ABC):
    """A result of a measurement, with a summary of it as a table."""

    listed: ClassVar[tuple[str, ...]] = ()
    """The columns of the summary that a result shows of itself; empty for all."""

    @abstractmethod
    def summary(self) -> pd.DataFrame:
        """Return the result as a table."""

    @property
    def headline(self) -> str:
        """What the result is, in one line."""
        model = getattr(self, "model", None)
        return type(self).__name__ if model is None else f"{type(self).__name__} of {model}"

    def digest(self) -> pd.DataFrame:
        """Return the summary that the result shows of itself, before columns are left out of it."""
        return self.summary()

    def __repr__(self) -> str:
        table, note = self._small()
        text = table.to_string(index=False, header=list(table.columns) != ["", " "])
        return "\n".join(filter(None, [printable(self.headline), text, note]))

    def _repr_html_(self) -> str:
        table, note = self._small()
        header = list(table.columns) != ["", " "]
        shown = table.to_html(index=False, header=header, escape=True, border=0)
        notes = f"<p>{escape(note)}</p>" if note else ""
        return f"<p><strong>{escape(printable(self.headline))}</strong></p>{shown}{notes}"

    def _small(self) -> tuple[pd.DataFrame, str]:
        """Return the table as texts, and what is left out of it."""
        whole = self.digest()
        columns = self.listed or tuple(map(str, whole.columns))
        texts = {
            name: [cell(row, name) for row in whole.head(ROWS).to_dict("records")]
            for name in columns
            if name in whole.columns and not name.endswith(("_low", "_high", "_least", "_most"))
        }
        texts = {name: values for name, values in texts.items() if set(values) - {""}}
        left = len(whole) - ROWS
        note = f"{left} more rows in summary()" if left > 0 else ""
        if len(whole) == 1:  # a single row reads better as a list
            rows = [(name, values[0]) for name, values in texts.items()]
            return pd.DataFrame(rows, columns=["", " "]), note
        return pd.DataFrame(texts), note


def cell(row: dict[Any, Any], name: str) -> str:
    """Return one value as text, with its interval if the row has one; nothing for a value that is missing."""
    found = plain(row[name])
    low, high = row.get(f"{name}_low", np.nan), row.get(f"{name}_high", np.nan)
    if found and not pd.isna(low) and not pd.isna(high):
        found += f" [{plain(low)}, {plain(high)}]"
    return found


def plain(value: Any) -> str:
    """Return a value as text: four digits of a number, and nothing for one that is missing."""
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, float | np.floating):
        return "" if np.isnan(value) else f"{value:.4g}"
    return "" if value is None else printable(str(value))


def printable(text: str) -> str:
    """Return a text whose control characters are written out, so that a terminal does not obey them."""
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)
