"""Cutting of texts into documents and token windows, with a record of every choice."""

import hashlib
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
from huggingface_hub import HfApi
from jaxtyping import Int
from torch import Tensor

from spectral_sinks.errors import InputError, SpectralWarning
from spectral_sinks.models import embedded
from spectral_sinks.models.checkpoint import TIMEOUT
from spectral_sinks.models.language import LanguageModel
from spectral_sinks.models.masked_lm import RULE

CORPUS = embedded.FOLDER / "corpus.jsonl"
"""The shipped corpus: held-out Wikipedia articles (CC BY-SA; attribution by the url of each row)."""

Bos = Literal["auto", "always", "never"]

BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".gz": "json"}


def documents(
    source: str | Path | Iterable[Any] | None = None,
    *,
    split: str = "train",
    column: str = "text",
    name: str | None = None,
    limit: int | None = None,
    separator: str | None = None,
) -> list[str]:
    """Load texts as a list with one string per document.

    A source can be:

    - None for the shipped corpus;
    - a file: .txt is one document, or several between `separator`; .jsonl, .csv and .parquet have one
      document per row, in `column`;
    - a string with white space, which is the text itself;
    - any other string, a data set id of the hub, which is streamed;
    - any iterable of strings or of rows, such as a `datasets` object.

    Args:
        source: where the texts come from, as listed above.
        split: the split of a data set of the hub.
        column: the column that holds the text, where the source has rows.
        name: the configuration of a data set of the hub.
        limit: the number of documents to keep, from the first.
        separator: the string between documents in a .txt file.

    Raises:
        InputError: for a source that does not exist or cannot be reached, a missing column, and empty texts.

    """
    if source is None:
        source = CORPUS
    if isinstance(source, str) and (any(c.isspace() for c in source) or not source):
        found: Iterable[Any] = [source]
    elif isinstance(source, Path) or (isinstance(source, str) and _is_path(source)):
        found = _from_file(Path(source).expanduser(), separator)
    elif isinstance(source, str):
        found = _from_hub(source, name, split)
    else:
        found = source
    taken: list[str] = []
    for place, row in enumerate(found):
        if limit is not None and len(taken) == limit:
            break
        if isinstance(row, Mapping):
            if column not in row:
                raise InputError(f"rows have no column {column!r}; columns: {', '.join(row)}")
            row = row[column]
        if not isinstance(row, str | None):
            raise InputError(f"row {place} of the texts is {type(row).__name__}, expected a string")
        if row and row.strip():
            taken.append(row)
    if not taken:
        raise InputError("the text is empty: give at least one document of two tokens")
    return taken


def _is_path(source: str) -> bool:
    """Whether a name without white space means a file rather than a data set of the hub."""
    return source[0] in "./~" or Path(source).suffix in {".txt", *BUILDERS} or Path(source).exists()


def _from_file(path: Path, separator: str | None) -> Iterable[Any]:
    if path.is_dir():
        raise InputError(f"{path} is a folder: give a file of text")
    if not path.exists():
        raise InputError(f"{path} does not exist")
    if path.suffix in BUILDERS:
        return _rows(path, BUILDERS[path.suffix])
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    return text.split(separator) if separator else [text]


