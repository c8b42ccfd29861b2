"""`spectral-sinks kv-cache`: what it prints is what the library returns."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support import tiny_models

import spectral_sinks as ss

Run = Callable[..., tiny_models.Ran]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], checkpoint: Path) -> Run:
    return lambda *options: tiny_models.run(capsys, "kv-cache", checkpoint, *options)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "text.jsonl"
    path.write_text("\n".join(json.dumps({"text": tiny_models.text(60, seed)}) for seed in range(4)))
    return path


def test_json_is_the_library_s(run: Run, checkpoint: Path, text: Path, tmp_path: Path) -> None:
    figure = tmp_path / "kv.png"
    done = run("--text", text, "--size", 20, "--first", 2, "--length", 100, "--figure", figure, "--json")
    assert (done.status, done.err) == (0, "") and done.out.count("\n") == 1
    record = json.loads(done.out)
    assert (record["texts"], record["tokens"], record["base"]) == (2, 100, "all entries")
    by = {row["cache"]: row for row in record["caches"]}
    assert list(by) == [
        "all entries",
        "first 2 + window",
        "window",
        "random 2 + window",
        "first 2 + attention",
        "first 2 + window, positions of the text",
        "int4",
    ]
    model = ss.load(checkpoint)
    ids = ss.nll.join_documents(ss.documents(text), model, length=100, count=2)
    settings = ss.nll.cache_settings(20, 100, first=2)
    assert record["settings"] == settings
    for name, own in settings.items():
        read = ss.nll.cached_nll(model, ids, ss.nll.KVCache(model, **own) if own else None)
        row = by[name]
        assert row["nll"] == pytest.approx(float(read.nll[:, 49:].double().mean()), abs=1e-5)
        assert row["early"] == pytest.approx(float(read.nll[:, :19].double().mean()), abs=1e-5)
        assert row["more"] == pytest.approx(row["nll"] - by["all entries"]["nll"], abs=1e-6)
        assert row["nbytes"] == read.nbytes / 2 and row["tokens_per_processor_second"] > 0
        assert (row["kind"] == "control") == (name in ("all entries", "window", "random 2 + window"))
    assert all(2 <= place < 20 for place in settings["random 2 + window"]["first"])
    ranges = [(row["start"], row["stop"]) for row in record["positions"] if row["cache"] == "window"]
    assert ranges == [(1, 32), (32, 64), (64, 100)]
    assert figure.stat().st_size > 20_000


def test_the_table_fits_a_terminal_and_names_the_controls(run: Run, text: Path) -> None:
    done = run("--text", text, "--size", 20, "--length", 100, "--texts", 1, "--caches", "none", "--draws", 2)
    assert done.status == 0, done.err
    assert done.out.count("(control)") == 4 and "tokens/s" in done.out and "NLL to 19" in done.out
    assert "int4" not in done.out and max(map(len, done.out.splitlines())) <= 80


@pytest.mark.filterwarnings("always")
def test_a_short_text_is_read_to_its_end_and_a_long_one_beyond_the_context_is_said(
    run: Run, text: Path
) -> None:
    done = run("--text", text, "--size", 20, "--length", 300, "--caches", "none", "--draws", 0, "--json")
    assert json.loads(done.out)["tokens"] == 241 and done.err.count("\n") == 2
    assert "the documents have 241 tokens, and 300 were asked for: all of them are read" in done.err
    assert "with this cache positions go up to 240" in done.err
    done = run("--text", text, "--size", 20, "--length", 61, "--texts", 9, "--caches", "none", "--json")
    assert json.loads(done.out)["texts"] == 4
    assert "give 4 texts of 61 tokens, and 9 were asked for" in done.err


@pytest.mark.filterwarnings("always")
def test_bad_input_is_one_sentence(run: Run, text: Path) -> None:
    for options, said in (
        (("--size", 4), "a cache of 4 entries cannot keep the first 4"),
        (("--caches", "int3"), "cache 'int3': choose from attention"),
        (("--length", 200), "would drop none of them"),
        (("--figure", "x.doc"), "x.doc"),
        (("--positions", "model"), "choose from"),
    ):
        done = run("--text", text, *options)
        assert done.status == 2 and said in done.err and done.err.count("\n") == 1, done.err
    done = run("--text", "text:w5 w6 w7")
    assert done.status == 2 and "error: the text has 4 tokens, and a cache of 256 entries" in done.err


def test_a_cache_that_drops_nothing_is_left_out_beyond_the_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, ids = tiny_models.model(), tiny_models.ids(2, 60)
    monkeypatch.setattr("spectral_sinks.measure.nll.cached_texts.free", lambda _: 10_000)
    with pytest.raises(ss.InputError, match=r"takes .* GB more for 60 tokens, and .* GB are free: bound it"):
        ss.nll.cached_nll(model, ids, block=10)
    with pytest.warns(ss.SpectralWarning, match="all entries is left out: a cache that drops nothing"):
        costs = ss.nll.cache_costs(model, ids, 20, others=[], block=10)
    assert costs.base == "first 4 + window" and "all entries" not in set(costs.table["cache"])
    assert (costs.table["more"].iloc[0], len(costs.table)) == (0, 3)
    assert "CacheCosts of" in repr(costs)
    assert torch.equal(ids, tiny_models.ids(2, 60))
