"""The commands that write pages: what they print and refuse, and the command that a page states."""

import json
from pathlib import Path

import pytest
from support import page_images, tiny_models

import spectral_sinks as ss


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save(tmp_path_factory.mktemp("checkpoint") / "model")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": tiny_models.text(90, seed)}) + "\n" for seed in range(2)))
    return path


def test_report_writes_a_page_and_says_the_verdict(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "page.html"
    arguments = ("report", checkpoint, "--text", text, "--length", 70, "--bands", 4, "--draws", 2)
    ran = tiny_models.run(capsys, *arguments, "--out", out)
    assert (ran.status, ran.err) == (0, "")
    assert "attention sink" in ran.out and str(out) in ran.out
    page = out.read_text(encoding="utf-8")
    assert f"spectral-sinks report {checkpoint} --text {text} --length 70 --bands 4" in page
    ran = tiny_models.run(capsys, *arguments, "--out", out, "--json")
    found = json.loads(ran.out)
    assert found["convention"] == "folded" and found["page"] == str(out) and found["absent"] == {}


def test_explore_writes_a_page_of_one_window_per_document(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "page.html"
    arguments = ("explore", checkpoint, "--text", text, "--length", 20, "--bands", 4, "--exits", "0,2")
    ran = tiny_models.run(capsys, *arguments, "--out", out, "--json")
    found = json.loads(ran.out)
    assert (found["texts"], found["tokens"], found["exits"]) == (2, [20, 20], [0, 2])
    assert set(found["filters"]) == {"dark (folded)", "dark (raw)", "head", "middle", "random"}
    assert "--exits 0,2" in out.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder") / "model"
    page_images.model().module.save_pretrained(folder)
    page_images.model().processor.save_pretrained(folder)
    return folder


def test_explore_writes_a_page_of_images(
    capsys: pytest.CaptureFixture[str], encoder: Path, tmp_path: Path
) -> None:
    out, files = tmp_path / "page.html", page_images.pictures(tmp_path)
    arguments = ("explore", encoder, tmp_path, "--documents", 2, "--matrix", "embedding", "--bands", 4)
    ran = tiny_models.run(capsys, *arguments, "--exits", 1, "--out", out, "--json")
    assert ran.err == "" and ran.status == 0
    found = json.loads(ran.out)
    assert (found["images"], found["tokens"], found["exits"]) == (2, [28, 28], [1])
    assert set(found["filters"]) == {"dark (raw)", "head", "middle", "random"} and found["absent"] == {}
    page = out.read_text(encoding="utf-8")
    print(page[page.index('<th scope="row">Command') :][:400])
    assert f"spectral-sinks explore {encoder} {tmp_path} --json --documents 2 --bands 4" in page
    for more, said in (
        (("--text", "x"), "--text is for texts, and images are given"),
        (("--square",), "--square without --size"),
    ):
        ran = tiny_models.run(capsys, "explore", encoder, files[0], *more, "--out", out)
        assert ran.status == 2 and said in ran.err


def test_an_image_encoder_without_images_is_named(
    capsys: pytest.CaptureFixture[str], encoder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for command in ("explore", "report", "info"):
        ran = tiny_models.run(capsys, command, encoder)
        assert ran.status == 2 and ran.err.count("\n") == 1
        assert (
            "is an image encoder: load it by load_vision, or give it images, as in spectral-sinks" in ran.err
        )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("report", "--out", "page.pdf"), "let it end in .html"),
        (("report", "--out", "nowhere/page.html"), "nowhere is not a folder"),
        (("explore", "--out", "page.txt"), "let it end in .html"),
        (("explore", "--size", "20"), "--size is for images: name them behind the model"),
        (("explore", "--exits", "one"), "--exits 'one': give layers such as 0,11"),
        (("report", "--draws", "-1"), "--draws -1: give 0 to 10000"),
    ],
)
def test_bad_input_is_one_sentence_before_any_work(
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ss, "load", None)
    ran = tiny_models.run(capsys, *arguments)
    assert ran.status == 2 and ran.out == "" and said in ran.err and ran.err.count("\n") == 1


def test_no_verdict_is_said_with_its_reason(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path
) -> None:
    words = "text:" + tiny_models.text(69)
    ran = tiny_models.run(
        capsys,
        "report",
        checkpoint,
        "--text",
        words,
        "--length",
        70,
        "--bands",
        4,
        "--out",
        tmp_path / "p.html",
    )
    assert ran.status == 0 and "There is no verdict: a verdict needs intervals" in ran.out
