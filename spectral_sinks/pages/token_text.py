"""Tokens as a reader sees them: characters that several tokens share, control characters, direction."""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

MOST_PARTS = 8
"""Tokens that may share one character, at most: a character has up to four bytes, and emoji have several."""

JOINERS = "\u200c\u200d"
"""Formatting characters that scripts need inside a word."""

RIGHT = ("R", "AL")
"""Directions of letters that are written from right to left."""


@dataclass(frozen=True)
class ShownToken:
    """One token as text."""

    text: str
    """What stands in the running text. Control characters are replaced by visible ones."""
    label: str
    """What stands alone, in tables and on axes: spaces are visible, too."""
    kind: Literal["text", "part", "special"]
    """A "part" continues a character that an earlier token began; "special" is a token of the tokenizer."""


def shown_tokens(ids: Sequence[int], tokenizer: Any) -> list[ShownToken]:
    """Return the tokens of one window as text.

    A character whose bytes lie in several tokens stands in the first of them. The others are shown as a dot.
    Without a tokenizer, a token is its number.
    """
    if tokenizer is None:
        return [ShownToken(f"#{token} ", f"#{token}", "text") for token in ids]
    special = set(tokenizer.all_special_ids)
    pieces = tokenizer.convert_ids_to_tokens(list(ids))
    found: list[ShownToken] = []
    while len(found) < len(ids):
        start = len(found)
        if ids[start] in special:
            name = visible(str(pieces[start]))
            found.append(ShownToken(name, name, "special"))
            continue
        text, parts = _whole_characters(ids, start, tokenizer, special)
        # SentencePiece leaves out the space before the first word of what it decodes
        if str(pieces[start]).startswith("▁") and not text.startswith(" "):
            text = " " + text
        found.append(ShownToken(visible(text), labelled(text), "text"))
        for part in range(2, parts + 1):
            found.append(ShownToken("·", f"part {part} of {parts} of {labelled(text)}", "part"))
    return found


def _whole_characters(ids: Sequence[int], start: int, tokenizer: Any, special: set[int]) -> tuple[str, int]:
    """Return the text that begins at a token, and the number of tokens that it takes to be whole."""
    text = _decoded(tokenizer, ids[start : start + 1])
    for parts in range(1, min(MOST_PARTS, len(ids) - start) + 1):
        if parts > 1 and ids[start + parts - 1] in special:
            break
        joined = _decoded(tokenizer, ids[start : start + parts])
        if "\ufffd" not in joined:
            return joined, parts
    return text, 1


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)


def visible(text: str) -> str:
    """Return a text whose control and formatting characters are visible, and change nothing around them."""
    return "".join(map(_seen, text))


def _seen(character: str) -> str:
    if character == "\n":
        return "⏎\n"
    if character == "\t":
        return "⇥\t"
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "␡"
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"):
        return character if character in JOINERS else f"⟨U+{code:04X}⟩"
    return character


def labelled(text: str) -> str:
    """Return a token for a table: spaces are visible, and a combining character has a circle to stand on."""
    shown = visible(text).replace("⏎\n", "⏎").replace("⇥\t", "⇥").replace(" ", "␣")
    return f"◌{shown}" if shown and unicodedata.category(shown[0]).startswith("M") else shown


def direction(tokens: Sequence[ShownToken]) -> Literal["ltr", "rtl"]:
    """Return the direction in which most letters of a text are written."""
    letters = [
        unicodedata.bidirectional(character)
        for token in tokens
        if token.kind == "text"
        for character in token.text
    ]
    right = sum(letter in RIGHT for letter in letters)
    return "rtl" if right > letters.count("L") else "ltr"