def _rows(path: Path, builder: str) -> Iterator[Any]:
    """Stream the rows of a table, without the cache of `datasets`, which may be read-only."""
    files = {"train": str(path)}
    try:
        with tempfile.TemporaryDirectory() as cache:
            yield from datasets.load_dataset(
                builder, data_files=files, split="train", streaming=True, cache_dir=cache
            )
    except (ValueError, OSError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise InputError(f"{path} cannot be read as {builder}: {error}") from error


def _from_hub(source: str, name: str | None, split: str) -> Iterable[Any]:
    try:
        HfApi().dataset_info(source, timeout=TIMEOUT)
        return datasets.load_dataset(source, name, split=split, streaming=True)
    except Exception as error:  # errors of several libraries behind the hub client
        raise InputError(
            f"{source!r} is not a file, and as a data set of the hub it cannot be read ({error}); "
            "a text itself needs white space"
        ) from error


@dataclass(frozen=True, eq=False)
class Windows:
    """Unpadded token windows, with the document that each comes from."""

    rows: tuple[Int[Tensor, "_"], ...]
    document: tuple[int, ...]
    record: dict[str, Any] = field(default_factory=dict)
    """How the windows were cut: policy, counts, first token ids, hash of the ids, and the masking rule for an
    encoder.
    """

    @classmethod
    def of_ids(
        cls,
        ids: Int[Tensor, "windows tokens"] | Sequence[Int[Tensor, "_"] | Sequence[int]],
        model: LanguageModel,
        document: Sequence[int] | None = None,
        **record: Any,
    ) -> "Windows":
        """Make windows from token ids; without `document`, each window is a document of its own.

        Raises InputError for no windows, ids outside the vocabulary, windows of fewer than two tokens, and
        windows longer than the model's context.
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
            record |= {"closes_with_sep": closed, "masking": RULE}
        return cls(rows, owner, record)

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
        return f"Windows({len(self)} of up to {self.length} tokens, {self.record['documents']} documents)"


def cut(
    texts: Iterable[str] | str,
    model: LanguageModel,
    *,
    length: int | None = None,
    per_document: int | None = 2,
    bos: Bos = "auto",
) -> Windows:
    """Cut documents into unpadded windows of `length` tokens, including BOS (and SEP for an encoder).

    Consecutive windows are taken from the start of each document. The rest at its end is dropped, but a
    document shorter than one window becomes one shorter window. A BOS at the start of the text itself is not
    doubled. The windows of an encoder begin with [CLS] and end with [SEP] by the same rule as for BOS.
    Documents shorter than two tokens are left out with a warning, and their number is recorded.

    Args:
        texts: the documents, or a single one.
        model: the model whose tokenizer is used.
        length: the number of tokens in a window; by default 256, or the context of the model if that is
            shorter.
        per_document: the largest number of windows from one document; None for all.
        bos: "always" opens each window with BOS, "never" opens none with it, and "auto" follows the model's
            own tokenizer.

    Raises:
        InputError: for a model without a tokenizer, texts that are all shorter than two tokens, a window
            longer than the context, and `bos` "always" without a BOS token.

    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    if model.tokenizer is None:
        raise InputError(
            f"{model.name} came without a tokenizer: load(model, tokenizer=...) or Windows.of_ids"
        )
    if bos not in ("auto", "always", "never"):
        raise InputError(f"bos {bos!r}: choose from auto, always, never")
    if bos == "always" and model.bos is None:
        raise InputError(f"the tokenizer of {model.name} has no BOS token: use bos='never'")
    opened = bos == "always" or (bos == "auto" and model.opens_with_bos)
    closed = model.sep is not None and (bos == "always" or (bos == "auto" and model.closes_with_sep))
    opening = [model.bos] if opened else []
    closing = [model.sep] if closed else []
    length = min(256, model.context or 256) if length is None else length
    if model.context is not None and length > model.context:
        raise InputError(f"windows of {length} tokens: {model.name} has a context of {model.context}")
    if length < 2 + opened + closed:
        raise InputError(f"windows of {length} tokens: nothing is left to predict")
    span = length - opened - closed  # tokens of the text in a window
    rows: list[Tensor] = []
    owner: list[int] = []
    short: list[str] = []
    dropped = 0
    for index, text in enumerate(texts):
        ids = model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        while model.bos is not None and ids[:1] == [model.bos]:
            ids = ids[1:]
        while closed and ids[-1:] == closing:
            ids = ids[:-1]
        if len(ids) < 2:
            short.append(text)
            continue
        count = max(1, len(ids) // span)
        count = count if per_document is None else min(count, per_document)
        parts = [ids[i * span : (i + 1) * span] for i in range(count)]
        dropped += len(ids) - sum(map(len, parts))
        rows += [torch.tensor(opening + part + closing) for part in parts]
        owner += [index] * count
    if short and not rows:
        raise InputError(f"the text is shorter than two tokens: {short[0][:40]!r}")
    if short:
        warnings.warn(
            f"{len(short)} documents shorter than two tokens are left out, such as {short[0][:40]!r}",
            SpectralWarning,
            stacklevel=2,
        )
    return Windows.of_ids(
        rows,
        model,
        owner,
        length=length,
        per_document=per_document,
        bos=bos,
        tokens_dropped=dropped,
        documents_dropped=len(short),
    )
