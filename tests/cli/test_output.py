"""What comes from outside is shown on a terminal and not obeyed, and no key is shown."""

import json
from pathlib import Path

import pytest
from nnsight.schema.config import CONFIG
from rich.console import Group
from rich.text import Text
from support import synthetic_rows, tiny_models

import spectral_sinks as ss
from spectral_sinks.cli import sinks
from spectral_sinks.cli.output import printable, say, show, table
from spectral_sinks.errors import HIDDEN, secrets, without_secrets

KEY = "0a1b2c3d-key-of-ndif"
MARKUP = [
    "[/x]",
    "[red]",
    "[/INST]",
    "[nan, nan]",
    "[0.1, 0.2]",
    ":smile:",
    "a[v2]",
    "[link=x]y[/link]",
    "[",
    "]",
]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain − ä 漢 🙂", "plain − ä 漢 🙂"),
        ("two\nlines\tand a tab", "two\nlines\tand a tab"),
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("over\rwritten", "over\\rwritten"),
        ("\x9b2J", "\\x9b2J"),
        ("\u202ereversed\u2066", "\\u202ereversed\\u2066"),
        ("zero\u200bwidth", "zero\\u200bwidth"),
        ("\udc80", "\\udc80"),
        ("\x00\x07\x7f", "\\x00\\x07\\x7f"),
    ],
)
def test_control_characters_are_shown(text: str, shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert printable(text) == shown
    say(text)
    show(False, {}, table(text.strip(), ("a",), [("b",)]))
    show(False, {}, Group(text, Text(text)))
    out = capsys.readouterr().out
    assert out.startswith(shown + "\n") and "\x1b" not in out and "\r" not in out


@pytest.mark.parametrize("text", MARKUP)
def test_markup_is_text(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    show(False, {}, table("", ("", ""), [(text, "next")]))
    show(False, {}, table(f"{text} title", (f"{text} head",), [("x",)]))
    show(False, {}, Group(text, Text(text)))
    out = capsys.readouterr().out
    assert out.count(text) >= 5 and "next" in out


def test_an_interval_is_not_markup(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [("[nan, nan]",), (sinks._low_high({"a": 0.5, "a_interval": [0.1, 0.2]}, "a"),)]
    show(False, {}, table("", ("",), rows))
    out = capsys.readouterr().out
    assert "[nan, nan]" in out and "0.500 [0.100, 0.200]" in out


def test_folders_with_names_of_markup(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")  # no path is broken
    for name in ("m[/x]", "r[v2]", "[red]"):
        store = ss.sweeps.Store(tmp_path / name)
        store.add("a", synthetic_rows.rows("a"))
        ran = tiny_models.run(capsys, "remote", "status", store.folder)
        assert ran.status == 0 and name in ran.out
        ran = tiny_models.run(capsys, "merge", tmp_path / f"{name} out", store.folder)
        assert ran.status == 0 and f"{name} out" in ran.out
    ran = tiny_models.run(capsys, "remote", "status", tmp_path / "x[/y]\x1b[2J")
    assert ran.status == 2 and "x[/y]\\x1b[2J holds no sweep results" in ran.err


def test_a_bos_token_is_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found = {"causal": True, "bos_token": "\x1b[31m[/INST]", "opens_with_bos": True}
    monkeypatch.setattr(ss, "describe", lambda *_, **__: found)
    ran = tiny_models.run(capsys, "info")
    assert ran.status == 0 and "\\x1b[31m[/INST]" in ran.out and "\x1b" not in ran.out
    ran = tiny_models.run(capsys, "info", "--json")
    assert json.loads(ran.out)["bos_token"] == "\x1b[31m[/INST]" and "\x1b" not in ran.out


def test_no_key_is_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(CONFIG.API, "APIKEY", KEY)
    monkeypatch.setenv("HF_TOKEN", "hf_secret_of_the_hub")
    monkeypatch.setenv("NDIF_API_KEY", "short")
    assert {KEY, "hf_secret_of_the_hub"} <= set(secrets()) and "short" not in secrets()
    told = f"headers {KEY!r}, hf_secret_of_the_hub, short"
    assert without_secrets(told) == f"headers {HIDDEN!r}, {HIDDEN}, short"
    say(told)
    show(False, {}, table(told, (told,), [(told,)]))
    show(True, {"told": [told]}, "")
    monkeypatch.setattr(ss, "describe", lambda *_, **__: (_ for _ in ()).throw(ss.InputError(told)))
    ran = tiny_models.run(capsys, "info")
    assert ran.status == 2 and "short" in ran.err
    for text in (ran.err, ran.out):
        assert KEY not in text and "hf_secret" not in text


def test_a_long_title_is_not_squeezed_into_narrow_columns(capsys: pytest.CaptureFixture[str]) -> None:
    title = "Heads with a no-op circuit of a model with a long name, at position 0"
    show(False, {}, table(title, ("head",), [("none",)]))
    assert len(title) > 60 and len(capsys.readouterr().out.splitlines()) <= 8
