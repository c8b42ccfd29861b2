"""Texts to documents to windows: no BOS doubled or lost, nothing padded, every token accounted for."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import tiny_models
from tokenizers.processors import TemplateProcessing

import spectral_sinks as ss

WORDS = st.integers(3, tiny_models.VOCABULARY - 1)


def text_of(ids: list[int]) -> str:
    return " ".join(f"w{i}" for i in ids)


def model_with(**policy: bool) -> ss.LanguageModel:
    """Make the tiny model with another tokenizer, without wrapping it again."""
    known = tiny_models.model()
    return ss.LanguageModel(known.nn, known.layout, known.name, tiny_models.tokenizer(**policy))


OPENING, SILENT, BARE = model_with(), model_with(opens=False), model_with(bos=False)


@pytest.mark.parametrize(
    ("model", "bos", "opened"),
    [
        (OPENING, "auto", True),
        (OPENING, "always", True),
        (OPENING, "never", False),
        (SILENT, "auto", False),
        (SILENT, "always", True),
        (SILENT, "never", False),
        (BARE, "auto", False),
        (BARE, "never", False),
    ],
    ids=[
        "auto",
        "always",
        "never",
        "silent auto",
        "silent always",
        "silent never",
        "bare auto",
        "bare never",
    ],
)
@given(
    documents=st.lists(st.lists(WORDS, min_size=2, max_size=60), min_size=1, max_size=4),
    length=st.integers(3, 30),
    per_document=st.one_of(st.none(), st.integers(1, 3)),
)
def test_cut(
    model: ss.LanguageModel,
    bos: Any,
    opened: bool,
    documents: list[list[int]],
    length: int,
    per_document: int | None,
) -> None:
    windows = ss.cut(
        [text_of(d) for d in documents], model, length=length, per_document=per_document, bos=bos
    )
    span, dropped = length - opened, 0
    for index, ids in enumerate(documents):
        mine = [
            row.tolist() for row, owner in zip(windows.rows, windows.document, strict=True) if owner == index
        ]
        if opened:
            assert all(row[0] == tiny_models.BOS for row in mine)
            mine = [row[1:] for row in mine]
        assert all(tiny_models.BOS not in row and tiny_models.EOS not in row for row in mine), (
            "not doubled, not padded"
        )
        flat = [i for row in mine for i in row]
        assert flat == ids[: len(flat)], "windows follow one another from the start"
        if len(ids) < span:
            assert mine == [ids], "a short document is one shorter window"
        else:
            assert all(len(row) == span for row in mine)
            assert len(mine) == min(len(ids) // span, per_document or len(ids))
        dropped += len(ids) - len(flat)
    record = windows.record
    assert windows.opens_with_bos == opened
    assert record["documents"] == len(documents) and record["windows"] == len(windows)
    assert record["tokens"] == sum(len(row) for row in windows.rows)
    assert (record["tokens_dropped"], record["length"], record["bos"]) == (dropped, length, bos)
    assert record["per_document"] == per_document
    assert windows.first_token_ids == sorted({int(row[0]) for row in windows.rows})


def test_what_auto_does_is_what_the_tokenizer_does() -> None:
    for model in (OPENING, SILENT, BARE):
        own = model.tokenizer("w5 w6 w7")["input_ids"]
        assert ss.cut("w5 w6 w7", model).rows[0].tolist() == own
        assert model.opens_with_bos == (own[0] == tiny_models.BOS)


def test_the_default_length_is_256_or_the_context() -> None:
    assert ss.cut(tiny_models.text(300), OPENING).length == tiny_models.CONTEXT
    embedded = ss.load()
    assert ss.cut(ss.documents(limit=2), embedded).length <= min(256, embedded.context or 256)


def test_the_hash_tells_windows_apart() -> None:
    one, same, other = (ss.cut(t, OPENING).record["data_hash"] for t in ("w5 w6", "w5 w6", "w6 w5"))
    assert one == same != other


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        (["w8", "w7"], {}, "the text is shorter than two tokens: 'w8'"),
        (["<bos> <bos> w7"], {}, "document 0 contains '<bos>', which the tokenizer of .* reads as a special"),
        (["w5 w6", "w7 \udfff"], {}, r"document 1 contains '\\udfff' at character 3, which is half of a"),
        (["w5 w6", 7], {}, "document 1 is int, expected a string"),
        (["w5 w6"], {"length": 129}, "windows of 129 tokens: .* context of 128"),
        (["w5 w6"], {"length": 2}, "nothing is left to predict"),
        (["w5 w6"], {"bos": "sometimes"}, "choose from auto, always, never"),
        ([], {}, "at least one"),
    ],
)
def test_cut_refuses(texts: list[str], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ss.InputError, match=message):
        ss.cut(texts, OPENING, **options)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "kind", [dict, pd.DataFrame, datasets.Dataset.from_dict, Path, datasets.DatasetDict, int]
)
def test_names_are_no_texts(kind: Callable[[Any], Any]) -> None:
    """Iterating over a table gives the names of its columns, and over splits theirs."""
    texts: Any = {"text": ["w5 w6"], "a long label": ["w7 w8"]}
    splits = {"w5 w6": datasets.Dataset.from_dict(texts)}
    given = {Path: "w5 w6.txt", int: 5, datasets.DatasetDict: splits}.get(kind, texts)
    with pytest.raises(ss.InputError, match=r"expected a string or a list of strings: .* by ss\.documents"):
        ss.cut(kind(given), OPENING)


def test_the_name_of_a_file_is_no_text(tmp_path: Path) -> None:
    (file := tmp_path / "w5 w6.txt").write_text("w5 w6 w7")
    for texts in (str(file), ["w5 w6", str(file)]):
        with pytest.raises(ss.InputError, match=r"the name of a file, not a text: read it by ss\.documents"):
            ss.cut(texts, OPENING)
    assert (
        ss.cut(["w5 w6.txt"], OPENING).rows[0].tolist()[1:] == OPENING.tokenizer("w5 w6.txt")["input_ids"][1:]
    )


def test_a_short_document_among_others_is_left_out_and_counted() -> None:
    with pytest.warns(ss.SpectralWarning, match="documents .* are left out: 1, such as .w7."):
        windows = ss.cut(["w5 w6", "w7", "w8 w9"], OPENING)
    assert [row.tolist()[1:] for row in windows.rows] == [[5, 6], [8, 9]]
    assert windows.document == (0, 2)
    assert windows.record["documents"] == 2
    assert windows.record["documents_dropped"] == 1


def test_windows_as_documents() -> None:
    windows = ss.cut("w5 w6 w7 w8 w9 w5", OPENING, length=3, per_document=None)
    assert windows.document == (0, 0, 0)
    single = windows.as_documents()
    assert single.document == (0, 1, 2)
    assert single.rows is windows.rows


def test_always_bos_needs_one() -> None:
    with pytest.raises(ss.InputError, match="has no BOS token: use bos='never'"):
        ss.cut("w5 w6", BARE, bos="always")


@pytest.mark.parametrize("size", range(1, 10))
@pytest.mark.parametrize("count", range(1, 21))
def test_batches(size: int, count: int) -> None:
    rows = [torch.full((5 if i % 3 else 2,), 3 + i) for i in range(count)]
    windows, seen = ss.Windows.of_ids(rows, OPENING), list[int]()
    for places, ids in windows.batches(size):
        assert ids.tolist() == [rows[place].tolist() for place in places] and 1 <= len(places) <= size
        alike = sum(len(row) == ids.shape[1] for row in rows)
        assert len(places) > 1 or alike == 1 or size <= 2, "alone only where no other has its length"
        seen += places
    assert sorted(seen) == list(range(count))


def test_windows_of_given_ids() -> None:
    windows = ss.Windows.of_ids([[0, 5, 6], [0, 7, 8, 9]], OPENING, [4, 4], note="mine")
    assert windows.document == (4, 4) and len(windows) == 2 and windows.length == 4
    assert windows.record["note"] == "mine" and windows.record["documents"] == 1
    assert windows.opens_with_bos and not ss.Windows.of_ids([[0, 5], [5, 0]], OPENING).opens_with_bos
    assert not ss.Windows.of_ids([[0, 5]], BARE).opens_with_bos
    with pytest.raises(ss.InputError, match="batches of 0 windows"):
        list(windows.batches(0))


def test_neighbours_in_a_batch_are_of_different_documents() -> None:
    windows = ss.cut(["w5 w6 w7 w8", "w8 w9 w5 w6", "w7 w5 w9 w8"], OPENING, length=3)
    for places, _ in windows.batches(3):
        assert sorted(windows.document[place] for place in places) == [0, 1, 2]


@pytest.mark.parametrize(
    ("template", "opening", "closing"),
    [
        ("<bos> $A <eos>", [0], 0),
        ("$A <eos>", [], 0),
        ("<eos> $A", [1], 1),
        ("<eos> <bos> $A <eos>", [1, 0], 1),
        ("<bos> <bos> $A", [0, 0], 1),
    ],
)
def test_windows_open_as_the_tokenizer_opens_texts(template: str, opening: list[int], closing: int) -> None:
    """And EOS, which some tokenizers append, is in none of them."""
    words = tiny_models.tokenizer(opens=False)
    words.backend_tokenizer.post_processor = TemplateProcessing(
        single=template, special_tokens=[("<bos>", 0), ("<eos>", 1)]
    )
    known = tiny_models.model()
    model = ss.LanguageModel(known.nn, known.layout, known.name, words)
    ids = list(range(5, 45))
    assert words(text_of(ids))["input_ids"][: len(opening) + 1] == [*opening, 5], "of the tokenizer itself"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        windows = ss.cut([text_of(ids)], model, length=12, per_document=None)
    span = 12 - len(opening)
    assert [row.tolist() for row in windows.rows] == [
        opening + ids[start : start + span] for start in range(0, 40 - span + 1, span)
    ]
    said = [str(each.message) for each in caught if issubclass(each.category, ss.SpectralWarning)]
    assert len(said) == closing and all("rather than with BOS alone" in each for each in said)
    assert ("all but the first of them are scored" in "".join(said)) == (len(opening) > 1)
    assert windows.opens_with_bos == (opening[:1] == [0])
    always = ss.cut([text_of(ids)], model, length=12, bos="always")
    never = ss.cut([text_of(ids)], model, length=12, bos="never")
    assert always.first_token_ids == [0] and always.rows[0].tolist() == [0, *ids[:11]]
    assert never.rows[0].tolist() == ids[:12]
