"""Chats as token ids: the chat template of a tokenizer, and the role of every token."""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import pairwise, takewhile
from typing import Any, TypeGuard

import numpy as np
from jaxtyping import Int
from numpy.typing import NDArray

from spectral_sinks.data.token_ids import MarkedEncoder, TextEncoder, listed, refuse_surrogates
from spectral_sinks.errors import InputError, brief

Chat = str | Sequence[Mapping[str, Any]]
"""A list of messages, each with its `role` and `content`; or a string, which is one message of a user."""

TEMPLATE = "template"
"""The role of the tokens that the chat template writes around the messages."""

UNREAD = ("tool_calls", "reasoning_content", "reasoning", "thinking")
"""Parts of a message that a template may write, and whose tokens would have no role of their own."""

Span = tuple[int, int, int]
"""A part of a rendered chat: where it begins and ends, and the index of its message."""


def is_chat(value: Any) -> TypeGuard[Sequence[Mapping[str, Any]]]:
    """Whether a value is a list of messages."""
    return isinstance(value, list | tuple) and all(isinstance(message, Mapping) for message in value)


class ChatEncoder:
    """Reads chats as the tokenizer's chat template writes them, without a generation prompt.

    The string of a special token inside a message is text. So is the string of any other added token that the
    template writes, except in messages of the assistant: "<think>" may be a token that the assistant wrote.
    """

    def __init__(self, tokenizer: Any, name: str) -> None:
        """Take the tokenizer of a model and the name of the model, for errors.

        Raises InputError for a tokenizer without a chat template or without offsets.
        """
        self.text = TextEncoder(tokenizer, name)
        self.tokenizer, self.name = tokenizer, name
        if getattr(self.tokenizer, "chat_template", None) is None:
            raise InputError(
                f"the tokenizer of {self.name} has no chat template: take a chat model, or set "
                "model.tokenizer.chat_template"
            )
        if not getattr(self.tokenizer, "is_fast", False):
            raise InputError(
                f"the tokenizer of {self.name} does not say where its tokens stand in the text, so they have "
                "no roles: load(model, tokenizer=...) with a fast tokenizer"
            )

    @cached_property
    def template(self) -> str:
        """The source of the chat template. Raises InputError where there are several and no default."""
        try:
            return self.tokenizer.get_chat_template()
        except ValueError as error:
            raise InputError(f"the chat template of {self.name} cannot be used: {brief(error)}") from error

    @property
    def template_hash(self) -> str:
        """A hash of the source of the chat template."""
        return hashlib.sha256(self.template.encode()).hexdigest()[:16]

    @cached_property
    def control(self) -> dict[str, int]:
        """The tokens whose strings are text in a message: special ones, and added ones of the template."""
        added = {token.content: number for number, token in self.tokenizer.added_tokens_decoder.items()}
        written = {s: number for s, number in added.items() if s.strip() and s in self.template}
        return self.text.special | written

    @cached_property
    def marked(self) -> MarkedEncoder:
        """The tokenizer that knows the tokens of the template from text in messages."""
        return MarkedEncoder.of(self.tokenizer, self.control.values())

    def read(self, chat: Any, name: str) -> tuple[list[int], list[str]]:
        """Return the token ids of a chat, and the role of each token.

        A token has the role of the first character in it that is not white space. `name` is the name of the
        chat in errors. Raises InputError for a chat that is no list of messages with role and content, that
        the template refuses, or whose messages the template rewrites.
        """
        messages = self.messages(chat, name)
        rendered = self.render(messages, name)
        owner = np.full(len(rendered), -1)
        for start, stop, message in self.spans(messages, rendered, name):
            owner[start:stop] = message
        written = list(self.written(rendered, owner, messages))
        found = self.tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, offsets = found["input_ids"], found["offset_mapping"]
        control, expected = set(self.control.values()), [number for _, _, number in written]
        if [number for number in ids if number in control] != expected:
            rendered, owner = self.renamed(rendered, owner, written)
            ids, offsets = self.marked.encode(rendered)
            refused = self.text.refused | (control - set(self.text.special.values()))
            held = [s for s in self.control if any(s in message["content"] for message in messages)]
            self.text.check(ids, expected, refused, listed(held), name)
        roles = [*(message["role"] for message in messages), TEMPLATE]  # -1 is the last one
        return ids, [roles[number] for number in owners_of(offsets, owner, rendered)]

    def held(self, chat: Chat) -> list[str]:
        """Return the strings of special tokens that the messages of a chat contain."""
        messages = self.messages(chat, "a chat")
        return [s for s in self.text.special if any(s in message["content"] for message in messages)]

    def messages(self, chat: Any, name: str) -> list[dict[str, str]]:
        """Return the messages of a chat, with role and content only. Raises InputError as `read` does."""
        if isinstance(chat, str):
            chat = [{"role": "user", "content": chat}]
        if not is_chat(chat):
            raise InputError(f"{name} is {type(chat).__name__}: expected a list of messages, or a string")
        if not chat:
            raise InputError(f"{name} has no messages: give at least one")
        found: list[dict[str, str]] = []
        for place, message in enumerate(chat):
            here = f"message {place} of {name}"
            if not {"role", "content"} <= set(message):
                raise InputError(f"{here} has the keys {', '.join(message)}: expected role and content")
            for part in ("role", "content"):
                if not isinstance(message[part], str):
                    kind = type(message[part]).__name__
                    raise InputError(f"the {part} of {here} is {kind}: expected a string")
                refuse_surrogates(message[part], here)
            if unread := [part for part in UNREAD if message.get(part)]:
                raise InputError(
                    f"{here} has {unread[0]!r}, and only role and content are read: write it into the content"
                )
            role = message["role"]
            if not role.strip() or role == TEMPLATE or any(string in role for string in self.control):
                raise InputError(
                    f"the role of {here} is {role!r}: expected a name such as user, other than {TEMPLATE!r} "
                    "and without special tokens"
                )
            found.append({"role": role, "content": message["content"]})
        return found

    def render(self, messages: Sequence[Mapping[str, str]], name: str) -> str:
        """Return a chat as the template writes it. Raises InputError if the template refuses it."""
        try:
            return self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=False
            )
        except Exception as error:  # a template is a program, which fails in its own ways
            raise InputError(f"the chat template of {self.name} refuses {name}: {brief(error)}") from error

    def spans(self, messages: Sequence[Mapping[str, str]], rendered: str, name: str) -> list[Span]:
        """Return where the messages stand in a rendered chat.

        The chat is rendered again with a mark at each end of every message, which the template writes along.
        Without the marks the result has to be the same. Raises InputError if the template rewrites messages.
        """
        contents = [message["content"] for message in messages]
        known = set(rendered).union(*contents)
        free = (mark for code in range(0xF0000, 0xFFFFE) if (mark := chr(code)) not in known)
        marks = [(next(free), next(free)) for _ in contents]

        def found(inner: Sequence[str]) -> list[Span] | None:
            marked = [marked_content(*parts) for parts in zip(contents, inner, marks, strict=True)]
            given = [{**m, "content": content} for m, content in zip(messages, marked, strict=True)]
            try:
                return spans_of(self.render(given, name), rendered, inner, marks)
            except InputError:  # the template does not take the marks
                return None

        if (spans := found(contents)) is not None:
            return spans
        # Where the template trims a message, the marks belong inside the white space at its ends
        inner = list(contents)
        for place, content in enumerate(contents):
            if found([content if i == place else "" for i in range(len(contents))]) is None:
                inner[place] = content.strip()
        if (spans := found(inner)) is not None:
            return spans
        raise InputError(
            f"the chat template of {self.name} rewrites the messages of {name}, so it cannot be said which "
            "token belongs to which message: give the messages as the template writes them"
        )

    def written(
        self,
        rendered: str,
        owner: Int[NDArray[np.int64], "characters"],
        messages: Sequence[Mapping[str, str]],
    ) -> Iterator[Span]:
        """Yield the control tokens that are no text, with their ids, in the order of the rendered chat."""
        longest = sorted(self.control, key=len, reverse=True)
        pattern = re.compile("|".join(map(re.escape, longest)) or "(?!)")
        edges = [0, *(np.flatnonzero(np.diff(owner)) + 1).tolist(), len(rendered)]
        for start, stop in pairwise(edges):
            message = int(owner[start]) if start < stop else -1
            for match in pattern.finditer(rendered, start, stop):
                of_assistant = message >= 0 and messages[message]["role"] == "assistant"
                if message < 0 or (of_assistant and match[0] not in self.text.special):
                    yield match.start(), match.end(), self.control[match[0]]

    def renamed(
        self, rendered: str, owner: Int[NDArray[np.int64], "characters"], written: Sequence[Span]
    ) -> tuple[str, Int[NDArray[np.int64], "named"]]:
        """Return a rendered chat with control tokens by their names, and the owners of its characters."""
        texts, owners, end = list[str](), list[NDArray[np.int64]](), 0
        for start, stop, number in written:
            name = self.marked.names[number]
            texts += [rendered[end:start], name]
            owners += [owner[end:start], np.full(len(name), owner[start])]
            end = stop
        return "".join([*texts, rendered[end:]]), np.concatenate([*owners, owner[end:]])


