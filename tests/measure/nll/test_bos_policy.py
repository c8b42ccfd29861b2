"""The NLL with and without BOS, recomputed from logits in float64; the advice; the commands that give it."""

import json
import re
from pathlib import Path

import pytest
import torch
from support.gguf_files import small_llama, write_gguf

import spectral_sinks as ss
from spectral_sinks.cli import main
from spectral_sinks.measure.nll import BosComparison, compare_bos


@pytest.fixture(scope="module")
def model() -> ss.LanguageModel:
    return ss.load()


@torch.no_grad()
def reference(model: ss.LanguageModel, ids: list[int], predicted: int) -> float:
    logits = model.module(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return float(-logits[:-1].gather(1, torch.tensor(ids[1:])[:, None])[-predicted:].mean())


@pytest.mark.parametrize("bos", ["always", "never"])
def test_both_policies_against_float64(model: ss.LanguageModel, bos: str) -> None:
    texts = ss.documents(limit=6)
    windows = ss.cut(texts, model, length=40, bos=bos)
    found = compare_bos(model, windows)
    assert found is not None
    with_bos, without = [], []
    for text in texts[:4]:
        span = 39 if bos == "always" else 40
        ids = model.tokenizer(text, add_special_tokens=False)["input_ids"][:span]
        with_bos.append(reference(model, [model.bos, *ids], span - 1))
        without.append(reference(model, ids, span - 1))
    assert found.with_bos == pytest.approx(sum(with_bos) / 4, abs=1e-5)
    assert found.without_bos == pytest.approx(sum(without) / 4, abs=1e-5)
    assert found.opens_with_bos == (bos == "always")
    assert found.windows == 4


@pytest.mark.parametrize(
    ("opens", "values", "worse", "said"),
    [
        (False, (2.9, 5.0), 2.1, r"without BOS \(<bos>\), .* 5\.00 .* 2\.90 with BOS: use --bos always"),
        (True, (5.0, 2.9), 2.1, r"with BOS \(<bos>\), .* 5\.00 .* 2\.90 without BOS: use --bos never"),
        (False, (3.08, 3.01), -0.07, None),
        (True, (3.08, 3.01), 0.07, None),
    ],
)
def test_advice(opens: bool, values: tuple[float, float], worse: float, said: str | None) -> None:
    found = BosComparison("<bos>", opens, *values, 4)
    assert found.worse_by == pytest.approx(worse)
    if said is None:
        assert found.advice is None
    else:
        assert re.search(said, str(found.advice))


def test_nothing_is_compared_without_bos() -> None:
    module = small_llama()
    bare = ss.load(module)
    assert compare_bos(bare, ss.Windows.of_ids([[3, 4, 5]], bare)) is None
    model = ss.load()
    chat = ss.Windows.of_ids([[model.bos or 0, 4, 5]], model, roles=[["template", "user", "user"]])
    assert compare_bos(model, chat) is None and compare_bos(model, ss.Windows.of_ids(chat.rows, model))


@pytest.mark.filterwarnings("always")
def test_commands_warn_and_name_the_option(capsys: pytest.CaptureFixture[str]) -> None:
    """A model that was trained with BOS loses by its absence."""
    for command in (["nll", "--documents", "4", "--length", "64"], ["sinks", "--documents", "4"]):
        main([*command, ss.DEFAULT, "--bos", "never", "--json"])
        printed = capsys.readouterr()
        assert json.loads(printed.out)["bos_comparison"]["worse_by"] > 0.2
        assert re.search("warning: windows open without BOS .*: use --bos always", printed.err)
        main([*command, ss.DEFAULT, "--json"])
        printed = capsys.readouterr()
        assert json.loads(printed.out)["bos_comparison"]["worse_by"] < 0
        assert "BOS" not in printed.err


@pytest.mark.filterwarnings("always")
def test_info_compares_where_bos_is_there_and_not_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_gguf(tmp_path / "x.gguf", small_llama())
    main(["info", str(file), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["bos_comparison"]["opens_with_bos"] is False
    main(["info", ss.DEFAULT, "--json"])
    assert "bos_comparison" not in json.loads(capsys.readouterr().out)
    main(["info", ss.DEFAULT])
    assert "not compared, since texts open with it" in " ".join(capsys.readouterr().out.split())
    monkeypatch.setattr("spectral_sinks.cli.info.LARGEST", 1000)
    main(["info", str(file)])
    assert "GiB of weights: `nll` and `sinks` compare both" in capsys.readouterr().err
