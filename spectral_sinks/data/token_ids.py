"""Token ids of texts, in which the strings of special tokens are text."""

import json
import uuid
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tokenizers import AddedToken, Tokenizer

from spectral_sinks.errors import InputError


@dataclass(frozen=True, eq=False)
class TextEncoder:
    """The tokenizer of a model for texts that may contain strings such as "</s>"."""

    tokenizer: Any
    name: str
    """The name of the model, for errors."""

    @cached_property
    def special(self) -> dict[str, int]:
        """The string of each special token with its id; without those that are white space."""
        added = getattr(self.tokenizer, "added_tokens_decoder", {})
        named = set(getattr(self.tokenizer, "all_special_tokens", []))
        found = {t.content: number for number, t in added.items() if t.special or t.content in named}
        return {string: number for string, number in found.items() if string.strip()}

    @cached_property
    def refused(self) -> frozenset[int]:
        """Ids that no text may contain: special tokens except UNK and padding, which may be usual tokens."""
        named = Counter[int | None](
            getattr(self.tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "cls", "sep", "mask")
        )
        usual = {getattr(self.tokenizer, f"{name}_token_id", None) for name in ("unk", "pad")}
        return frozenset(number for number in self.special.values() if number not in usual or named[number])

    def held(self, text: str) -> list[str]:
        """Return the strings of special tokens that a text contains."""
        return [string for string in self.special if string in text]

    def read(self, text: Any, name: str) -> tuple[list[int], list[str]]:
        """Return the token ids of a text, without BOS and other tokens that the tokenizer adds, and no roles.

        `name` is the name of the text in errors. Raises InputError for what is no string, for a lone
        surrogate, and for the string of a special token where the tokenizer cannot read it as text.
        """
        if not isinstance(text, str):
            chat = " (for chats: cut(..., chat=True), --chat)" if isinstance(text, list | tuple) else ""
            raise InputError(f"{name} is {type(text).__name__}, expected a string{chat}")
        refuse_surrogates(text, name)
        if not (held := self.held(text)):
            return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], []
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        try:
            ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)[
                "input_ids"
            ]
        finally:
            if backend is not None:  # the option stays in the backend after the call
                backend.encode_special_tokens = self.tokenizer.split_special_tokens
        self.check(ids, [], self.refused, listed(held), name)
        return ids, []

    def check(
        self, ids: Iterable[int], written: Iterable[int], refused: frozenset[int], held: str, name: str
    ) -> None:
        """Raise InputError if other tokens of `refused` are among the ids of a text than those `written`.

        `held` lists the strings that they come from.
        """
        if [i for i in ids if i in refused] != [i for i in written if i in refused]:
            raise InputError(
                f"{name} contains {held}, which the tokenizer of {self.name} reads as a special token even "
                "in a text: take it out of the text"
            )


@dataclass(frozen=True, eq=False)
class MarkedEncoder:
    """A copy of a fast tokenizer that reads chosen tokens only where their `names` stand."""

    backend: Tokenizer
    names: dict[int, str]
    ids: dict[int, int]
    """The id of each token, by the id of its name."""

    @classmethod
    def of(cls, tokenizer: Any, tokens: Iterable[int]) -> "MarkedEncoder":
        """Copy a tokenizer; the strings of `tokens` are then text."""
        settings = json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
        names = {token: f"<{uuid.uuid4().hex}>" for token in tokens}
        chosen = [token for token in settings["added_tokens"] if token["id"] in names]
        for token in chosen:
            token["special"] = True
        backend = Tokenizer.from_str(json.dumps(settings))
        backend.encode_special_tokens = True  # which turns the matching of special tokens off
        backend.add_tokens(
            [
                AddedToken(
                    names[token["id"]],
                    lstrip=token["lstrip"],
                    rstrip=token["rstrip"],
                    normalized=False,
                    special=False,
                )
                for token in chosen
            ]
        )
        ids = backend.get_vocab(with_added_tokens=True)
        return cls(backend, names, {ids[name]: token for token, name in names.items()})

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the token ids of a text, and where each token begins and ends in it."""
        found = self.backend.encode(text, add_special_tokens=False)
        return [self.ids.get(number, number) for number in found.ids], found.offsets


def refuse_surrogates(text: str, name: str) -> None:
    """Raise InputError for a text that contains half of a surrogate pair, which no encoding can express."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{name} contains {text[error.start]!r} at character {error.start}, which is half of a surrogate "
            "pair and no character: read the text in its own encoding, or replace the half"
        ) from error


def listed(strings: Iterable[str]) -> str:
    """Return strings as the subject of a sentence, such as "'<bos>', '</s>'"."""
    return ", ".join(map(repr, strings))
