"""Documents from every source that people have: no mark, line end or name of a column becomes text."""

import codecs
import gc
import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
from huggingface_hub import HfApi
from hypothesis import given
from hypothesis import strategies as st

import spectral_sinks as ss
from spectral_sinks.data.document_sources import decoded

TEXTS = ["w5 w6 w7", "w8 w9", "zwölf • 12"]


@pytest.fixture
def closed() -> Iterator[None]:
    """Meet here the files that `datasets` leaves for the garbage collector to close."""
    yield
    gc.collect()


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le"])
@pytest.mark.parametrize("name", ["my.txt", "my.jsonl"])
def test_wide_characters_without_a_mark_are_no_utf8(encoding: str, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(json.dumps({"text": "w5 w6"}).encode(encoding))
    with pytest.raises(ss.InputError, match=f"{name} is not UTF-8 text .it holds NUL characters, as UTF-16"):
        ss.documents(tmp_path / name)


@pytest.mark.usefixtures("closed")
@pytest.mark.filterwarnings("ignore:unclosed file", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet", "txt"])
def test_documents_of_a_file(tmp_path: Path, form: str) -> None:
    path, table = tmp_path / f"my.{form}", pd.DataFrame({"id": range(3), "text": TEXTS})
    if form == "jsonl":
        path.write_text("".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in enumerate(TEXTS)))
    elif form == "csv":
        table.to_csv(path, index=False)
    elif form == "parquet":
        table.to_parquet(path)
    else:
        path.write_text("\n--\n".join(TEXTS), encoding="utf-8")
        assert ss.documents(path) == ["\n--\n".join(TEXTS)], "one document without a separator"
        assert ss.documents(str(path), separator="\n--\n") == TEXTS
        return
    assert ss.documents(path) == TEXTS and ss.documents(str(path), limit=2) == TEXTS[:2]
    assert ss.documents(path, column="text") == TEXTS
    with pytest.raises(ss.InputError, match="no column 'body'; columns: id, text"):
        ss.documents(path, column="body")


def test_documents_of_anything_else() -> None:
    rows = [{"text": t, "body": t.upper()} for t in TEXTS]
    assert ss.documents("a text of its own") == ["a text of its own"]
    assert ss.documents(TEXTS) == ss.documents(iter(TEXTS)) == ss.documents(rows) == TEXTS
    assert ss.documents(datasets.Dataset.from_list(rows)) == TEXTS
    assert ss.documents(datasets.Dataset.from_list(rows).to_iterable_dataset(), limit=1) == TEXTS[:1]
    assert ss.documents(rows, column="body") == [t.upper() for t in TEXTS]
    with pytest.warns(ss.SpectralWarning, match="3 rows hold no text, and are left out"):
        assert ss.documents(["", " \n", "w5 w6", None]) == ["w5 w6"], "what is empty is passed over"
    with pytest.warns(ss.SpectralWarning, match="1 row holds no text, and is left out"):
        assert ss.documents(["", *TEXTS], limit=2) == TEXTS[:2], "and does not count"
    assert ss.documents(io.StringIO("w5 w6\nw7 w8\n")) == ["w5 w6\n", "w7 w8\n"]
    corpus = ss.documents()
    assert len(corpus) > 20 and all(len(t) > 200 for t in corpus) and ss.documents(limit=3) == corpus[:3]


@pytest.mark.parametrize("empty", ["", "  \n", [], ["", " "]], ids=repr)
def test_no_text_at_all(empty: Any) -> None:
    with pytest.raises(ss.InputError, match="the text is empty"):
        ss.documents(empty)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ss.InputError, match=r"is a folder without .txt files: give a file, or a folder"):
        ss.documents(tmp_path)
    with pytest.raises(ss.InputError, match="does not exist"):
        ss.documents(tmp_path / "missing.txt")
    latin = tmp_path / "latin.txt"
    latin.write_bytes("zwölf".encode("latin-1"))
    with pytest.raises(ss.InputError, match=r"is not UTF-8 text \(.* 0xf6 at byte 2, which is 'ö' in cp1252"):
        ss.documents(latin)
    for name in ("broken.jsonl", "broken.parquet"):
        (tmp_path / name).write_text('{"text": "w5')
        with pytest.raises(ss.InputError, match=f"{name} cannot be read as"):
            ss.documents(tmp_path / name)
    with pytest.raises(ss.InputError, match=r"row 1 .* is int"):
        ss.documents(["w5 w6", 7])
    with pytest.raises(ss.InputError, match=r"row 0 .* is int"):
        ss.documents([{"text": 7}])


