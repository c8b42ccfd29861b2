"""Long texts for a cache: documents joined until they have a number of tokens."""

import warnings
from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from spectral_sinks.data.texts import Bos, listed_texts
from spectral_sinks.data.token_ids import TextEncoder
from spectral_sinks.errors import InputError, SpectralWarning
from spectral_sinks.models.language import LanguageModel


def join_documents(
    documents: Iterable[str] | str,
    model: LanguageModel,
    *,
    length: int,
    count: int = 1,
    bos: Bos = "auto",
) -> Int[Tensor, "texts tokens"]:
    """Return texts of equal length, each of which consists of consecutive documents.

    A text opens with the tokens with which the tokenizer opens a text, and nothing is put between its
    documents. It begins with the beginning of a document, so what is left of the last document of the text
    before is dropped; a single document is cut into consecutive texts. A warning says where there are fewer
    texts than `count`. If there is not even one of `length` tokens, the result is a single shorter text, with
    a warning.

    Args:
        documents: the documents, or a single one.
        model: the model whose tokenizer is used.
        length: number of tokens of a text, with those that open it. It may exceed the context of the model.
        count: the largest number of texts.
        bos: "always" opens each text with BOS, "never" with nothing, and "auto" as the tokenizer does.

    Raises:
        InputError: for a model without a tokenizer, or without BOS for "always", for what `documents` reads
            (a table, a path, the name of a file), and for a text in which nothing is left to predict.

    """
    if model.tokenizer is None:
        raise InputError(f"{model.name} came without a tokenizer: load(model, tokenizer=...)")
    if bos == "always" and model.bos is None:
        raise InputError(f"the tokenizer of {model.name} has no BOS token: use bos='never'")
    opening: list[int] = []
    if bos != "never":
        opening = [int(model.bos)] if bos == "always" and model.bos is not None else list(model.opening)
    if length < 2 + len(opening) or count < 1:
        raise InputError(
            f"{count} texts of {length} tokens: expected at least one, of at least {2 + len(opening)} tokens"
        )
    given = listed_texts(documents)
    encoder = TextEncoder(model.tokenizer, model.name)
    rows: list[list[int]] = []
    current = list(opening)
    for index, document in enumerate(given):
        ids, _ = encoder.read(document, f"document {index}")
        while ids and len(rows) < count:
            taken = length - len(current)
            current, ids = current + ids[:taken], ids[taken:]
            if len(current) == length:
                rows.append(current)
                current = list(opening)
                if len(given) > 1:
                    break
        if len(rows) == count:
            break
    _warn(rows, current, length, count)
    rows = rows or [current]
    if len(rows[0]) < 2 + len(opening):
        raise InputError("the text has fewer than two tokens: nothing is left to predict")
    return torch.tensor(rows)


def _warn(rows: Sequence[Sequence[int]], rest: Sequence[int], length: int, count: int) -> None:
    if len(rows) == count:
        return
    if rows:
        said = f"the documents give {len(rows)} texts of {length} tokens, and {count} were asked for"
    else:
        said = f"the documents have {len(rest)} tokens, and {length} were asked for: all of them are read"
    warnings.warn(said, SpectralWarning, stacklevel=3)
