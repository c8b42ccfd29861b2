"""Windows of token ids, cut from texts and chats, with a record of every choice."""

import hashlib
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePath
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from spectral_sinks.data.chats import Chat, ChatEncoder, is_chat
from spectral_sinks.data.token_ids import TextEncoder, listed
from spectral_sinks.errors import InputError, SpectralWarning, plural
from spectral_sinks.models.language import LanguageModel
from spectral_sinks.models.masked_lm import RULE

Bos = Literal["auto", "always", "never"]


@dataclass(frozen=True, eq=False)
class Windows:
    """Unpadded token windows, with the document that each comes from."""

    rows: tuple[Int[Tensor, "_"], ...]
    document: tuple[int, ...]
    record: dict[str, Any] = field(default_factory=dict)
    """How the windows were cut: policy, counts, first token ids, hash of the ids, and the masking rule for an
    encoder.
    """
    roles: tuple[tuple[str, ...], ...] | None = None
    """The role of each token of a chat: the role of its message, or "template" for what the chat template
    writes around the messages. None for windows that are not chats."""

    @classmethod
    def of_ids(
        cls,
        ids: Int[Tensor, "windows tokens"] | Sequence[Int[Tensor, "_"] | Sequence[int]],
        model: LanguageModel,
        document: Sequence[int] | None = None,
        *,
        roles: Sequence[Sequence[str]] | None = None,
        **record: Any,
    ) -> "Windows":
        """Make windows from token ids; without `document`, each window is a document of its own.

        `roles` has the role of each token of each window, for chats.

        Raises InputError for no windows, ids outside the vocabulary, windows of fewer than two tokens,
        windows longer than the model's context, and roles that are not one for each token.
        """
        rows = tuple(torch.as_tensor(row, dtype=torch.long) for row in ids)
        if not rows:
            raise InputError("no token windows: give at least one")
        for row in rows:
            if row.ndim != 1 or len(row) < 2:
                raise InputError(f"a window of shape {tuple(row.shape)}: expected at least two tokens")
            if not 0 <= int(row.min()) <= int(row.max()) < model.vocabulary:
                bad = row[(row < 0) | (row >= model.vocabulary)][0]
                raise InputError(f"token id {int(bad)} lies outside the vocabulary of {model.vocabulary}")
            if model.context is not None and len(row) > model.context:
                raise InputError(
                    f"a window of {len(row)} tokens, {model.name} has a context of {model.context}"
                )
        if roles is not None and [len(row) for row in roles] != [len(row) for row in rows]:
            raise InputError("the roles do not fit the windows: give one role for each token of each window")
        owner = tuple(range(len(rows))) if document is None else tuple(document)
        digest = hashlib.sha256(b"".join(row.numpy().tobytes() for row in rows)).hexdigest()
        opened = model.bos is not None and all(int(row[0]) == model.bos for row in rows)
        record |= {
            "documents": len(set(owner)),
            "windows": len(rows),
            "tokens": sum(len(row) for row in rows),
            "first_token_ids": sorted({int(row[0]) for row in rows}),
            "opens_with_bos": opened,
            "data_hash": digest[:16],
        }
        if not model.causal:
            closed = model.sep is not None and all(int(row[-1]) == model.sep for row in rows)
            record |= {"closes_with_sep": closed} | ({"masking": RULE} if model.masks else {})
        return cls(rows, owner, record, None if roles is None else tuple(map(tuple, roles)))

    @property
    def first_token_ids(self) -> list[int]:
        """The distinct ids at position 0."""
        return self.record["first_token_ids"]

    @property
    def opens_with_bos(self) -> bool:
        return self.record["opens_with_bos"]

    @property
    def length(self) -> int:
        """Number of tokens in the longest window."""
        return max(len(row) for row in self.rows)

    @property
    def lengths(self) -> list[int]:
        """Number of tokens in each window."""
        return [len(row) for row in self.rows]

    def tokens(self, batch: Int[Tensor, "batch tokens"]) -> Int[Tensor, "batch tokens"]:
        """Return the id of each token of a batch, which is the batch itself (`Pixels.tokens` returns kinds
        instead).
        """
        return batch

    def batches(self, size: int) -> Iterator[tuple[list[int], Int[Tensor, "batch tokens"]]]:
        """Yield batches of windows of one length, at most `size` in each, with their indices in `rows`.

        For a size of 3 or more, no batch has a single row unless its length occurs once. The first windows of
        all documents come before the second ones, so that each finds a donor for a swap in another document.
        """
        if size < 1:
            raise InputError(f"batches of {size} windows: give at least 1")
        lengths = self.lengths
        seen: Counter[int] = Counter()
        turn: list[int] = []
        for owner in self.document:
            turn.append(seen[owner])
            seen[owner] += 1
        for length in sorted(set(lengths), reverse=True):
            places = sorted((i for i, n in enumerate(lengths) if n == length), key=turn.__getitem__)
            count = -(-len(places) // size)
            for part in range(count):
                chosen = places[part * len(places) // count : (part + 1) * len(places) // count]
                yield chosen, torch.stack([self.rows[i] for i in chosen])

    def as_documents(self) -> "Windows":
        """Make each window a document of its own, for one long text, whose windows are not independent."""
        return replace(self, document=tuple(range(len(self))))

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        documents = plural(self.record["documents"], "document")
        return f"Windows({len(self)} of up to {self.length} tokens, {documents})"


def cut(
    texts: Iterable[Chat] | Chat,
    model: LanguageModel,
    *,
    length: int | None = None,
    per_document: int | None = 2,
    bos: Bos = "auto",
    chat: bool = False,
) -> Windows:
    """Cut documents into unpadded windows of `length` tokens, including BOS (and SEP for an encoder).

    Consecutive windows are taken from the start of each document. The rest at its end is dropped, but a
    document shorter than one window becomes one shorter window. The windows of an encoder begin with [CLS]
    and end with [SEP] by the same rule as for BOS. Documents shorter than two tokens are left out with a
    warning, and their number is recorded.

    The string of a special token, such as "<bos>" or "</s>", is text in a document, also at its start, and a
    warning says how many documents contain one.

    A chat becomes one window, its first `length` tokens as the chat template of the tokenizer writes them,
    without a generation prompt: only the start of a chat stands where the template has it. BOS is there if
    the template writes it. `Windows.roles` has the role of each token. The strings of special tokens are text
    inside a message, so they end no turn.

    Args:
        texts: the documents, or a single one. With `chat`, each is a list of messages with `role` and
            `content`, or a string, which is one message of a user.
        model: the model whose tokenizer is used.
        length: the number of tokens in a window; by default 256, or the context of the model if that is
            shorter.
        per_document: the largest number of windows from one document; None for all. A chat gives one.
        bos: "always" opens each window with BOS, "never" opens none with it, and "auto" follows the model's
            own tokenizer. A warning says where that opens with other tokens. EOS, which some tokenizers
            append, is in no window.
        chat: whether the documents are chats.

    Raises:
        InputError: for a model without a tokenizer, texts that are all shorter than two tokens, a window
            longer than the context, `bos` "always" without a BOS token, a document that is no string or
            contains a lone surrogate, what `documents` reads (a table, a path, the name of a file), and the
            string of a special token where the tokenizer cannot read it as text. With `chat`, for a tokenizer
            without a chat template or without offsets, for `bos` "always" and "never", and for a chat that
            the template refuses or rewrites.

    """
    given = listed_texts(texts, chat)
    if model.tokenizer is None:
        raise InputError(
            f"{model.name} came without a tokenizer: load(model, tokenizer=...) or Windows.of_ids"
        )
    encoder = (ChatEncoder if chat else TextEncoder)(model.tokenizer, model.name)
    if bos not in ("auto", "always", "never"):
        raise InputError(f"bos {bos!r}: choose from auto, always, never")
    if chat and bos != "auto":
        raise InputError(f"bos {bos!r} for chats: a chat opens as its template writes it, so leave out bos")
    if bos == "always" and model.bos is None:
        raise InputError(f"the tokenizer of {model.name} has no BOS token: use bos='never'")
    opening: list[int | None] = []
    if not chat and bos != "never":
        opening = [model.bos] if bos == "always" else list(model.opening)
    closed = (
        not chat and model.sep is not None and bos != "never" and (bos == "always" or model.closes_with_sep)
    )
    closing = [model.sep] if closed else []
    length = min(256, model.context or 256) if length is None else length
    if model.context is not None and length > model.context:
        raise InputError(f"windows of {length} tokens: {model.name} has a context of {model.context}")
    if length < 2 + len(opening) + closed:
        raise InputError(f"windows of {length} tokens: nothing is left to predict")
    span = length - len(opening) - closed  # tokens of the text in a window
    per_document = 1 if chat else per_document
    rows: list[Tensor] = []
    roles: list[list[str]] = []
    owner: list[int] = []
    short: list[Any] = []
    held: list[str] = []
    dropped = 0
    for index, text in enumerate(given):
        ids, said = encoder.read(text, f"document {index}")
        held += encoder.held(text)[:1]
        if len(ids) < 2:
            short.append(text)
            continue
        count = max(1, len(ids) // span)
        count = count if per_document is None else min(count, per_document)
        parts = [ids[i * span : (i + 1) * span] for i in range(count)]
        dropped += len(ids) - sum(map(len, parts))
        rows += [torch.tensor(opening + part + closing) for part in parts]
        roles.append(said[:length])
        owner += [index] * count
    if short and not rows:
        raise InputError(f"the text is shorter than two tokens: {short[0][:40]!r}")
    if short:
        warnings.warn(
            f"documents shorter than two tokens are left out: {len(short)}, such as {short[0][:40]!r}",
            SpectralWarning,
            stacklevel=2,
        )
    if held:
        warnings.warn(
            f"{plural(len(held), 'document')} with strings of special tokens, such as {held[0]!r}, which are "
            "read as text",
            SpectralWarning,
            stacklevel=2,
        )
    if opening not in ([], [model.bos]):
        tokens = listed(map(str, model.tokenizer.convert_ids_to_tokens(opening)))
        scored = " (all but the first of them are scored like the text)" if len(opening) > 1 else ""
        warnings.warn(
            f"windows open as the tokenizer of {model.name} opens a text, with {tokens} rather than with BOS "
            f"alone{scored}: bos='never' or 'always' opens them otherwise",
            SpectralWarning,
            stacklevel=2,
        )
    template = {"chat_template": encoder.template_hash} if isinstance(encoder, ChatEncoder) else {}
    return Windows.of_ids(
        rows,
        model,
        owner,
        roles=roles if chat else None,
        length=length,
        per_document=per_document,
        bos=bos,
        tokens_dropped=dropped,
        documents_dropped=len(short),
        **template,
    )


def listed_texts(texts: Any, chat: bool = False) -> list[Any]:
    """Return the documents as a list. Raises InputError for what `documents` reads.

    Iterating over a table gives the names of its columns, which would be taken for the texts.
    """
    if isinstance(texts, str) or (chat and is_chat(texts) and len(texts) > 0):
        texts = [texts]
    tabular = isinstance(texts, Mapping) or hasattr(texts, "columns") or hasattr(texts, "column_names")
    if tabular or isinstance(texts, PurePath) or not isinstance(texts, Iterable):
        raise InputError(
            f"texts of the type {type(texts).__name__}, expected a string or a list of strings: read files "
            "and tables by ss.documents"
        )
    given: list[Any] = list(texts)
    for text in given:
        if isinstance(text, str) and "." in text[-9:] and os.path.isfile(text):
            raise InputError(f"{text!r} is the name of a file, not a text: read it by ss.documents({text!r})")
    return given