def test_a_data_set_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked first whether the hub knows it, then streamed; no network here."""
    asked: list[Any] = []
    rows = datasets.Dataset.from_dict({"body": TEXTS}).to_iterable_dataset()
    monkeypatch.setattr(HfApi, "dataset_info", lambda self, name, **_: asked.append(name))
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **o: asked.append((a, o)) or rows)
    found = ss.documents("owner/set", name="part", split="test", column="body", limit=2)
    assert found == TEXTS[:2]
    assert asked == ["owner/set", (("owner/set", "part"), {"split": "test", "streaming": True})]

    def unknown(*_: Any, **__: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(HfApi, "dataset_info", unknown)
    with pytest.raises(ss.InputError, match=r"is not a file, and as a data set of the hub .*no network"):
        ss.documents("owner/set")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (codecs.BOM_UTF16_LE + "w5".encode("utf-16-le"), "begins with the byte order mark of UTF-16"),
        (codecs.BOM_UTF16_BE + "w5".encode("utf-16-be"), "begins with the byte order mark of UTF-16"),
        (codecs.BOM_UTF32_LE + "w5".encode("utf-32-le"), "begins with the byte order mark of UTF-32"),
        (codecs.BOM_UTF32_BE + "w5".encode("utf-32-be"), "begins with the byte order mark of UTF-32"),
        (codecs.BOM_UTF8 + b"w5 \x93w6\x94", "0x93 at byte 6, which is '“' in cp1252"),
        (b"w5 \x81", r"0x81 at byte 3\)"),
    ],
)
def test_another_encoding_is_named(data: bytes, message: str, tmp_path: Path) -> None:
    for name in ("my.txt", "my.jsonl", "my.csv"):
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(ss.InputError, match=f"{name} is not UTF-8 text .*{message}.*: save it as UTF-8"):
            ss.documents(path)


@pytest.mark.usefixtures("closed")
@pytest.mark.filterwarnings("ignore:unclosed file", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_packed_files_and_tables_with_tabs(tmp_path: Path) -> None:
    table = pd.DataFrame({"n": range(3), "text": TEXTS})
    contents = {
        "my.txt.gz": "\ufeffw5 w6\r\nw7",
        "my.jsonl.gz": "".join(json.dumps({"text": text}) + "\n\n" for text in TEXTS),
        "my.csv.gz": table.to_csv(index=False),
        "my.tsv.gz": table.to_csv(index=False, sep="\t"),
        "my.tsv": table.to_csv(index=False, sep="\t"),
    }
    for name, content in contents.items():
        data = content.encode()
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        found = ss.documents(tmp_path / name)
        assert found == (["w5 w6\nw7"] if name == "my.txt.gz" else TEXTS), name
        if name.endswith(".gz"):
            for broken in (gzip.compress(data * 50)[:-9], data, gzip.compress(data * 50)[:40] + b"x" * 40):
                (tmp_path / name).write_bytes(broken)
                with pytest.raises(
                    ss.InputError, match=rf"{name} cannot be unpacked .*: fetch or pack it again"
                ):
                    ss.documents(tmp_path / name)
        (tmp_path / name).unlink()
    (tmp_path / "latin.txt.gz").write_bytes(gzip.compress(b"zw\xf6lf"))
    with pytest.raises(ss.InputError, match="is not UTF-8 text"):
        ss.documents(tmp_path / "latin.txt.gz")
    for name in ("my.gz", "my.zip", "my.tar.gz", "my.txt.bz2"):
        (tmp_path / name).write_bytes(gzip.compress(b"w5 w6"))
        with pytest.raises(
            ss.InputError, match=rf"{name} is packed: unpack it, or give .* .txt.gz, .jsonl.gz"
        ):
            ss.documents(tmp_path / name)


@pytest.mark.parametrize(
    "name", ["my.txt", "my.jsonl", "my.json", "my.csv", "my.tsv", "my.jsonl.gz", "my.csv.gz"]
)
@pytest.mark.parametrize("content", ["", "\n\n", "\ufeff"])
def test_empty_files(tmp_path: Path, name: str, content: str) -> None:
    data = content.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    with pytest.raises(ss.InputError, match="the text is empty"):
        ss.documents(tmp_path / name)


@pytest.mark.usefixtures("unchecked")
def test_what_is_no_text() -> None:
    for source in (3, float("nan"), object()):
        with pytest.raises(ss.InputError, match=f"texts of the type {type(source).__name__}: give a file"):
            ss.documents(source)
    assert ss.documents("zwölf w6".encode()) == ["zwölf w6"]
    with pytest.raises(ss.InputError, match="the text is not UTF-8"):
        ss.documents("zwölf w6".encode("latin-1"))
    for limit in (0, -3):
        with pytest.raises(ss.InputError, match=f"limit {limit}: give at least 1"):
            ss.documents(TEXTS, limit=limit)


def test_separators_without_text_between_them_are_no_empty_documents(tmp_path: Path) -> None:
    (tmp_path / "my.txt").write_text("\n\nw5 w6\n\n \n\nw7\n\n")
    assert ss.documents(tmp_path / "my.txt", separator="\n\n") == ["w5 w6", "w7"]


@given(st.text(), st.booleans(), st.sampled_from(["\n", "\r\n", "\r"]))
def test_a_mark_and_line_ends_are_no_text(text: str, mark: bool, end: str) -> None:
    text = text.replace("\r", "").replace("\0", "").removeprefix("\ufeff")
    data = codecs.BOM_UTF8 * mark + text.replace("\n", end).encode()
    assert decoded(data, "it") == text


@pytest.mark.usefixtures("closed")
@pytest.mark.filterwarnings("ignore:unclosed file", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_files_from_windows(tmp_path: Path) -> None:
    contents = {
        "my.txt": "w5 w6\r\nw7\r\n--\r\nw8",
        "my.jsonl": '\r\n{"text": "w5 w6"}\r\n  \r\n\r\n{"text": "w8"}\r\n\r\n',
        "my.csv": "text,n\r\nw5 w6,1\r\nw8,2\r\n",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(codecs.BOM_UTF8 + content.encode())
    assert ss.documents(tmp_path / "my.txt") == ["w5 w6\nw7\n--\nw8"]
    for separator in ("\n--\n", "\r\n--\r\n"):
        assert ss.documents(tmp_path / "my.txt", separator=separator) == ["w5 w6\nw7", "w8"]
    for name in ("my.jsonl", "my.csv"):
        assert ss.documents(tmp_path / name) == ["w5 w6", "w8"]


def test_a_folder_of_texts(tmp_path: Path) -> None:
    files = {"b.txt": "w7 w8", "a.txt": "w5 w6", "c.TXT": "w9", "._a.txt": "x", "d.md": "y"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    for source in (tmp_path, str(tmp_path)):
        with pytest.warns(
            ss.SpectralWarning, match=r"also holds what is no \.txt file and is left out: d\.md$"
        ):
            assert ss.documents(source) == ["w5 w6", "w7 w8", "w9"]
    (tmp_path / "e.jsonl").touch()
    with pytest.warns(ss.SpectralWarning, match=r"left out: d\.md and 1 more"):
        ss.documents(tmp_path, limit=1)
    (tmp_path / "e.jsonl").unlink()
    (tmp_path / "d.md").unlink()
    assert ss.documents(tmp_path) == ["w5 w6", "w7 w8", "w9"], "and nothing is said"
    (tmp_path / "b.txt").write_bytes(b"\xff")
    with pytest.raises(ss.InputError, match=r"b\.txt is not UTF-8"):
        ss.documents(tmp_path)


def test_tables_are_no_lists_of_names() -> None:
    frame = pd.DataFrame({"label": range(3), "text": ["w5 w6", None, float("nan")]})
    for table in (frame, frame["text"]):
        with pytest.warns(ss.SpectralWarning, match="2 rows hold no text"):
            assert ss.documents(table) == ["w5 w6"]
    assert ss.documents(pd.Series(TEXTS)) == TEXTS
    assert ss.documents({"some label": [1, 2], "text": TEXTS}) == TEXTS
    assert ss.documents({"text": "w5 w6"}) == ["w5 w6"], "one row"
    rows = datasets.Dataset.from_dict({"text": TEXTS})
    splits = datasets.DatasetDict({"train": rows, "some part": rows.select([1])})
    assert ss.documents(splits) == TEXTS and ss.documents(splits, split="some part") == [TEXTS[1]]
    with pytest.raises(ss.InputError, match="no split 'test': give split= one of 'train', 'some part'"):
        ss.documents(splits, split="test")
    for table in (frame.drop(columns="text"), {"label": [1]}):
        with pytest.raises(ss.InputError, match="no column 'text'; columns: label"):
            ss.documents(table)


CHATS = [
    [{"role": "user", "content": "w5"}, {"role": "assistant", "content": "w6"}],
    [{"role": "user", "content": "w7"}],
]


@pytest.mark.usefixtures("closed")
@pytest.mark.filterwarnings("ignore:unclosed file", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_chats_in_every_form(tmp_path: Path) -> None:
    rows = [{"text": "w5 w6", "messages": chat} for chat in CHATS]
    forms: list[Any] = [rows, pd.DataFrame(rows), datasets.Dataset.from_list(rows), {"messages": CHATS}]
    for form in forms:
        assert ss.documents(form, chat=True) == ss.documents(form, column="messages") == CHATS
    assert ss.documents(rows) == ["w5 w6"] * 2, "text comes first where no chats are asked for"
    assert ss.documents([{"messages": chat} for chat in CHATS]) == CHATS, "and chats where there is no text"
    with pytest.warns(ss.SpectralWarning, match="1 row holds no text"):
        assert ss.documents([*CHATS, []]) == ss.documents(CHATS) == CHATS
    assert ss.documents(CHATS[0]) == ss.documents({"messages": CHATS[0]}) == CHATS[:1], "one chat"
    assert ss.documents(["w5 w6", CHATS[1]], chat=True) == ["w5 w6", CHATS[1]]
    assert ss.documents([{"text": "w5 w6"}], chat=True) == ["w5 w6"]
    assert ss.documents([{"messages": np.array(CHATS[0], dtype=object)}]) == CHATS[:1]
    path = tmp_path / "my.jsonl"
    path.write_text("\n\n".join(json.dumps(row) for row in rows))
    assert ss.documents(path, chat=True) == CHATS
    with pytest.raises(ss.InputError, match="row 0 of the texts is list, expected a string or a list"):
        ss.documents([["w5"]])


def test_half_a_surrogate_pair() -> None:
    with pytest.raises(ss.InputError, match=r"document 1 contains '\\ud83d' at character 1"):
        ss.documents(["w5 w6", "w\ud83d"])
    assert ss.documents(["w \U0001f600"]) == ["w \U0001f600"]