def marked_content(content: str, inner: str, marks: tuple[str, str]) -> str:
    """Put marks around the inner part of a message; none around nothing."""
    if not inner:
        return content
    before, _, after = content.partition(inner)
    return f"{before}{marks[0]}{inner}{marks[1]}{after}"


def spans_of(
    marked: str, rendered: str, contents: Sequence[str], marks: Sequence[tuple[str, str]]
) -> list[Span] | None:
    """Return where the messages stand in a rendered chat, from the same chat with marks; None if unknown.

    A template may cut off the beginning of a message, such as the thoughts before an answer, and the first
    mark with it. What is left of the message is then as much before the second mark as agrees with it.
    """
    kinds = {mark: (place, kind) for place, pair in enumerate(marks) for kind, mark in enumerate(pair)}
    pieces = re.split(f"([{''.join(kinds)}])", marked)
    if "".join(pieces[::2]) != rendered:
        return None
    found, opened, at = list[Span](), list[tuple[int, int]](), 0
    for text, mark in zip(pieces[::2], pieces[1::2], strict=False):
        at += len(text)
        place, closing = kinds[mark]
        if not closing:
            opened.append((at, place))
            continue
        start, other = opened.pop() if opened else (beginning(rendered[:at], contents[place]), place)
        if opened or other != place:
            return None
        found.append((start, at, place))
    return None if opened else found


def beginning(rendered: str, content: str) -> int:
    """Return where the end of a message begins at the end of a rendered chat; white space is none of it."""
    pairs = zip(reversed(rendered), reversed(content), strict=False)
    common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    return len(rendered) - len(rendered[len(rendered) - common :].lstrip())


def owners_of(
    offsets: Sequence[tuple[int, int]], owner: Int[NDArray[np.int64], "characters"], text: str
) -> Iterator[int]:
    """Yield the message that each token belongs to, or -1: that of its first character beyond white space.

    A token begins where the one before it ends, since offsets leave out white space in some tokenizers.
    Tokens of one character share their offsets.
    """
    end = 0
    for start, stop in offsets:
        first = end if end < stop else start
        here = text[first:stop]
        first += (len(here) - len(here.lstrip())) * bool(here.strip())
        yield int(owner[min(first, len(owner) - 1)])
        end = max(end, stop)
